"""The first step and the search for a learning rate of :mod:`adaptlr.reference`: section 8."""

from __future__ import annotations

import math

from adaptlr.reference_detector import is_finite
from adaptlr.reference_progress import FAST_GAIN, Reading, variance_of
from adaptlr.reference_recovery import (
    NEVER,
    RAMP_DIVISOR,
    RAMP_REACH,
    SURE_ERRORS,
    WARMUP_DIVISOR,
    Orders,
    agreed,
    enter,
    has_learned,
    relative,
    return_to_start,
)
from adaptlr.reference_state import Config, Flag, Phase, Progress, Signals, State

BASELINE = 9  # losses at a rate that changes nothing: with a median of eight differences
SEARCH_REACH = 20.0  # below the estimate, where a ramp begins
SEARCH_DECADES = 3.3  # that the steps of a search are spread over
COARSE_REACH, COARSE_DECADE_STEPS = 1e4, 4
COARSE_BACK = 10**1.25
RAMP_TRUST = 5.0  # times the estimate: no ramp is believed above that


def begin_run(config: Config, signals: Signals, state: State) -> int:
    """Make a rate of what the first gradient told; judge the typed LR by it, or search for one."""
    loss, told, state.estimate = signals.loss, state.estimate, 0.0
    typed = config.search_steps < 0
    is_scale = is_finite(loss) and not (typed and loss <= 0)
    if is_scale and is_finite(told) and told > 0:
        state.estimate = told * abs(loss) / config.peak
    if typed:
        far = state.estimate and not 1 / 60 <= state.estimate <= 60
        return Flag.FAR_LR if far else 0
    suffices = config.estimate_suffices and state.estimate and loss > 0
    if config.search_steps and config.snapshot_slots and not suffices:
        start = state.estimate / SEARCH_REACH or 1 / COARSE_REACH
        begin_baseline(start, state)
        enter(Phase.SEARCH, state.step, state)
        return 0
    state.cut_factor = state.ceiling = state.estimate or 1.0
    state.warmup_start = -config.search_steps
    return Flag.FOUND


def begin_baseline(start: float, state: State) -> None:
    """Hold the LR far below where the ramp will begin."""
    state.ramp_start = max(start, 1e-30)
    state.ramp_lr, state.ramp_growth = state.ramp_start / RAMP_REACH, 1.0
    state.ramp_level = NEVER


def advance_search(
    config: Config, signals: Signals, flags: int, reading: Reading, state: State
) -> Orders:
    """Take one step of a search."""
    broken = bool(flags & Flag.NONFINITE)
    lost = broken or bool(flags & (Flag.LOST | Flag.ABOVE))
    progress = state.fine
    if state.step + 1 >= config.search_steps or not config.snapshot_slots:
        return end_search(config, lost, state)
    stage = stage_of(state)
    if broken and (stage == "baseline" or state.consecutive_skips < 2):
        return Orders()
    match stage:
        case "baseline":
            state.ramp_level = min(state.ramp_level, signals.loss)
            if lost:  # not even that rate is harmless
                return search_from(state.ramp_start / (SEARCH_REACH * RAMP_REACH), state)
            if progress.count >= BASELINE:
                begin_rise(config, state)
        case "coarse":
            height = abs(signals.loss - progress.first_loss)
            if lost or height > 6 * progress.noise or progress.lowest_evidence > 4:
                return search_from(state.ramp_lr / COARSE_BACK, state)
            if state.step >= 0.6 * config.search_steps:
                return end_search(config, False, state)
        case "rise":
            left = config.search_steps - state.step
            early = progress.count < BASELINE + 12 and left > 3 * BASELINE
            if lost and early and not has_learned(progress):
                return search_from(state.ramp_start / RAMP_REACH, state)
            if lost or is_past_lowest(reading, state):
                return end_search(config, lost, state)
    return Orders()


def stage_of(state: State) -> str:
    """Tell the stages of a search apart by how fast the LR grows."""
    if state.ramp_growth == 1:
        return "baseline"
    return "coarse" if state.ramp_growth > 1.5 else "rise"


def is_past_lowest(reading: Reading, state: State) -> bool:
    """Say whether the lowest level lies half a decade of the LR behind."""
    half_decade = 0.5 * math.log(10) / math.log(state.ramp_growth)
    old = state.fine.lowest_age + 0.5 >= half_decade
    return old and has_learned(state.fine) and reading.fast_rise > 2.5


def search_from(start: float, state: State) -> Orders:
    """Search again from the start of the run, with a ramp that begins elsewhere.

    An estimate that led here is refuted.
    """
    if state.estimate or stage_of(state) == "coarse":
        state.ramp_limit = state.ramp_lr
    state.estimate = 0.0
    state.last_alarm = state.step
    orders = return_to_start(Phase.SEARCH, state)
    begin_baseline(start, state)
    return orders


def begin_rise(config: Config, state: State) -> None:
    """Let the LR grow; the mean of the baseline takes the place of the first loss."""
    progress = state.fine
    mean = progress.fast_level
    if state.estimate and state.origin_step == 0:
        is_scale = state.ramp_level > 0 or mean >= 3 * progress.noise
        first = abs(progress.first_loss)
        scale = math.sqrt(mean * first) if is_scale else 30 * progress.noise
        state.estimate *= scale / first
        state.ramp_start = state.estimate / SEARCH_REACH
    decade_steps: float = COARSE_DECADE_STEPS
    if state.estimate or state.ramp_limit:
        left = config.search_steps - state.step - 1
        decade_steps = min(max(left / SEARCH_DECADES, 8.0), 24.0)
    state.ramp_lr, state.ramp_growth = state.ramp_start, 10 ** (1 / decade_steps)
    progress.first_loss = progress.lowest_level = mean
    progress.lowest_variance = variance_of(FAST_GAIN, progress)
    progress.lowest_noise = progress.noise * math.sqrt(progress.variance_factor)
    progress.lowest_evidence = progress.lowest_age = 0.0
    progress.log_lr = progress.lowest_log_lr = math.log(config.peak * state.ramp_lr)


def end_search(config: Config, lost: bool, state: State) -> Orders:
    """Undo the search, and let the run proper begin with the peak that was found."""
    learned = stage_of(state) == "rise" and has_learned(state.fine)
    state.cut_factor = state.ceiling = found_lr(config, state.fine, learned, lost, state)
    state.ramp_level = state.fine.lowest_level
    state.ramp_log_lr = state.fine.lowest_log_lr if learned else 0.0
    orders = return_to_start(Phase.RUN, state)
    state.restarted = 0.0
    state.warmup_start = state.origin_step
    return orders._replace(flags=Flag.FOUND)


def found_lr(config: Config, progress: Progress, learned: bool, lost: bool, state: State) -> float:
    """Return the mean of what ramp and gradient say, or what one of them says, or the typed LR.

    What a ramp says counts up to ``RAMP_TRUST`` estimates and, if it is not sure, not below one.
    """
    alone = state.estimate or 1.0
    if lost and stage_of(state) == "rise":
        alone = min(alone, relative(config, progress.log_lr) / WARMUP_DIVISOR)
    if not learned:
        return alone
    ramp = relative(config, progress.lowest_log_lr) / RAMP_DIVISOR
    if not state.estimate:
        return ramp
    lr = agreed(min(ramp, RAMP_TRUST * state.estimate), state)
    return lr if progress.lowest_evidence > SURE_ERRORS else max(lr, alone)
