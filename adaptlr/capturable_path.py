"""The capturable path: for optimizers that read lr on the device, but no skip flag."""

from __future__ import annotations

from adaptlr import _extension
from adaptlr.config import GuardMode
from adaptlr.device_flags import CAPTURABLE
from adaptlr.tensor_lr_path import TensorLRPath


class CapturablePath(TensorLRPath):
    """A skipped step has lr 0 and its gradients zeroed, by one more kernel.

    The parameters stay exactly as they are, weight decay included; moments decay by one tick.
    """

    name = CAPTURABLE

    def bind(self) -> None:
        """Take lr over; skips have to be prepared for unless nothing can order one."""
        super().bind()
        self.zeroes = bool(self._config.row["guard_mode"] == GuardMode.ACT)

    def step(self) -> int:
        """Launch the control step, and zero the gradients if it says skip.

        Returns:
            The notices so far; or NEW_GROUPS alone, and nothing was done.
        """
        if len(self._optimizer.param_groups) > len(self.lrs):
            return _extension.NEW_GROUPS
        notices = self._launch(None, -1.0)
        if self.zeroes:
            self.zero_gradients()
        return notices

    def skip_suspended(self) -> None:
        """Let the coming step change nothing."""
        self._block[_extension.LR_OFFSET : _extension.SKIP_OFFSET].zero_()
        self.skip_flag.fill_(1.0)
        self.zero_gradients()

    def stand_aside(self) -> None:
        """Nothing to do: a step that is not ours takes the lr of the last."""
