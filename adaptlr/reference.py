"""The algorithm in plain Python floats (float64): what ``csrc/`` is tested against.

Equation numbers are those of ``docs/algorithm.md``. Nothing here is shared with ``csrc/``, so that
a mistake in one of the two shows.

Example:
    >>> import numpy as np
    >>> config = default_config(total_steps=100, peak=1e-3)
    >>> records, state = run(config, np.linspace(3.0, 1.0, 100))
    >>> float(records["lr"].max()), state.cuts
    (0.001, 0.0)
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from adaptlr.reference_detector import (
    START_UP,
    Measurement,
    detect,
    detect_norm,
    is_finite,
    noise_scale,
    rebase,
)
from adaptlr.reference_guard import guard, multiplier, rewarmed_factor
from adaptlr.reference_progress import OUTLIER_RUN, Reading, watch_progress
from adaptlr.reference_recovery import Orders, follow_peak, is_ramp
from adaptlr.reference_schedule import last_multiplier, schedule
from adaptlr.reference_search import begin_run
from adaptlr.reference_state import (
    Action,
    Archive,
    Config,
    Decay,
    Decision,
    Flag,
    GuardMode,
    Phase,
    Progress,
    Record,
    Signals,
    Slot,
    State,
    flattened,
)

__all__ = [
    "Action",
    "Archive",
    "Config",
    "Decay",
    "Decision",
    "Flag",
    "GuardMode",
    "Phase",
    "Progress",
    "Record",
    "Signals",
    "Slot",
    "State",
    "control_step",
    "default_config",
    "detect",
    "detect_norm",
    "flattened",
    "guard",
    "rebase",
    "run",
    "schedule",
    "watch_progress",
]

INTEGERS = {"step": "i8", "phase": "i4", "previous_phase": "i4", "flags": "i4", "action": "i4"}
RECORD_DTYPE = np.dtype([(name, INTEGERS.get(name, "f8")) for name in Record._fields])


def control_step(
    config: Config, signals: Signals, state: State, archive: Archive | None = None
) -> tuple[Decision, Record]:
    """Advance ``state`` by one optimizer step: measure, judge, act, write the LR (equation 1).

    Args:
        config: The run's settings.
        signals: What the step brings in.
        state: Is advanced in place.
        archive: The states beside the snapshots; the same from step to step. Needed where there
            are snapshots.
    """
    is_first = not state.peak
    if state.peak != config.peak:
        follow_peak(config, state)
    measurement, reading = measure(config, signals, state)
    flags = measurement.flags
    record = record_before_guard(signals, measurement, state)
    if is_first:
        flags |= begin_run(config, signals, state)
    orders = Orders(skip=True)
    if state.phase != Phase.FAILED:
        archive = {} if archive is None else archive
        orders = guard(config, signals, flags, reading, state, archive)
    flags |= orders.flags
    if orders.skip and config.guard_mode == GuardMode.ACT:
        state.skips += 1
    event = is_event(config, flags, record.previous_phase, state)
    share = set_lr(config, signals, orders, state)
    state.step += 1
    action = Action.SKIP if orders.skip else Action.NONE
    decision = Decision(share, action, flags, orders.save, orders.restore, event)
    return decision, record_after_guard(config, decision, reading, record, state)


def record_before_guard(signals: Signals, measurement: Measurement, state: State) -> Record:
    """Note what was measured: an alarm's record shows the numbers that caused it."""
    return Record(
        step=int(state.step),
        loss=signals.loss,
        level=state.level,
        scale=measurement.scale,
        slope=state.slope,
        t_statistic=state.t_statistic,
        score=measurement.score,
        cusum=state.cusum,
        rise=state.rise,
        grad_norm=math.nan if signals.grad_norm < 0 else signals.grad_norm,
        lr=state.lr,
        factor=state.factor,
        target_factor=state.cut_factor,
        phase=state.phase,
        previous_phase=state.phase,
        flags=measurement.flags,
        action=Action.NONE,
    )


