"""How well does a run end whose rate is too high? ``python -m benchmarks.quality.run DATA``.

Trains real fine-tuning tasks at 1 to 1000 times the best swept rate, with adaptlr and with what
else there is, and writes one row a run as JSON Lines. Runs that the file already has are not
repeated, so a measurement can be cut off and taken up again. report.py makes tables of the rows.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import multiprocessing
import os
import time
import traceback
import warnings
from collections.abc import Iterable
from dataclasses import asdict
from functools import cache
from pathlib import Path

import torch
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

from adaptlr.bench.facts import facts_of
from benchmarks.quality import grid
from benchmarks.quality.data import Data, load
from benchmarks.quality.methods import ALL_METHODS, METHODS, RAISES, SEARCHES
from benchmarks.quality.tasks import ALL_TASKS, LONG_TASKS, TASKS
from benchmarks.quality.training import Run, clean_up, train

MOST_FAILURES = 5  # a broken set-up fails every time, and a CUDA error spoils a worker for good


class Worker:
    """Takes runs one after the other, in a process of its own; data stay loaded."""

    def __init__(self, directory: Path, device: str, graphs: bool, deadline: float) -> None:
        self.directory, self.device = directory, torch.device(device)
        self.graphs, self.deadline = graphs, deadline
        torch.set_num_threads(1)  # workers share the cores
        torch.set_float32_matmul_precision("high")  # TF32, as in the sweep of tasks.py
        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")
        self.load = cache(self._load)

    def _load(self, name: str) -> Data:
        return load(self.directory / f"{name}.npz", self.device)

    def __call__(self, run: Run) -> dict | None:
        """Return the row of a run, one with an ``error``, or None once time is up."""
        if time.time() > self.deadline:
            return None
        try:
            data = self.load(ALL_TASKS[run.task].data)
            return train(run, data, self.device, self.graphs)
        except Exception:  # whatever it was, other runs may do better
            return {**asdict(run), "error": traceback.format_exc()}
        finally:
            clean_up()


def _start(*arguments: object) -> None:
    global _worker
    _worker = Worker(*arguments)


def _run(run: Run) -> dict | None:
    return _worker(run)


def measure(runs: list[Run], arguments: argparse.Namespace) -> Iterable[dict | None]:
    """Yield rows as they are finished, in any order."""
    graphs = arguments.device.startswith("cuda") and not arguments.eager
    deadline = time.time() + 60 * arguments.minutes
    setting = (arguments.data, arguments.device, graphs, deadline)
    if arguments.workers == 1:
        yield from map(Worker(*setting), runs)
        return
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(arguments.workers, _start, setting) as pool:
        yield from pool.imap_unordered(_run, runs)


def write(rows: Iterable[dict | None], total: int, arguments: argparse.Namespace) -> None:
    """Append rows to the file, behind a line with the hardware and versions."""
    facts = facts_of(torch.device(arguments.device), arguments.commit)
    failures = 0
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    with arguments.output.open("a") as file, Progress(*columns) as progress:
        print(json.dumps({"facts": facts.line(), "slug": facts.slug()}), file=file)
        bar = progress.add_task("runs", total=total)
        for row in rows:
            progress.advance(bar)
            if row is None:
                continue
            print(json.dumps(row), file=file, flush=True)
            if "error" in row:
                failures += 1
                progress.console.print(row["error"])
            if failures > MOST_FAILURES:
                raise SystemExit(f"{failures} runs failed; the last one is shown above")


def planned(arguments: argparse.Namespace) -> list[Run]:
    """Return the runs that were asked for and are not in the file yet."""
    tasks, optimizers, steps = arguments.tasks, arguments.optimizers, arguments.steps
    seeds = range(arguments.seeds)

    def among(methods: Iterable[str]) -> list[str]:
        return [method for method in arguments.methods if method in methods]

    if arguments.sweep:
        runs = [*grid.sweep_grid(tasks, optimizers, seeds, steps)]
    else:
        runs = [*grid.near_grid(tasks, optimizers, arguments.near, steps)] if arguments.near else []
        starts = (among(SEARCHES), seeds, steps, arguments.starts)
        runs += grid.search_grid(tasks, optimizers, *starts)
        if arguments.fixed:
            runs += grid.fixed_grid(tasks, optimizers, among(grid.FIXED_RATES), seeds, steps)
        elif methods := among(METHODS | RAISES):
            multiples = arguments.multiples
            runs += grid.guard_grid(tasks, optimizers, methods, multiples, seeds, steps)
    # Long runs first: one that begins last would keep all others waiting.
    runs.sort(key=lambda run: run.task not in LONG_TASKS)
    done = {grid.key_of(row) for row in grid.read_rows(arguments.output)}
    return [run for run in runs if run.key() not in done]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    on_cuda = torch.cuda.is_available()
    add = parser.add_argument
    add("data", type=Path, help="directory that build.py has filled")
    add("--output", type=Path, default=Path("guard.jsonl"), help="rows; appended to")
    add("--tasks", nargs="+", choices=ALL_TASKS, default=list(TASKS), metavar="TASK")
    add("--optimizers", nargs="+", choices=grid.ALL_OPTIMIZERS, default=grid.OPTIMIZERS)
    add("--methods", nargs="+", choices=ALL_METHODS, default=list(METHODS))
    multiples = (*grid.LOW_MULTIPLES, *grid.MULTIPLES)
    add("--multiples", nargs="+", type=float, choices=multiples, default=grid.MULTIPLES)
    add("--seeds", type=int, default=2, help="how many, from 0")
    add("--sweep", action="store_true", help="plain runs over all rates instead")
    add("--fixed", action="store_true", help="peers at the one rate that they get on every task")
    add("--near", type=int, default=0, help="plain runs too, so many half decades to both sides")
    add("--starts", type=int, help="how many rates a search is begun with")
    add("--steps", type=int, help="a shorter budget, to see whether everything runs")
    add("--minutes", type=float, default=math.inf, help="no run is started after so long")
    cores = max(1, min(15, (os.cpu_count() or 1) - 1))
    add("--workers", type=int, default=cores if on_cuda else 1, help="runs side by side")
    add("--device", default="cuda" if on_cuda else "cpu")
    add("--eager", action="store_true", help="no CUDA graphs: slower, errors are easier to read")
    add("--commit", default="", help="commit of the sources, outside of a clone")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    runs = planned(arguments)
    begun = time.perf_counter()
    write(measure(runs, arguments), len(runs), arguments)
    print(f"{len(runs)} runs were planned; {time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main()
