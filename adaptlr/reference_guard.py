"""The guard of :mod:`adaptlr.reference`: what the flags of the charts lead to."""

from __future__ import annotations

import copy
import math

from adaptlr.reference_detector import is_finite, rebase
from adaptlr.reference_progress import Reading
from adaptlr.reference_raise import (
    advance_raise,
    begin_raise,
    calls_for_raise,
    end_raise,
    has_failed,
    is_far_below,
    is_on_probation,
    is_slow,
    may_raise,
    prove_raise,
    undo_raise,
)
from adaptlr.reference_recovery import (
    NEVER,
    NOTHING,
    SETTLED_SAMPLES,
    Orders,
    advance_ramp,
    advance_trial,
    answer_on_ramp,
    begin_probe,
    enter,
    experiment,
    forget_statistics,
    go_on_as_before,
    is_ramp,
    least_factor,
    may_experiment,
    return_to_aside,
    shown_progress,
    spare_slot,
    start_over,
    take_statistics,
    was_range_test,
)
from adaptlr.reference_schedule import own_schedule, schedule
from adaptlr.reference_search import advance_search
from adaptlr.reference_state import (
    Archive,
    Config,
    Flag,
    GuardMode,
    Phase,
    Progress,
    Signals,
    Slot,
    State,
)

LONG_ALARMS = Flag.DIVERGE | Flag.DRIFT | Flag.WORSE
COLLAPSE = Flag.LOST | Flag.ABOVE
OVERFLOW_LIMIT = 33  # in a row; GradScaler halves from 2^16 to 2^-16 in 32
EARLY = 4.0  # chart_steps after a start, within which it is gone back to
RUINED = 0.5  # of the progress made: what is left of it is not worth keeping
WORTHWHILE = 0.5  # of the steps taken must be left to take them again in ruins
FORGIVEN = 0.25  # of a restart, by every snapshot that has aged well
FAST_ALARMS = Flag.DIVERGE | COLLAPSE
DECADE = 10.0  # of LR, above which a snapshot has nothing to do with a collapse
PROBE_STEPS = 8
PROBE_LEAD = 1.5  # votes that end a probe early: three of one mind
PROBE_VOTE = 0.5  # one; it will do for a change of the data that is asked about again
PROBE_NOISES = 3.0  # that the two levels of a probe are apart at least
FIRST_QUESTION = 16  # steps after a change of the data


def guard(
    config: Config, signals: Signals, flags: int, reading: Reading, state: State, archive: Archive
) -> Orders:
    """Answer the flags of this step: move the phase and the factor, give the orders."""
    alarms = audible(config, flags, state)
    track_onset(config, signals, alarms, state)
    acts = config.guard_mode == GuardMode.ACT
    broken = Flag.OVERFLOW | (Flag.NONFINITE if acts else 0)
    count_skips(config, flags, state)
    if state.consecutive_overflows >= OVERFLOW_LIMIT:
        return fail(state)
    if state.consecutive_skips > config.max_consecutive_skips:
        if not config.snapshot_slots or not state.first_lr:
            return fail(state)  # there is nothing to undo
        alarms |= Flag.NONFINITE
        state.consecutive_skips = state.consecutive_overflows = 0.0
    if config.guard_mode == GuardMode.OFF:
        orders = Orders()
    elif state.phase == Phase.SEARCH:
        orders = advance_search(config, signals, flags, reading, state)
    elif alarms:
        orders = answer_alarm(config, signals, alarms, state, archive)
    else:
        orders = go_on(config, signals, flags, reading, state, archive)
    if has_failed(state):
        orders = undo_raise(config, state, archive)
    return orders._replace(skip=orders.skip or bool(flags & broken))


def audible(config: Config, flags: int, state: State) -> int:
    """Return the hard alarms that count.

    Soon after another alarm those of the slow charts are its echo. On a ramp the collapse charts
    judge alone: the others know no rising LR. A loss that is not finite ends a rescue at once; a
    test has a healthy run to lose. A probe judges by itself.
    """
    if state.phase == Phase.PROBE:
        return 0
    if is_ramp(state):
        heard = state.phase == Phase.RESCUE and state.fine.count
        broken = Flag.NONFINITE if heard else 0
        return flags & (COLLAPSE | broken)
    echoes = state.step - state.last_alarm < config.rewarm_steps + config.hold_steps
    return flags & (COLLAPSE | (Flag.DIVERGE if echoes else LONG_ALARMS))


