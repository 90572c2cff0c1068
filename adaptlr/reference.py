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
    Measurement,
    detect,
    detect_norm,
    is_finite,
    noise_scale,
    rebase,
)
from adaptlr.reference_state import (
    Action,
    Config,
    Decay,
    Decision,
    Flag,
    GuardMode,
    Phase,
    Record,
    Signals,
    State,
)

__all__ = [
    "Action",
    "Config",
    "Decay",
    "Decision",
    "Flag",
    "GuardMode",
    "Phase",
    "Record",
    "Signals",
    "State",
    "control_step",
    "default_config",
    "detect",
    "detect_norm",
    "guard",
    "rebase",
    "run",
    "schedule",
]

ALARMS = Flag.DIVERGE | Flag.DRIFT | Flag.WORSE
OVERFLOW_LIMIT = 33  # in a row; GradScaler halves from 2^16 to 2^-16 in 32
OPEN_ENDED_STEPS = 10_000  # stands for T in the defaults of a run without end
INTEGERS = {"step": "i8", "phase": "i4", "previous_phase": "i4", "flags": "i4", "action": "i4"}
RECORD_DTYPE = np.dtype([(name, INTEGERS.get(name, "f8")) for name in Record._fields])


def control_step(config: Config, signals: Signals, state: State) -> tuple[Decision, Record]:
    """Advance ``state`` by one optimizer step: measure, judge, act, write the LR (equation 1)."""
    measurement = measure(config, signals, state)
    record = record_before_guard(signals, measurement, state)
    action = guard(config, signals, measurement.flags, state)
    multiplier = state.factor * schedule(config, state.step)
    state.lr = signals.applied_lr if signals.applied_lr >= 0 else config.peak * multiplier
    state.step += 1
    if config.guard_mode == GuardMode.ACT:
        state.skips += action
    record = record._replace(lr=state.lr, factor=state.factor, phase=state.phase, action=action)
    return Decision(multiplier, action, measurement.flags), record


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
        previous_factor=state.factor,
        phase=state.phase,
        previous_phase=state.phase,
        flags=measurement.flags,
        action=Action.NONE,
    )


def measure(config: Config, signals: Signals, state: State) -> Measurement:
    """Collect the flags of the signals and the charts; a failed run is measured no more."""
    flags = Flag.OVERWRITTEN if signals.overwritten else Flag(0)
    if 0 < config.total_steps <= state.step:
        flags |= Flag.ENDED
    if state.phase == Phase.FAILED:
        return Measurement(flags, noise_scale(state), 0.0)
    if signals.overflow:
        flags |= Flag.OVERFLOW
    # Behind an overflow an infinite norm says nothing new: the scaler will lower its scale.
    elif not (signals.grad_norm < 0 or is_finite(signals.grad_norm)):
        flags |= Flag.NONFINITE
    measurement = detect(signals.loss, state)
    flags |= measurement.flags
    if signals.grad_norm >= 0 and not flags & (Flag.NONFINITE | Flag.OVERFLOW):
        flags |= detect_norm(signals.grad_norm, state)
    return measurement._replace(flags=flags)


# Schedule.


