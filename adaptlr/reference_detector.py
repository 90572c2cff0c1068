"""The statistics and charts of :mod:`adaptlr.reference`: sections 2, 3 and 5."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from adaptlr.reference_state import Flag, State

START_UP = 16  # losses that are averaged plainly; below that a robust scale is worth little
GAIN = 1 / 128  # a memory of 2 / GAIN = 256 steps
SIGN_GAIN = 1 / 512  # slower, so that a divergence of 20 steps cannot raise its own threshold
LEAK = 1 / 2048  # of best_level, upwards
CLIP = 2.5
# E[min(Z^2, CLIP^2)] of a normal Z.
BETA = (
    math.erf(CLIP / math.sqrt(2))
    - 2 * CLIP * math.exp(-(CLIP**2) / 2) / math.sqrt(2 * math.pi)
    + CLIP**2 * math.erfc(CLIP / math.sqrt(2))
)
OUTLIER = 6.0  # score of an outlier
ORDERS = 1000  # of losses alike, of which one has the largest at its end
SPIKE_SHARE = 1e-3  # of all steps, at most
LEVEL_LIMIT = 6.5  # standard errors, of DRIFT and WORSE
RISING = 2.0  # t-statistic of the slope, of DRIFT: a level that falls has not drifted up
REBASE_SAMPLES = 32
LEAST_NORM = 1e-30  # stands for a norm of 0
LEAST_NORM_SCALE = 0.01  # of the log; bfloat16 resolves 0.8 %


class Measurement(NamedTuple):
    """What the detector says of one loss."""

    flags: int
    scale: float
    score: float


def is_finite(loss: float) -> bool:
    """Say whether a loss enters the statistics at all."""
    return abs(loss) <= 1e30  # false for NaN


def detect(loss: float, state: State) -> Measurement:
    """Let a loss enter the statistics (section 2) and evaluate the charts (section 3)."""
    if not is_finite(loss):
        return Measurement(Flag.NONFINITE, noise_scale(state), 0.0)
    if state.samples < START_UP:
        return start_up(loss, state)
    state.samples = min(state.samples + 1, 1e6)
    state.observed += 1
    gain = max(GAIN, 1 / state.samples)
    scale = noise_scale(state)
    state.score = (loss - state.level) / scale
    state.outlier_run = 0.0  # of refused losses; control_step counts outliers from here on
    score = min(max(state.score, -CLIP), CLIP)
    flags = spike_chart(state)
    update_sign_agreement(score, gain, state)
    flags |= divergence_chart(score, state)
    update_regression(scale * score, gain, state)
    update_level_and_variance(scale, score, gain, state)
    update_t_statistic(state)
    flags |= level_charts(scale, gain, state)
    return Measurement(flags, scale, state.score)


def start_up(loss: float, state: State) -> Measurement:
    """Average the first losses plainly (equation 3), unless the start-up guard refuses one."""
    if state.samples >= 4 and loss - state.max_loss > 2 * max(
        abs(state.max_loss), abs(state.min_loss)
    ):
        state.outlier_run += 1
        # Of the orders of n + k losses alike, (n + k over k), one has these k at its end.
        losses = state.samples + state.outlier_run
        sure = math.comb(int(losses), int(state.outlier_run)) >= ORDERS
        flags = Flag.DIVERGE | Flag.WORSE if sure else 0
        return Measurement(flags, math.sqrt(state.variance), 0.0)
    state.max_loss = max(state.max_loss, loss) if state.samples else loss
    state.min_loss = min(state.min_loss, loss) if state.samples else loss
    state.outlier_run = 0.0
    state.samples += 1
    state.observed += 1
    gain = 1 / state.samples
    residual = loss - state.level
    state.level += gain * residual
    state.variance = (1 - gain) * (state.variance + gain * residual**2)
    if state.samples > 1:
        update_regression(residual, gain, state)
    if state.observed <= START_UP:
        state.best_level = state.start_level = state.level
        state.best_samples = state.samples
    state.spike_threshold = OUTLIER
    return Measurement(0, math.sqrt(state.variance), 0.0)


def smallest_scale(state: State) -> float:
    """Return the floor of the scale (equation 4): a share of the progress made, or of rounding."""
    progress = max(state.start_level - state.best_level, 0.0)
    return max(1e-3 * progress, 5e-7 * abs(state.level), 1e-30)


def noise_scale(state: State) -> float:
    """Return sigma of equation (4); during start-up the plain standard deviation."""
    deviation = math.sqrt(state.variance)
    return deviation if state.samples <= START_UP else max(deviation, smallest_scale(state))


def update_level_and_variance(scale: float, score: float, gain: float, state: State) -> None:
    """Move the robust level and variance by one bounded score (equation 5)."""
    floor = smallest_scale(state)
    state.level += gain * scale * score
    state.variance = max(state.variance, floor**2) * (1 + gain * (score**2 / BETA - 1))


def update_sign_agreement(score: float, gain: float, state: State) -> None:
    """Compare the sign of a centred score with the one before it (equation 6)."""
    centred = score - state.mean_score
    agreement = 1.0 if (centred > 0) == (state.previous_score > 0) else -1.0
    sign_gain = max(SIGN_GAIN, 1 / (state.samples + 32))
    state.sign_agreement += sign_gain * (agreement - state.sign_agreement)
    state.previous_score = centred
    state.mean_score += gain * (score - state.mean_score)


def long_run_factor(state: State) -> float:
    """Return tau of equation (6): how much noisier a mean is than that of independent losses."""
    correlation = min(max(math.sin(math.pi / 2 * state.sign_agreement), 0.0), 0.9)
    return (1 + correlation) / (1 - correlation)


def update_regression(residual: float, gain: float, state: State) -> None:
    """Feed the regression on relative time and take its slope (equations 7 and 8)."""
    age = state.mean_age + 1
    state.age_covariance = (1 - gain) * (state.age_covariance + gain * age * residual)
    state.age_variance = (1 - gain) * (state.age_variance + gain * age**2)
    state.mean_age = (1 - gain) * age
    state.slope = state.age_covariance / state.age_variance


def update_t_statistic(state: State) -> None:
    """Measure the slope in its standard errors (equation 9)."""
    n = state.samples
    slope_variance = max(12 / (n**3 - n), 2 * GAIN**3 / (2 - GAIN) ** 3)
    explained = state.age_covariance**2 / state.age_variance
    residual_variance = max(state.variance - explained, 0.05 * state.variance)
    product = slope_variance * residual_variance * long_run_factor(state)
    state.t_statistic = state.slope / math.sqrt(max(product, 1e-38))


# Charts.


def spike_chart(state: State) -> int:
    """Flag a score above a threshold that allows one in 1000 steps (SPIKE)."""
    is_spike = state.score > state.spike_threshold
    state.spike_threshold = calibrated(state.spike_threshold, is_spike)
    return Flag.SPIKE if is_spike else 0


def calibrated(threshold: float, is_spike: bool) -> float:
    """Return the next threshold: up by each spike, and back down to 6 meanwhile."""
    if is_spike:
        return threshold * math.exp(0.5 * (1 - SPIKE_SHARE))
    return max(OUTLIER, threshold * (1 - 0.5 * SPIKE_SHARE))


def divergence_chart(score: float, state: State) -> int:
    """Sum clipped scores as Page (1954) does (DIVERGE)."""
    increment = score / math.sqrt(BETA * long_run_factor(state)) - 0.5
    state.cusum = max(0.0, state.cusum + increment)
    return Flag.DIVERGE if state.cusum > 16 else 0


def level_charts(scale: float, gain: float, state: State) -> int:
    """Compare the level with its best (DRIFT) and with that of the start (WORSE)."""
    effective = min(state.samples, 2 / gain - 1)
    if state.level < state.best_level:
        state.best_level, state.best_samples = state.level, effective
    else:
        state.best_level += LEAK * (state.level - state.best_level)
    error = scale * math.sqrt(long_run_factor(state) * (1 / effective + 1 / state.best_samples))
    state.rise = (state.level - state.best_level) / error
    start_error = scale * math.sqrt(long_run_factor(state) * (1 / effective + 1 / START_UP))
    start_rise = state.level - max(state.start_level, state.best_level)
    progress = max(state.start_level - state.best_level, 0.0)
    flags = 0
    if state.samples > 32:
        rises = state.rise > LEVEL_LIMIT and state.t_statistic > RISING
        if rises and state.level - state.best_level > 0.1 * progress:
            flags |= Flag.DRIFT
        if start_rise > LEVEL_LIMIT * start_error:
            flags |= Flag.WORSE
    return flags


def rebase(loss: float, accept: bool, state: State) -> None:
    """Forget how sure the statistics were; ``accept`` also takes the level as the new normal."""
    state.samples = min(state.samples, REBASE_SAMPLES)
    state.mean_age = min(state.mean_age, REBASE_SAMPLES / 2)
    state.age_variance = min(state.age_variance, REBASE_SAMPLES**2 / 12)
    state.age_covariance = state.cusum = state.outlier_run = 0.0
    state.max_loss = max(state.max_loss, loss)
    if accept:
        state.best_level, state.best_samples = state.level, state.samples
        state.start_level = max(state.start_level, state.level)


# Gradient norm.


def detect_norm(norm: float, state: State) -> int:
    """Let the log of a finite norm enter its own statistics; flag one far above its level."""
    log_norm = float(np.log(max(norm, LEAST_NORM)))
    state.norm_samples = min(state.norm_samples + 1, 1e6)
    gain = max(GAIN, 1 / state.norm_samples)
    residual = log_norm - state.norm_level
    if state.norm_samples <= START_UP:
        state.norm_level += gain * residual
        state.norm_variance = (1 - gain) * (state.norm_variance + gain * residual**2)
        return 0
    scale = max(math.sqrt(state.norm_variance), LEAST_NORM_SCALE)
    score = residual / scale
    clipped = min(max(score, -CLIP), CLIP)
    state.norm_level += gain * scale * clipped
    state.norm_variance = scale**2 * (1 + gain * (clipped**2 / BETA - 1))
    is_spike = score > state.norm_spike_threshold
    state.norm_spike_threshold = calibrated(state.norm_spike_threshold, is_spike)
    return Flag.NORM_SPIKE if is_spike else 0
