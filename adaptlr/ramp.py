"""`Ramp`: the losses of one rising learning rate, when to stop it, and the rate that it suggests.

The level is an exponential mean of the losses, seeded with what the loss was before any update. The
test stops once a significant part of the progress is lost again. So it works for losses of any sign
and size, and a loss that is not finite is an end like any other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev

_BETA = 0.9  # of the level
_LEVEL_ERROR = math.sqrt((1.0 - _BETA) / (1.0 + _BETA))  # of an exponential mean, in noises
_SIGNIFICANT = 5.0  # standard errors
_NOISE_GAIN = 0.15
_NOISE_PER_DIFFERENCE = 0.886  # standard deviation over mean difference of neighbours, if normal
_LEAST_NOISE = 1e-3  # of the loss: a handful of losses may agree by chance
_OUTLIER = 3.0  # noises above the level, where a loss is cut off: one bad batch is no cliff
_LOST = 0.5  # share of the progress
_LEAST_STEPS = 8


def overshoot(steps_per_decade: float) -> float:
    """Return how far above the best peak of a run a ramp has its landmarks.

    Args:
        steps_per_decade: Of the ramp.

    Returns:
        Decades; fitted on six tasks.
    """
    return 1.15 - 0.9 * math.log10(steps_per_decade / 10.0)


class Baseline:
    """What the loss was before any update.

    Args:
        losses: Of several batches at the same weights, at least two, finite.

    Attributes:
        count: How many losses.
        level: Their mean.
        noise: Their standard deviation, or a thousandth of the level if that is more.
    """

    def __init__(self, losses: Sequence[float]) -> None:
        """Take the mean and standard deviation."""
        self.count = len(losses)
        self.level = fmean(losses)
        self.noise = max(stdev(losses), _LEAST_NOISE * abs(self.level), 1e-12)


class Ramp:
    """Takes the losses of a ramp one by one.

    Args:
        baseline: What the loss was before the ramp.

    Attributes:
        stopped: Why the ramp is over: ``"lost"``, half of the progress is gone again; ``"rose"``,
            the loss rose and never fell; ``"nonfinite"``; None while it goes on.
        levels: (log10 of the rate, level) wherever the level was at its lowest so far.
    """

    def __init__(self, baseline: Baseline) -> None:
        """Begin at the level of the baseline."""
        self._baseline = baseline
        self._level = baseline.level
        self._weight = 1.0 - _BETA**baseline.count
        self._noise = baseline.noise
        self._last: float | None = None
        self._steps = 0
        self.levels: list[tuple[float, float]] = []
        self.stopped: str | None = None

    @property
    def progress(self) -> float:
        """How far the level has fallen."""
        return self._baseline.level - self.levels[-1][1] if self.levels else 0.0

    @property
    def flat(self) -> bool:
        """Whether the level has never fallen by more than the noise explains."""
        error = math.sqrt(1.0 / self._baseline.count + _LEVEL_ERROR**2)
        return self.progress <= _SIGNIFICANT * error * self._baseline.noise

    def observe(self, lr: float, loss: float) -> bool:
        """Take the loss that the steps before ``lr`` have left; return whether to go on."""
        if not math.isfinite(loss):
            self.stopped = "nonfinite"
            return False
        self._steps += 1
        self._track(loss)
        if self._level < (self.levels[-1][1] if self.levels else math.inf):
            self.levels.append((math.log10(lr), self._level))
        self.stopped = self._why_stop()
        return self.stopped is None

    def _track(self, loss: float) -> None:
        # The noise now, not of the start: it grows tenfold where a classifier becomes confident.
        if self._last is not None:
            most = _OUTLIER * self._noise / _NOISE_PER_DIFFERENCE
            difference = _NOISE_PER_DIFFERENCE * min(abs(loss - self._last), most)
            self._noise += _NOISE_GAIN * (difference - self._noise)
        self._last = loss
        noise = max(self._baseline.noise, self._noise)
        loss = min(loss, self._level + _OUTLIER * noise)
        self._weight = _BETA * self._weight + 1.0 - _BETA
        self._level += (1.0 - _BETA) / self._weight * (loss - self._level)

    def _why_stop(self) -> str | None:
        noise = max(self._baseline.noise, self._noise)
        if not self.flat:
            lost = self._level - self.levels[-1][1]
            return "lost" if lost > max(_LOST * self.progress, 3.0 * noise * _LEVEL_ERROR) else None
        rise = self._level - self._baseline.level
        rose = rise > 8.0 * self._baseline.noise * _LEVEL_ERROR and self._steps > _LEAST_STEPS
        return "rose" if rose else None

    def suggestion(self, steps_per_decade: float) -> float:
        """Return the peak that the curve suggests, for a run with warm-up and decay.

        The landmarks are the rate of the lowest level, which a flat top blurs, and the rate at
        which 80 % of the progress was made, which slow progress pulls down. Both lie above the best
        peak of a run, because a ramp passes each rate in few steps: the more so, the faster it is.

        Args:
            steps_per_decade: Of the ramp.

        Returns:
            NaN if the curve is flat.
        """
        if self.flat:
            return math.nan
        seen = 0.75 * self.levels[-1][0] + 0.25 * self._rate_at(0.8)
        return float(10.0 ** (seen - overshoot(steps_per_decade)))

    def _rate_at(self, share: float) -> float:
        """Return log10 of the rate at which a share of the progress was made, interpolated."""
        target = self._baseline.level - share * self.progress
        rate, level = self.levels[0]
        for next_rate, next_level in self.levels:
            if next_level <= target:
                fall = level - next_level
                return rate + (next_rate - rate) * ((level - target) / fall if fall > 0.0 else 1.0)
            rate, level = next_rate, next_level
        return rate
