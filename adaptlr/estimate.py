"""`estimate_lr`: the learning rate that a few gradients at the start of a run suggest."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median, stdev
from typing import Any

import torch
from torch import nn

from adaptlr.config import require
from adaptlr.one_gradient import UpdateFamily, estimate, gradient_sum, update_family
from adaptlr.probe import Probe
from adaptlr.start import Start
from adaptlr.trial import Loss, Trial, lr_ratios

# Root mean square of log10(found / best rate) over six tasks and two optimizers, with the constants
# of each task taken from the other five (benchmarks/results/find_lr_nvidia-h200.md).
RULE_ERROR = 0.4


@dataclass(frozen=True)
class LREstimate:
    """What a few gradients say about the learning rate.

    Attributes:
        lr: Peak of the group with the largest rate, for a run with warm-up and decay; NaN if the
            gradients tell nothing.
        interval: Where the best rate lies in about 19 of 20 cases.
        family: What the optimizer makes of a gradient.
        estimates: From each gradient by itself.
        losses: The loss that each gradient is of.
    """

    lr: float
    interval: tuple[float, float]
    family: UpdateFamily
    estimates: list[float] = field(repr=False)
    losses: list[float] = field(repr=False)

    def __repr__(self) -> str:
        """Show the rate, how sure it is, and what it comes from."""
        low, high = self.interval
        count = f"{len(self.estimates)} gradient" + "s" * (len(self.estimates) > 1)
        return f"LREstimate({self.lr:.2g}, best rate between {low:.1g} and {high:.1g}; {count})"


def estimate_lr(
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Any] | None = None,
    *,
    model: nn.Module | None = None,
    gradients: int = 4,
    family: UpdateFamily | None = None,
    scaler: torch.amp.GradScaler | None = None,
    accumulate: int = 1,
    max_grad_norm: float | None = None,
) -> LREstimate:
    """Estimate a learning rate from a few gradients, as `one_gradient` explains.

    Call it before training, in the loop's own setting: autocast, clipping and accumulation belong
    to what is measured. For an optimizer that is not known, a step is taken and undone, to see
    what it makes of a gradient; weight decay is left out. Everything is afterwards what it was, bit
    for bit, except that ``batches`` has moved on. Waits for the device.

    Args:
        loss: Called with a batch, returns its loss, shape ``()``. Or a model: a batch that is a
            mapping becomes keyword arguments, and what it returns may have a ``loss``.
        optimizer: As it will be trained with, without a controller. Its present rates tell only
            the ratios of the groups.
        batches: Iterable of batches, begun anew when it ends; None: ``loss`` takes no arguments.
        model: Model whose buffers are to be put back, where ``loss`` is not the model itself.
        gradients: How many, each of its own batch, at least 1.
        family: Takes the place of what is found out about the optimizer.
        scaler: GradScaler, if training has one.
        accumulate: Micro-batches in a step.
        max_grad_norm: Clip gradients to this norm; None: do not.

    Returns:
        The median of the estimates, with an interval.

    Raises:
        TypeError: if an argument is of the wrong kind, or the optimizer cannot be put back.
        ValueError: for LBFGS, Rprop and Prodigy, or if there is no batch.
        RuntimeError: if the optimizer has a controller, or several processes train.
    """
    require(isinstance(gradients, int) and gradients >= 1, "gradients", "at least 1", gradients)
    trial = Trial(loss, optimizer, batches, model, scaler, accumulate, max_grad_norm)
    with Start(trial.optimizer, trial.model, scaler) as start:
        return estimate_from(trial, start, gradients, family)


def estimate_from(
    trial: Trial, start: Start, gradients: int, family: UpdateFamily | None = None
) -> LREstimate:
    """Do what `estimate_lr` does at a start that is kept already, and go back to it."""
    optimizer = trial.optimizer
    ratios = lr_ratios(optimizer)
    known = update_family(optimizer)
    family = family or known
    losses, sums = [], []
    for _ in range(gradients):
        losses.append(trial.gradient())
        if known is None or family is None:
            probe = Probe(optimizer, start, ratios)
            family = family or probe.family()
            sums.append(probe.fall(family))
        else:
            sums.append(gradient_sum(optimizer, family, ratios).item())
            trial.skip()
    start.rewind()
    assert family is not None  # there was at least one gradient
    no_scale = gradients > 1 and all(map(math.isfinite, losses)) and min(losses) <= 0.0
    noise = stdev(losses) if no_scale else None
    estimates = [estimate(*pair, family, noise) for pair in zip(losses, sums, strict=True)]
    return _summary(estimates, losses, family)


def interval_of(lr: float, logs: list[float], rule_error: float) -> tuple[float, float]:
    """Return two standard errors to each side: of the rule, and of the median of ``logs``."""
    sampling = 1.25 * stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else 0.0
    width = 10.0 ** (2.0 * math.hypot(rule_error, sampling))
    return lr / width, lr * width


def _summary(estimates: list[float], losses: list[float], family: UpdateFamily) -> LREstimate:
    logs = [math.log10(value) for value in estimates if math.isfinite(value)]
    lr = 10.0 ** median(logs) if logs else math.nan
    return LREstimate(lr, interval_of(lr, logs, RULE_ERROR), family, estimates, losses)
