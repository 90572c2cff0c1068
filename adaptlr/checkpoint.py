"""The controller's state as one tensor that travels in the optimizer's own state dict.

The tensor holds the bytes of float64 numbers, as uint8: there are devices without float64, and
frameworks that cast the floating-point tensors of a state dict.

Layout: version, length of the State, number of groups, the length that the run was made with and
    the one it has now (0: open-ended),
the peaks that it was made with and those it has now, the State.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from adaptlr import _extension
from adaptlr.telemetry import Phase, Slot

KEY = "adaptlr"
VERSION = 4
STATE_FIELDS: tuple[str, ...] = tuple(_extension.state_dtype.names or ())
_STATE_NUMBERS = _extension.state_dtype.itemsize // 8
_HEADER = 5
_COUNTS = dict.fromkeys(("step", "samples", "norm_samples"), np.inf) | {
    "phase": max(Phase).value,
    "fine.next_difference": _extension.DIFFERENCES - 1,
    "coarse.next_difference": _extension.DIFFERENCES - 1,
    "aside_slot": Slot.SECOND.value,
    "good_slot": Slot.SECOND.value,
    "pending_slot": Slot.SECOND.value,
}


@dataclass(frozen=True)
class Checkpoint:
    """What is needed to go on as if the run had never stopped.

    Attributes:
        made_steps: ``total_steps`` as given to the constructor; 0: open-ended.
        total_steps: The same as it stands now, after any `extend`.
        made_peaks: Peak of every group as the constructor left it.
        peaks: The same as it stands now, after any `set_peak`.
        state: The State, a structured array of shape ``()``.
    """

    made_steps: int
    total_steps: int
    made_peaks: tuple[float, ...]
    peaks: tuple[float, ...]
    state: npt.NDArray[Any]


def pack(checkpoint: Checkpoint) -> torch.Tensor:
    """Lay a checkpoint out as a uint8 tensor on the CPU."""
    head = (
        VERSION,
        _STATE_NUMBERS,
        len(checkpoint.peaks),
        checkpoint.made_steps,
        checkpoint.total_steps,
    )
    state = np.frombuffer(checkpoint.state.tobytes(), dtype=np.float64)
    values = [*head, *checkpoint.made_peaks, *checkpoint.peaks, *state]
    return torch.from_numpy(np.array(values, dtype="<f8").view(np.uint8))


def unpack(tensor: object, group_count: int) -> Checkpoint:
    """Read what `pack` wrote.

    Raises:
        TypeError: if it is not a tensor.
        ValueError: if it was written by another version, for other groups, or is damaged.
    """
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"the checkpoint's {KEY!r} entry must be a tensor, got {type(tensor)}")
    if tensor.dtype is not torch.uint8 or tensor.numel() % 8:
        found = f"{tensor.numel()} of {tensor.dtype}"
        raise ValueError(f"the checkpoint's {KEY!r} entry must be bytes of float64, got {found}")
    values = tensor.detach().cpu().reshape(-1).numpy().view("<f8").tolist()
    if len(values) < _HEADER or values[0] != VERSION:
        found = f"{values[0]:g}" if values else "nothing"
        raise ValueError(f"the checkpoint's adaptlr version must be {VERSION}, got {found}")
    fields, groups, made_steps, total_steps = _counts(values[1:_HEADER])
    if groups != group_count:
        raise ValueError(
            f"the checkpoint must be of {group_count} parameter groups, as the optimizer has, "
            f"got {groups}"
        )
    expected = _HEADER + 2 * group_count + _STATE_NUMBERS
    if fields != _STATE_NUMBERS or len(values) != expected:
        raise ValueError(f"the checkpoint must hold {expected} numbers, got {len(values)}")
    peaks = values[_HEADER : _HEADER + 2 * group_count]
    if not np.isfinite(peaks).all():
        raise ValueError(f"the checkpoint's peaks must be finite, got {peaks}")
    state = np.array(values[-_STATE_NUMBERS:]).view(_extension.state_dtype).reshape(())
    check_state(state)
    return Checkpoint(
        made_steps,
        total_steps,
        tuple(peaks[:group_count]),
        tuple(peaks[group_count:]),
        state,
    )


def _counts(values: list[float]) -> list[int]:
    if not all(np.isfinite(value) and value == int(value) for value in values):
        raise ValueError(f"the checkpoint must begin with counts, got {values}")
    return [int(value) for value in values]


def check_state(state: npt.NDArray[Any]) -> None:
    """Raise ValueError if a State holds what no run could have brought about."""
    bad = [name for name in STATE_FIELDS if not np.isfinite(state[name]).all()]
    if bad:
        raise ValueError(f"the checkpoint's {bad[0]} must be finite, got {state[bad[0]]}")
    for name, most in _COUNTS.items():
        value = float(state[name])
        if not 0.0 <= value <= most or value != np.floor(value):
            at_most = "" if most == np.inf else f" of at most {most}"
            raise ValueError(f"the checkpoint's {name} must be a count{at_most}, got {value:g}")
    for name in ("factor", "cut_factor"):
        if state[name] < 0.0:
            raise ValueError(
                f"the checkpoint's {name} must be at least 0, got {float(state[name]):g}"
            )
