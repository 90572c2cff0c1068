"""Raises of :mod:`adaptlr.reference`: a run that learns too slowly may get a higher LR (section 9).

A ramp from the start asks whether that gets lower. The state from before is kept until a raised
run has got below it, or goes back to it.
"""

from __future__ import annotations

import copy
import math

from adaptlr.reference_progress import Reading, coarse_progress
from adaptlr.reference_recovery import (
    NEVER,
    NOTHING,
    PAUSE_SAMPLES,
    RAMP_DIVISOR,
    SURE_ERRORS,
    Orders,
    agreed,
    begin_ramp,
    gets_lower,
    has_learned,
    present_error,
    relative,
    return_to_aside,
    return_to_start,
    schedule_left,
    test_decade_steps,
)
from adaptlr.reference_schedule import own_schedule
from adaptlr.reference_state import Archive, Config, Phase, Progress, Slot, State

WINDOW = (1.5, 4.0)  # in which a slow run is noticed, in chart_steps
SLOW = 0.15  # of the first loss: a good LR has won more by then
LEAST_RAISE = 2.0
RAISE_ERRORS = 3.0  # below the run: a raise is on probation yet


def may_raise(config: Config, state: State) -> bool:
    """Say whether the run may ask at all: once, on its first way, at the typed LR."""
    allowed = config.max_factor > 1 and config.snapshot_slots >= 3
    is_first = not (state.restarted or state.tested or state.cuts)
    affordable = state.restarts < config.max_restarts
    return allowed and is_first and affordable and state.phase == Phase.RUN


def is_far_below(state: State) -> bool:
    """Say whether the first gradient calls the LR much too low."""
    return state.estimate > 10 * state.cut_factor


def is_slow(progress: Progress) -> bool:
    """Say whether next to nothing was won."""
    return progress.first_loss - progress.fast_level < SLOW * abs(progress.first_loss)


def falls_steadily(progress: Progress, earlier: Progress) -> bool:
    """Say whether the loss has clearly fallen since, and no slower than before."""
    fall, before = earlier.fast_level - progress.fast_level, progress.first_loss
    per_step = fall * earlier.count
    per_step_before = (before - earlier.fast_level) * (progress.count - earlier.count)
    return fall > SURE_ERRORS * present_error(progress) and per_step >= per_step_before


def calls_for_raise(config: Config, state: State, archive: Archive) -> bool:
    """Say, when a snapshot is due, whether the run is too slow."""
    first, last = (share * config.chart_steps for share in WINDOW)
    if not may_raise(config, state) or not first <= state.step <= last:
        return False
    if not is_slow(state.fine):
        return False
    if state.estimate:
        return is_far_below(state)
    return bool(state.pending_slot) and falls_steadily(state.fine, archive[state.pending_slot].fine)


def begin_raise(config: Config, state: State, archive: Archive) -> Orders:
    """Set the present state aside and ramp up from the start, beginning at the LR in use."""
    lr = state.cut_factor * own_schedule(config, state)
    steps = test_decade_steps(config, lr, config.max_factor, coarse_progress(config, state))
    state.restarts += 1
    state.good_slot = state.pending_slot = NOTHING
    archive[Slot.FIRST] = copy.deepcopy(state)
    orders = begin_ramp(Phase.RAISE, lr, steps, state)
    state.aside_slot = Slot.FIRST
    return orders._replace(save=Slot.FIRST)


def advance_raise(config: Config, reading: Reading, state: State, archive: Archive) -> Orders:
    """End a ramp that has arrived, or whose best lies half a decade behind."""
    half = 0.5 * math.log(10) / math.log(state.ramp_growth)
    is_past = state.fine.lowest_age + 0.5 >= half and reading.fast_rise > 2.5
    arrived = state.ramp_lr >= 0.999 * config.max_factor
    passed = is_past and has_learned(state.fine)
    if arrived or passed:
        return end_raise(config, not passed, state, archive)
    return Orders()


def end_raise(config: Config, arrived: bool, state: State, archive: Archive) -> Orders:
    """Raise the LR if a higher one got lower, or if the highest one allowed is still far too low.

    Args:
        config: The run's settings.
        arrived: Whether the ramp has come to its end unharmed.
        state: Is changed.
        archive: The states beside the snapshots.
    """
    before = coarse_progress(config, archive[state.aside_slot])
    won = gets_lower(coarse_progress(config, state), before, RAISE_ERRORS)
    lr = shown_lr(config, state) if won else 0.0
    seen = has_learned(state.fine)
    if arrived and state.estimate > 3 * config.max_factor:
        lr = config.max_factor
    if lr < LEAST_RAISE:
        return undo_raise(config, state, archive)
    state.ramp_level = state.fine.lowest_level
    state.ramp_log_lr = state.fine.lowest_log_lr if seen else 0.0
    return raise_to(config, lr, state)


def shown_lr(config: Config, state: State) -> float:
    """Return the LR that a ramp has shown to be good; 0: none."""
    if not has_learned(state.fine):
        return 0.0
    return agreed(relative(config, state.fine.lowest_log_lr) / RAMP_DIVISOR, state)


def raise_to(config: Config, lr: float, state: State) -> Orders:
    """Go back to the start for a higher LR, meant once re-warmed."""
    state.cut_factor = min(config.max_factor, lr / schedule_left(config, state))
    state.ceiling = state.cut_factor
    state.soft_step = 0.0
    return return_to_start(Phase.REWARM, state)


def undo_raise(config: Config, state: State, archive: Archive) -> Orders:
    """Take the state from before back, and its budget; it will not ask again.

    What was set aside is the good snapshot from now on.
    """
    slot = state.aside_slot
    restarts = archive[slot].restarts
    state.last_alarm = state.step
    orders = return_to_aside(state, archive)
    state.restarts, state.good_slot = restarts, slot
    state.tested, state.ramp_level = 1.0, NEVER
    state.soft_step = state.step + PAUSE_SAMPLES * config.block_steps
    return orders


def has_failed(state: State) -> bool:
    """Say whether nothing is left of a raise that had yet to prove itself."""
    return is_on_probation(state) and (state.cut_factor <= 1 or state.phase == Phase.FAILED)


def is_on_probation(state: State) -> bool:
    """Say whether the state from before a raise is still kept."""
    own = (Phase.RAISE, Phase.TEST, Phase.PROBE)  # which set a state aside themselves
    return state.aside_slot != NOTHING and state.phase not in own


def prove_raise(config: Config, state: State, archive: Archive) -> Orders | None:
    """Decide once the raised run has a snapshot that has aged; None: it goes on."""
    if not is_on_probation(state) or not state.pending_slot:
        return None
    before = coarse_progress(config, archive[state.aside_slot])
    if not gets_lower(coarse_progress(config, state), before, RAISE_ERRORS):
        return undo_raise(config, state, archive)
    state.aside_slot = NOTHING
    return None
