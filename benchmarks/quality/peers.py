"""The rules that adaptlr is compared with.

All of them get the same peak, the same linear warm-up, the same gradient clipping and the same
number of steps. They decide on the host: most read the loss in every step, all write the rate.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from contextlib import AbstractContextManager, nullcontext

import torch

from adaptlr.cli.demo_training import WARMUP, warmup_cosine
from benchmarks.quality.method import CAPTURED, Story, make_optimizer
from benchmarks.quality.stages import Eager, Gradients, Stage, clear_state


class Plain:
    """Warm-up and cosine decay whatever the loss says, independent of adaptlr; base of the rest."""

    reads_loss = False

    def __init__(self, optimizer: str, gradients: Gradients, peak: float, steps: int) -> None:
        self.gradients = gradients
        self.peak, self.steps = peak, steps
        self.warmup_steps = round(WARMUP * steps)
        self.story = Story()
        self.optimizer = self.make_optimizer(optimizer)

    def make_optimizer(self, name: str) -> torch.optim.Optimizer:
        """Return the optimizer of the run."""
        device = self.gradients.index.device
        self.is_captured = name in CAPTURED
        on_device = self.is_captured and device.type == "cuda"
        lr = torch.tensor(self.peak, device=device) if on_device else self.peak
        return make_optimizer(name, self.gradients.parameters, lr)

    def stages(self) -> list[Stage]:
        # Two, so that the host can decide between them.
        update = self.optimizer.step
        return [self.gradients, update if self.is_captured else Eager(update)]

    def suspended(self) -> AbstractContextManager:
        return nullcontext()

    def captured(self) -> None:
        """Undo what the iterations before the capture did to the optimizer."""
        clear_state(self.optimizer)

    def step(self, index: int, stages: list[Stage]) -> bool:
        lr = self.lr(index)
        self.story.lrs.append(lr)
        self._write(lr)
        compute_gradients, update = stages
        compute_gradients()
        if self.accepts(index):
            update()
        if self.reads_loss:
            self.read(index, self.gradients.loss.item())
        return True

    def _write(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def lr(self, index: int) -> float:
        """Return the rate of a step."""
        return self.peak * warmup_cosine(index, self.steps)

    def accepts(self, index: int) -> bool:
        """Whether the optimizer may take the step."""
        return True

    def read(self, index: int, loss: float) -> None:
        """Take note of the loss of a step."""

    def finish(self) -> Story:
        return self.story


class SkipSixSigma(Plain):
    """OLMo's rule: no step if loss or gradient norm is over 6 sigma above its last 128 values.

    As there, the rule starts with 64 values, and a value that was skipped enters the window.
    """

    window, least, sigmas = 128, 64, 6.0

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)
        self.seen = [deque(maxlen=self.window) for _ in range(2)]

    def accepts(self, index: int) -> bool:
        values = (self.gradients.loss.item(), self.gradients.norm.item())
        usual = [self._usual(*pair) for pair in zip(values, self.seen, strict=True)]
        for value, seen in zip(values, self.seen, strict=True):
            seen.append(value)
        if not all(usual):
            self.story.events.append((index, "skip", f"loss {values[0]:g}, norm {values[1]:g}"))
        return all(usual)

    def _usual(self, value: float, seen: deque[float]) -> bool:
        if len(seen) < self.least:
            return True
        if not all(map(math.isfinite, seen)):
            return False  # the mean is not finite, and no comparison with it is true
        return value - statistics.fmean(seen) <= self.sigmas * statistics.stdev(seen)


class Scheduled(Plain):
    """A rule that is told the loss of every step after the warm-up and sets the rate by itself.

    The scheduler drives an optimizer of its own, which trains nothing: a rate that lies on the
    device would be read, and replaced by a float, in every step.
    """

    reads_loss = True

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)
        self.driven = torch.optim.SGD([torch.zeros(1)], lr=self.peak)
        self.scheduler = self.make_scheduler()

    def make_scheduler(self) -> object:
        """Return something with ``step(loss)``, attached to `driven`."""
        raise NotImplementedError

    def lr(self, index: int) -> float:
        warmed = min((index + 1) / max(self.warmup_steps, 1), 1.0)
        return warmed * self.driven.param_groups[0]["lr"]

    def read(self, index: int, loss: float) -> None:
        if index < self.warmup_steps:
            return
        before = self.driven.param_groups[0]["lr"]
        self.advance(loss)
        after = self.driven.param_groups[0]["lr"]
        if after != before:
            kind = "cut" if after < before else "raise"
            self.story.events.append((index, kind, f"from {before:g} to {after:g}"))

    def advance(self, loss: float) -> None:
        """Hand a loss to the scheduler."""
        self.scheduler.step(loss)


class Plateau(Scheduled):
    """torch's ReduceLROnPlateau, in every step.

    Its default patience of 10 is meant for epochs; 5 % of the run is what is left of it in steps.
    """

    def make_scheduler(self) -> object:
        patience = max(10, self.steps // 20)
        return torch.optim.lr_scheduler.ReduceLROnPlateau(self.driven, patience=patience)


class Greedy(Scheduled):
    """GreedyLR of transformers, in every step.

    Its default bounds, 0.001 and 1, would raise most of these rates and lower none of them; here it
    may lower a rate a thousandfold and never goes above the peak.
    """

    highest = 1.0  # in peaks

    def make_scheduler(self) -> object:
        from transformers.optimization import GreedyLR

        least = self.peak / 1000
        most = self.highest * self.peak
        return GreedyLR(self.driven, min_lr=least, max_lr=most, eps=least / 1000)


class GreedyUp(Greedy):
    """The same, allowed to raise the rate tenfold."""

    highest = 10.0


class Dlrs(Scheduled):
    """DLRS: the rate follows the slope of the losses of an epoch.

    These runs are shorter than one epoch, or a few: a twentieth of the run takes its place.
    """

    def make_scheduler(self) -> object:
        from dlrs import DLRSScheduler

        self.losses: list[float] = []
        return DLRSScheduler(self.driven)

    def advance(self, loss: float) -> None:
        self.losses.append(loss)
        if len(self.losses) == self.steps // 20:
            self.scheduler.step(self.losses)
            self.losses = []