def track_onset(config: Config, signals: Signals, alarms: int, state: State) -> None:
    """Note the LR behind the present loss while nothing is wrong: a later alarm blames it."""
    quiet = is_finite(signals.loss) and state.cusum == 0 and state.outlier_run == 0
    if quiet and not alarms and state.phase != Phase.PROBE:
        state.onset_lr = state.lr / config.peak


def count_skips(config: Config, flags: int, state: State) -> None:
    """Count broken steps in a row."""
    broken = config.guard_mode == GuardMode.ACT and flags & (Flag.NONFINITE | Flag.OVERFLOW)
    if not broken:
        state.consecutive_skips = state.consecutive_overflows = 0.0
        return
    state.consecutive_skips += bool(flags & Flag.NONFINITE)
    state.consecutive_overflows += bool(flags & Flag.OVERFLOW)


def fail(state: State, restore: Slot = NOTHING) -> Orders:
    """End the run."""
    enter(Phase.FAILED, state.step, state)
    return Orders(skip=True, restore=restore)


# Hard alarms.


def answer_alarm(
    config: Config, signals: Signals, alarms: int, state: State, archive: Archive
) -> Orders:
    """Go back to where the run was sound; without snapshots, cut in place."""
    state.last_alarm = state.step
    can_undo = config.snapshot_slots and state.first_lr
    if config.guard_mode != GuardMode.ACT or not can_undo:
        return answer_in_place(config, signals, alarms, state)
    choose_snapshot(alarms, state, archive)
    state.restarts += 1
    if state.restarts > config.max_restarts:
        return fail(state, state.aside_slot or state.good_slot or Slot.START)
    if state.phase == Phase.TRIAL:
        state.cut_factor = state.trial_factor
    if state.phase == Phase.RAISE:
        return end_raise(config, False, state, archive)
    if is_ramp(state):
        return answer_on_ramp(config, state, archive)
    if state.good_slot:
        collapsed = bool(alarms & FAST_ALARMS) and calls_for_start(config, state, archive)
        return begin_probe(collapsed, state, archive)
    if is_early(config, state) or is_ruined(config, alarms, state):
        return start_over(config, state)
    if state.level < state.start_level:  # what is at hand is still better than the start
        return answer_in_place(config, signals, alarms, state)
    return start_over(config, state)


def choose_snapshot(alarms: int, state: State, archive: Archive) -> None:
    """Take a newer snapshot for the good one if the alarm has begun since it was taken.

    One that was put back before and fails again is dropped.
    """
    age = state.step - state.pending_step
    newer = state.pending_slot and alarms & FAST_ALARMS and age >= SETTLED_SAMPLES
    if state.good_slot and newer:
        state.good_slot = state.pending_slot
    elif state.good_slot and state.phase in (Phase.REWARM, Phase.HOLD):
        if archive[state.good_slot].step < state.phase_step:
            state.good_slot = NOTHING
    state.pending_slot = NOTHING


def calls_for_start(config: Config, state: State, archive: Archive) -> bool:
    """Say whether a collapse is answered from the start: its way was a range test.

    Not where the snapshot is from a decade of LR below, nor after a change of the data, before
    which the charts know nothing.
    """
    near = state.lr <= DECADE * archive[state.good_slot].lr and state.phase != Phase.SHIFT
    return near and is_early(config, state) and was_range_test(shown_progress(config, state))


def is_early(config: Config, state: State) -> bool:
    """Say whether the start is near, with more left of the run than would be lost."""
    taken = state.step - state.origin_step
    worth_it = not config.total_steps or taken <= config.total_steps - state.step
    return worth_it and taken <= EARLY * config.chart_steps


def is_ruined(config: Config, alarms: int, state: State) -> bool:
    """Say whether a collapse in a run without a good snapshot has left little to go on with."""
    if not alarms & COLLAPSE or config.snapshot_slots < 3:
        return False
    fine = state.fine
    lost = fine.fast_level - fine.lowest_level > RUINED * (fine.first_loss - fine.lowest_level)
    left = config.total_steps - state.step
    return lost and (
        not config.total_steps or left >= WORTHWHILE * (state.step - state.origin_step)
    )


def answer_in_place(config: Config, signals: Signals, alarms: int, state: State) -> Orders:
    """Cut and zero the first moment, unless nothing that the LR did can be to blame."""
    to_blame = config.guard_mode == GuardMode.ACT and state.onset_lr > 0
    if to_blame:
        cut(config, alarms, state)
    expect_change(signals.loss, not to_blame or not alarms & Flag.DIVERGE, state)
    return Orders(skip=True, restore=Slot.ZERO_MOMENT) if to_blame else Orders()


