"""The counts as Markdown tables, and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from families import FAMILIES, Family, Group
from measure import SENSITIVITIES, Part, Results, Runs, Task
from simulate import ALARMS

MAX_KEPT_SHORT = {Group.LIGHT: 1.0, Group.HEAVY: 3.5}  # % of runs of 300 steps
MAX_KEPT_LONG = {Group.LIGHT: 0.1, Group.HEAVY: 0.1}  # in 100,000 steps
ALARM_NAMES = [alarm.name or "" for alarm in ALARMS]

INTRODUCTION = """\
Healthy losses that do not react to the learning rate, under the control step of the extension with
the defaults of the product: every alarm is a false one, every lowered factor a mistake. All runs
have 10 % of warm-up and a cosine schedule. Families and targets: `benchmarks/README.md`."""

ALARMS_TEXT = """\
The guard observes. Share of {short} runs of 300 steps with at least one such alarm, in %, and
alarms in 100,000 steps, the mean of {long} runs. Several charts may raise one alarm."""

LOOP_TEXT = """\
The guard acts, with three slots for snapshots. Weights that are put back bring their place on the
curve back; the noise from there on is new. {short} runs of 300 steps, in % of them: a *cut kept* is
a factor below 1 in the end; *touched*, a run that had any experiment or rollback; *failed*, one
that was given up. {long} runs of 100,000 steps: cuts that were not taken back, and answers
(rollbacks, ramps, tests, probes, trials that did not help), a run each; runs that were given up.
**Bold**: above the target of the family's group."""

DIAL_TEXT = """\
Means over the families of a group, of the same measures. Thresholds of the collapse charts (LOST
and ABOVE) are divided by `sensitivity`. Settings other than 1 have {alarms} runs of 300 steps for
alarms, {loop} for cuts, and {long} of 100,000 steps."""


