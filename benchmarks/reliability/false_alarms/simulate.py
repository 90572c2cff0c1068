"""One healthy run under the control step of the extension, watched or acted upon."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from families import Family, Random, times

from adaptlr._extension import ZERO_MOMENT, HostController
from adaptlr.config import Guard, ResolvedConfig
from adaptlr.telemetry import Flag, Phase, Slot

PEAK = 1e-3
SLOTS = 3  # for snapshots
ALARMS = (Flag.LOST, Flag.ABOVE, Flag.DIVERGE, Flag.DRIFT, Flag.WORSE)
READ_EVERY = 1000  # steps; the flight record keeps 1024 events
SAVE_SHIFT, RESTORE_SHIFT, SLOT_MASK = 4, 8, 15


def config_row(
    steps: int, mode: Literal["act", "observe"], sensitivity: float = 1.0
) -> npt.NDArray[np.void]:
    """Return the product's defaults for a run of that many steps."""
    config = ResolvedConfig(
        total_steps=steps,
        warmup=0.1,
        decay="cosine",
        min_lr_ratio=0.0,
        guard=Guard(mode=mode, sensitivity=sensitivity),
        peaks=[PEAK],
    )
    row = config.row.copy()
    row["snapshot_slots"] = SLOTS
    return row


def alarm_flags(family: Family, row: npt.NDArray[np.void], random: Random) -> npt.NDArray[np.int16]:
    """Return the flags of every hard alarm that an observing guard would have answered."""
    controller = HostController(row, 1)
    losses = family.draw(times(int(row["total_steps"])), random).tolist()
    flags = []
    for first in range(0, len(losses), READ_EVERY):
        seen = int(controller.events()["sequence"][-1:].sum())
        for loss in losses[first : first + READ_EVERY]:
            controller.step(loss)
        flags.append(controller.events(seen)["flags"])
    return np.concatenate(flags)


class Outcome(NamedTuple):
    """What an acting guard did to a run that needed nothing.

    Attributes:
        cuts: Of the factor, less those that were taken back.
        answers: Rollbacks, ramps, tests, probes, and trials that did not help.
        lowered: Whether the factor is below 1 in the end.
        failed: Whether the guard gave the run up.
    """

    cuts: int
    answers: int
    lowered: bool
    failed: bool


class Replay:
    """The losses of a run whose weights may be put back.

    Weights bring their place on the curve back, not the batches: the noise from there on is new.
    """

    def __init__(self, family: Family, steps: int, random: Random) -> None:
        """Draw the losses of a run in which nothing happens."""
        self._family, self._steps, self._random = family, steps, random
        self._places = {int(Slot.START): 0}
        self._begin(0, 0)

    def _begin(self, step: int, place: int) -> None:
        self._first_step, self._first_place = step, place
        drawn = self._family.draw(times(self._steps, step, place), self._random)
        self._losses = drawn.tolist()

    def losses(self, step: int) -> Iterator[float]:
        """Iterate over the losses from ``step`` on."""
        return iter(self._losses[step - self._first_step :])

    def save(self, slot: int, step: int) -> None:
        """Keep the weights after the update of ``step``."""
        self._places[slot] = self._first_place + step + 1 - self._first_step

    def restore(self, slot: int, step: int) -> None:
        """Put weights back after the update of ``step``."""
        self._begin(step + 1, self._places[slot])

    def apply(self, records: npt.NDArray[np.void]) -> None:
        """Save and restore what the records say."""
        for step, action in zip(records["step"].tolist(), records["action"].tolist(), strict=True):
            save, restore = action >> SAVE_SHIFT & SLOT_MASK, action >> RESTORE_SHIFT & SLOT_MASK
            if save:
                self.save(save, step)
            if restore not in (0, ZERO_MOMENT):  # a cut puts no weights back
                self.restore(restore, step)


def closed_loop(family: Family, row: npt.NDArray[np.void], random: Random) -> Outcome:
    """Let a guard act on a run to which the learning rate makes no difference."""
    steps = int(row["total_steps"])
    controller, replay = HostController(row, steps), Replay(family, steps, random)
    control, step, applied = controller.step, 0, 0
    while step < steps and not is_failed(controller):
        for loss in replay.losses(step):
            step += 1
            if control(loss)[0] or step == steps:  # only a skipped step can have put weights back
                break
        replay.apply(controller.records(applied))
        applied = step
    return outcome_of(controller)


def is_failed(controller: HostController) -> bool:
    return int(controller.state["phase"]) == Phase.FAILED


def outcome_of(controller: HostController) -> Outcome:
    state = controller.state
    events = controller.events()  # the last 1024: plenty
    restores = events["action"] >> RESTORE_SHIFT & SLOT_MASK != 0
    tries = (events["phase"] == Phase.TRIAL) & (events["previous_phase"] != Phase.TRIAL)
    answers = int(np.count_nonzero(restores | tries))
    lowered = bool(state["cut_factor"] < 1.0)
    return Outcome(int(state["cuts"]), answers, lowered, is_failed(controller))