def record_after_guard(
    config: Config, decision: Decision, reading: Reading, record: Record, state: State
) -> Record:
    """Add what was done about it; an event of the collapse charts shows what they saw."""
    if decision.event and reading.flags:
        record = record._replace(level=reading.level, scale=reading.noise, rise=reading.rise)
    raises = (record.previous_phase == Phase.RAISE) != (state.phase == Phase.RAISE)
    if raises or decision.flags & (Flag.FAR_LR | Flag.FOUND):
        chosen, suggested = config.peak * state.cut_factor, config.peak * state.estimate
        record = record._replace(score=chosen, rise=suggested, cusum=0.0)
        if state.ramp_log_lr:
            record = record._replace(cusum=math.exp(state.ramp_log_lr), level=state.ramp_level)
    return record._replace(
        lr=state.lr,
        factor=state.factor,
        target_factor=state.cut_factor,
        phase=state.phase,
        flags=decision.flags,
        action=decision.action | decision.save << 4 | decision.restore << 8,
    )


def is_event(config: Config, flags: int, previous_phase: Phase, state: State) -> bool:
    """Say whether the step belongs among the events: something was done, or would have been."""
    if flags & Flag.ENDED and state.step == config.total_steps:
        return True
    if flags & (Flag.FAR_LR | Flag.FOUND):
        return True
    if config.guard_mode == GuardMode.OFF or previous_phase == Phase.FAILED:
        return False
    broken = bool(flags & (Flag.NONFINITE | Flag.OVERFLOW))
    return broken or state.last_alarm == state.step or state.phase != previous_phase


# Measuring.


def measure(config: Config, signals: Signals, state: State) -> tuple[Measurement, Reading]:
    """Collect the flags of the signals and the charts; a failed run is measured no more."""
    flags = Flag.OVERWRITTEN if signals.overwritten else 0
    if 0 < config.total_steps <= state.step:
        flags |= Flag.ENDED
    if state.phase == Phase.FAILED:
        return Measurement(flags, noise_scale(state), 0.0), Reading()
    if signals.overflow:
        flags |= Flag.OVERFLOW
    # Behind an overflow an infinite norm says nothing new: the scaler will lower its scale.
    elif not (signals.grad_norm < 0 or is_finite(signals.grad_norm)):
        flags |= Flag.NONFINITE
    outliers = state.outlier_run
    measurement = detect(signals.loss, state)
    flags |= measurement.flags
    if signals.grad_norm >= 0 and not flags & (Flag.NONFINITE | Flag.OVERFLOW):
        flags |= detect_norm(signals.grad_norm, state)
    reading = Reading()
    if config.guard_mode != GuardMode.OFF and is_finite(signals.loss):
        reading = watch_progress(config, signals.loss, log_lr_behind(config, state), state)
    if reading.outlier and state.samples > START_UP:
        state.outlier_run = outliers + 1
        flags |= Flag.DIVERGE if state.outlier_run >= OUTLIER_RUN else 0
    return measurement._replace(flags=flags | reading.flags), reading


def log_lr_behind(config: Config, state: State) -> float:
    """Return ln of the LR that led to this loss; of the first loss, of the LR to come.

    An LR of 0 has led nowhere.
    """
    if not state.fine.count:
        return math.log(max(config.peak * multiplier(config, state), 1e-30))
    return math.log(state.lr) if state.lr > 0 else state.fine.log_lr


# The LR.


def set_lr(config: Config, signals: Signals, orders: Orders, state: State) -> float:
    """Write the LR of this step, and what the next one needs of it; return its multiplier."""
    scheduled = schedule(config, state.step)
    state.factor = rewarmed_factor(config, state)
    share = state.factor * scheduled
    if leaves_schedule(config, state):
        share = multiplier(config, state)
        state.factor = share / scheduled if scheduled else state.factor
    state.lr = signals.applied_lr if signals.applied_lr >= 0 else config.peak * share
    if not orders.skip:
        state.first_lr = state.first_lr or state.lr / config.peak
        if is_ramp(state):
            state.ramp_lr *= state.ramp_growth
    return share


