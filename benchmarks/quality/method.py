"""What every method of controlling the learning rate has in common."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

import torch

from benchmarks.quality.stages import Gradients, Stage

CAPTURED = ("adamw", "sgd")  # whose updates are graphs on CUDA; the others' are made eagerly


@dataclass
class Story:
    """What a method did.

    Attributes:
        lrs: Rate of every step.
        events: (step, kind, reason).
        diverged: Why the run was given up, if it was.
        found: What a search has told: ``peak``, the ``estimate`` of the first gradient, and the
            ``lowest_lr`` where the ramp was lowest, 0 where there was none.
    """

    lrs: Sequence[float] = field(default_factory=list)
    events: list[tuple[int, str, str]] = field(default_factory=list)
    diverged: str | None = None
    found: dict[str, float] | None = None

    def counts(self) -> dict[str, int]:
        """Return how often each kind of event came."""
        return dict(Counter(kind for _, kind, _ in self.events))


def make_optimizer(
    name: str, parameters: list[torch.nn.Parameter], lr: float | torch.Tensor
) -> torch.optim.Optimizer:
    """Make the optimizer; a tensor ``lr`` on a CUDA device makes it one that a graph can hold.

    Those that are not `CAPTURED` have their packages' defaults, and want a float.
    """
    on_device = isinstance(lr, torch.Tensor)
    if name not in CAPTURED:
        return further_optimizer(name)(parameters, lr=lr)
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=lr, momentum=0.9, fused=on_device or None)
    # Otherwise flags stay as the user of adaptlr would leave them: it switches them by itself.
    flags = {"fused": True, "capturable": True} if on_device else {}
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01, **flags)


def further_optimizer(name: str) -> Callable[..., torch.optim.Optimizer]:
    """Return the class of an optimizer that the tasks have no sweep for."""
    if name == "lion":
        from lion_pytorch import Lion

        return Lion
    classes = (torch.optim.RMSprop, torch.optim.NAdam, torch.optim.Adagrad)
    return next(cls for cls in classes if cls.__name__.lower() == name)


class Method(Protocol):
    """Controls one run: makes the optimizer, and takes the steps."""

    def __init__(self, optimizer: str, gradients: Gradients, peak: float, steps: int) -> None:
        """Attach to the parameters of ``gradients``."""

    def stages(self) -> list[Stage]:
        """Return the work of a step, in parts that can be captured one by one."""

    def suspended(self) -> AbstractContextManager:
        """Return the context of the iterations before a capture."""

    def captured(self) -> None:
        """Make the optimizer one that has taken no step, after a capture."""

    def step(self, index: int, stages: list[Stage]) -> bool:
        """Take a step by running the stages, or their graphs; False once the run is given up."""

    def finish(self) -> Story:
        """Return what was done, after the last step."""