def cut(config: Config, alarms: int, state: State, held: float = 0.0) -> None:
    """Cut below the factor that failed, the one at the change point (equation 10).

    Args:
        config: The run's settings.
        alarms: What the cut is an answer to.
        state: Is changed.
        held: An LR, as a share of the peak, that is known to hold: not lower than that.
    """
    again = state.phase in (Phase.REWARM, Phase.HOLD)
    state.streak = state.streak + 1 if again else 0.0
    backoff = config.backoff_factor ** (1 + min(state.streak, 2))
    if alarms == Flag.DRIFT:
        backoff = 0.7
    multiplier = schedule(config, max(state.step + config.rewarm_steps, config.warmup_steps))
    present = state.cut_factor
    failed = min(present, state.onset_lr / multiplier) if multiplier else present
    least = min(present, held / multiplier) if multiplier else present
    state.cut_factor = max(least_factor(config, 1e-4), least, backoff * failed)
    state.ceiling = max(0.7 * failed, state.cut_factor)
    enter(Phase.REWARM, state.step + 1, state)
    state.cuts += 1


def expect_change(loss: float, accept: bool, state: State) -> None:
    """Forget how sure the statistics were; the collapse charts start anew."""
    rebase(loss, accept, state)
    state.fine, state.coarse = Progress(), Progress()
    state.block_sum = state.block_count = 0.0
    state.soft_step = NEVER  # a run that goes on flat is not one that has just begun


# Steps without a hard alarm.


def go_on(
    config: Config, signals: Signals, flags: int, reading: Reading, state: State, archive: Archive
) -> Orders:
    """Advance the phase; begin an experiment or take a snapshot when it is time."""
    measured = is_finite(signals.loss) and not flags & Flag.NONFINITE
    if state.phase == Phase.PROBE and flags & Flag.NONFINITE:
        return return_to_aside(state, archive)  # of good weights: the data is broken
    if state.phase == Phase.PROBE:
        return advance_probe(config, signals, state, archive) if measured else Orders()
    if state.phase == Phase.RAISE:
        return advance_raise(config, reading, state, archive) if measured else Orders()
    if is_ramp(state):
        return advance_ramp(config, state, archive) if measured else Orders()
    if state.phase == Phase.TRIAL:
        return advance_trial(config, state, archive) if measured else Orders()
    if state.phase == Phase.SHIFT:
        return advance_shift(state, archive) if measured else Orders()
    if config.guard_mode == GuardMode.ACT:
        advance_phase(config, state)
    if measured and may_experiment(config, flags, state):
        return answer_doubt(config, flags, reading, state, archive)
    if measured and is_snapshot_due(config, state):
        return keep_snapshot(config, reading, state, archive)
    return Orders()


def answer_doubt(
    config: Config, flags: int, reading: Reading, state: State, archive: Archive
) -> Orders:
    """Answer a soft alarm: with a raise, the end of one, or an experiment."""
    if may_raise(config, state) and is_far_below(state) and is_slow(state.fine):
        return begin_raise(config, state, archive)
    if not is_on_probation(state):
        return experiment(config, flags, reading, state, archive)
    return undo_raise(config, state, archive) if reading.gain < 1 else Orders()


def advance_probe(config: Config, signals: Signals, state: State, archive: Archive) -> Orders:
    """Let a loss vote: for the snapshot's level (weights to blame) or that of the alarm (data)."""
    usual, failed = archive[state.good_slot].fine, archive[state.aside_slot].fine
    gap = max(failed.fast_level - usual.fast_level, least_gap(usual))
    share = (signals.loss - usual.fast_level) / gap
    state.probe_sum += min(max(share, 0.0), 1.0) - 0.5
    again = archive[state.aside_slot].phase == Phase.SHIFT
    lead = PROBE_VOTE if again and state.probe_sum > 0 else PROBE_LEAD
    if steps_of_phase(state) < PROBE_STEPS and abs(state.probe_sum) < lead:
        return Orders(skip=True)
    if state.probe_sum > 0:
        return accept_shift(config, state, archive)
    return go_on_from_snapshot(config, signals, state, archive)


def least_gap(usual: Progress) -> float:
    """Return how far apart the two levels are at least between which a probe decides."""
    return PROBE_NOISES * usual.noise * math.sqrt(usual.variance_factor)


def accept_shift(config: Config, state: State, archive: Archive) -> Orders:
    """Go on with the weights set aside: nothing had failed.

    All statistics begin anew. The snapshot from before is kept until the shift has lasted.
    """
    aside = archive[state.aside_slot]
    since = aside.phase_step if aside.phase == Phase.SHIFT else state.step + 1
    orders = return_to_aside(state, archive)
    forget_statistics(state)
    state.soft_step = NEVER
    state.restarts -= 1
    if state.step - since < config.rewarm_steps + config.hold_steps:
        enter(Phase.SHIFT, since, state)
    return orders