def leaves_schedule(config: Config, state: State) -> bool:
    """Say whether the LR is another than the re-warmed factor times the schedule."""
    another_warmup = state.restarted or state.warmup_start
    is_warming = bool(another_warmup) and state.step < config.warmup_steps
    return state.phase == Phase.PROBE or is_ramp(state) or is_warming


# Runs.


def run(
    config: Config,
    losses: npt.NDArray[np.float64],
    *,
    grad_norms: npt.NDArray[np.float64] | None = None,
    overflows: npt.NDArray[np.bool_] | None = None,
    state: State | None = None,
    archive: Archive | None = None,
) -> tuple[npt.NDArray[np.void], State]:
    """Run over a trace of losses.

    Args:
        config: The run's settings.
        losses: One a step, shape ``(steps,)``.
        grad_norms: Shape ``(steps,)``; negative: not given. Default: none is given.
        overflows: Shape ``(steps,)``. Default: no step overflows.
        state: Where to go on; it is advanced in place. Default: a new run.
        archive: The states beside the snapshots, likewise. Default: empty.

    Returns:
        The records, shape ``(steps,)``, and the state after the last step.
    """
    state = State() if state is None else state
    archive = {} if archive is None else archive
    norms = np.full(len(losses), -1.0) if grad_norms is None else grad_norms
    broken = np.zeros(len(losses), bool) if overflows is None else overflows
    records = [
        control_step(config, Signals(loss, norm, overflow=overflow), state, archive)[1]
        for loss, norm, overflow in zip(
            losses.tolist(), norms.tolist(), broken.tolist(), strict=True
        )
    ]
    return np.array(records, dtype=RECORD_DTYPE), state


def default_config(total_steps: int, peak: float, **overrides: Any) -> Config:
    """Resolve the defaults of section 4 to numbers.

    Args:
        total_steps: T; 0 for a run without end.
        peak: The largest learning rate.
        overrides: Fields of :class:`Config` to set otherwise. ``final_multiplier`` follows from the
            schedule unless it is given.
    """
    warmup_steps = overrides.get("warmup_steps", round(0.1 * total_steps))
    length = total_steps or max(10 * warmup_steps, 1000)
    chart_steps = overrides.get("chart_steps", max(float(warmup_steps), 0.1 * length))
    config = Config(
        total_steps=total_steps,
        warmup_steps=warmup_steps,
        min_lr_ratio=0.0,
        decay_share=0.2,
        cycles=1.0,
        timescale=1000.0,
        final_multiplier=0.0,
        backoff_factor=0.5,
        rewarm_steps=rounded(0.5 * chart_steps, 10, 200),
        hold_steps=rounded(0.05 * length, 20, 500),
        regrow_growth=2 ** (1 / max(50, 0.1 * length)),
        max_consecutive_skips=8,
        snapshot_slots=0,
        snapshot_steps=rounded(0.02 * length, 32, 1000),
        chart_steps=chart_steps,
        block_steps=math.ceil(chart_steps / 40) if chart_steps > 100 else 1,
        sensitivity=1.0,
        max_restarts=8,
        max_factor=1.0,
        search_steps=-1,
        peak=peak,
        peaks=(peak,),
        group_count=1,
        estimate_suffices=0,
        decay=Decay.COSINE,
        guard_mode=GuardMode.ACT,
    )
    config = dataclasses.replace(config, **overrides)
    if "final_multiplier" in overrides:
        return config
    return dataclasses.replace(config, final_multiplier=last_multiplier(config))


def rounded(steps: float, least: int, most: int) -> int:
    """Return a whole number of steps within bounds."""
    return min(max(round(steps), least), most)
