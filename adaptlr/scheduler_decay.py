"""A scheduler of torch or transformers as the schedule of a run: what it would do, written down."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from adaptlr.config import check_total_steps, require


class SchedulerDecay:
    """The multipliers of a scheduler, by step; found with a copy, so the scheduler stays as it is.

    Args:
        scheduler: One that has not been stepped and follows the step alone.
        total_steps: Length of the run.

    Attributes:
        highest: What the peaks are raised by, at least 1: a scheduler such as OneCycleLR starts
            from a fraction of its own peak. Multipliers are shares of the raised peaks.

    Raises:
        TypeError: if the scheduler reacts to a metric.
        ValueError: if it has been stepped, or treats parameter groups differently.
    """

    def __init__(self, scheduler: LRScheduler, total_steps: int | None) -> None:
        """Copy the scheduler, and run the copy to the end."""
        if isinstance(scheduler, ReduceLROnPlateau):
            raise TypeError(
                f"decay must follow the step alone, got {type(scheduler).__name__}, which reacts "
                "to a metric: name a decay such as 'constant', and let the guard watch the loss"
            )
        parts = getattr(scheduler, "_schedulers", [scheduler])  # a ChainedScheduler has no clock
        stepped = parts[0].last_epoch
        require(stepped == 0, "decay", "a scheduler that has not been stepped", f"step {stepped}")
        check_total_steps(total_steps)
        if total_steps is None:
            raise ValueError("total_steps must be an int for a decay that is a scheduler")
        self._name = type(scheduler).__name__
        optimizer = scheduler.optimizer
        groups = zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True)
        self._groups = [_bare(group) | {"lr": float(lr)} for group, lr in groups]
        stand_in = SimpleNamespace(param_groups=self._groups, step=_step, _opt_called=True)
        self._copy = copy.deepcopy(scheduler, {id(optimizer): stand_in})
        self._multipliers = [self._multiplier()]
        self.highest = max(1.0, *(self._follow(step) for step in range(total_steps)))

    def __call__(self, step: int) -> float:
        """Return the share of the peaks at ``step``."""
        return self._follow(step) / self.highest

    def _follow(self, step: int) -> float:
        while len(self._multipliers) <= step:
            self._copy.step()
            self._multipliers.append(self._multiplier())
        return self._multipliers[step]

    def _multiplier(self) -> float:
        pairs = [(float(group["lr"]), float(group["initial_lr"])) for group in self._groups]
        multipliers = [lr / initial for lr, initial in pairs if initial > 0.0]
        if not multipliers or max(multipliers) - min(multipliers) > 1e-9 * max(multipliers):
            raise ValueError(
                f"decay must treat all parameter groups alike, got {self._name} with the "
                f"multipliers {multipliers}; give the groups different lr instead"
            )
        return multipliers[0]


def _bare(group: dict[str, Any]) -> dict[str, Any]:
    """Return a group without parameters; its numbers are the copy's own."""
    kept = {key: value for key, value in group.items() if key != "params"}
    return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in kept.items()}


def _step() -> None:
    """Stand in for ``optimizer.step``, which a scheduler looks at but does not call."""


_step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]  # where torch's schedulers look
