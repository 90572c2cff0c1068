"""The optimizer's first moments: zeroed where a cut has no snapshot to go back to.

They are the moving means of gradients, in which what led to the alarm lives on. The host zeroes
them as it skips the step; on the device the control step does, which has to know where they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from adaptlr.config import GuardMode, ResolvedConfig
from adaptlr.contents import local
from adaptlr.device_slots import is_dense
from adaptlr.host_path import HostPath

if TYPE_CHECKING:
    from adaptlr.attachment import Path

# The names that torch's optimizers give to them, and most others.
NAMES = ("exp_avg", "momentum_buffer", "exp_avg_diff")
_LOOKS = 3  # steps in which optimizers make their state


def first_moments(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    """Yield them; not those that are quantised, where a code of 0 is no zero."""
    for state in optimizer.state.values():
        for name in NAMES if isinstance(state, dict) else ():
            moment = state.get(name)
            if isinstance(moment, torch.Tensor) and moment.is_floating_point():
                moment = local(moment)
                if not hasattr(moment, "__tensor_flatten__"):
                    yield moment


class FirstMoments:
    """Zeroes the first moments of one optimizer, or tells the device where they are."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, config: ResolvedConfig, path: Path
    ) -> None:
        """Ask to be called before the first steps, if the device has to be told."""
        self._optimizer = optimizer
        self._path = path
        self._looks = 0
        self._told: list[int] = []
        self._acts = config.row["guard_mode"] == GuardMode.ACT
        if isinstance(path, HostPath):
            path.zero_moments = self.zero
        self.look()

    @torch.no_grad()
    def zero(self) -> None:
        """Zero them."""
        for moment in first_moments(self._optimizer):
            moment.zero_()

    def look(self) -> None:
        """Ask to be called before the coming steps, in which state may appear."""
        if self._acts and not isinstance(self._path, HostPath):
            self._looks = _LOOKS
            self._path.prepares = True

    def prepare(self) -> None:
        """Before a step, look where they are; not within a capture, where nothing can be told."""
        if self._looks and not self._path.is_capturing():
            self._looks -= 1
            self.tell()
            self._path.prepares = self._looks > 0

    def tell(self) -> None:
        """Tell the device where they are, if that is news. Does not wait for it."""
        path = self._path
        if isinstance(path, HostPath) or not self._acts:
            return
        moments = [
            moment
            for moment in first_moments(self._optimizer)
            if moment.device == path.device and is_dense(moment)
        ]
        addresses = [moment.data_ptr() for moment in moments]
        if addresses != self._told:
            path.tell_moments(moments)
            self._told = addresses
