"""What the controller has seen and done, read from the flight record without any wait."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Any

import numpy.typing as npt


class Phase(IntEnum):
    """Where the guard stands."""

    RUN = 0
    REWARM = 1
    HOLD = 2
    REGROW = 3
    FAILED = 4


class Action(IntEnum):
    """What a step was told to do."""

    NONE = 0
    SKIP = 1


class Flag(IntFlag):
    """What the charts said about a step; SPIKE and NORM_SPIKE (of ``grad_norm``) inform only."""

    NONFINITE = 1
    SPIKE = 2
    DIVERGE = 4
    DRIFT = 8
    WORSE = 16
    OVERFLOW = 32
    OVERWRITTEN = 64
    ENDED = 128
    NORM_SPIKE = 256


ALARMS = Flag.DIVERGE | Flag.DRIFT | Flag.WORSE


@dataclass(frozen=True)
class Status:
    """The newest record, and how the run is going.

    Attributes:
        step: Optimizer steps taken so far, skipped ones included.
        loss: The last loss that was observed; NaN before the first.
        level: Its robust moving mean, in units of the loss.
        scale: Its noise about the level, in units of the loss.
        slope: Its trend, in units of the loss a step.
        t_statistic: The slope in standard errors; beyond ±3 it is hardly chance.
        lr: Learning rate of the largest group in the last step.
        factor: What the guard multiplies the scheduled rate by, in (0, 1].
        phase: Where the guard stands.
        flags: What the charts said about the last step.
        action: What the last step was told to do.
        lag: Steps that were handed to the device and have not been reported yet.
        dropped: Records and events that newer ones have overwritten.
    """

    step: int
    loss: float
    level: float
    scale: float
    slope: float
    t_statistic: float
    lr: float
    factor: float
    phase: Phase
    flags: Flag
    action: Action
    lag: int
    dropped: int

    @property
    def variance(self) -> float:
        """Robust moving variance of the loss about its level, in squared units of the loss."""
        return self.scale * self.scale


def make_status(row: npt.NDArray[Any], lag: int, dropped: int) -> Status:
    """Turn the newest record into a `Status`."""
    numbers = ("loss", "level", "scale", "slope", "t_statistic", "lr", "factor")
    return Status(
        step=int(row["step"]) + 1,
        **{name: float(row[name]) for name in numbers},
        phase=Phase(int(row["phase"])),
        flags=Flag(int(row["flags"])),
        action=Action(int(row["action"])),
        lag=lag,
        dropped=dropped,
    )


def initial_status(step: int, lr: float) -> Status:
    """Return the status before the first record."""
    nan = math.nan
    return Status(
        step, nan, nan, nan, nan, nan, lr, 1.0, Phase.RUN, Flag(0), Action.NONE, lag=0, dropped=0
    )


@dataclass(frozen=True)
class Event:
    """Something that the controller did, or noticed.

    Attributes:
        step: The optimizer step, from 0, at which it happened.
        kind: ``"skip"``, ``"overflow"``, ``"cut"``, ``"alarm"`` (noticed, not acted on),
            ``"hold"``, ``"regrow"``, ``"run"``, ``"failed"``, ``"ended"``, ``"resume"``,
            ``"extend"`` or ``"set_peak"``.
        reason: One sentence with the numbers.
        lr: Learning rate of the largest group in that step.
        factor: What the guard multiplies the scheduled rate by from here on.
    """

    step: int
    kind: str
    reason: str
    lr: float
    factor: float


def make_event(row: npt.NDArray[Any], rewarm_start: float = 0.1) -> Event:
    """Explain one record of the event ring."""
    kind = _kind(row)
    reason = _REASONS[kind](row) if kind in _REASONS else _alarm_reason(row, kind, rewarm_start)
    return Event(int(row["step"]), kind, reason, float(row["lr"]), float(row["factor"]))


def _kind(row: npt.NDArray[Any]) -> str:
    flags, phase = Flag(int(row["flags"])), Phase(int(row["phase"]))
    changed = phase != Phase(int(row["previous_phase"]))
    if changed and phase is Phase.FAILED:
        return "failed"
    if phase is Phase.REWARM and (changed or row["factor"] < row["previous_factor"]):
        return "cut"
    if flags & Flag.NONFINITE:
        return "skip" if row["action"] == Action.SKIP else "alarm"
    if flags & Flag.OVERFLOW:
        return "overflow"
    if flags & ALARMS:
        return "alarm"
    return phase.name.lower() if changed else "ended"


def _nonfinite(row: npt.NDArray[Any]) -> str:
    if math.isfinite(float(row["loss"])):
        return f"the gradient norm is {float(row['grad_norm']):g}"
    return f"the loss is {float(row['loss']):g}"


def _what_alarmed(row: npt.NDArray[Any]) -> str:
    flags = Flag(int(row["flags"]))
    level = f"level {row['level']:.4g}, noise {row['scale']:.2g}"
    if flags & Flag.DIVERGE:
        return f"the loss runs away (loss {row['loss']:.4g}, {level}, cusum {row['cusum']:.1f})"
    if flags & Flag.WORSE:
        return f"the loss is above where the run began ({level})"
    return f"the loss drifts upwards ({level}, {row['rise']:.1f} standard errors above its best)"


def _alarm_reason(row: npt.NDArray[Any], kind: str, rewarm_start: float) -> str:
    if kind == "alarm":
        what = _nonfinite(row) if row["flags"] & Flag.NONFINITE else _what_alarmed(row)
        return f"{what}; nothing was changed"
    target = float(row["factor"]) / rewarm_start
    return (
        f"{_what_alarmed(row)}; step skipped, learning rate cut to {target:.3g} of its schedule "
        f"(it stood at {float(row['previous_factor']):.3g}) and warmed up again"
    )


_REASONS: dict[str, Callable[[npt.NDArray[Any]], str]] = {
    "skip": lambda row: f"{_nonfinite(row)}; step skipped",
    "overflow": lambda row: "GradScaler found an infinite gradient; step skipped",
    "failed": lambda row: (
        f"{_nonfinite(row) if row['flags'] & Flag.NONFINITE else 'gradients overflow'} once more "
        "and the budget of consecutive skips is spent; no further step is taken"
    ),
    "hold": lambda row: f"re-warmed to {float(row['factor']):.3g} of the schedule; holding",
    "regrow": lambda row: "the loss has been quiet; the learning rate grows again",
    "run": lambda row: f"regrown to {float(row['factor']):.3g} of the schedule, and left there",
    "ended": lambda row: "total_steps are over; the last non-zero learning rate is kept",
}
