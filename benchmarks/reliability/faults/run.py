"""Does a run at a good learning rate that suffers a fault end as if it had not?

Writes ``faults_<device>.md`` and ``.csv``. Needs rich, and scikit-learn or ``digits.npz``.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

from adaptlr.bench.facts import facts_of
from benchmarks.reliability.faults.faults import FAULTS, Fault
from benchmarks.reliability.faults.measure import Place, Row, measure
from benchmarks.reliability.faults.report import csv_of, markdown
from benchmarks.reliability.faults.tasks import Task, Teacher, digits_task
from benchmarks.reliability.faults.training import OPTIMIZERS

RESULTS = Path(__file__).parents[2] / "results"
FORMS = ("eager", "graph")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    on_cuda = torch.cuda.is_available()
    add = parser.add_argument
    add("--device", default="cuda" if on_cuda else "cpu")
    add("--form", nargs="+", choices=FORMS, help="both on CUDA, eager on the CPU")
    add("--task", choices=("digits", "teacher"), default="digits")
    add("--data", type=Path, help="where digits.npz lies; scikit-learn's own if not said")
    add("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS), metavar="NAME")
    add("--only", nargs="+", default=[""], metavar="TEXT", help="faults with such a name")
    add("--seeds", type=int, default=3, help="how many, from 0")
    add("--steps", type=int, default=600)
    add("--workers", type=int, default=1, help="optimizers side by side, each in a process")
    add("--minutes", type=float, default=math.inf, help="no optimizer is waited for after so long")
    add("--output-dir", type=Path, default=RESULTS)
    add("--commit", default="", help="commit of the sources, outside of a clone")
    return parser.parse_args()


def rows_of(
    task: Task, faults: Sequence[Fault], places: Sequence[Place], arguments: argparse.Namespace
) -> Iterator[list[Row]]:
    """Yield the rows of one optimizer at a time; every seed is finished before the next begins."""
    jobs = [
        (task, [optimizer], faults, seed, place)
        for seed in range(arguments.seeds)
        for place in places
        for optimizer in arguments.optimizers
    ]
    if arguments.workers == 1:
        yield from map(measured, jobs)
        return
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(arguments.workers, settle) as pool:
        yield from pool.imap(measured, jobs)


def measured(job: tuple[Task, list[str], Sequence[Fault], int, Place]) -> list[Row]:
    return list(measure(*job))


def settle() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "something else")  # writes lr: that is one of the faults


def collect(rows: Iterator[list[Row]], total: int, minutes: float) -> list[Row]:
    """Take the rows with a progress bar, until time is up."""
    deadline = time.monotonic() + 60 * minutes
    taken: list[Row] = []
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("faults", total=total)
        for some in rows:
            taken += some
            where = f"{some[-1].optimizer}, {some[-1].form}, seed {some[-1].seed}"
            progress.update(bar, advance=len(some), description=where)
            if time.monotonic() > deadline:
                break
    return taken


def main() -> None:
    arguments = parse()
    settle()
    device = torch.device(arguments.device)
    forms = arguments.form or (FORMS if device.type == "cuda" else FORMS[:1])
    places = [Place(device, form == "graph", arguments.steps) for form in forms]
    task = Teacher() if arguments.task == "teacher" else digits_task(arguments.data)
    faults = [
        fault
        for fault in FAULTS
        if any(text in fault.name for text in arguments.only)
        and not (fault.float_lr and device.type == "cuda")
    ]
    total = arguments.seeds * len(places) * len(arguments.optimizers) * len(faults)
    rows = collect(rows_of(task, faults, places, arguments), total, arguments.minutes)
    facts = facts_of(device, arguments.commit)
    report = markdown(facts.line(), arguments.steps, rows)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    file = arguments.output_dir / f"faults_{facts.slug()}"
    file.with_suffix(".md").write_text(report)
    file.with_suffix(".csv").write_text(csv_of(rows))
    print(report)


if __name__ == "__main__":
    main()
