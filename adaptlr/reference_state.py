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
    """Where the guard is between an alarm and its end."""

    RUN, REWARM, HOLD, REGROW, FAILED = range(5)


class Action(enum.IntEnum):
    """What a step is told to do."""

    NONE, SKIP = range(2)


class Flag(enum.IntFlag):
    """What a step has shown."""

    NONFINITE, SPIKE, DIVERGE, DRIFT, WORSE, OVERFLOW, OVERWRITTEN, ENDED, NORM_SPIKE = (
        1 << i for i in range(9)
    )


ALARMS = Flag.DIVERGE | Flag.DRIFT | Flag.WORSE


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
    peak: float
    peaks: tuple[float, ...]
    group_count: int
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


@dataclasses.dataclass
class State:
    """Everything that lasts from step to step."""

    step: float = 0.0
    lr: float = 0.0
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


class Decision(NamedTuple):
    """What a step is told to do; the LR of group g is ``peaks[g] * multiplier``."""

    multiplier: float
    action: Action
    flags: Flag


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
    previous_factor: float
    phase: Phase
    previous_phase: Phase
    flags: Flag
    action: Action
