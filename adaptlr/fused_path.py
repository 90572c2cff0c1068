"""The fused path: nothing but one kernel before the optimizer's own, and an exact skip."""

from __future__ import annotations

from adaptlr import _extension
from adaptlr.device_flags import FUSED
from adaptlr.tensor_lr_path import TensorLRPath


class FusedPath(TensorLRPath):
    """The optimizer's fused kernels read lr and skip flag from device memory: exact, no wait."""

    name = FUSED

    def bind(self) -> None:
        """Take lr over, for an optimizer that reads the skip flag as well."""
        super().bind()
        self.flagged = True

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

    def skip_suspended(self) -> None:
        """Let the coming step change nothing."""
        self.skip_flag.fill_(1.0)
        self._optimizer.__dict__["found_inf"] = self.skip_flag

    def stand_aside(self) -> None:
        """Let a step pass that is not ours: the flag is that of the last one."""
        if self._optimizer.__dict__.get("found_inf") is self.skip_flag:
            del self._optimizer.__dict__["found_inf"]
