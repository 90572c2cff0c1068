"""The fused path: nothing but one kernel before the optimizer's own, and an exact skip."""

from __future__ import annotations

from typing import Any

import torch

from adaptlr import _extension
from adaptlr.device_path import DevicePath
from adaptlr.fused_flags import FusedFlags


class FusedPath(DevicePath):
    """The optimizer's fused kernels read lr and skip flag from device memory: exact, no wait."""

    name = "fused"

    def bind(self) -> None:
        """Make every group's lr a view into the block; switch the groups to the fused kernels."""
        offset = _extension.LR_OFFSET
        views = self._block[offset : offset + 4 * _extension.MAX_GROUPS].view(torch.float32)
        self._views = list(views.unbind())
        self._flags = FusedFlags(self._optimizer)
        self._bind_known()

    def adopt(self) -> None:
        """Take in groups that were added."""
        self._flags.switch_new()
        self._bind_known()

    def _bind_known(self) -> None:
        self.lrs = self._views[: len(self._flags.saved)]
        self.plain = True
        self._rebind()

    def _rebind(self) -> None:
        for group, lr in zip(self._optimizer.param_groups, self.lrs, strict=False):
            if group["lr"] is not lr:  # an added group still shows its own peak
                group["lr"] = lr

    def step(self) -> int:
        """Launch the control step and point the optimizer at the skip flag.

        The optimizer keeps pointing there: setting and deleting ``found_inf`` in every step would
        cost a hook. GradScaler replaces it before a step and deletes it after.

        Returns:
            The notices so far; or NEW_GROUPS alone, and nothing was done.
        """
        if len(self._optimizer.param_groups) > len(self.lrs):
            return _extension.NEW_GROUPS
        attributes = self._optimizer.__dict__
        flag = attributes.get("found_inf")
        notices = self._launch(None if flag is self.skip_flag else flag, -1.0)
        attributes["found_inf"] = self.skip_flag
        return notices

    def stand_aside(self) -> None:
        """Let a step pass that is not ours: the flag is that of the last one."""
        if self._optimizer.__dict__.get("found_inf") is self.skip_flag:
            del self._optimizer.__dict__["found_inf"]

    def preset(self) -> None:
        """Nothing to do: the optimizer's kernels read the rate when it is there."""

    def release(self) -> None:
        """Give the groups Python floats and the user's own flags back. Waits for the device."""
        for group, lr in zip(self._optimizer.param_groups, self.lrs, strict=False):
            group["lr"] = float(lr)
        self._flags.restore()
        self.stand_aside()

    def saved_group(self, index: int) -> dict[str, Any]:
        """Return what a checkpoint shows of a group in place of the live values. Waits."""
        return {"lr": float(self.lrs[index]), **self._flags.saved[index]}
