"""Short runs at a few rates, all from one start: the slow way to a learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import fmean, median, stdev

import numpy as np
import torch

from adaptlr.estimate import LREstimate
from adaptlr.range_result import CURVE, RangeTest
from adaptlr.start import Start
from adaptlr.trial import Trial, lr_ratios, set_lr

_WARMUP = 0.1
_LAST = 0.2  # share of the steps whose losses count

Runs = dict[float, list[list[float]]]


def run_grid(
    trial: Trial,
    start: Start,
    rates: list[float],
    replicas: int,
    steps: int,
    advance: Callable[[], object],
) -> Runs:
    """Return the losses of every run, by rate; a run ends with the first that is not finite.

    The runs of a replica see the same random numbers, and the same batches where these can be
    iterated anew.
    """
    runs: Runs = {rate: [] for rate in rates}
    for replica in range(replicas):
        for rate in rates:
            start.rewind()
            torch.manual_seed(replica)
            trial.restart()
            runs[rate].append(_run(trial, rate, steps, advance))
    return runs


def _run(trial: Trial, rate: float, steps: int, advance: Callable[[], object]) -> list[float]:
    ratios = lr_ratios(trial.optimizer)
    warmup = max(1, round(_WARMUP * steps))
    losses = []
    for step in range(steps):
        losses.append(trial.gradient())
        advance()
        if not math.isfinite(losses[-1]):
            break
        decayed = 0.5 * (1.0 + math.cos(math.pi * (step - warmup + 1) / (steps - warmup)))
        multiplier = (step + 1) / warmup if step < warmup else decayed
        set_lr(trial.optimizer, rate * multiplier, ratios)
        trial.step()
    return losses


def grid_result(runs: Runs, estimate: LREstimate) -> RangeTest:
    """Choose the rate whose runs end lowest; the interval holds all that are as good.

    As good is what ends within two standard errors of the best, and at least the neighbours.
    """
    rates = sorted(runs)
    ends = {rate: sorted(_end(losses) for losses in runs[rate]) for rate in rates}
    best = min(rates, key=lambda rate: median(ends[rate]))
    good = [
        index
        for index, rate in enumerate(rates)
        if median(ends[rate]) <= median(ends[best]) + 2.0 * _error(runs[best])
    ]
    lr = best if math.isfinite(median(ends[best])) else math.nan
    at = rates.index(best)
    low = rates[max(0, min([*good, at - 1]))]
    high = rates[min(len(rates) - 1, max([*good, at + 1]))]
    rows = [(rate, median(ends[rate]), ends[rate][0], ends[rate][-1]) for rate in rates]
    return RangeTest(lr, (low, high), np.array(rows, dtype=CURVE), estimate, [])


def _end(losses: list[float]) -> float:
    """Return the mean loss at the end of a run; infinite if it has blown up."""
    last = losses[-max(1, round(_LAST * len(losses))) :]
    return fmean(last) if math.isfinite(losses[-1]) else math.inf


def _error(runs: list[list[float]]) -> float:
    """Return the standard error of the mean end."""
    last = [losses[-max(2, round(_LAST * len(losses))) :] for losses in runs]
    errors = [stdev(losses) / math.sqrt(len(losses)) for losses in last if len(losses) > 1]
    return fmean(errors) / math.sqrt(len(errors)) if errors else 0.0
