"""The data that :mod:`adaptlr.reference` works on; ``csrc/state.h`` describes every field."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class Decay(enum.IntEnum):
    """Shape of the schedule after warm-up."""

    COSINE, LINEAR, CONSTANT, WSD, INVERSE_SQRT, COSINE_RESTARTS, TABLE = range(7)


class GuardMode(enum.IntEnum):
    """What an alarm may do."""

    OFF, OBSERVE, ACT = range(3)


class Phase(enum.IntEnum):
    """Where the guard is between an alarm or an experiment and its end."""

    RUN, REWARM, HOLD, REGROW, FAILED, TRIAL, RESCUE, TEST, PROBE, SEARCH, SHIFT, RAISE = range(12)


class Slot(enum.IntEnum):
    """Place for a snapshot of parameters and optimizer state; or that first moments are zeroed."""

    NO_SLOT, START, FIRST, SECOND, ZERO_MOMENT = range(5)


class Action(enum.IntEnum):
    """What a step is told to do."""

    NONE, SKIP = range(2)


class Flag:
    """What a step has shown, a bit each: ints, since sums of an ``IntFlag`` are slow."""

    NONFINITE, SPIKE, DIVERGE, DRIFT, WORSE, OVERFLOW, OVERWRITTEN, ENDED, NORM_SPIKE = (
        1 << i for i in range(9)
    )
    LOST, ABOVE, NO_PROGRESS, STALL, FAR_LR, FOUND = (1 << i for i in range(9, 15))


@dataclasses.dataclass(frozen=True)
class Config:
    """What the user asked for, resolved to numbers; see :func:`default_config`."""

    total_steps: float
    warmup_steps: float
    min_lr_ratio: float
    decay_share: float
    cycles: float
    timescale: float
    final_multiplier: float
    backoff_factor: float
    rewarm_steps: float
    hold_steps: float
    regrow_growth: float
    max_consecutive_skips: float
    snapshot_slots: float
    snapshot_steps: float
    chart_steps: float
    block_steps: float
    sensitivity: float
    max_restarts: float
    max_factor: float
    search_steps: float
    peak: float
    peaks: tuple[float, ...]
    group_count: int
    estimate_suffices: int
    decay: Decay
    guard_mode: GuardMode
    table: Sequence[float] | npt.NDArray[np.float64] = ()


@dataclasses.dataclass(frozen=True)
class Signals:
    """What one optimizer step brings in."""

    loss: float
    grad_norm: float = -1.0
    applied_lr: float = -1.0
    overflow: bool = False
    overwritten: bool = False


DIFFERENCES = 24  # that the noise is taken from


@dataclasses.dataclass
class Progress:
    """What the collapse charts know of the loss since the run was started, or started again."""

    count: float = 0.0
    first_loss: float = 0.0
    previous_loss: float = 0.0
    next_difference: float = 0.0
    difference_trend: float = 0.0
    difference_residual: float = 0.0
    difference_agreement: float = 0.0
    variance_factor: float = 0.0
    noise: float = 0.0
    cleanest_noise: float = 0.0
    fast_level: float = 0.0
    slow_level: float = 0.0
    log_lr: float = 0.0
    highest_level: float = 0.0
    lowest_level: float = 0.0
    lowest_slow_level: float = 0.0
    lowest_variance: float = 0.0
    lowest_slow_variance: float = 0.0
    lowest_noise: float = 0.0
    lowest_log_lr: float = 0.0
    lowest_evidence: float = 0.0
    lowest_age: float = 0.0


def no_differences() -> list[float]:
    """Return an empty window of differences."""
    return [0.0] * DIFFERENCES


@dataclasses.dataclass
class Curve:
    """The long run of the loss and of the gradient norm."""

    samples: float = 0.0
    observed: float = 0.0
    level: float = 0.0
    variance: float = 0.0
    mean_age: float = 0.0
    age_variance: float = 0.0
    age_covariance: float = 0.0
    sign_agreement: float = 0.0
    previous_score: float = 0.0
    mean_score: float = 0.0
    cusum: float = 0.0
    outlier_run: float = 0.0
    spike_threshold: float = 6.0
    best_level: float = 0.0
    best_samples: float = 0.0
    start_level: float = 0.0
    max_loss: float = 0.0
    min_loss: float = 0.0
    slope: float = 0.0
    t_statistic: float = 0.0
    score: float = 0.0
    rise: float = 0.0
    norm_samples: float = 0.0
    norm_level: float = 0.0
    norm_variance: float = 0.0
    norm_spike_threshold: float = 6.0


@dataclasses.dataclass
class Statistics(Curve):
    """All that is measured; set aside and put back with the weights."""

    block_sum: float = 0.0
    block_count: float = 0.0
    fine: Progress = dataclasses.field(default_factory=Progress)
    coarse: Progress = dataclasses.field(default_factory=Progress)
    fine_differences: list[float] = dataclasses.field(default_factory=no_differences)
    coarse_differences: list[float] = dataclasses.field(default_factory=no_differences)


@dataclasses.dataclass
class State(Statistics):
    """Everything that lasts from step to step."""

    step: float = 0.0
    lr: float = 0.0
    phase: Phase = Phase.RUN
    phase_step: float = 0.0
    factor: float = 1.0
    cut_factor: float = 1.0
    ceiling: float = 1.0
    onset_lr: float = 0.0
    streak: float = 0.0
    last_alarm: float = -1e9
    consecutive_skips: float = 0.0
    consecutive_overflows: float = 0.0
    skips: float = 0.0
    cuts: float = 0.0
    restarts: float = 0.0
    origin_step: float = 0.0
    restarted: float = 0.0
    first_lr: float = 0.0
    ramp_lr: float = 0.0
    ramp_growth: float = 0.0
    ramp_start: float = 0.0
    ramp_limit: float = 0.0
    trial_factor: float = 0.0
    trial_level: float = 0.0
    trials: float = 0.0
    tested: float = 0.0
    soft_step: float = 0.0
    ramp_level: float = 0.0
    ramp_log_lr: float = 0.0
    probe_sum: float = 0.0
    collapsed: float = 0.0
    aside_slot: Slot = Slot.NO_SLOT
    good_slot: Slot = Slot.NO_SLOT
    pending_slot: Slot = Slot.NO_SLOT
    pending_step: float = 0.0
    peak: float = 0.0
    estimate: float = 0.0
    warmup_start: float = 0.0


# The states that lie beside the snapshots of Slot.FIRST and Slot.SECOND.
Archive = dict[Slot, State]


def flattened(state: State) -> dict[str, float | list[float]]:
    """Return the fields under the names that the rows of the extension have: ``fine.count``."""
    fields: dict[str, float | list[float]] = {}
    for name, value in vars(state).items():
        if isinstance(value, Progress):
            fields |= {f"{name}.{key}": number for key, number in vars(value).items()}
        else:
            fields[name] = value
    return fields


class Decision(NamedTuple):
    """What a step is told to do; the LR of group g is ``peaks[g] * multiplier``."""

    multiplier: float
    action: Action
    flags: int
    save: Slot
    restore: Slot
    event: bool


class Record(NamedTuple):
    """One line of the flight record; what was measured is as the guard saw it, before a rebase."""

    step: int
    loss: float
    level: float
    scale: float
    slope: float
    t_statistic: float
    score: float
    cusum: float
    rise: float
    grad_norm: float
    lr: float
    factor: float
    target_factor: float
    phase: Phase
    previous_phase: Phase
    flags: int
    action: int  # an Action, and the slots to save and restore 4 and 8 bits further up
