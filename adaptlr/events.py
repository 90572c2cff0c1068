"""What the controller did, in sentences with the numbers that made it do so."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy.typing as npt

from adaptlr.telemetry import Action, Flag, Phase, Slot, action_of, restore_order, restored_slot

Row: TypeAlias = npt.NDArray[Any]

ALARMS = Flag.DIVERGE | Flag.DRIFT | Flag.WORSE | Flag.LOST | Flag.ABOVE
RAMP_DIVISOR = 3.0  # from the rate of the lowest level on a ramp to the one that it suggests


@dataclass(frozen=True)
class Event:
    """Something that the controller did, or noticed.

    Attributes:
        step: The optimizer step, from 0, at which it happened.
        kind: ``"skip"``, ``"overflow"``, ``"alarm"`` (noticed, not acted on), ``"cut"``,
            ``"restart"``, ``"rescue"``, ``"trial"``, ``"kept"``, ``"test"``, ``"undone"``,
            ``"raise"``, ``"raised"``, ``"probe"``, ``"back"``, ``"shift"``, ``"hold"``,
            ``"regrow"``, ``"run"``, ``"failed"``, ``"far_lr"``, ``"search"``, ``"found"``,
            ``"ended"``, ``"resume"``, ``"extend"`` or ``"set_peak"``.
        reason: One sentence with the numbers.
        lr: Learning rate of the largest group in that step.
        factor: What the guard multiplies the scheduled rate by, once re-warmed; after a search, the
            rate that was found.
    """

    step: int
    kind: str
    reason: str
    lr: float
    factor: float


def make_events(rows: Iterable[Row]) -> list[Event]:
    """Turn the records of the event ring, oldest first, into events."""
    events, factor, found = [], 1.0, 1.0
    for row in rows:
        if Flag(int(row["flags"])) & Flag.FOUND:
            found = float(row["target_factor"])
        row = _relative(row, found)
        kind = _kind(row, factor)
        target = float(row["target_factor"])
        reason = _REASONS[kind](row, factor)
        events.append(Event(int(row["step"]), kind, reason, float(row["lr"]), target))
        factor = target
    return events


def _relative(row: Row, found: float) -> Row:
    """Return a record whose factors are shares of the one that a search has found."""
    if found == 1.0:
        return row
    row = row.copy()
    for name in ("factor", "target_factor"):
        row[name] /= found
    return row


_ENTERED = {
    Phase.SEARCH: "search",
    Phase.RESCUE: "rescue",
    Phase.TRIAL: "trial",
    Phase.TEST: "test",
    Phase.PROBE: "probe",
    Phase.SHIFT: "shift",
    Phase.RAISE: "raise",
    Phase.HOLD: "hold",
    Phase.REGROW: "regrow",
    Phase.FAILED: "failed",
}
_LEFT = {Phase.TEST: "undone", Phase.RAISE: "undone", Phase.PROBE: "shift"}


def _kind(row: Row, factor: float) -> str:
    flags, phase = Flag(int(row["flags"])), Phase(int(row["phase"]))
    previous = Phase(int(row["previous_phase"]))
    restored = restored_slot(row)
    if flags & Flag.FOUND:
        return "found"
    if flags & Flag.FAR_LR and not restored:
        return "far_lr"
    if phase in _ENTERED and (phase != previous or restored):
        return _ENTERED[phase]
    if phase is Phase.REWARM and restored:
        return "raised" if previous is Phase.RAISE else "restart"
    if phase is Phase.REWARM and (phase != previous or flags & ALARMS):
        return "cut"
    if phase is Phase.RUN and previous is Phase.TRIAL:
        return "kept" if row["target_factor"] <= factor else "undone"
    if previous is Phase.PROBE and phase is not previous and not restored:
        return "back"
    if phase is Phase.RUN and previous in _LEFT:
        return _LEFT[previous]
    if phase is Phase.RUN and restored:  # the state from before a raise
        return "undone"
    return _kind_within_a_phase(row, flags, phase != previous)


def _kind_within_a_phase(row: Row, flags: Flag, changed: bool) -> str:
    if flags & Flag.NONFINITE:
        return "skip" if action_of(row) is Action.SKIP else "alarm"
    if flags & Flag.OVERFLOW:
        return "overflow"
    if flags & ALARMS:
        return "alarm"
    return "run" if changed else "ended"


def _nonfinite(row: Row) -> str:
    if math.isfinite(float(row["loss"])):
        return f"the gradient norm is {float(row['grad_norm']):g}"
    return f"the loss is {float(row['loss']):g}"


def _level(row: Row) -> str:
    return f"level {float(row['level']):.4g}, noise {float(row['scale']):.2g}"


def _seen(row: Row) -> str:
    """Say what the charts saw, or that no chart did."""
    flags, level = Flag(int(row["flags"])), _level(row)
    errors = cusum = lowest = best = ""
    if not flags & Flag.FAR_LR:  # whose record tells of rates in their place
        errors, cusum = f", {row['rise']:.1f} standard errors", f", cusum {row['cusum']:.1f}"
        lowest, best = f"{errors} above its lowest", f"{errors} above its best"
    if flags & Flag.LOST:
        return f"the progress made is lost ({level}{lowest})"
    if flags & Flag.ABOVE:
        return f"the loss has risen above the first one ({level}{errors})"
    if flags & Flag.DIVERGE:
        return f"the loss runs away (loss {float(row['loss']):.4g}, {level}{cusum})"
    if flags & Flag.WORSE:
        return f"the loss is above where the run began ({level})"
    if flags & Flag.DRIFT:
        return f"the loss drifts upwards ({level}{best})"
    if flags & Flag.NO_PROGRESS:
        return f"the loss is where it began ({level})"
    if flags & Flag.STALL:
        return f"the loss has stopped falling{lowest} ({level})"
    if flags & Flag.NONFINITE:
        return f"{_nonfinite(row)} once more"
    return ""


def _restored(row: Row) -> str:
    slot = restored_slot(row)
    where = "from the start" if slot is Slot.START else "from the last good snapshot"
    return f"weights and optimizer state {where} are put back"


def _cut(row: Row, factor: float) -> str:
    what = _seen(row) or "the loss is back with the snapshot's weights, so lr was to blame"
    zeroed = "momentum zeroed, " if restore_order(row) is Slot.ZERO_MOMENT else ""
    return (
        f"{what}; step skipped, {zeroed}learning rate cut to {float(row['target_factor']):.3g} of "
        f"its schedule (it stood at {factor:.3g}) and warmed up again"
    )


def _restart(row: Row, factor: float) -> str:
    previous = Phase(int(row["previous_phase"]))
    found = {
        Phase.TEST: "from the start a lower learning rate got lower",
        Phase.TRIAL: "a lower learning rate did not help",
        Phase.RESCUE: "the ramp has shown which learning rate holds",
    }
    what = _seen(row) or found.get(previous, "a lower learning rate had got lower before")
    if Flag(int(row["flags"])) & Flag.FAR_LR:
        what = "the lower learning rate got no lower" if previous is Phase.TEST else what
        what += f", and the first gradient suggests {float(row['rise']):.2g}"
    return (
        f"{what}; {_restored(row)}, learning rate set to {float(row['target_factor']):.3g} of its "
        f"schedule (it stood at {factor:.3g}) and warmed up again"
    )


def _raise(row: Row, _: float) -> str:
    typed, suggested = float(row["score"]), float(row["rise"])
    began = Flag(int(row["flags"])) & Flag.NO_PROGRESS
    slope = f"slope {float(row['slope']):.2g} a step, t-statistic {float(row['t_statistic']):.1f}"
    what = "the loss is where it began" if began else "the loss falls slowly"
    why = (
        f"the first gradient suggests {suggested:.2g}, {suggested / typed:.0f} times the rate"
        if suggested
        else "no slower than at first"
    )
    return (
        f"{what} ({_level(row)}, {slope}), and {why}; the present state is set aside, "
        f"{_restored(row)}, learning rate grows from {float(row['lr']):.2g} to see whether a "
        "higher one gets lower"
    )


def _raised(row: Row, factor: float) -> str:
    suggested, lowest = float(row["rise"]), float(row["cusum"])
    what = (
        f"on the ramp the loss was lowest, {float(row['level']):.4g}, at lr {lowest:.2g}"
        if lowest
        else "the ramp has changed nothing yet"
    )
    gradient = f", and the first gradient suggests {suggested:.2g}" if suggested else ""
    return (
        f"{what}{gradient}; {_restored(row)}, learning rate set to "
        f"{float(row['target_factor']):.3g} of its schedule (it stood at {factor:.3g}) and warmed "
        "up; the state set aside is kept until the loss is lower than there"
    )


def _undone(row: Row, _: float) -> str:
    previous = Phase(int(row["previous_phase"]))
    what = {
        Phase.TRIAL: "a lower learning rate made no difference",
        Phase.TEST: "the lower learning rate got no lower",
        Phase.RAISE: _seen(row) or "a higher learning rate got no lower",
    }.get(previous, _seen(row) or "the raised learning rate got no lower")
    back = "the state set aside is back, " if restored_slot(row) else ""
    factor = float(row["target_factor"])
    return f"{what}; {back}learning rate at {factor:.3g} of its schedule as before"


def _probe(row: Row, _: float) -> str:
    alarm = Flag(int(row["flags"])) & (ALARMS | Flag.NONFINITE)
    asked_again = Phase(int(row["previous_phase"])) is Phase.SHIFT and not alarm
    what = "the data may be as it was before it changed" if asked_again else _seen(row)
    return f"{what}; {_restored(row)} to see, without an update, whether the loss is lower there"


def _run(row: Row, _: float) -> str:
    previous = Phase(int(row["previous_phase"]))
    if previous is Phase.SHIFT:
        return "the loss is down again after the change of the data"
    if previous is Phase.RESCUE:
        return "up to the learning rate in use nothing has gone wrong again: it is left there"
    return f"at {float(row['target_factor']):.3g} of the schedule, and left there"


def _shift(row: Row, _: float) -> str:
    broken = Flag(int(row["flags"])) & Flag.NONFINITE
    what = (
        f"{_nonfinite(row)} with weights that are known to be good, so the data is broken"
        if broken
        else "the loss is as high with weights that are known to be good, so the data has changed"
    )
    kept = Phase(int(row["phase"])) is Phase.SHIFT
    return f"{what}; the state set aside is back, and nothing is cut" + (
        ", but that snapshot is kept for a while" if kept else ""
    )


def _far_lr(row: Row, _: float) -> str:
    typed, suggested = float(row["score"]), float(row["rise"])
    times = max(typed / suggested, suggested / typed)
    return (
        f"lr={typed:.3g} is {times:.0f} times {'above' if typed > suggested else 'below'} what the "
        f"first gradient suggests, about {suggested:.2g}"
    )


def _search(row: Row, _: float) -> str:
    if restored_slot(row):
        what = _seen(row) or "the loss has begun to change"
        return f"{what}; {_restored(row)}, and another ramp begins lower"
    return (
        f"looking for a learning rate: a few losses at {float(row['lr']):.2g}, where nothing "
        "changes, then it grows"
    )


def _found(row: Row, _: float) -> str:
    peak, suggested, lowest = (float(row[name]) for name in ("score", "rise", "cusum"))
    gradient = f"the first gradient suggests {suggested:.2g}" if suggested else ""
    if not lowest and not suggested:
        return f"no learning rate has changed the loss clearly; the one given, {peak:.3g}, stays"
    if not lowest:
        flat = "no ramp confirms it" if restored_slot(row) else "there was no room for a ramp"
        return f"{gradient} and {flat}; peak set to {peak:.3g}"
    ramp = f"on the ramp the loss was lowest, {float(row['level']):.4g}, at lr {lowest:.2g}"
    if not suggested:
        return f"{ramp}; {_restored(row)}, peak set to {peak:.3g}"
    shown = lowest / RAMP_DIVISOR
    apart = f"a factor of {max(shown / suggested, suggested / shown):.1f} apart"
    if not math.isclose(peak, math.sqrt(shown * suggested), rel_tol=0.01):
        apart += ", which is more than is believed"
    return (
        f"{ramp}, which suggests {shown:.2g}; {gradient}, {apart}; {_restored(row)}, peak set to "
        f"{peak:.3g}"
    )


def _failed(row: Row, factor: float) -> str:
    flags = Flag(int(row["flags"]))
    if flags & Flag.OVERFLOW:
        what = "gradients overflow once more and the budget of consecutive skips is spent"
    elif flags & Flag.NONFINITE and not flags & ALARMS:
        what = f"{_nonfinite(row)} once more and the budget of consecutive skips is spent"
    else:
        what = f"{_seen(row)} and the budget of restarts is spent"
    return (
        f"{what}; {_restored(row)}; no further step is taken"
        if restored_slot(row)
        else (f"{what}; no further step is taken")
    )


_REASONS: dict[str, Callable[[Row, float], str]] = {
    "skip": lambda row, _: f"{_nonfinite(row)}; step skipped",
    "overflow": lambda row, _: "GradScaler found an infinite gradient; step skipped",
    "alarm": lambda row, _: f"{_alarm(row)}; nothing was changed",
    "cut": _cut,
    "restart": _restart,
    "rescue": lambda row, _: (
        f"{_seen(row)} and nothing was learned before; {_restored(row)}, learning rate grows from "
        f"{float(row['lr']):.2g} to find one that holds"
    ),
    "trial": lambda row, factor: (
        f"{_seen(row)}; {float(row['target_factor']):.3g} of the schedule is tried in place of "
        f"{factor:.3g}"
    ),
    "kept": lambda row, _: (
        f"a new lowest level, and a rise at the rate from before ({_level(row)}); the lower "
        "learning rate is kept, "
        f"{float(row['target_factor']):.3g} of the schedule"
    ),
    "test": lambda row, _: (
        f"{_seen(row) or 'a lower learning rate did not help'}; the present state is set aside, "
        f"{_restored(row)}, learning rate grows from {float(row['lr']):.2g} to see whether a lower "
        "one gets lower"
    ),
    "undone": _undone,
    "raise": _raise,
    "raised": _raised,
    "probe": _probe,
    "back": lambda row, _: (
        "the loss is back with the snapshot's weights; the run goes on from them, at "
        f"{float(row['target_factor']):.3g} of its schedule as before"
    ),
    "shift": _shift,
    "far_lr": _far_lr,
    "search": _search,
    "found": _found,
    "failed": _failed,
    "hold": lambda row, _: f"re-warmed to {float(row['factor']):.3g} of the schedule; holding",
    "regrow": lambda row, _: "the loss has been quiet; the learning rate grows again",
    "run": _run,
    "ended": lambda row, _: "total_steps are over; the last non-zero learning rate is kept",
}


def _alarm(row: Row) -> str:
    flags = Flag(int(row["flags"]))
    return _nonfinite(row) if flags & Flag.NONFINITE else _seen(row)
