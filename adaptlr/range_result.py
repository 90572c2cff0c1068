"""`RangeTest`: what a search before the run has found, and how it looks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from adaptlr import peer_rules
from adaptlr.estimate import RULE_ERROR, LREstimate, interval_of
from adaptlr.one_gradient import UpdateFamily
from adaptlr.ramp import overshoot

CURVE = np.dtype([("lr", float), ("loss", float), ("low", float), ("high", float)])


@dataclass(frozen=True)
class Curve:
    """One ramp.

    Attributes:
        lrs: Rates, rising.
        losses: Of the batch of each step, before the update.
        stopped: ``"lost"``, ``"rose"``, ``"nonfinite"``, or None: the last rate was reached.
        lr: What this curve suggests; NaN if it is flat.
    """

    lrs: list[float]
    losses: list[float]
    stopped: str | None
    lr: float


@dataclass(frozen=True, eq=False)
class RangeTest:
    """What `find_lr` has found.

    Attributes:
        lr: Peak of the group with the largest rate, for a run with warm-up and decay; NaN if no
            rate made the loss fall.
        interval: Where the best rate lies in about 19 of 20 cases.
        curve: Array with fields ``lr``, ``loss`` (median over the replicas), ``low`` and ``high``
            (quartiles), sorted by ``lr``.
        estimate: What the gradients at the start suggest by themselves.
        replicas: The ramps one by one; empty for a grid.
    """

    lr: float
    interval: tuple[float, float]
    curve: npt.NDArray[Any] = field(repr=False)
    estimate: LREstimate = field(repr=False)
    replicas: list[Curve] = field(repr=False)

    @property
    def flat(self) -> bool:
        """Whether no rate made the loss fall by more than its noise."""
        return math.isnan(self.lr)

    def __repr__(self) -> str:
        """Show the rate and how sure it is."""
        if self.flat:
            return "RangeTest(flat: no rate made the loss fall by more than its noise)"
        low, high = self.interval
        return f"RangeTest(lr={self.lr:.2g}, best rate between {low:.1g} and {high:.1g})"

    def peers(self) -> dict[str, float]:
        """Return what other finders' rules read off the first ramp, by their names.

        See `adaptlr.peer_rules`; empty for a grid. They are made for ramps of 100 steps over 8
        decades, and ours are shorter.
        """
        if not self.replicas:
            return {}
        first = self.replicas[0]
        return peer_rules.suggestions(np.array(first.lrs), np.array(first.losses))

    def plot(self, axes: Any = None) -> Any:
        """Draw the curve with the rate found; return the matplotlib axes.

        Args:
            axes: Where to draw; None: a new figure.

        Raises:
            ImportError: if matplotlib is missing.
        """
        if axes is None:
            axes = _new_axes()
        for replica in self.replicas:
            axes.plot(replica.lrs, replica.losses, color="0.75", linewidth=0.8)
        axes.plot(self.curve["lr"], self.curve["loss"], color="C0", label="loss, median")
        if self.flat:
            axes.set_title("flat: no rate made the loss fall by more than its noise")
        else:
            axes.axvspan(*self.interval, color="C2", alpha=0.12, linewidth=0, label="interval")
            axes.axvline(self.lr, color="C2", label=f"found: {self.lr:.2g}")
        axes.set(xscale="log", xlabel="learning rate", ylabel="loss")
        rates, losses = self.curve["lr"], self.curve["loss"][np.isfinite(self.curve["loss"])]
        axes.set_xlim(rates[0], rates[-1])
        room = 0.3 * (losses[0] - losses.min()) + 1e-12
        axes.set_ylim(losses.min() - room, losses[0] + 3.0 * room)  # the cliff would hide the rest
        axes.legend(frameon=False)
        return axes


def ramp_result(ramps: list[Curve], estimate: LREstimate, steps_per_decade: float) -> RangeTest:
    """Combine ramps and gradients: their errors are independent, so the mean is better than each.

    The gradients know nothing of the cliff; a ramp is noisy, and reads slow progress too low. With
    SGD its end tells what the first, most curved part of the way bears, not what comes after a
    warm-up: there it may raise what the gradients say, and lower it only to its landmarks.
    """
    logs = [math.log10(ramp.lr) for ramp in ramps if math.isfinite(ramp.lr)]
    lr = 10.0 ** median(logs) if 2 * len(logs) >= len(ramps) and logs else math.nan
    if math.isfinite(lr) and math.isfinite(estimate.lr):
        mean = math.sqrt(lr * estimate.lr)
        seen = lr * 10.0 ** overshoot(steps_per_decade)
        lr = max(mean, min(estimate.lr, seen)) if estimate.family is UpdateFamily.SGD else mean
    interval = interval_of(lr, logs, RULE_ERROR)
    return RangeTest(lr, interval, _median_curve(ramps), estimate, ramps)


def _median_curve(ramps: list[Curve]) -> npt.NDArray[Any]:
    """Return median and quartiles over the ramps that are finite at each rate."""
    by_rate: dict[str, list[tuple[float, float]]] = {}
    for ramp in ramps:
        for lr, loss in zip(ramp.lrs, ramp.losses, strict=True):
            if math.isfinite(loss):
                by_rate.setdefault(f"{lr:.6g}", []).append((lr, loss))
    rows = []
    for pairs in by_rate.values():
        low, middle, high = np.quantile([loss for _, loss in pairs], (0.25, 0.5, 0.75))
        rows.append((pairs[0][0], middle, low, high))
    return np.array(sorted(rows), dtype=CURVE)


def _new_axes() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot needs matplotlib: pip install 'adaptlr[plot]'") from error
    return Figure(figsize=(6.4, 4.0), layout="constrained").subplots()
