"""Rollbacks and experiments of :mod:`adaptlr.reference`, where a smaller LR alone mends nothing.

Every function that answers a step changes the state and returns the orders for that step. Slots
are places for the weights, which lie outside; the states beside them lie in the archive.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import NamedTuple

from adaptlr.reference_progress import (
    FAST_GAIN,
    SOFT,
    Reading,
    coarse_progress,
    rise,
    variance_of,
)
from adaptlr.reference_schedule import own_schedule, schedule
from adaptlr.reference_state import (
    Archive,
    Config,
    Flag,
    GuardMode,
    Phase,
    Progress,
    Slot,
    State,
    Statistics,
)

RAMP_REACH = 50.0  # a ramp begins this far below the LR that failed
DECADE_STEPS = 12.0  # of a ramp, at least
WARMUP_DIVISOR, RAMP_DIVISOR = 4.0, 3.0  # from the LR of the lowest level to one that holds
TEST_ERRORS, WORSE_ERRORS, TRIAL_ERRORS = 4.0, 3.0, 2.5
TRIAL_SAMPLES, TRIAL_CUT, MOST_TRIALS = 20, 4.0, 3
PAUSE_SAMPLES = 24  # of the soft charts after a trial or a test
RAMP_ERRORS = 2.5  # above its lowest level: the best of a ramp lies behind
SURE_ERRORS = 4.0  # of progress that is more than the luckiest of many levels
SETTLED_SAMPLES = 12  # that a level and its noise need to be sure of
UNHEARD_OF = 5.0  # times the estimate: no best rate was so far above
NEVER = 1e18  # above every level
NOTHING = Slot.NO_SLOT


class Orders(NamedTuple):
    """What the guard wants of a step, and what it adds to the flags."""

    skip: bool = False
    save: Slot = NOTHING
    restore: Slot = NOTHING
    flags: int = 0


def enter(phase: Phase, first_step: float, state: State) -> None:
    """Let a phase begin; the present record shows it already."""
    state.phase, state.phase_step = phase, first_step


def is_ramp(state: State) -> bool:
    """Say whether the LR grows by itself, up from far below."""
    return state.phase in (Phase.RESCUE, Phase.TEST, Phase.SEARCH, Phase.RAISE)


def spare_slot(state: State) -> Slot:
    """Return the one of the two slots that holds nothing to go back to."""
    return Slot.SECOND if Slot.FIRST in (state.good_slot, state.aside_slot) else Slot.FIRST


def follow_peak(config: Config, state: State) -> None:
    """Where the user has changed the peak, keep the rates that were seen what they are.

    A lower peak needs no cut for what it lowers by itself. A higher one is the user's word against
    the guard's. After a search any peak is: it takes the place of the one that was found; and so it
    does after a raise, from which nothing is kept any more.
    """
    ratio = state.peak / config.peak if state.peak else 1.0
    relief = max(1.0, ratio)
    if config.search_steps >= 0 and ratio != 1 and state.phase != Phase.SEARCH:
        relief = NEVER
    for name in ("cut_factor", "ceiling", "trial_factor"):
        setattr(state, name, min(1.0, getattr(state, name) * relief))
    for name in ("onset_lr", "first_lr", "ramp_lr", "ramp_start", "ramp_limit"):
        setattr(state, name, getattr(state, name) * ratio)
    if state.step:
        state.estimate *= ratio
    if ratio != 1 and state.phase not in (Phase.RAISE, Phase.TEST, Phase.PROBE):
        state.aside_slot = NOTHING
    state.peak = config.peak


def has_learned(progress: Progress) -> bool:
    """Say whether there was progress that stands out of the noise."""
    return progress.count >= 6 and progress.lowest_evidence > 2


def shown_progress(config: Config, state: State) -> Progress:
    """Return what the way here has shown: by means of blocks, once there are enough.

    The lowest of thousands of levels of single losses is always far below the first loss.
    """
    coarse = coarse_progress(config, state)
    return coarse if coarse.count >= 6 else state.fine


def relative(config: Config, log_lr: float) -> float:
    """Return an LR as a share of the peak."""
    return math.exp(log_lr) / config.peak


def level_error(noise: float) -> float:
    """Return the standard error of a fast level, of whose 15 samples the half are new."""
    return math.sqrt(2 / 15) * noise


def present_error(progress: Progress) -> float:
    """Return the standard error of the fast level now."""
    return level_error(progress.noise * math.sqrt(progress.variance_factor))


def take_statistics(source: Statistics, state: State) -> None:
    """Copy what was measured; the clock and the counts of the guard stay."""
    for field in dataclasses.fields(Statistics):
        setattr(state, field.name, copy.deepcopy(getattr(source, field.name)))


def pooled_noise(progress: Progress, other: float) -> float:
    """Return the noise of a ramp's lowest level, in which that of the run has a say.

    Where noise has a tail upwards, luck that makes a level low makes its noise look small as well.
    """
    return max(progress.lowest_noise, math.sqrt(progress.lowest_noise * other))


def highest_likely(progress: Progress, noise: float, errors: float) -> float:
    """Return so many standard errors above the lowest level."""
    return progress.lowest_level + errors * noise * math.sqrt(progress.lowest_variance)


def lowest_likely(progress: Progress, variance_factor: float, errors: float) -> float:
    """Return so many standard errors below the present level."""
    variance = variance_factor * variance_of(FAST_GAIN, progress)
    return progress.fast_level - errors * progress.noise * math.sqrt(variance)


# From the start.


def forget_statistics(state: State) -> None:
    """Begin to measure anew."""
    take_statistics(Statistics(), state)


def return_to_start(phase: Phase, state: State) -> Orders:
    """Begin a phase from the first snapshot with the next step; other snapshots are void."""
    forget_statistics(state)
    state.origin_step = state.step + 1
    state.restarted, state.first_lr = 1.0, 0.0
    state.pending_slot = state.good_slot = NOTHING
    if state.phase == Phase.TEST:  # it has won; a raise has yet to beat what it has set aside
        state.aside_slot = NOTHING
    enter(phase, state.step + 1, state)
    return Orders(skip=True, restore=Slot.START)


def least_factor(config: Config, least: float) -> float:
    """Return the least factor: what a search has found may be any share of the typed LR."""
    return least if config.search_steps < 0 else 1e-30


def is_far_above(state: State) -> bool:
    """Say whether the first gradient, too, calls the LR much too high."""
    return bool(state.estimate) and state.cut_factor > 10 * state.estimate


def is_vouched(state: State) -> bool:
    """Say whether the first gradient speaks for the LR: a loss that has fallen may stand still."""
    return state.cut_factor <= 3 * state.estimate


def agreed(lr: float, state: State) -> float:
    """Return the geometric mean of an LR that was found and of the estimate, if there is one.

    One gradient may be an odd one: it counts as at most a decade off.
    """
    return math.sqrt(lr * min(max(state.estimate, lr / 10), 10 * lr)) if state.estimate else lr


def schedule_left(config: Config, state: State) -> float:
    """Return what the schedule leaves once re-warmed, as far as a restart makes up for it."""
    resumes = max(state.step + config.rewarm_steps, config.warmup_steps)
    return max(0.2, schedule(config, resumes))


def restart(config: Config, lr: float, state: State) -> Orders:
    """Go back to the start for an LR that holds once re-warmed, at most half of the present one."""
    wanted = lr / schedule_left(config, state)
    least = least_factor(config, 1e-8)
    state.cut_factor = state.ceiling = max(least, min(wanted, state.cut_factor / 2))
    state.cuts += 1
    state.tested = state.soft_step = 0.0
    return return_to_start(Phase.REWARM, state)


def restart_as_told(config: Config, lr: float, state: State) -> Orders:
    """Restart on account of the first gradient; no earlier ramp has a part in its record."""
    state.ramp_log_lr = 0.0
    return restart(config, lr, state)._replace(flags=Flag.FAR_LR)


def begin_ramp(phase: Phase, lr: float, decade_steps: float, state: State) -> Orders:
    """Go back to the start with an LR that grows by a decade in so many steps."""
    state.ramp_start = state.ramp_lr = max(lr, 1e-15)
    state.ramp_growth = math.exp(math.log(10) / decade_steps)
    return return_to_start(phase, state)


def rescue(config: Config, failed: float, state: State) -> Orders:
    """Ramp up to an LR that is known to be too high, to find one that is not."""
    state.ramp_limit = relative(config, state.fine.log_lr)
    return begin_ramp(Phase.RESCUE, failed / RAMP_REACH, DECADE_STEPS * config.block_steps, state)


def failed_lr(state: State) -> float:
    """Return the LR, as a share of the peak, that the run has failed with since its start."""
    return max(state.first_lr, 0.1 * state.cut_factor) if state.restarted else state.first_lr


def was_range_test(p: Progress) -> bool:
    """Say whether the way to a collapse has told which LR is good: it has doubled since."""
    return not has_learned(p) or p.log_lr - p.lowest_log_lr > math.log(2)


def start_over(config: Config, state: State) -> Orders:
    """Answer a hard alarm near the start: the way there may have told which LR was good."""
    progress = shown_progress(config, state)
    if not has_learned(progress):
        if is_far_above(state):
            return restart_as_told(config, state.estimate, state)
        return rescue(config, failed_lr(state), state)
    divisor = RAMP_DIVISOR if state.tested else WARMUP_DIVISOR
    lr = relative(config, progress.lowest_log_lr) / divisor
    return restart(config, agreed(lr, state), state)


def restart_below(config: Config, log_lr: float, state: State) -> Orders:
    """Restart at an LR that holds, where a ramp had its lowest level at this one."""
    return restart(config, agreed(relative(config, log_lr) / RAMP_DIVISOR, state), state)


def settle(config: Config, progress: Progress, state: State) -> Orders:
    """End a ramp: below the LR of the lowest level, or well below one that brought nothing."""
    if has_learned(progress):
        return restart_below(config, progress.lowest_log_lr, state)
    lr = relative(config, progress.log_lr) / WARMUP_DIVISOR
    return restart(config, min(lr, state.estimate or lr), state)


def answer_on_ramp(config: Config, state: State, archive: Archive) -> Orders:
    """Answer a hard alarm on a ramp; one that comes at once means that the ramp began too high."""
    began_too_high = state.fine.count < 12 and not has_learned(state.fine)
    if state.phase == Phase.TEST:
        return test_again(state) if began_too_high else end_test(config, state, archive)
    if began_too_high:
        return rescue(config, state.ramp_start, state)
    return settle(config, shown_progress(config, state), state)


def advance_ramp(config: Config, state: State, archive: Archive) -> Orders:
    """End a ramp that has arrived, or whose best lies a decade behind."""
    in_use = state.cut_factor * own_schedule(config, state)
    arrived = state.ramp_lr >= 0.999 * in_use
    if state.phase == Phase.TEST:
        return end_test(config, state, archive) if arrived else Orders()
    progress = shown_progress(config, state)
    decade = math.log(10) / (math.log(state.ramp_growth) * config.block_steps)
    is_above = rise(progress) > RAMP_ERRORS if progress.count > 1 else False
    is_past = is_above and progress.lowest_age + 0.5 >= decade
    at_limit = state.ramp_lr >= 0.999 * state.ramp_limit
    told = is_above or progress.lowest_evidence > SURE_ERRORS or state.restarts > 1
    if (is_past and has_learned(progress)) or (at_limit and told):
        return settle(config, progress, state)
    if at_limit:  # what led here has not come again: on to the LR in use, and from there as before
        state.ramp_limit = in_use
        if arrived:
            go_on_as_before(state.step + 1, state)
    return Orders()


# With the present state set aside.


def test_decade_steps(config: Config, first: float, last: float, progress: Progress) -> float:
    """Return the steps of a decade of LR on a ramp that is to get as far as the run has got."""
    decades = max(0.5, math.log10(max(last / first, 1.0)))
    steps = min(0.6 * progress.count * config.block_steps, 1.5 * config.chart_steps)
    return max(DECADE_STEPS * config.block_steps, steps / decades)


def begin_test(config: Config, state: State, archive: Archive) -> Orders:
    """Ask from the start whether a lower LR gets lower."""
    progress = coarse_progress(config, state)
    known = has_learned(progress)
    lr = relative(config, progress.lowest_log_lr) if known else failed_lr(state)
    first, last = lr / RAMP_REACH, state.cut_factor * own_schedule(config, state)
    decade_steps = test_decade_steps(config, first, last, progress)
    slot, good_slot = spare_slot(state), state.good_slot
    enter(Phase.RUN, state.step, state)
    archive[slot] = copy.deepcopy(state)
    orders = begin_ramp(Phase.TEST, first, decade_steps, state)
    state.aside_slot, state.good_slot = slot, good_slot
    state.restarts += 1
    return orders._replace(save=slot)


def test_again(state: State) -> Orders:
    """Ask from further below; what is set aside stays there."""
    kept = {name: getattr(state, name) for name in ("good_slot", "aside_slot")}
    decade_steps = math.log(10) / math.log(state.ramp_growth)
    orders = begin_ramp(Phase.TEST, state.ramp_start / RAMP_REACH, decade_steps, state)
    for name, slot in kept.items():
        setattr(state, name, slot)
    return orders


def gets_lower(progress: Progress, other: Progress, errors: float) -> bool:
    """Say whether one has got lower than the other ever did, by so many standard errors."""
    error = level_error(pooled_noise(progress, other.lowest_noise))
    lower = progress.lowest_level < other.lowest_level - errors * error
    return lower and has_learned(progress)


def end_test(config: Config, state: State, archive: Archive) -> Orders:
    """Settle if the ramp got lower than the run ever did, or clearly lower than where it stands.

    Without a winner the first gradient has the casting vote.
    """
    progress = coarse_progress(config, state)
    before = coarse_progress(config, archive[state.aside_slot])
    settled = progress.count - progress.lowest_age >= SETTLED_SAMPLES
    factor = min(progress.variance_factor, before.variance_factor)
    noise = pooled_noise(progress, before.noise * math.sqrt(factor))
    highest = highest_likely(progress, noise, TEST_ERRORS)
    better = settled and highest < lowest_likely(before, factor, TEST_ERRORS)
    if better or gets_lower(progress, before, TEST_ERRORS):
        return restart_below(config, progress.lowest_log_lr, state)
    unheard_of = state.cut_factor > UNHEARD_OF * state.estimate
    proven = is_vouched(state) or gets_lower(before, progress, WORSE_ERRORS)
    if state.estimate and (unheard_of or not proven):
        return restart_as_told(config, agreed(state.cut_factor, state), state)
    orders = return_to_aside(state, archive)
    state.restarts -= 1  # nothing had failed
    state.tested = 1.0
    sure = progress.lowest_evidence > SURE_ERRORS
    state.ramp_level = highest_likely(progress, noise, WORSE_ERRORS) if sure else NEVER
    state.ramp_log_lr = progress.lowest_log_lr
    state.soft_step = state.step + PAUSE_SAMPLES * config.block_steps
    return orders


def return_to_aside(state: State, archive: Archive) -> Orders:
    """Take weights and statistics back; the clock and the counts go on."""
    now = copy.copy(state)
    for name, value in vars(copy.deepcopy(archive[now.aside_slot])).items():
        setattr(state, name, value)
    for name in ("step", "skips", "cuts", "restarts", "last_alarm"):
        setattr(state, name, getattr(now, name))
    state.consecutive_skips = state.consecutive_overflows = 0.0
    state.aside_slot = state.pending_slot = NOTHING
    go_on_as_before(state.step + 1, state)
    return Orders(skip=True, restore=now.aside_slot)


def go_on_as_before(first_step: float, state: State) -> None:
    """Leave an experiment: the LR grows again if that was not over."""
    grows = state.cut_factor < state.ceiling
    enter(Phase.REGROW if grows else Phase.RUN, first_step, state)


def begin_probe(collapsed: bool, state: State, archive: Archive) -> Orders:
    """Look at the losses of the good snapshot: if they are as high, the data has changed."""
    slot, good = spare_slot(state), state.good_slot
    archive[slot] = copy.deepcopy(state)
    take_statistics(archive[good], state)
    state.aside_slot, state.pending_slot = slot, NOTHING
    state.probe_sum = 0.0
    state.collapsed = float(collapsed)
    enter(Phase.PROBE, state.step + 1, state)
    return Orders(skip=True, save=slot, restore=good)


# Soft alarms.


def may_experiment(config: Config, flags: int, state: State) -> bool:
    """Say whether a soft alarm is answered at all."""
    able = config.guard_mode == GuardMode.ACT and config.snapshot_slots > 0
    allowed = state.step >= state.soft_step and state.restarts < config.max_restarts
    return able and allowed and bool(flags & SOFT)


def experiment(
    config: Config, flags: int, reading: Reading, state: State, archive: Archive
) -> Orders:
    """Answer a soft alarm: with a test where nothing is won yet, else with a trial."""
    if flags & Flag.NO_PROGRESS or reading.gain < 1 or is_far_above(state):
        return doubt(config, state, archive)
    if is_vouched(state):
        return Orders()
    if state.tested:
        return doubt(config, state, archive)
    if state.trials < MOST_TRIALS:
        begin_trial(config, state)
    return Orders()


def doubt(config: Config, state: State, archive: Archive) -> Orders:
    """Test once; later on, take what the test's ramp had reached if the run has got worse."""
    if is_far_above(state):
        state.restarts += 1  # the lowest of a level that stands still tells no LR
        return restart_as_told(config, state.estimate, state)
    if not state.tested:
        return begin_test(config, state, archive) if config.snapshot_slots >= 3 else Orders()
    progress = coarse_progress(config, state)
    lowest = lowest_likely(progress, progress.variance_factor, WORSE_ERRORS)
    if lowest <= state.ramp_level:
        return Orders()
    state.restarts += 1
    return restart_below(config, state.ramp_log_lr, state)