def go_on_from_snapshot(config: Config, signals: Signals, state: State, archive: Archive) -> Orders:
    """Keep the snapshot's weights; blame the LR unless it had held, and this is the first time."""
    slot, state.aside_slot = state.aside_slot, NOTHING
    failed, good = archive[slot], archive[state.good_slot]
    if state.collapsed:
        take_statistics(failed, state)  # what the way there has told
        return start_over(config, state)
    has_held = failed.lr <= good.lr
    if failed.phase == Phase.SHIFT or (has_held and state.restarts <= 1):
        go_on_as_before(state.step + 1, state)
        return Orders(skip=True)
    cut(config, 0, state, 0.0 if has_held else good.lr / config.peak)
    expect_change(signals.loss, False, state)
    return Orders(skip=True)


def advance_shift(state: State, archive: Archive) -> Orders:
    """After 16, 24, 32, 48 ... steps ask whether the snapshot from before is better again."""
    steps = int(steps_of_phase(state))
    doublings = math.floor(math.log2(steps))
    if steps < FIRST_QUESTION or steps not in (2**doublings, 1.5 * 2**doublings):
        return Orders()
    usual = archive[state.good_slot].fine
    if state.fine.fast_level - usual.fast_level < least_gap(usual):
        go_on_as_before(state.step + 1, state)  # the loss is down by itself
        return Orders()
    state.restarts += 1
    return begin_probe(False, state, archive)


def steps_of_phase(state: State) -> float:
    """Return k: the steps of the phase so far, the present one included."""
    return state.step - state.phase_step + 1


def advance_phase(config: Config, state: State) -> None:
    """Move on from REWARM to HOLD, REGROW and RUN, each in its time."""
    match state.phase:
        case Phase.REWARM if steps_of_phase(state) >= config.rewarm_steps:
            enter(Phase.HOLD, state.step + 1, state)
        case Phase.HOLD if steps_of_phase(state) >= config.hold_steps:
            enter(Phase.REGROW, state.step + 1, state)
            state.streak = 0.0
        case Phase.REGROW:
            state.cut_factor = min(state.cut_factor * config.regrow_growth, state.ceiling)
            if state.cut_factor == state.ceiling:
                enter(Phase.RUN, state.step + 1, state)


def is_snapshot_due(config: Config, state: State) -> bool:
    """Say whether it is time for the next snapshot."""
    if config.snapshot_slots < 3 or config.guard_mode != GuardMode.ACT:
        return False
    age = state.step - state.pending_step
    return not state.pending_slot or age >= config.snapshot_steps


def keep_snapshot(config: Config, reading: Reading, state: State, archive: Archive) -> Orders:
    """Take a snapshot while the charts are quiet; the one before it has then aged well."""
    quiet = state.cusum < 4 and reading.fast_rise < 3 and state.phase != Phase.REWARM
    if not quiet or state.fine.count < config.snapshot_steps:
        return Orders()
    if calls_for_raise(config, state, archive):
        return begin_raise(config, state, archive)
    undone = prove_raise(config, state, archive)
    if undone is not None:
        return undone
    if state.pending_slot:
        state.good_slot = state.pending_slot
        state.restarts = max(0.0, state.restarts - FORGIVEN)
    state.pending_slot, state.pending_step = spare_slot(state), state.step
    archive[state.pending_slot] = copy.deepcopy(state)
    return Orders(save=state.pending_slot)


# The LR.


def rewarmed_factor(config: Config, state: State) -> float:
    """Return the cut factor, approached along a ramp in REWARM (k = 0 at the alarm)."""
    if state.phase != Phase.REWARM:
        return state.cut_factor
    return state.cut_factor * (0.1 + 0.9 * steps_of_phase(state) / config.rewarm_steps)


def multiplier(config: Config, state: State) -> float:
    """Return what the peak is multiplied by in this step."""
    if state.phase == Phase.PROBE:
        return 0.0
    if state.phase == Phase.SEARCH:
        return state.ramp_lr
    if state.phase in (Phase.RESCUE, Phase.RAISE):
        limit = state.ramp_limit if state.phase == Phase.RESCUE else config.max_factor
        return min(state.ramp_lr, limit)
    scheduled = rewarmed_factor(config, state) * own_schedule(config, state)
    return min(state.ramp_lr, scheduled) if state.phase == Phase.TEST else scheduled
