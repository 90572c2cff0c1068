"""Snapshots as a checkpoint holds them: plain dicts, lists, numbers and tensors on the CPU.

Layout: ``version``; ``states``, the bytes of the States beside the snapshots, as uint8; ``slots``,
for each slot that the run could go back to the ``step`` it is of and `Contents.numbered` values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch

from adaptlr import _extension
from adaptlr.checkpoint import check_state
from adaptlr.contents import Contents, copied, matched, merged, opened
from adaptlr.device_slots import DeviceSlots
from adaptlr.host_slots import HostSlots

SNAPSHOTS_KEY = "adaptlr_snapshots"
VERSION = 1
START: int = _extension.START_SLOT
_SLOTS = range(START, START + _extension.SLOTS)


@dataclass(frozen=True)
class SavedSlots:
    """What is needed, beside the controller's state, to go on in an experiment.

    Attributes:
        states: The States beside all slots but the start's, shape ``(SAVED_STATES,)``.
        slots: What every slot holds; see the module.
    """

    states: npt.NDArray[Any]
    slots: dict[int, dict[str, Any]]

    @property
    def count(self) -> int:
        """Slots that a run must have to take these in."""
        return 1 if set(self.slots) == {START} else len(_SLOTS)


def slots_of(state: npt.NDArray[Any]) -> set[int]:
    """Return the slots that a run in this State could go back to."""
    named = {int(state[name]) for name in ("aside_slot", "good_slot", "pending_slot")}
    return {START} | named - {0}


def read_slot(
    slot: int, contents: Contents, host: HostSlots, device: DeviceSlots | None
) -> dict[str, Any]:
    """Return what a slot holds, put together from what the host and a kernel have copied.

    Nothing may be under way on the device.
    """
    values = host.read(slot)
    if device is None:
        return values
    live = contents.live()
    whole = merged(values, copied(live, None, lambda tensor, _: device.read(tensor, slot)))
    return cast(dict[str, Any], whole)


def write_slot(
    slot: int,
    values: dict[str, Any],
    contents: Contents,
    host: HostSlots,
    device: DeviceSlots | None,
) -> None:
    """Fill a slot with what `read_slot` has returned. Nothing may be under way on the device."""
    host.write(slot, values)
    if device is not None:
        for tensor, live in matched(values, contents.live()):
            device.write(live, slot, tensor)


def pack_slots(saved: SavedSlots) -> dict[str, Any]:
    """Lay snapshots out as torch saves them, also for loading with ``weights_only=True``."""
    states = torch.from_numpy(np.frombuffer(saved.states.tobytes(), dtype=np.uint8).copy())
    return {"version": VERSION, "states": states, "slots": dict(saved.slots)}


def unpack_slots(
    packed: object,
    state: npt.NDArray[Any],
    contents: Contents,
    coming: dict[Any, Any] | None,
    is_complete: bool,
) -> SavedSlots:
    """Read what `pack_slots` wrote, if it can be taken in whole.

    Args:
        packed: What the checkpoint holds.
        state: The State beside it.
        contents: Where the snapshots are to be put back.
        coming: The optimizer's state that is about to be loaded; None: it stays as it is.
        is_complete: Whether the optimizer must have every tensor that the snapshots hold.

    Raises:
        TypeError: if it is no dict.
        ValueError: if it was written by another version, for other parameters, or is damaged.
    """
    if not isinstance(packed, dict):
        raise TypeError(f"the checkpoint's {SNAPSHOTS_KEY!r} entry must be a dict, got {packed!r}")
    _require(packed.get("version") == VERSION, f"of version {VERSION}", packed.get("version"))
    slots, expected = packed.get("slots"), slots_of(state)
    _require(
        isinstance(slots, dict) and expected <= set(slots) <= set(_SLOTS),
        f"of the slots {sorted(expected)}",
        sorted(slots) if isinstance(slots, dict) else slots,
    )
    assert isinstance(slots, dict)
    live = contents.live()
    if coming is not None:
        live["state"] = copied(coming, None, lambda tensor, _: opened(tensor))
    for values in slots.values():
        _check_form(values)
        _check_weights(values["weights"], live["weights"])
        _check_numbers(values["state"], len(contents.parameters()))
        _check_memory(values, live, is_complete)
    states = _unpack_states(packed.get("states"))
    for slot in expected - {START}:
        check_state(states[slot - START - 1])
    return SavedSlots(states, slots)


def _require(condition: bool, accepted: str, value: object) -> None:
    if not condition:
        raise ValueError(f"the checkpoint's snapshots must be {accepted}, got {value}")


def _unpack_states(packed: object) -> npt.NDArray[Any]:
    size = _extension.SAVED_STATES * _extension.state_dtype.itemsize
    fits = isinstance(packed, torch.Tensor) and packed.dtype is torch.uint8
    found = f"{packed.numel()} of {packed.dtype}" if isinstance(packed, torch.Tensor) else packed
    good = fits and isinstance(packed, torch.Tensor) and packed.numel() == size
    _require(good, f"beside {size} bytes of states", found)
    assert isinstance(packed, torch.Tensor)
    return packed.detach().cpu().reshape(-1).numpy().copy().view(_extension.state_dtype)


def _check_form(values: object) -> None:
    """Check what a slot consists of, but not yet what is in it."""
    kinds = {"weights": dict, "state": dict, "groups": list}
    good = isinstance(values, dict) and all(
        isinstance(values.get(name), kind) for name, kind in kinds.items()
    )
    _require(good, f"dicts of {', '.join(kinds)}", type(values).__name__)
    assert isinstance(values, dict)
    step = values.get("step")
    _require(step is None or isinstance(step, int), "of a step that is an int", step)


def _check_weights(saved: dict[Any, Any], live: dict[Any, torch.Tensor]) -> None:
    """Compare trainable parameters, by number, and buffers, by name."""
    strange = sorted(map(str, saved.keys() ^ live.keys()))
    if strange:
        raise ValueError(
            "the checkpoint's snapshots must be of the parameters that are trained now, and of "
            f"the buffers of model=, got a difference in {', '.join(strange[:5])}"
        )
    for key, tensor in live.items():
        found = saved[key]
        fits = isinstance(found, torch.Tensor) and _form(found) == _form(tensor)
        name = f"parameter {key}" if isinstance(key, int) else f"buffer {key!r}"
        _require(fits, f"{_form(tensor)} in {name}", _form(found))


def _check_numbers(state: dict[Any, Any], count: int) -> None:
    strange = [key for key in state if isinstance(key, int) and not 0 <= key < count]
    _require(not strange, f"of {count} parameters", f"state of number {strange}")


def _check_memory(saved: dict[str, Any], live: dict[str, Any], is_complete: bool) -> None:
    """Compare what the optimizer keeps; it may keep more now than it did then, or less."""
    groups = len(saved["groups"]), len(live["groups"])
    _require(groups[0] == groups[1], f"of {groups[1]} parameter groups", groups[0])
    for name in ("state", "groups"):
        for tensor, present in matched(saved[name], live[name]):
            if isinstance(present, torch.Tensor):
                fits = tensor.shape == present.shape
                _require(
                    fits, f"of shape {tuple(present.shape)} in the {name}", tuple(tensor.shape)
                )
            elif is_complete:
                raise ValueError(
                    "the checkpoint's snapshots hold optimizer state that is not there yet: load "
                    "the optimizer's state before the controller's"
                )


def _form(value: object) -> str:
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
