"""The losses that wait for the next optimizer step, and how they turn out to be stale.

Under GradScaler an optimizer that is not fused never reaches ``step`` when gradients overflow, so
no hook tells that the losses of that step are void. The order of calls does: see
`Pending.observed_anew` and `Pending.gradients_cleared`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Pending:
    """Counts the losses since the last step. Every path builds on it, which saves calls.

    Attributes:
        count: Losses that wait.
        last_count: Losses that the last step used.
        mean: Whether the step's loss is their mean (else their sum).
        unobserved: Optimizer steps in a row that came without a loss.
        unheeded: Notices that the host has not been told of yet.
        cleared: Whether zero_grad was called after the first waiting loss.
        accumulates: Whether some step used several losses.
        suspended: Whether losses are ignored and every step is skipped.
        prepares: Whether there is something to do before the coming step.
        entries: Entries of the optimizer's state that snapshots know of; negative: none are made.
        observes_first: Whether this loop calls zero_grad between observe and backward.
    """

    # What the hot loops leave to Python; set by `Attachment`.
    step_slowly: Callable[..., Any]
    answer: Callable[[int], None]
    catch_up: Callable[[], None]  # set by `Snapshots`

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        """Start with nothing waiting."""
        self._optimizer = optimizer
        self.count = 0
        self.last_count = 0
        self.mean = True
        self.unobserved = 0
        self.unheeded = 0
        self.cleared = False
        self.observes_first = False
        self.accumulates = False
        self.suspended = False
        self.prepares = False
        self.entries = -1

    def taken(self) -> None:
        """Note that a step has used the waiting losses."""
        self.last_count = self.count
        self.accumulates |= self.count > 1
        self.count = self.unobserved = 0
        self.observes_first |= self.cleared
        self.cleared = False

    def dropped(self) -> None:
        """Note that the waiting losses are void."""
        self.count = 0
        self.cleared = False

    def observed_anew(self) -> bool:
        """Whether what waits is stale, now that another loss arrives.

        It is if every step had a single loss so far, and the gradients of the waiting one are gone.
        """
        return self.last_count == 1 and (self.cleared or not self.has_gradients())

    def gradients_cleared(self) -> bool:
        """Whether what waits is stale, now that the gradients are being cleared.

        It is if gradients are there to be lost, unless this loop observes first and clears
        afterwards.
        """
        if self.observes_first or not self.has_gradients():
            self.cleared = True
            return False
        return True

    def has_gradients(self) -> bool:
        """Whether any parameter holds a gradient."""
        groups = self._optimizer.param_groups
        return any(p.grad is not None for group in groups for p in group["params"])
