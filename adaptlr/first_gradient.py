"""What the first gradient tells the control step: the rate that it suggests for a loss of 1.

The step itself multiplies that by its loss, so nothing waits for a device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from adaptlr.config import ResolvedConfig
from adaptlr.one_gradient import gradient_sum, update_family

if TYPE_CHECKING:
    from adaptlr.attachment import Path


def has_taken_no_step(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer has no state, or what Adagrad has before its first step."""
    steps = (state.get("step") for state in optimizer.state.values() if state)
    return all(isinstance(step, torch.Tensor) and _is_zero(step) for step in steps)


def _is_zero(step: torch.Tensor) -> bool:
    # A count on a device would have to be waited for.
    return step.device.type == "cpu" and step.item() == 0.0


class FirstGradient:
    """Takes the estimate once, between the first backward and the first update.

    Only of an optimizer whose family is known and that has taken no step yet: a run that goes on
    from elsewhere is past the point that the estimate is about. In front of a CUDA graph it is
    taken in the first suspended step; within a capture, never.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        config: ResolvedConfig,
        path: Path,
        asked: bool,
    ) -> None:
        """Ask to be called before the first step, if something is to be told.

        That is not so of an optimizer that had state before ``path`` was chosen, which may have
        given it some.
        """
        self._optimizer = optimizer
        self._config = config
        self._path = path
        self._state, self._entries = optimizer.state, self._count_entries()
        self._family = update_family(optimizer) if asked else None
        if self._family is not None:
            path.prepares = True

    def take(self, step: int) -> None:
        """Tell the path, unless it was told before or there is nothing to tell.

        Args:
            step: Steps taken before this controller's first.
        """
        if self._family is None or self._path.is_capturing():
            return
        family, self._family = self._family, None
        is_same = self._optimizer.state is self._state and self._count_entries() == self._entries
        if step or not is_same:
            return
        peaks = self._config.peaks
        ratios = [peak / max(peaks) for peak in peaks]
        ratios += [1.0] * (len(self._optimizer.param_groups) - len(peaks))
        total = gradient_sum(self._optimizer, family, ratios)
        told = torch.nan_to_num(family.relative_change / total, 0.0, 0.0, 0.0)
        self._path.tell_estimate(told)

    def _count_entries(self) -> int:
        return sum(map(len, self._optimizer.state.values()))