def begin_trial(config: Config, state: State) -> None:
    """Go on with the same weights and a lower LR."""
    state.trial_factor = state.cut_factor
    state.trial_level = coarse_progress(config, state).lowest_level
    state.cut_factor /= TRIAL_CUT
    enter(Phase.TRIAL, state.step, state)


def advance_trial(config: Config, state: State, archive: Archive) -> Orders:
    """Keep the LR of a trial that brings a new lowest level, if the level rises again without it.

    One that brings none is undone, and then the run is doubted.
    """
    progress = coarse_progress(config, state)
    error = TRIAL_ERRORS * present_error(progress)
    is_over = state.step - state.phase_step >= TRIAL_SAMPLES * config.block_steps
    is_back = state.cut_factor >= state.trial_factor
    has_risen = progress.fast_level > state.trial_level + error
    if is_back and has_risen:
        return keep_trial(config, state)
    if not is_over:
        return Orders()
    if not is_back and progress.fast_level < state.trial_level - error:
        state.cut_factor, state.trial_level = state.trial_factor, progress.fast_level
        state.phase_step = state.step
        return Orders()
    state.soft_step = state.step + PAUSE_SAMPLES * config.block_steps
    state.cut_factor = state.trial_factor
    state.trials += 1
    go_on_as_before(state.step, state)
    return Orders() if is_back or state.tested else doubt(config, state, archive)


def keep_trial(config: Config, state: State) -> Orders:
    """Go on at the LR of a trial."""
    state.soft_step = state.step + PAUSE_SAMPLES * config.block_steps
    state.cut_factor = state.ceiling = state.trial_factor / TRIAL_CUT
    state.cuts += 1
    go_on_as_before(state.step, state)
    return Orders()
