"""The grid of runs, and what is asked of each: a fault beside its reference and the plain run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch

from adaptlr import Guard
from benchmarks.reliability.faults.faults import Demand, Fault, Write, none
from benchmarks.reliability.faults.script import healthy
from benchmarks.reliability.faults.tasks import Task
from benchmarks.reliability.faults.training import Outcome, train


@dataclass(frozen=True)
class Place:
    """Where runs take place.

    Attributes:
        device: Of model and data.
        graph: Whether steps are replays of a CUDA graph.
        steps: Length of a run.
    """

    device: torch.device
    graph: bool
    steps: int

    @property
    def form(self) -> str:
        """Return ``"graph"`` or ``"eager"``."""
        return "graph" if self.graph else "eager"


@dataclass(frozen=True)
class Row:
    """A fault under the guard, the same without it, and the reference: no fault and no guard."""

    task: str
    form: str
    optimizer: str
    fault: str
    seed: int
    begin: int
    start: float
    reference: float
    plain: float
    guarded: float
    rollbacks: int
    factor: float
    events: str

    @property
    def excess(self) -> float:
        """Return how far the guarded run ends above the reference, as a share of the latter."""
        return self.guarded / self.reference - 1.0

    @property
    def plain_excess(self) -> float:
        """Return the same of the plain run."""
        return self.plain / self.reference - 1.0

    @property
    def lost_progress(self) -> float:
        """Return what is missing of the reference's progress, as a share of that."""
        return (self.guarded - self.reference) / (self.start - self.reference)

    def keeps(self, demand: Demand) -> bool:
        """Whether the guard did nothing that ``demand`` forbids."""
        untouched = self.rollbacks == 0 and self.factor == 1.0
        return {
            Demand.UNTOUCHED: untouched,
            Demand.NO_CUT_LEFT: self.factor == 1.0,
            Demand.NOTHING: True,
        }[demand]


def measure(
    task: Task,
    optimizers: Sequence[str],
    faults: Sequence[Fault],
    seed: int,
    place: Place,
    with_plain: bool = True,
) -> Iterator[Row]:
    """Yield the rows of one seed, optimizer by optimizer; ``plain`` is NaN where not wanted."""
    for optimizer in optimizers:
        series = _Series(task, optimizer, seed, place)
        references: dict[Write, Outcome] = {}
        for fault in faults:
            if fault.float_lr and place.device.type != "cpu":
                continue
            key = fault.write if fault.lasting else none
            if key not in references:
                references[key] = series.train(key, None)
            reference = references[key]
            plain = reference.end if fault.write is key else math.nan
            if with_plain and fault.write is not key:
                plain = series.train(fault.write, None).end
            guarded = series.train(fault.write, Guard())
            yield Row(
                *(task.name, place.form, optimizer, fault.name, seed, series.begin),
                *(reference.start, reference.end, plain, guarded.end),
                *(guarded.rollbacks, guarded.factor, " / ".join(guarded.events)),
            )


def begin_of(seed: int, steps: int) -> int:
    """Return when faults begin: between a quarter and two thirds of a run, by the seed."""
    return int(steps * (0.25 + 0.4 * (seed * 0.618 % 1.0)))


def as_fields(row: Row) -> dict[str, object]:
    """Return all there is to a row, for the CSV."""
    return asdict(row)


class _Series:
    """Runs that differ in their fault and their guard alone."""

    def __init__(self, task: Task, optimizer: str, seed: int, place: Place) -> None:
        self.task, self.optimizer, self.seed, self.place = task, optimizer, seed, place
        self.course = task.course(place.steps, seed)
        self.begin = begin_of(seed, place.steps)

    def train(self, write: Write, guard: Guard | None) -> Outcome:
        """Take a run whose script ``write`` has changed."""
        script = healthy(self.course)
        write(script, self.begin, torch.Generator().manual_seed(self.seed))
        script.course = script.course.to(self.place.device)
        torch.manual_seed(self.seed)
        model = self.task.model().to(self.place.device)
        return train(model, self.optimizer, script, guard, self.place.graph)
