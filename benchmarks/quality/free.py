"""Peers that bring an optimizer of their own and ask for no rate, or for one that hardly matters.

Each is its authors' package, set up as they advise, with the same clipped gradients and number of
steps as everyone. What they are asked to stand in for, AdamW or SGD, decides what they are compared
with, and which variant is taken where there are two.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from benchmarks.quality.data import draw
from benchmarks.quality.method import Story
from benchmarks.quality.peers import Plain
from benchmarks.quality.stages import Eager, Stage

ADAM_DECAY = 0.01  # weight decay, as AdamW has it
LEAST = 1e-6  # of the peak
STATISTICS_BATCHES = 50  # for BatchNorm, after the weights have been replaced


class OwnOptimizer(Plain):
    """Base of these peers: warm-up and cosine on a peak that multiplies their own rate.

    They see all weights as one vector. All of them treat every weight alike or look at sums over
    all weights, so that changes nothing but how often they wait for the device.
    """

    def make_optimizer(self, name: str) -> torch.optim.Optimizer:
        parameters = self.gradients.parameters
        self.vector = nn.Parameter(parameters_to_vector(parameters).detach().clone())
        vector_to_parameters(self.vector.detach(), parameters)  # views of it from now on
        return self.make(name)([self.vector], lr=self.peak)

    def make(self, name: str) -> Callable[..., torch.optim.Optimizer]:
        """Return what makes the optimizer that stands in for ``name``."""
        raise NotImplementedError

    def lr(self, index: int) -> float:
        # Not 0 in the last step, which dadaptation 3.2 ends with an error.
        return max(super().lr(index), LEAST * self.peak)

    def stages(self) -> list[Stage]:
        return [self.gradients, Eager(self.update)]

    def update(self) -> None:
        """Take a step on the gradients that are there."""
        gradients = (
            torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for parameter in self.gradients.parameters
        )
        self.vector.grad = parameters_to_vector(gradients)
        self.optimizer.step()


class Prodigy(OwnOptimizer):
    """Prodigy, with what its authors advise for runs with a warm-up."""

    def make(self, name: str) -> Callable[..., torch.optim.Optimizer]:
        from prodigyopt import Prodigy

        advised = {"safeguard_warmup": True, "use_bias_correction": True}
        return lambda weights, lr: Prodigy(weights, lr, weight_decay=ADAM_DECAY, **advised)


class DAdaptation(OwnOptimizer):
    """D-Adaptation's Adam or SGD."""

    def make(self, name: str) -> Callable[..., torch.optim.Optimizer]:
        from dadaptation import DAdaptAdam, DAdaptSGD

        if name == "sgd":
            return lambda weights, lr: DAdaptSGD(weights, lr, momentum=0.9)
        return lambda weights, lr: DAdaptAdam(weights, lr, weight_decay=ADAM_DECAY, decouple=True)


class Dog(OwnOptimizer):
    """DoG without a schedule and with its averages of the weights, as its authors ask for."""

    def make(self, name: str) -> Callable[..., torch.optim.Optimizer]:
        from dog import DoG, PolynomialDecayAverager

        self.averager = PolynomialDecayAverager(self.gradients.model)
        first = 1e-4 if has_statistics(self.gradients.model) else 1e-6
        return lambda weights, lr: DoG(weights, reps_rel=first, lr=lr)

    def lr(self, index: int) -> float:
        return self.peak

    def update(self) -> None:
        super().update()
        self.averager.step()

    def finish(self) -> Story:
        self.gradients.model.load_state_dict(self.averager.averaged_model.state_dict())
        return self.story


class ScheduleFree(OwnOptimizer):
    """Schedule-free AdamW or SGD: a fixed rate, its own warm-up, and averages of the weights."""

    def make(self, name: str) -> Callable[..., torch.optim.Optimizer]:
        from schedulefree import AdamWScheduleFree, SGDScheduleFree

        is_sgd = name == "sgd"
        cls, decay = (SGDScheduleFree, 0.0) if is_sgd else (AdamWScheduleFree, ADAM_DECAY)
        warmup = {"warmup_steps": self.warmup_steps}
        return lambda weights, lr: cls(weights, lr, weight_decay=decay, **warmup)

    def lr(self, index: int) -> float:
        return self.peak

    def update(self) -> None:
        self.optimizer.train()
        super().update()

    def finish(self) -> Story:
        self.optimizer.eval()
        if has_statistics(self.gradients.model):
            self._refresh_statistics()
        return self.story

    @torch.no_grad()
    def _refresh_statistics(self) -> None:
        data, batch = self.gradients.data, len(self.gradients.index)
        for index in draw(data, STATISTICS_BATCHES, batch, seed=0):
            data.loss(self.gradients.model, index)


def has_statistics(model: nn.Module) -> bool:
    """Whether a model has running statistics, which belong to its weights."""
    return any(isinstance(module, _BatchNorm) for module in model.modules())
