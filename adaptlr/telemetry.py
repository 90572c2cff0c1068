"""What the controller has seen and done, read from the flight record without any wait."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Any

import numpy.typing as npt

from adaptlr import _extension


class Phase(IntEnum):
    """Where the guard stands.

    Attributes:
        RUN: Nothing is wrong; the factor stays as it is.
        REWARM: After a cut or a restart: the rate grows from a tenth of the new one.
        HOLD: Re-warmed; the rate waits for the run to be quiet.
        REGROW: The rate grows back, to 0.7 of the one that failed at most.
        FAILED: The budget is spent; no further step is taken.
        TRIAL: A quarter of the rate is tried, with the weights as they are.
        RESCUE: From the start of the run the rate ramps up, to find one that holds.
        TEST: The same, while the present state is set aside and may come back.
        PROBE: The loss of older weights is looked at, without an update.
        SEARCH: ``lr="auto"`` looks for the peak.
        SHIFT: The data has changed; weights from before are kept, and asked again now and then.
        RAISE: From the start of the run the rate ramps up beyond the typed one, while the present
            state is set aside and may come back.
    """

    RUN = 0
    REWARM = 1
    HOLD = 2
    REGROW = 3
    FAILED = 4
    TRIAL = 5
    RESCUE = 6
    TEST = 7
    PROBE = 8
    SEARCH = 9
    SHIFT = 10
    RAISE = 11


class Action(IntEnum):
    """What a step was told to do.

    Attributes:
        NONE: To be taken.
        SKIP: To leave the parameters as they are.
    """

    NONE = 0
    SKIP = 1


class Slot(IntEnum):
    """Places for snapshots; in place of one that is put back also that first moments are zeroed."""

    NONE = 0
    START = 1
    FIRST = 2
    SECOND = 3
    ZERO_MOMENT = 4


SLOT_BITS = 15


def action_of(row: npt.NDArray[Any]) -> Action:
    """Return what the step of a record was told to do."""
    return Action(int(row["action"]) & SLOT_BITS)


def saved_slot(row: npt.NDArray[Any]) -> Slot:
    """Return the slot that the step of a record has filled."""
    return Slot(int(row["action"]) >> _extension.SAVE_SHIFT & SLOT_BITS)


def restored_slot(row: npt.NDArray[Any]) -> Slot:
    """Return the slot that the step of a record has put back."""
    order = restore_order(row)
    return Slot.NONE if order is Slot.ZERO_MOMENT else order


def restore_order(row: npt.NDArray[Any]) -> Slot:
    """Return the slot that the step of a record has put back, or ZERO_MOMENT."""
    return Slot(int(row["action"]) >> _extension.RESTORE_SHIFT & SLOT_BITS)


class Flag(IntFlag):
    """What was seen in a step; docs/algorithm.md has the thresholds.

    Attributes:
        NONFINITE: The loss, or the gradient norm, is NaN or infinite; the step is skipped.
        SPIKE: One loss lies far above its level. Informs only.
        DIVERGE: The loss runs away.
        DRIFT: The level of the loss has crept up from its lowest.
        WORSE: The level is above where the run began.
        OVERFLOW: GradScaler found an infinite gradient; the step is skipped.
        OVERWRITTEN: Somebody else has written the learning rate.
        ENDED: The run is longer than ``total_steps``.
        NORM_SPIKE: One gradient norm lies far above its level. Informs only.
        LOST: The progress that was made is lost.
        ABOVE: The loss has risen above the first one.
        NO_PROGRESS: The loss is where it began; heeded early in a run only.
        STALL: The loss has stopped falling; heeded early in a run only.
        FAR_LR: The learning rate is far off what the first gradient suggests: the typed one, or
            one that a restart lowers for that.
        FOUND: A search has ended, and the peak is set.
    """

    NONFINITE = 1
    SPIKE = 2
    DIVERGE = 4
    DRIFT = 8
    WORSE = 16
    OVERFLOW = 32
    OVERWRITTEN = 64
    ENDED = 128
    NORM_SPIKE = 256
    LOST = 512
    ABOVE = 1024
    NO_PROGRESS = 2048
    STALL = 4096
    FAR_LR = 8192
    FOUND = 16384


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
        factor: What the guard multiplies the scheduled rate by; above 0.
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

    def _repr_html_(self) -> str:
        """Show a table in notebooks."""
        cells = {
            "step": f"{self.step:,}",
            "loss": f"{self.loss:.4g}",
            "level ± noise": f"{self.level:.4g} ± {self.scale:.2g}",
            "slope a step (t)": f"{self.slope:.2g} ({self.t_statistic:.1f})",
            "lr": f"{self.lr:.3g}",
            "factor": f"{self.factor:.3g}",
            "phase": self.phase.name,
            "flags": ", ".join(flag.name or "" for flag in Flag if flag in self.flags) or "none",
        }
        head = "".join(f"<th>{name}</th>" for name in cells)
        body = "".join(f"<td>{text}</td>" for text in cells.values())
        return f"<table><tr>{head}</tr><tr>{body}</tr></table>"


def make_status(row: npt.NDArray[Any], lag: int, dropped: int) -> Status:
    """Turn the newest record into a `Status`."""
    numbers = ("loss", "level", "scale", "slope", "t_statistic", "lr", "factor")
    return Status(
        step=int(row["step"]) + 1,
        **{name: float(row[name]) for name in numbers},
        phase=Phase(int(row["phase"])),
        flags=Flag(int(row["flags"])),
        action=action_of(row),
        lag=lag,
        dropped=dropped,
    )


def initial_status(step: int, lr: float) -> Status:
    """Return the status before the first record."""
    nan = math.nan
    return Status(
        step, nan, nan, nan, nan, nan, lr, 1.0, Phase.RUN, Flag(0), Action.NONE, lag=0, dropped=0
    )
