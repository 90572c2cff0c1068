"""The collapse charts of :mod:`adaptlr.reference`: was there progress since the start, is it lost?

They are alive from the third loss, where the charts of :mod:`adaptlr.reference_detector` still
learn what is normal. LOST and ABOVE are hard alarms; NO_PROGRESS and STALL only ask for an
experiment.
"""

from __future__ import annotations

import math
import statistics
from typing import NamedTuple

from adaptlr.reference_state import DIFFERENCES, Config, Flag, Progress, State

FAST_GAIN, SLOW_GAIN = 1 / 8, 1 / 32
CLEANEST_GAIN = 1 / 64
AGREEMENT_GAIN, AGREEMENT_PRIOR = 1 / 256, 48
TREND_GAIN, TREND_CLIP = 1 / 8, 3.5
# 1.4826 / sqrt(2): from a median of |differences| to the deviation of one loss.
MEDIAN_SCALE = 1.0484
FAST_LOST, SLOW_LOST, ABOVE = 10.0, 8.0, 8.0  # standard errors
LOST_SHARE = 0.3  # of the progress made
NO_PROGRESS, STALL = 1.0, 2.0  # standard errors
POWER = 0.6  # of the first loss: progress that would show in three standard errors
OUTLIER_NOISES, OUTLIER_RUN = 6.0, 5  # so many losses in a row so far up are a jump
SOFT = Flag.NO_PROGRESS | Flag.STALL


class Reading(NamedTuple):
    """What the charts found, in standard errors."""

    flags: int = 0
    fast_rise: float = 0.0  # of the fast level above its lowest
    gain: float = 0.0  # of the fast level below the first loss
    rise: float = 0.0  # the largest of the hard charts
    level: float = 0.0  # loss
    noise: float = 0.0  # loss
    outlier: bool = False  # the loss lies far above the fast level


class Window(NamedTuple):
    """When the soft charts may speak, in samples since the start."""

    first: float
    first_weak: float
    last: float
    stall: float


def watch_progress(config: Config, loss: float, log_lr: float, state: State) -> Reading:
    """Feed every loss to the fine charts and, where blocks are longer, their means to the coarse.

    The hard charts read every loss, the soft ones the means.
    """
    window = soft_window(config, state)
    fine = track(loss, log_lr, config, window, state.fine, state.fine_differences)
    if config.block_steps <= 1:
        return fine
    hard = fine.flags & ~SOFT
    state.block_sum += loss
    state.block_count += 1
    if state.block_count < config.block_steps:
        return fine._replace(flags=hard)
    mean = state.block_sum / config.block_steps
    state.block_sum = state.block_count = 0.0
    coarse = track(mean, log_lr, config, window, state.coarse, state.coarse_differences)
    if hard:
        return fine._replace(flags=hard, gain=coarse.gain)
    return coarse._replace(
        flags=coarse.flags & SOFT, fast_rise=fine.fast_rise, outlier=fine.outlier
    )


def coarse_progress(config: Config, state: State) -> Progress:
    """Return what the soft charts go by."""
    return state.coarse if config.block_steps > 1 else state.fine


def soft_window(config: Config, state: State) -> Window:
    """Let the soft charts speak in [W' + 2, 4 W'], after a restart from W' / 2 + 2."""
    warmup = config.chart_steps / config.block_steps
    first = max(10.0, warmup / 2) if state.restarted else warmup
    return Window(first + 2, 1.5 * warmup, 4 * warmup, max(20.0, warmup / 3))


def track(
    sample: float,
    log_lr: float,
    config: Config,
    window: Window,
    progress: Progress,
    differences: list[float],
) -> Reading:
    """Take one finite sample in and evaluate all four charts."""
    progress.count = min(progress.count + 1, 1e6)
    if progress.count == 1:
        begin(sample, log_lr, progress)
        return Reading()
    change = sample - progress.previous_loss
    newest = remember(abs(change), progress, differences)
    progress.previous_loss = sample
    track_noise(newest, progress)
    track_correlation(change, progress)
    track_levels(sample, log_lr, newest, progress)
    track_lowest(progress)
    flags = lost_charts(config, progress) | above_chart(config, progress)
    return Reading(
        flags | soft_charts(window, progress),
        rise(progress),
        gain(progress),
        max(rise(progress), slow_rise(progress), height(config, progress)),
        progress.fast_level,
        progress.noise,
        is_outlier(sample, progress),
    )