def schedule(config: Config, step: float) -> float:
    """Return the multiplier of the peak at a step (equation 2)."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if 0 < config.total_steps <= step:
        return config.final_multiplier
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * decay(config, step)


def decay(config: Config, step: float) -> float:
    """Return d of equation (2), which falls from 1 after warm-up."""
    age = step + 1 - config.warmup_steps
    match config.decay:
        case Decay.CONSTANT:
            return 1.0
        case Decay.INVERSE_SQRT:
            return math.sqrt(config.timescale / (age + config.timescale))
        case Decay.TABLE:
            return float(config.table[int(step)])
    x = age / (config.total_steps - config.warmup_steps)
    match config.decay:
        case Decay.COSINE:
            return 0.5 * (1 + math.cos(math.pi * x))
        case Decay.LINEAR:
            return 1 - x
        case Decay.WSD:
            return min(1.0, (1 - x) / config.decay_share)
    turns = config.cycles * x
    return 0.5 * (1 + math.cos(math.pi * (turns - math.ceil(turns) + 1)))


# Guard.


def guard(config: Config, signals: Signals, flags: Flag, state: State) -> Action:
    """Turn flags into a factor and an action (section 4)."""
    if state.phase == Phase.FAILED:
        return Action.SKIP
    alarm = unmuted_alarm(config, flags, state)
    track_onset(config, signals, alarm, state)
    if exceeds_budget(config, flags, state):
        state.phase, state.phase_step = Phase.FAILED, state.step
        return Action.SKIP
    acts = config.guard_mode == GuardMode.ACT
    cut = bool(alarm) and acts and state.onset_lr > 0
    if alarm and config.guard_mode != GuardMode.OFF:
        if cut:
            cut_factor(config, alarm, state)
        rebase(signals.loss, not cut or not alarm & Flag.DIVERGE, state)
        state.last_alarm = state.step
    elif acts:
        advance_phase(config, state)
    if acts:
        state.factor = phase_factor(config, state)
    skip = cut or flags & Flag.OVERFLOW or (acts and flags & Flag.NONFINITE)
    return Action.SKIP if skip else Action.NONE


def unmuted_alarm(config: Config, flags: Flag, state: State) -> Flag:
    """Return the alarms that count: soon after another only DIVERGE, as the rest are its echo."""
    quiet = state.step - state.last_alarm >= config.rewarm_steps + config.hold_steps
    return flags & (ALARMS if quiet else Flag.DIVERGE)


def track_onset(config: Config, signals: Signals, alarm: Flag, state: State) -> None:
    """Note the LR behind the present loss while nothing is wrong: a later alarm blames it."""
    quiet = is_finite(signals.loss) and state.cusum == 0 and state.outlier_run == 0
    if quiet and not alarm:
        state.onset_lr = state.lr / config.peak


def exceeds_budget(config: Config, flags: Flag, state: State) -> bool:
    """Count broken steps in a row and say whether they are too many to go on."""
    broken = config.guard_mode == GuardMode.ACT and flags & (Flag.NONFINITE | Flag.OVERFLOW)
    if not broken:
        state.consecutive_skips = state.consecutive_overflows = 0.0
        return False
    state.consecutive_skips += bool(flags & Flag.NONFINITE)
    state.consecutive_overflows += bool(flags & Flag.OVERFLOW)
    too_many_skips = state.consecutive_skips > config.max_consecutive_skips
    return too_many_skips or state.consecutive_overflows >= OVERFLOW_LIMIT


def cut_factor(config: Config, alarm: Flag, state: State) -> None:
    """Cut below the factor that failed, the one at the change point (equation 10)."""
    again = state.phase in (Phase.REWARM, Phase.HOLD)
    state.streak = state.streak + 1 if again else 0.0
    backoff = config.backoff_factor ** (1 + min(state.streak, 2))
    if alarm == Flag.DRIFT:
        backoff = 0.7
    multiplier = schedule(config, max(state.step + config.rewarm_steps, config.warmup_steps))
    failed = min(state.factor, state.onset_lr / multiplier) if multiplier else state.factor
    state.cut_factor = max(1e-4, backoff * failed)
    state.ceiling = max(0.7 * failed, state.cut_factor)
    enter(Phase.REWARM, state)
    state.cuts += 1


def enter(phase: Phase, state: State) -> None:
    """Let a phase begin with the next step; it holds in the present record already."""
    state.phase, state.phase_step = phase, state.step + 1


def steps_of_phase(state: State) -> float:
    """Return k: the steps of the phase so far, the present one included."""
    return state.step - state.phase_step + 1


def advance_phase(config: Config, state: State) -> None:
    """Move on from REWARM to HOLD, REGROW and RUN, each in its time."""
    match state.phase:
        case Phase.REWARM if steps_of_phase(state) >= config.rewarm_steps:
            enter(Phase.HOLD, state)
        case Phase.HOLD if steps_of_phase(state) >= config.hold_steps:
            enter(Phase.REGROW, state)
            state.streak = 0.0
        case Phase.REGROW:
            state.cut_factor = min(state.cut_factor * config.regrow_growth, state.ceiling)
            if state.cut_factor == state.ceiling:
                enter(Phase.RUN, state)


def phase_factor(config: Config, state: State) -> float:
    """Return the factor: the cut one, approached along a ramp in REWARM (k = 0 at the alarm)."""
    if state.phase != Phase.REWARM:
        return state.cut_factor
    return state.cut_factor * (0.1 + 0.9 * steps_of_phase(state) / config.rewarm_steps)


# Runs.


def run(
    config: Config,
    losses: npt.NDArray[np.float64],
    *,
    grad_norms: npt.NDArray[np.float64] | None = None,
    overflows: npt.NDArray[np.bool_] | None = None,
    state: State | None = None,
) -> tuple[npt.NDArray[np.void], State]:
    """Run over a trace of losses.

    Args:
        config: The run's settings.
        losses: One a step, shape ``(steps,)``.
        grad_norms: Shape ``(steps,)``; negative: not given. Default: none is given.
        overflows: Shape ``(steps,)``. Default: no step overflows.
        state: Where to go on; it is advanced in place. Default: a new run.

    Returns:
        The records, shape ``(steps,)``, and the state after the last step.
    """
    state = State() if state is None else state
    norms = np.full(len(losses), -1.0) if grad_norms is None else grad_norms
    broken = np.zeros(len(losses), bool) if overflows is None else overflows
    records = [
        control_step(config, Signals(loss, norm, overflow=overflow), state)[1]
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
    length = total_steps or OPEN_ENDED_STEPS
    config = Config(
        total_steps=total_steps,
        warmup_steps=round(0.1 * total_steps),
        min_lr_ratio=0.0,
        decay_share=0.2,
        cycles=1.0,
        timescale=1000.0,
        final_multiplier=0.0,
        backoff_factor=0.5,
        rewarm_steps=round(min(max(0.02 * length, 10), 200)),
        hold_steps=round(min(max(0.05 * length, 20), 500)),
        regrow_growth=2 ** (1 / max(50, 0.1 * length)),
        max_consecutive_skips=8,
        snapshot_slots=0,
        peak=peak,
        peaks=(peak,),
        group_count=1,
        decay=Decay.COSINE,
        guard_mode=GuardMode.ACT,
    )
    config = dataclasses.replace(config, **overrides)
    if "final_multiplier" in overrides:
        return config
    return dataclasses.replace(config, final_multiplier=last_multiplier(config))


def last_multiplier(config: Config) -> float:
    """Return the last multiplier before T that is not zero; 0 (unused) for a run without end."""
    steps = reversed(range(int(config.total_steps)))
    return next((m for m in (schedule(config, step) for step in steps) if m), 0.0)
