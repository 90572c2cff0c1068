"""The method that is measured: adaptlr as a user gets it."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import numpy as np

from adaptlr import AdaptiveLR, Guard, TrainingDiverged
from adaptlr.cli.demo_training import WARMUP
from adaptlr.telemetry import Flag
from benchmarks.quality.method import CAPTURED, Story, make_optimizer
from benchmarks.quality.stages import Eager, Gradients, Stage

# Versions with snapshots want the model for its buffers (BatchNorm); those without refuse it.
HAS_SNAPSHOTS = inspect.signature(AdaptiveLR).parameters["snapshot"].default == "auto"
CHECK_EVERY = 20  # steps; the check reads host memory alone


class Adaptlr:
    """`AdaptiveLR` with everything at its default.

    The whole step is one stage, unless the optimizer's updates are made eagerly.
    """

    settings: ClassVar[dict[str, Any]] = {}

    def __init__(self, optimizer: str, gradients: Gradients, peak: float, steps: int) -> None:
        self.gradients = gradients
        self.story = Story()
        self.is_captured = optimizer in CAPTURED
        optimizer = make_optimizer(optimizer, gradients.parameters, peak)
        options = {"model": gradients.model} if HAS_SNAPSHOTS else {}
        self.controller = AdaptiveLR(optimizer, steps, warmup=WARMUP, **options, **self.settings)

    def stages(self) -> list[Stage]:
        return [self._step] if self.is_captured else [self.gradients, Eager(self._update)]

    def _step(self) -> None:
        self.gradients()
        self._update()

    def _update(self) -> None:
        self.controller.step(self.gradients.loss, grad_norm=self.gradients.norm)

    def suspended(self) -> AbstractContextManager:
        return self.controller.suspended()

    def captured(self) -> None:
        """Nothing to do: suspended steps have left no trace."""

    def step(self, index: int, stages: list[Stage]) -> bool:
        """Take a step; False once the run has been given up."""
        try:
            for stage in stages:
                stage()
            if index % CHECK_EVERY == CHECK_EVERY - 1:
                self.controller.check()
        except TrainingDiverged as error:
            self.story.diverged = str(error)
        return self.story.diverged is None

    def finish(self) -> Story:
        self.controller.detach()  # waits for the device: the records are complete then
        try:
            self.controller.check()
        except TrainingDiverged as error:
            self.story.diverged = str(error)
        records = self.controller.history()
        self.story.lrs = records["lr"].tolist()
        self.story.found = _found(records)
        self.story.events = [(e.step, e.kind, e.reason) for e in self.controller.events()]
        return self.story


def _found(records: np.ndarray) -> dict[str, float] | None:
    """Return what the record says that ended a search; docs/algorithm.md names its fields."""
    for record in records[(records["flags"] & Flag.FOUND) != 0]:
        named = {"peak": "score", "estimate": "rise", "lowest_lr": "cusum"}
        return {name: float(f"{record[field]:.4g}") for name, field in named.items()}
    return None


class Auto(Adaptlr):
    """The same with `lr="auto"`: the rate that it is given says nothing."""

    settings: ClassVar[dict[str, Any]] = {"lr": "auto"}


class Raise(Adaptlr):
    """The same with a rate that may be raised."""

    settings: ClassVar[dict[str, Any]] = {"guard": Guard(max_factor=100.0)}


class RaiseAlone(Raise):
    """The same without what the first gradient suggests: the losses alone tell."""

    settings: ClassVar[dict[str, Any]] = {**Raise.settings, "check_lr": False}
