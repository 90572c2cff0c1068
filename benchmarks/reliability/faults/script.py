"""What will happen in a run, step by step; a fault is a change of that script."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from benchmarks.reliability.faults.tasks import Course


class Actor(Protocol):
    """What an action can reach, between two steps.

    Attributes:
        model: The model that is trained.
        optimizer: As the user made it.
        peak: The learning rate of the run.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    peak: float

    def set_peak(self, lr: float) -> None: ...


Action = Callable[[Actor], None]


@dataclass
class Script:
    """Everything that reaches a run from outside. Of the same shapes always, so graphs can run it.

    Attributes:
        course: The batches, and the evaluation.
        loss_scale: What the loss of each step is multiplied by, shape ``(steps,)``.
        gradient_scale: The same for its gradient alone, which the loss does not show.
        actions: What is done before which step.
    """

    course: Course
    loss_scale: Tensor
    gradient_scale: Tensor
    actions: dict[int, list[Action]] = field(default_factory=lambda: defaultdict(list))


def healthy(course: Course) -> Script:
    """Return the script of a run without a fault; ``course`` is not written into."""
    ones = torch.ones(len(course.labels))
    return Script(course.copy(), ones, ones.clone())
