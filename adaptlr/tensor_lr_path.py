"""What the paths share whose optimizers read lr on the device, from one float32 buffer."""

from __future__ import annotations

from typing import Any

import torch

from adaptlr import _extension
from adaptlr.device_flags import DeviceFlags
from adaptlr.device_path import DevicePath


class TensorLRPath(DevicePath):
    """Every group's lr is a view into the block; the optimizer's flags are switched to ``name``."""

    def bind(self) -> None:
        """Make every group's lr a view into the block; switch the groups' flags."""
        offset = _extension.LR_OFFSET
        views = self._block[offset : offset + 4 * _extension.MAX_GROUPS].view(torch.float32)
        self._views = list(views.unbind())
        self._flags = DeviceFlags(self.name, self._optimizer)
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
