"""The grid of runs, and what is asked of each: a fault beside its reference and the plain run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch

from adaptlr import Guard
from benchmarks.reliability.faults.faults import Demand, Fault, none
from benchmarks.reliability.faults.script import Script, healthy
from benchmarks.reliability.faults.tasks import Course, Task
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
    task: Task, optimizers: Sequence[str], faults: Sequence[Fault], seed: int, place: Place
) -> Iterator[Row]:
    """Yield the rows of one seed, optimizer by optimizer."""
    course = task.course(place.steps, seed)
    begin = begin_of(seed, place.steps)
    for optimizer in optimizers:
        references: dict[object, Outcome] = {}
        for fault in faults:
            if fault.float_lr and place.device.type != "cpu":
                continue
            key = fault.write if fault.lasting else none
            if key not in references:
                references[key] = _train(task, optimizer, key, course, begin, seed, place, None)
            reference = references[key]
            plain = (
                reference
                if fault.write is key
                else _train(task, optimizer, fault.write, course, begin, seed, place, None)
            )
            guarded = _train(task, optimizer, fault.write, course, begin, seed, place, Guard())
            yield Row(
                *(task.name, place.form, optimizer, fault.name, seed, begin),
                *(reference.start, reference.end, plain.end, guarded.end),
                *(guarded.rollbacks, guarded.factor, " / ".join(guarded.events)),
            )


def begin_of(seed: int, steps: int) -> int:
    """Return when faults begin: between a quarter and two thirds of a run, by the seed."""
    return int(steps * (0.25 + 0.4 * (seed * 0.618 % 1.0)))


def as_fields(row: Row) -> dict[str, object]:
    """Return all there is to a row, for the CSV."""
    return asdict(row)


def _train(
    task: Task,
    optimizer: str,
    write: object,
    course: Course,
    begin: int,
    seed: int,
    place: Place,
    guard: Guard | None,
) -> Outcome:
    script = healthy(course)
    write(script, begin, torch.Generator().manual_seed(seed))
    script = Script(
        script.course.to(place.device), script.loss_scale, script.gradient_scale, script.actions
    )
    torch.manual_seed(seed)
    model = task.model().to(place.device)
    return train(model, optimizer, script, guard, place.graph)
