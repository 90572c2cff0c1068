"""The late-float path: for optimizers on CUDA that cannot read lr on the device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy.typing as npt
import torch

from adaptlr import _extension
from adaptlr.config import GuardMode
from adaptlr.device_path import DevicePath

LATE_FLOAT_LAG = 2  # steps that the host may run ahead of the factor it applies


class LateFloatPath(DevicePath):
    """For optimizers that know lr only as a float: schedule on time, factor a little late.

    The host applies the newest factor that the device has reported and runs at most two steps ahead
    of it. A skipped step has its gradients zeroed on the device, which keeps NaN out; momentum
    still moves the parameters.
    """

    name = "float"

    def bind(self) -> None:
        """Set the rates of the coming step."""
        self._clock = int(self.state()["step"])
        self._factor = float(self.state()["factor"])
        self._skips = self._config.row["guard_mode"] == GuardMode.ACT
        self.adopt()

    def adopt(self) -> None:
        """Take in groups that were added."""
        self._written: list[Any] = [group["lr"] for group in self._optimizer.param_groups]
        self.preset()

    def step(self) -> int:
        """Set the rates from the newest factor, launch, zero the gradients if told to."""
        groups = self._optimizer.param_groups
        if len(groups) > len(self._written):
            return _extension.NEW_GROUPS
        self.core.wait(LATE_FLOAT_LAG)
        self._factor = self.core.factor
        overwritten = any(
            group["lr"] is not lr for group, lr in zip(groups, self._written, strict=True)
        )
        lr = self._set_lrs()
        notices = self._launch(None, lr)
        self.core.record_event(self._stream(self._index))
        self._clock += 1
        if self._skips:
            self._zero_if_skipped()
        return notices | (_extension.OVERWRITTEN if overwritten else 0)

    def stand_aside(self) -> None:
        """Nothing to do: a step that is not ours sees nothing of ours."""

    def preset(self) -> None:
        """Set the rates of the coming step."""
        self._set_lrs()

    def _set_lrs(self) -> float:
        multiplier = self._factor * self._config.multiplier(self._clock)
        lrs = [peak * multiplier for peak in self._config.peaks]
        for index, (group, lr) in enumerate(zip(self._optimizer.param_groups, lrs, strict=True)):
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
            self._written[index] = group["lr"]
        return max(lrs)

    def _zero_if_skipped(self) -> None:
        """Zero what lies in one piece by one kernel for all, the rest tensor by tensor."""
        addresses, sizes = [], []
        for gradient in self._gradients():
            if is_one_piece(gradient):
                addresses.append(gradient.data_ptr())
                sizes.append(gradient.numel() * gradient.element_size())
            else:
                gradient.masked_fill_(self.skip_flag != 0, 0)
        self.core.zero_if_skipped(self._stream(self._index), addresses, sizes)

    def _gradients(self) -> Iterator[torch.Tensor]:
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is not None:
                    yield gradient._values() if gradient.is_sparse else gradient

    def configure(self, state: npt.NDArray[Any] | None = None) -> None:
        """Hand the config, and a State if given, to the device; set the rates that follow."""
        super().configure(state)
        if state is not None:
            self._clock, self._factor = int(state["step"]), float(state["factor"])
        self.preset()

    def release(self) -> None:
        """Nothing to do: the rates are Python floats."""

    def saved_group(self, index: int) -> dict[str, Any]:
        """Return what a checkpoint shows of a group in place of the live values."""
        return {"lr": float(self._optimizer.param_groups[index]["lr"])}


def is_one_piece(tensor: torch.Tensor) -> bool:
    """Whether the elements fill the memory from the first to the last without gaps."""
    channels_last = torch.channels_last if tensor.dim() == 4 else torch.channels_last_3d
    return tensor.is_contiguous() or (
        tensor.dim() in (4, 5) and tensor.is_contiguous(memory_format=channels_last)
    )