def begin(loss: float, log_lr: float, progress: Progress) -> None:
    """Take the first loss as the only clean sample of the start."""
    for name in ("first_loss", "previous_loss", "fast_level", "slow_level"):
        setattr(progress, name, loss)
    progress.highest_level = progress.lowest_level = progress.lowest_slow_level = loss
    progress.log_lr = progress.lowest_log_lr = log_lr
    progress.lowest_variance = progress.lowest_slow_variance = progress.variance_factor = 1.0
    progress.difference_agreement = -1 / 3  # of independent noise: sin(-pi/6) = -1/2


def remember(size: float, progress: Progress, differences: list[float]) -> list[float]:
    """Write a difference over the oldest one; return those there are, newest first."""
    at = int(progress.next_difference)
    differences[at] = size
    progress.next_difference = float((at + 1) % DIFFERENCES)
    known = min(int(progress.count) - 1, DIFFERENCES)
    return [differences[at - age] for age in range(known)]


# What is tracked.


def track_noise(newest: list[float], progress: Progress) -> None:
    """Estimate the noise of a sample, and the cleanest of late, from the differences."""
    # A median of few can be tiny by luck.
    typical = statistics.median(newest) if len(newest) >= 8 else max(newest) / 1.5
    span = progress.highest_level - progress.lowest_level
    floor = max(1e-3 * span, 5e-7 * abs(progress.slow_level), 1e-30)
    progress.noise = max(MEDIAN_SCALE * typical, floor)
    if progress.count <= 3 or progress.noise < progress.cleanest_noise:
        progress.cleanest_noise = progress.noise
    else:
        progress.cleanest_noise += CLEANEST_GAIN * (progress.noise - progress.cleanest_noise)


def track_correlation(change: float, progress: Progress) -> None:
    """Derive tau from how often successive changes, less their trend, agree in sign."""
    residual = change - progress.difference_trend
    if progress.count > 2:
        same = (residual > 0) == (progress.difference_residual > 0)
        weight = max(AGREEMENT_GAIN, 1 / (progress.count + AGREEMENT_PRIOR))
        progress.difference_agreement += weight * (
            (1 if same else -1) - progress.difference_agreement
        )
    progress.difference_residual = residual
    progress.difference_trend += TREND_GAIN * clipped(residual, TREND_CLIP * progress.noise)
    lag_one = math.sin(math.pi / 2 * progress.difference_agreement)
    correlation = min(max(1 + 2 * lag_one, 0.0), 0.8)
    progress.variance_factor = (1 + correlation) / (1 - correlation) ** 2


def clipped(value: float, limit: float) -> float:
    """Return a value within the limit on both sides of 0."""
    return min(max(value, -limit), limit)


def track_levels(sample: float, log_lr: float, newest: list[float], progress: Progress) -> None:
    """Move the levels by bounded steps, and the log of the LR with the weights of the fast one."""
    noise = max(progress.noise, MEDIAN_SCALE * statistics.median(newest[:6]))
    up = 3 * min(noise, 1.5 * progress.noise)
    down = 3 * min(noise, 8 * progress.noise)
    fast, slow = weight_of(FAST_GAIN, progress), weight_of(SLOW_GAIN, progress)
    progress.fast_level += fast * min(max(sample - progress.fast_level, -down), up)
    progress.slow_level += slow * min(max(sample - progress.slow_level, -down), up)
    progress.log_lr += fast * (log_lr - progress.log_lr)
    if progress.count <= 8:
        progress.highest_level = max(progress.highest_level, progress.fast_level)


def weight_of(least: float, progress: Progress) -> float:
    """Return the weight of the newest sample: that of a plain mean at first."""
    return max(least, 1 / progress.count)


def variance_of(least: float, progress: Progress) -> float:
    """Return the variance of a level, in units of that of a sample."""
    weight = weight_of(least, progress)
    return weight / (2 - weight)


