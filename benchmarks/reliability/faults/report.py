"""The rows as Markdown tables, and as CSV."""

from __future__ import annotations

import csv
import io
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from benchmarks.reliability.faults.faults import FAULTS, Demand
from benchmarks.reliability.faults.measure import Row, as_fields

LIMIT = 0.02  # of the final loss of the reference
DEMANDS = {fault.name: fault.demand for fault in FAULTS}

TEXT = """\
{facts}

Runs of {steps} steps at a good learning rate that suffer a fault between a quarter and two thirds
of their way. *Reference*: the same seed without the fault (with it where it is lasting data) and
without a guard. *Excess*: held-out loss after the last step over that of the reference, less 1;
means of at most {seeds} seeds; *worst* is the worst seed. *Lost*: what is missing of the
reference's progress from the untrained model, in % of it. *Touched*: runs with a rollback
or a cut left.
Target: a mean excess of at most {limit:.0%}, and what the fault demands besides. The row *none, one
batch taken twice* shows how far apart runs lie by chance. How it is done: `benchmarks/README.md`.
"""


@dataclass(frozen=True)
class Verdict:
    """All seeds of one fault."""

    rows: Sequence[Row]

    @property
    def excess(self) -> float:
        return fmean(row.excess for row in self.rows)

    @property
    def demand(self) -> Demand:
        return DEMANDS[self.rows[0].fault]

    @property
    def ends_well(self) -> bool:
        return self.excess <= LIMIT  # False for NaN

    @property
    def kept(self) -> int:
        """Runs in which the guard did what it may."""
        return sum(row.keeps(self.demand) for row in self.rows)

    @property
    def met(self) -> bool:
        return self.ends_well and self.kept == len(self.rows)

    def misses(self) -> str:
        """Say what was not met."""
        parts = []
        if not self.ends_well:
            parts.append("loss")
        if self.kept < len(self.rows):
            parts.append(f"{self.demand.value}: {self.kept} of {len(self.rows)}")
        return f"**{'; '.join(parts)}**" if parts else "yes"

    def cells(self) -> list[object]:
        rows = self.rows
        return [
            f"{fmean(row.reference for row in rows):.4f}",
            percent(fmean(row.plain_excess for row in rows)),
            percent(self.excess),
            percent(max((row.excess for row in rows), key=_nan_last)),
            percent(fmean(row.lost_progress for row in rows)),
            sum(row.rollbacks > 0 or row.factor < 1.0 for row in rows),
            self.misses(),
        ]


def percent(share: float) -> str:
    """Return a share in %, or what it is if not finite."""
    return f"{100 * share:+.1f}" if math.isfinite(share) else f"{share:g}"


def _nan_last(value: float) -> float:
    return math.inf if math.isnan(value) else value


def table(head: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table."""
    rule = ["---"] * len(head)
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in (head, rule, *lines))


def verdicts(rows: Iterable[Row]) -> dict[tuple[str, str, str, str], Verdict]:
    """Return what came of each (task, form, optimizer, fault), in the order of the rows."""
    groups: dict[tuple[str, str, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.task, row.form, row.optimizer, row.fault].append(row)
    return {key: Verdict(group) for key, group in groups.items()}


def markdown(facts: str, steps: int, rows: Sequence[Row]) -> str:
    """Return the whole report."""
    results = verdicts(rows)
    seeds = len({row.seed for row in rows})
    parts = [TEXT.format(facts=facts, steps=steps, seeds=seeds, limit=LIMIT), _summary(results)]
    head = ["fault", "reference", "plain, %", "adaptlr, %", "worst, %", "lost, %", "touched", "met"]
    for section in dict.fromkeys(key[:3] for key in results):
        chosen = [(key[3], value) for key, value in results.items() if key[:3] == section]
        parts.append(f"## {section[0]}, {section[1]}, {section[2]}\n")
        parts.append(table(head, ([name, *value.cells()] for name, value in chosen)) + "\n")
    return "\n".join(parts)


def _summary(results: dict[tuple[str, str, str, str], Verdict]) -> str:
    met = sum(value.met for value in results.values())
    well = sum(value.ends_well for value in results.values())
    plain = sum(
        fmean(row.plain_excess for row in value.rows) <= LIMIT for value in results.values()
    )
    return (
        f"{len(results)} cases: {met} meet all targets; the final loss is met by {well}, and by "
        f"{plain} without a guard.\n"
    )


def csv_of(rows: Sequence[Row]) -> str:
    """Return every run, one a line, with all events."""
    text = io.StringIO()
    lines = [as_fields(row) for row in rows]
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()
