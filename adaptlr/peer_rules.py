"""What other learning-rate finders would read off a curve: for comparison, by the names they use.

Each rule takes rates and raw losses of equal length, as 1-d float64 arrays, and returns a rate.
They smooth with an exponential mean over about 50 losses, and expect curves from a harmless rate to
beyond the cliff.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[np.float64]

_BETA = 0.98
_DIVERGED = 4.0  # times the lowest smoothed loss: where these finders stop
_LEAST = 8  # points without which no rule has anything to say


def smoothed(losses: Array) -> Array:
    """Return the exponential mean without the bias of its start."""
    level, out = 0.0, np.empty_like(losses)
    for index, loss in enumerate(losses):
        level = _BETA * level + (1.0 - _BETA) * loss
        out[index] = level / (1.0 - _BETA ** (index + 1))
    return out


def until_diverged(lrs: Array, losses: Array) -> tuple[Array, Array]:
    """Cut a curve off where these finders stop; NaN, which most of them run past, ends it too."""
    level = smoothed(losses)
    over = ~np.isfinite(level) | (level > _DIVERGED * np.minimum.accumulate(level))
    over[0] = False
    end = int(over.argmax()) if over.any() else len(losses)
    return lrs[:end], losses[:end]


def _inner(
    lrs: Array, losses: Array, begin: int | None = None, end: int = 5
) -> tuple[Array, Array]:
    """Return rates and smoothed losses without the ends that a finder ignores.

    Of few points all are kept. By default as fastai: a tenth at the beginning, 5 at the end.
    """
    levels = smoothed(losses)
    first = len(lrs) // 10 if begin is None else begin
    if len(lrs) < first + end + _LEAST:
        return lrs, levels
    return lrs[first:-end], levels[first:-end]


def minimum(lrs: Array, losses: Array) -> float:
    """Return a tenth of the rate with the lowest loss (fastai)."""
    rates, levels = _inner(lrs, losses)
    return float(rates[levels.argmin()] / 10.0)


def steepest(lrs: Array, losses: Array) -> float:
    """Return the rate where the loss falls fastest in log(rate) (fastai, torch-lr-finder)."""
    rates, levels = _inner(lrs, losses)
    return float(rates[(np.diff(levels) / np.diff(np.log(rates))).argmin()])


def valley(lrs: Array, losses: Array) -> float:
    """Return the rate in the middle of the longest falling subsequence (fastai's default)."""
    rates, levels = _inner(lrs, losses)
    last, length = _longest_fall(levels)
    return float(rates[max(0, last - length + length // 2)])


def slide(lrs: Array, losses: Array, width: int = 15, flat: float = 0.005) -> float:
    """Return the rate ``width`` points before the slope, from the right, calms down (fastai)."""
    rates, levels = _inner(lrs, losses)
    slopes = np.gradient(levels)
    for right in range(len(rates) - 1, width - 1, -1):
        if abs(slopes[right] - slopes[right - width]) <= flat:
            return float(rates[min(right + 1, len(rates) - 1) - width])
    return float(rates[0])


def lightning(lrs: Array, losses: Array) -> float:
    """Return the rate where the loss falls fastest in the rate itself (Lightning)."""
    rates, levels = _inner(lrs, losses, 10, 1)
    return float(rates[np.gradient(levels, rates).argmin()])


RULES: dict[str, Callable[[Array, Array], float]] = {
    "minimum": minimum,
    "steepest": steepest,
    "valley": valley,
    "slide": slide,
    "lightning": lightning,
}


def suggestions(lrs: Array, losses: Array) -> dict[str, float]:
    """Return what every rule reads off a curve; NaN for all if it is too short."""
    lrs, losses = until_diverged(np.asarray(lrs, float), np.asarray(losses, float))
    if len(lrs) < _LEAST:
        return dict.fromkeys(RULES, float("nan"))
    return {name: rule(lrs, losses) for name, rule in RULES.items()}


def _longest_fall(values: Array) -> tuple[int, int]:
    """Return where the first of the longest strictly falling subsequences ends, and its length."""
    ends: list[float] = []  # negated last value of the best subsequence of each length
    last = 0
    for index, value in enumerate(values):
        place = bisect_left(ends, -value)
        last = index if place == len(ends) else last
        ends[place : place + 1] = [-value]
    return last, len(ends)