@dataclass(frozen=True)
class Report:
    """All that one run of the benchmark has found."""

    facts: str
    runs: Runs
    dial_runs: Runs
    results: Results

    def markdown(self) -> str:
        runs, dial = self.runs, self.dial_runs
        texts = [
            ALARMS_TEXT.format(short=runs.short_alarms, long=runs.long),
            LOOP_TEXT.format(short=runs.short_loop, long=runs.long),
            DIAL_TEXT.format(alarms=dial.short_alarms, loop=dial.short_loop, long=dial.long),
        ]
        return "\n\n".join(
            [
                self.facts,
                INTRODUCTION,
                "## Targets",
                self._targets(),
                "## Hard alarms",
                *(texts[0], self._alarms()),
                "## Cuts kept",
                *(texts[1], self._loops()),
                "## The dial",
                *(texts[2], self._dial()),
                "",
            ]
        )

    def rate(self, family: Family, part: Part, name: str, sensitivity: float = 1.0) -> float:
        """Return how many ``name`` there are in a run."""
        matches = (
            task
            for task in self.results
            if (task.family, task.part, task.sensitivity) == (family.name, part, sensitivity)
        )
        task = next(matches)
        return self.results[task][name] / task.runs

    def percent(self, family: Family, part: Part, name: str, sensitivity: float = 1.0) -> float:
        return 100.0 * self.rate(family, part, name, sensitivity)

    def kept_short(self, family: Family, sensitivity: float = 1.0) -> float:
        return self.percent(family, Part.SHORT_LOOP, "lowered", sensitivity)

    def kept_long(self, family: Family, sensitivity: float = 1.0) -> float:
        return self.rate(family, Part.LONG_LOOP, "cuts", sensitivity)

    # -- tables -----------------------------------------------------------------

    def _targets(self) -> str:
        rows = []
        for group, limit in MAX_KEPT_SHORT.items():
            name = f"runs of 300 steps that keep a cut, {group.value}"
            rows.append(self._short_target(name, members(group), limit))
        for group, limit in MAX_KEPT_LONG.items():
            mean = mean_over(members(group), self.kept_long)
            name = f"cuts kept in 100,000 steps, {group.value}, mean"
            rows.append((name, f"at most {limit:g}", _number(mean), _yes(mean <= limit)))
        for group in (Group.DEPENDENT, Group.CHANGING):
            short = max(self.kept_short(family) for family in members(group))
            long = max(self.kept_long(family) for family in members(group))
            measured = f"up to {_number(short)} % and {_number(long)}"
            exceeds = short > max(MAX_KEPT_SHORT.values()) or long > max(MAX_KEPT_LONG.values())
            verdict = "exceeds those of the others" if exceeds else ""
            rows.append((f"both, {group.value}", "none", measured, verdict))
        return table(("target", "limit", "measured", "met"), rows)

    def _short_target(
        self, name: str, families: Sequence[Family], limit: float
    ) -> tuple[str, str, str, str]:
        above = [family for family in families if self.kept_short(family) > limit]
        worst = max(families, key=self.kept_short)
        measured = f"worst {_number(self.kept_short(worst))} % ({worst.name})"
        if above:
            measured += f"; {len(above)} of {len(families)} families above"
        return (name, f"at most {limit:g} % of every family", measured, _yes(not above))

    def _alarms(self) -> str:
        names = [*ALARM_NAMES, "any"]
        header = ["family", *(f"{n}, %" for n in names), *(f"{n} / 100k" for n in names)]
        rows = [
            [
                family.name,
                *(self._cell(self.percent(family, Part.SHORT_ALARMS, f"runs with {n}"))
                  for n in names),
                *(self._cell(self.rate(family, Part.LONG_ALARMS, n)) for n in names),
            ]
            for family in FAMILIES
        ]  # fmt: skip
        return table(header, rows)

    def _loops(self) -> str:
        header = ("family", "group", "cut kept, %", "touched, %", "failed, %")
        header += ("cuts kept / 100k", "answers / 100k", "failed of 100k, %")
        rows = []
        for family in FAMILIES:
            short, long = self.kept_short(family), self.kept_long(family)
            rows.append(
                (
                    family.name,
                    family.group.value,
                    self._cell(short, MAX_KEPT_SHORT.get(family.group)),
                    self._cell(self.percent(family, Part.SHORT_LOOP, "touched")),
                    self._cell(self.percent(family, Part.SHORT_LOOP, "failed")),
                    self._cell(long, MAX_KEPT_LONG.get(family.group)),
                    self._cell(self.rate(family, Part.LONG_LOOP, "answers")),
                    self._cell(self.percent(family, Part.LONG_LOOP, "failed")),
                )
            )
        return table(header, rows)

    def _dial(self) -> str:
        header = ("sensitivity", "group", "runs with an alarm, %", "alarms / 100k")
        header += ("cut kept, %", "touched, %", "cuts kept / 100k")
        rows = []
        for value in SENSITIVITIES:
            for group in Group:
                columns: list[Callable[[Family], float]] = [
                    lambda f, v=value: self.percent(f, Part.SHORT_ALARMS, "runs with any", v),
                    lambda f, v=value: self.rate(f, Part.LONG_ALARMS, "any", v),
                    lambda f, v=value: self.kept_short(f, v),
                    lambda f, v=value: self.percent(f, Part.SHORT_LOOP, "touched", v),
                    lambda f, v=value: self.kept_long(f, v),
                ]
                cells = [_number(mean_over(members(group), column)) for column in columns]
                rows.append((f"{value:g}", group.value, *cells))
        return table(header, rows)

    @staticmethod
    def _cell(value: float, limit: float | None = None) -> str:
        text = _number(value)
        return f"**{text}**" if limit is not None and value > limit else text

    # -- CSV ----------------------------------------------------------------------

    def csv(self) -> str:
        """Return the counts of every task as a line, under a comment with the facts."""
        measures = sorted({name for counts in self.results.values() for name in counts})
        text = io.StringIO()
        text.write(f"# {self.facts}\n")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("sensitivity", "part", "family", "runs", *measures))
        for task in sorted(self.results, key=_order):
            counts = [self.results[task].get(name, "") for name in measures]
            first = (f"{task.sensitivity:g}", task.part.value, task.family, task.runs)
            writer.writerow((*first, *counts))
        return text.getvalue()


def _order(task: Task) -> tuple[float, str, int]:
    return task.sensitivity, task.part.value, [f.name for f in FAMILIES].index(task.family)


def members(group: Group) -> list[Family]:
    return [family for family in FAMILIES if family.group is group]


def mean_over(families: Sequence[Family], value: Callable[[Family], float]) -> float:
    return sum(value(family) for family in families) / len(families)


def _number(value: float) -> str:
    return f"{value:.0f}" if value == 0.0 or value >= 10.0 else f"{value:.2g}"


def _yes(met: bool) -> str:
    return "yes" if met else "**no**"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rule = ["---"] * len(header)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))