def track_lowest(progress: Progress) -> None:
    """Note the lowest levels and what was known when they were reached."""
    progress.lowest_age += 1
    if progress.count >= 3 and progress.fast_level < progress.lowest_level:
        progress.lowest_level = progress.fast_level
        progress.lowest_log_lr = progress.log_lr
        progress.lowest_variance = variance_of(FAST_GAIN, progress)
        progress.lowest_noise = progress.noise * math.sqrt(progress.variance_factor)
        progress.lowest_evidence = gain(progress)
        progress.lowest_age = 0.0
    lower = progress.count > 12 and progress.slow_level < progress.lowest_slow_level
    if progress.count == 12 or lower:
        progress.lowest_slow_level = progress.slow_level
        progress.lowest_slow_variance = variance_of(SLOW_GAIN, progress)


# Charts.


def standard_error(progress: Progress) -> float:
    """Return that of the fast level less the first loss."""
    tau, variance = progress.variance_factor, variance_of(FAST_GAIN, progress)
    return progress.noise * math.sqrt(1 + tau * variance)


def gain(progress: Progress) -> float:
    """Return how far the fast level lies below the first loss, in standard errors."""
    return (progress.first_loss - progress.fast_level) / standard_error(progress)


def hard_scale(progress: Progress) -> float:
    """Return the unit of the hard charts: a collapse inflates the present noise alone."""
    return math.sqrt(progress.noise * progress.cleanest_noise)


def rise(progress: Progress) -> float:
    """Return how far the fast level lies above its lowest, in standard errors of both."""
    variance = variance_of(FAST_GAIN, progress) + progress.lowest_variance
    error = hard_scale(progress) * math.sqrt(progress.variance_factor * variance)
    return (progress.fast_level - progress.lowest_level) / error


def slow_rise(progress: Progress) -> float:
    """Return the same of the slow level."""
    variance = variance_of(SLOW_GAIN, progress) + progress.lowest_slow_variance
    error = hard_scale(progress) * math.sqrt(progress.variance_factor * variance)
    return (progress.slow_level - progress.lowest_slow_level) / error


def late_stretch(progress: Progress) -> float:
    """Return what thresholds are multiplied by: long runs take more chances."""
    return 1 + 0.2 * max(0.0, math.log2(progress.count / 128))


def lost_charts(config: Config, progress: Progress) -> int:
    """Flag a rise of either level above its lowest (LOST)."""
    limit = late_stretch(progress) / config.sensitivity
    fast = progress.count >= 6 and rise(progress) > FAST_LOST * limit
    slow = progress.count >= 24 and slow_rise(progress) > SLOW_LOST * limit
    fast &= costs_a_share(progress.fast_level, progress.lowest_level, progress)
    slow &= costs_a_share(progress.slow_level, progress.lowest_slow_level, progress)
    return Flag.LOST if fast or slow else 0


def costs_a_share(level: float, lowest: float, progress: Progress) -> bool:
    """Say whether a rise takes back a fair part of the progress."""
    return level - lowest > LOST_SHARE * max(progress.first_loss - lowest, 0.0)


def above_chart(config: Config, progress: Progress) -> int:
    """Flag a level above the first loss (ABOVE)."""
    above = progress.count >= 3 and height(config, progress) > ABOVE * late_stretch(progress)
    return Flag.ABOVE if above else 0


def height(config: Config, progress: Progress) -> float:
    """Return how far the fast level lies above the first loss, in standard errors."""
    variance = variance_of(FAST_GAIN, progress)
    error = hard_scale(progress) * math.sqrt(1 + progress.variance_factor * variance)
    return config.sensitivity * (progress.fast_level - progress.first_loss) / error


def is_outlier(sample: float, progress: Progress) -> bool:
    """Say whether a loss lies far above the fast level, once the noise is known well."""
    limit = OUTLIER_NOISES * hard_scale(progress) * math.sqrt(progress.variance_factor)
    return progress.count >= DIFFERENCES and sample - progress.fast_level > limit


def soft_charts(window: Window, progress: Progress) -> int:
    """Flag a level that is where it began (NO_PROGRESS), or that stays above its lowest (STALL)."""
    flags = 0
    if not window.first <= progress.count <= window.last:
        return flags
    powered = 3 * standard_error(progress) < POWER * abs(progress.first_loss)
    if (
        progress.count >= max(32.0, 0.0 if powered else window.first_weak)
        and gain(progress) < NO_PROGRESS
        and progress.lowest_age >= 16
    ):
        flags |= Flag.NO_PROGRESS
    if progress.count >= 24 and progress.lowest_age >= window.stall and rise(progress) > STALL:
        flags |= Flag.STALL
    return flags
