"""The demo in words: a table, and what the numbers say about the guard."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from rich.table import Table

if TYPE_CHECKING:
    from adaptlr import Event
    from adaptlr.cli.demo_training import Pair, Run

LEARNED = 0.8  # a run has learned something once its loss is below this share of the untrained one
AGREEMENT = 1e-3  # in units of the loss; differences in rounding may grow to that over a run
SHOWN_EVENTS = 6
NO_RECOVERY = "Recovery from a snapshot is not part of this version."


def table(pair: Pair) -> Table:
    """Return the final numbers of both runs, and what the controller did and when."""
    result = Table(title=f"Peak learning rate {pair.peak:g}", title_justify="left")
    result.add_column("run")
    result.add_column("eval loss", justify="right")
    result.add_column("accuracy", justify="right")
    result.add_column("what the controller did")
    result.add_row("untrained", *numbers(*pair.untrained), "")
    result.add_row("plain", *numbers(pair.plain.eval_loss, pair.plain.accuracy), "")
    run = pair.adaptlr
    result.add_row("adaptlr", *numbers(run.eval_loss, run.accuracy), story(run))
    return result


def numbers(eval_loss: float, accuracy: float) -> tuple[str, str]:
    """Format the two numbers of a row."""
    return f"{eval_loss:.3f}", f"{accuracy:.1%}"


def story(run: Run) -> str:
    """Tell the events one by one, up to a number that can be read."""
    lines = [f"step {event.step}: {event.reason}" for event in run.events[:SHOWN_EVENTS]]
    if len(run.events) > SHOWN_EVENTS:
        lines.append(f"and {len(run.events) - SHOWN_EVENTS} more events")
    if run.gave_up:
        lines.append(f"stopped after {len(run.losses)} steps")
    return "\n".join(lines) or "nothing: no chart gave an alarm"


def headline(pair: Pair) -> str:
    """Say in a few words how the pair ended."""
    plain, adaptive = learned(pair, pair.plain), learned(pair, pair.adaptlr)
    if plain and adaptive:
        agree = difference(pair) <= AGREEMENT
        return "adaptlr leaves a healthy run alone" if agree else "Both runs learn"
    if adaptive:
        return "adaptlr rescues the run"
    if plain:
        return "Only the plain run learns: the guard does harm"
    if pair.adaptlr.events:
        return "Neither run learns, whatever the guard did"
    return "Neither run learns, and the guard sees nothing"


def verdict(pair: Pair) -> str:
    """Say what the numbers show, also where adaptlr did not help."""
    plain, adaptive = learned(pair, pair.plain), learned(pair, pair.adaptlr)
    if plain and adaptive:
        if difference(pair) <= AGREEMENT:
            how = f"to within {difference(pair):.0e}" if difference(pair) else "exactly"
            return f"Both runs learned and agree {how} in every loss: adaptlr left this run alone."
        change = pair.adaptlr.eval_loss - pair.plain.eval_loss
        return f"Both runs learned; with adaptlr the eval loss is {change:+.3f} against plain."
    if adaptive:
        return "The plain run learned nothing; with adaptlr the model learned."
    if plain:
        return "The plain run learned, and with adaptlr the model did not: the guard did harm here."
    if not pair.adaptlr.events:
        return f"Neither run learned. The guard saw nothing and did nothing. {NO_RECOVERY}"
    acts = count_kinds(pair.adaptlr.events)
    return f"Neither run learned. The guard acted ({acts}) but did not rescue it. {NO_RECOVERY}"


def learned(pair: Pair, run: Run) -> bool:
    """Say whether a run got clearly below the loss of the untrained model."""
    return math.isfinite(run.eval_loss) and run.eval_loss < LEARNED * pair.untrained[0]


def difference(pair: Pair) -> float:
    """Return the largest difference between the losses of both runs in one step."""
    plain, adaptive = np.array(pair.plain.losses), np.array(pair.adaptlr.losses)
    return float(np.abs(plain - adaptive).max()) if len(plain) == len(adaptive) else math.inf


def count_kinds(events: Sequence[Event]) -> str:
    """Return the kinds of events in order of appearance, with their numbers."""
    kinds = [event.kind for event in events]
    return ", ".join(f"{kind} x{kinds.count(kind)}" for kind in dict.fromkeys(kinds))
