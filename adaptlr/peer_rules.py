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


def minimum(lrs: Array, losses: Array) -> float:
    """A tenth of the rate with the lowest loss (fastai)."""
    return float(lrs[smoothed(losses).argmin()] / 10.0)


def steepest(lrs: Array, losses: Array) -> float:
    """The rate where the loss falls fastest in log(rate) (fastai's steep, torch-lr-finder)."""
    slopes = np.diff(smoothed(losses)) / np.diff(np.log(lrs))
    return float(lrs[slopes.argmin()])


def valley(lrs: Array, losses: Array) -> float:
    """The middle of the longest falling subsequence of losses (fastai's default)."""
    falling = _longest_fall(smoothed(losses))
    first, last = falling[0], falling[-1]
    return float(lrs[first + (last - first) // 2])


def slide(lrs: Array, losses: Array, width: int = 15, flat: float = 0.005) -> float:
    """The rate ``width`` points before the slope calms down, coming from the right (fastai)."""
    slopes = np.gradient(smoothed(losses))
    for right in range(len(lrs) - 1, width - 1, -1):
        if abs(slopes[right] - slopes[right - width]) <= flat:
            return float(lrs[right - width])
    return float(lrs[0])


def lightning(lrs: Array, losses: Array) -> float:
    """The rate where the loss falls fastest in the rate itself (Lightning)."""
    skipped = slice(10, -1) if len(lrs) > 20 else slice(None)
    slopes = np.gradient(smoothed(losses)[skipped], lrs[skipped])
    return float(lrs[skipped][slopes.argmin()])


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
    enough = len(lrs) >= _LEAST
    return {name: rule(lrs, losses) if enough else float("nan") for name, rule in RULES.items()}


def _longest_fall(values: Array) -> list[int]:
    """Return the indices of the longest strictly falling subsequence."""
    ends: list[float] = []  # negated last value of the best subsequence of each length
    last: list[int] = []
    before = [-1] * len(values)
    for index, value in enumerate(values):
        place = bisect_left(ends, -value)
        before[index] = last[place - 1] if place else -1
        ends[place : place + 1] = [-value]
        last[place : place + 1] = [index]
    index, path = last[-1], []
    while index >= 0:
        path.append(index)
        index = before[index]
    return path[::-1]
