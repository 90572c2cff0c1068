"""The demo in words: the numbers, what the controller did, and what both say about the guard."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
from rich.padding import Padding
from rich.table import Table

if TYPE_CHECKING:
    from adaptlr import Event
    from adaptlr.cli.demo_training import Pair, Run

LEARNED = 0.8  # a run has learned something once its loss is below this share of the untrained one
AGREEMENT = 1e-3  # in units of the loss; differences in rounding may grow to that over a run
SHOWN_EVENTS = 12
LAST_EVENTS = 4  # of those shown, where the middle is left out


def table(pair: Pair) -> Table:
    """Return the final numbers of both runs."""
    result = Table(title=f"Peak learning rate {pair.peak:g}", title_justify="left")
    result.add_column("run")
    result.add_column("eval loss", justify="right")
    result.add_column("accuracy", justify="right")
    result.add_row("untrained", *numbers(*pair.untrained))
    for run in (pair.plain, pair.adaptlr):
        result.add_row(run.name, *numbers(run.eval_loss, run.accuracy))
    return result


def numbers(eval_loss: float, accuracy: float) -> tuple[str, str]:
    """Format the two numbers of a row."""
    return f"{eval_loss:.3f}", f"{accuracy:.1%}"


def story(run: Run) -> Padding:
    """Return what the controller did, one event a row; long sentences wrap in their column."""
    rows = Table.grid(padding=(0, 2))
    rows.add_column(justify="right", no_wrap=True)
    rows.add_column(no_wrap=True)
    rows.add_column()
    for step, kind, reason in shorten(told_once(run.events)):
        rows.add_row(step, kind, reason)
    if not run.events:
        rows.add_row("", "nothing", "no chart gave an alarm")
    if run.gave_up:
        rows.add_row("", "the end", f"the guard stopped the run after {len(run.losses)} steps")
    return Padding(rows, (0, 0, 0, 1))


def told_once(events: Sequence[Event]) -> list[tuple[str, str, str]]:
    """Return step, kind and reason of each event; of equal ones in a row the first alone."""
    rows = []
    for _, group in groupby(events, lambda event: (event.kind, event.reason)):
        same = list(group)
        first, times = same[0], f" (x{len(same)})" if len(same) > 1 else ""
        rows.append((f"step {first.step}", first.kind, first.reason + times))
    return rows


def shorten(rows: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """Leave the middle out of a story that is too long: how it began and ended tells most."""
    left_out = len(rows) - SHOWN_EVENTS
    if left_out <= 0:
        return rows
    first = SHOWN_EVENTS - LAST_EVENTS
    return [*rows[:first], ("...", "", f"{left_out} more events"), *rows[-LAST_EVENTS:]]


def headline(pair: Pair) -> str:
    """Say in a few words how the pair ended."""
    plain, adaptive = learned(pair, pair.plain), learned(pair, pair.adaptlr)
    if plain and adaptive:
        agree = difference(pair) <= AGREEMENT
        return "adaptlr leaves a healthy run alone" if agree else both_learn(pair)
    if adaptive:
        return "adaptlr rescues the run"
    if plain:
        return "Only the plain run learns: the guard does harm"
    if pair.adaptlr.gave_up:
        return "Neither run learns, and the guard ends its own"
    if pair.adaptlr.events:
        return "Neither run learns, whatever the guard did"
    return "Neither run learns, and the guard sees nothing"


def both_learn(pair: Pair) -> str:
    """Say which of two runs that learned, and differ, got further."""
    plain, adaptive = pair.plain.eval_loss, pair.adaptlr.eval_loss
    return f"Both runs learn, {'adaptlr' if adaptive < plain else 'plain'} more"


def verdict(pair: Pair) -> str:
    """Say what the numbers show, also where adaptlr did not help."""
    plain, adaptive = learned(pair, pair.plain), learned(pair, pair.adaptlr)
    if plain and adaptive:
        return verdict_on_two_that_learned(pair)
    if adaptive:
        return (
            f"The plain run learned nothing (eval loss {pair.plain.eval_loss:.3f}, untrained "
            f"{pair.untrained[0]:.3f}). adaptlr rescued its own: {pair.adaptlr.eval_loss:.3f}."
        )
    if plain:
        return "The plain run learned, and with adaptlr the model did not: the guard did harm here."
    if pair.adaptlr.gave_up:
        return "Neither run learned. The guard tried what it can, then stopped the run and said so."
    if not pair.adaptlr.events:
        return "Neither run learned. The guard saw nothing and did nothing."
    acts = count_kinds(pair.adaptlr.events)
    return f"Neither run learned. The guard acted ({acts}) but did not rescue it."


def verdict_on_two_that_learned(pair: Pair) -> str:
    """Say whether adaptlr changed anything, and for better or worse."""
    largest = difference(pair)
    if largest <= AGREEMENT:
        how = f"to within {largest:.0e}" if largest else "exactly"
        return f"Both runs learned and agree {how} in every loss: adaptlr left this run alone."
    change = pair.adaptlr.eval_loss - pair.plain.eval_loss
    worse = " The guard cost this run something." if change > 0 else ""
    return f"Both runs learned; with adaptlr the eval loss is {change:+.3f} against plain.{worse}"


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
