"""Counts of false alarms and of what came of them, over many runs of every family."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, as_completed
from dataclasses import dataclass
from enum import Enum

from families import FAMILIES, Family
from simulate import ALARMS, alarm_flags, closed_loop, config_row

SHORT, LONG = 300, 100_000  # steps
SENSITIVITIES = (0.5, 0.7, 1.0, 1.4, 2.0)


class Part(Enum):
    """What is measured: hard alarms while observing, or the outcome of acting; short or long."""

    SHORT_ALARMS = "alarms in 300 steps"
    LONG_ALARMS = "alarms in 100,000 steps"
    SHORT_LOOP = "closed loop of 300 steps"
    LONG_LOOP = "closed loop of 100,000 steps"


@dataclass(frozen=True)
class Runs:
    """How many runs of each part a family gets."""

    short_alarms: int
    short_loop: int
    long: int

    def of(self, part: Part) -> int:
        sizes = {Part.SHORT_ALARMS: self.short_alarms, Part.SHORT_LOOP: self.short_loop}
        return sizes.get(part, self.long)


@dataclass(frozen=True)
class Task:
    """One part of one family, at one setting of the dial."""

    family: str
    sensitivity: float
    part: Part
    runs: int


Counts = Counter[str]
Results = dict[Task, Counts]


def tasks_of(runs: Runs, dial_runs: Runs, families: Sequence[Family] = FAMILIES) -> list[Task]:
    """List all there is to do; settings other than the default get ``dial_runs``."""
    return [
        Task(family.name, value, part, (runs if value == 1.0 else dial_runs).of(part))
        for value in sorted(SENSITIVITIES, key=lambda value: value != 1.0)
        for part in Part
        for family in families
    ]


def measure(task: Task) -> Counts:
    """Count over the runs of one task. The same seeds at every setting of the dial."""
    family = next(family for family in FAMILIES if family.name == task.family)
    steps = SHORT if task.part in (Part.SHORT_ALARMS, Part.SHORT_LOOP) else LONG
    acts = task.part in (Part.SHORT_LOOP, Part.LONG_LOOP)
    row = config_row(steps, "act" if acts else "observe", task.sensitivity)
    counts: Counts = Counter()
    for run in range(task.runs):
        random = family.random(list(Part).index(task.part), run)
        if acts:
            counts.update(_outcomes(closed_loop(family, row, random)._asdict()))
        else:
            counts.update(_alarms(alarm_flags(family, row, random).tolist()))
    return counts


def _outcomes(outcome: dict[str, int]) -> Counts:
    """Sum the numbers up, and count the runs in which anything happened."""
    touched = outcome["cuts"] + outcome["answers"] > 0
    return Counter(**{name: int(value) for name, value in outcome.items()}, touched=int(touched))


def _alarms(flags: list[int]) -> Counts:
    """Count alarms by their charts, and the runs that have one (``runs with ...``)."""
    counts: Counts = Counter({"any": len(flags)})
    for alarm in ALARMS:
        counts[alarm.name or ""] = sum(bool(value & alarm) for value in flags)
    counts.update({f"runs with {name}": int(count > 0) for name, count in list(counts.items())})
    return counts


def measure_all(tasks: Sequence[Task], pool: Executor | None) -> Iterator[tuple[Task, Counts]]:
    """Measure in this process, or in those of ``pool``, in any order."""
    if pool is None:
        yield from ((task, measure(task)) for task in tasks)
        return
    futures = {pool.submit(functools.partial(measure, task)): task for task in tasks}
    for future in as_completed(futures):
        yield futures[future], future.result()
