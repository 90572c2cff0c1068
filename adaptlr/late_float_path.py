"""The late-float path: for optimizers on CUDA that cannot read lr on the device."""

from __future__ import annotations

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
        self.zeroes = bool(self._config.row["guard_mode"] == GuardMode.ACT)
        self.adopt()

    def adopt(self) -> None:
        """Take in groups that were added."""
        groups = self._optimizer.param_groups
        self._one_device = len({p.device for group in groups for p in group["params"]}) == 1
        self._written: list[Any] = [group["lr"] for group in self._optimizer.param_groups]
        self.preset()

    def step(self) -> int:
        """Set the rates from the newest factor, launch, zero the gradients if told to."""
        groups = self._optimizer.param_groups
        if len(groups) > len(self._written):
            return _extension.NEW_GROUPS
        if self.is_capturing():
            raise RuntimeError(
                f"{type(self._optimizer).__name__} takes lr as a number, which a CUDA graph would "
                "freeze: leave optimizer.step() out of the capture, or take an optimizer that "
                "reads lr on the device (docs/optimizers.md)"
            )
        # The highest rate of a search or a raise must not be applied where that goes back to.
        climbs = self._clock <= self._config.search_steps + 1 or self._config.row["max_factor"] > 1
        self.core.wait(1 if climbs else LATE_FLOAT_LAG)
        self._factor = self.core.factor
        overwritten = any(
            group["lr"] is not lr for group, lr in zip(groups, self._written, strict=True)
        )
        lr = self._set_lrs(self._multiplier())
        notices = self._launch(None, lr)
        self.core.record_event(self._stream(self._index))
        self._clock += 1
        if self.zeroes:
            self._zero()
        return notices | (_extension.OVERWRITTEN if overwritten else 0)

    def _zero(self) -> None:
        if self._one_device:
            self.zero_gradients()
        else:
            groups = self._optimizer.param_groups
            parameters = (p for group in groups for p in group["params"])
            self.zero_slowly([p.grad for p in parameters if p.grad is not None])

    def skip_suspended(self) -> None:
        """Let the coming step change as little as its optimizer allows."""
        self._set_lrs(0.0)
        self.skip_flag.fill_(1.0)
        self._zero()

    def stand_aside(self) -> None:
        """Nothing to do: a step that is not ours sees nothing of ours."""

    def preset(self) -> None:
        """Set the rates of the coming step."""
        self._set_lrs(self._multiplier())

    def _multiplier(self) -> float:
        if self._clock == 0 and self._config.search_steps >= 0:
            return 0.0  # the typed rate means nothing, and a better one is not known yet
        return self._factor * self._config.multiplier(self._clock)

    def _set_lrs(self, multiplier: float) -> float:
        lrs = [peak * multiplier for peak in self._config.peaks]
        for index, (group, lr) in enumerate(zip(self._optimizer.param_groups, lrs, strict=True)):
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
            self._written[index] = group["lr"]
        return max(lrs)

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
