"""Which runs make up a measurement, and in which order."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from benchmarks.quality.tasks import ALL_TASKS, half_decade
from benchmarks.quality.training import Run

OPTIMIZERS = ("adamw", "sgd")
MULTIPLES = (1, 3, 10, 32, 100, 316, 1000)  # names of the half decades from 0 to 6
# What searches begin with: rates that say nothing.
STARTS = {"adamw": (1e-7, 1e-4, 1e-2, 1.0), "sgd": (1e-5, 1e-3, 1e-1, 10.0)}
SWEPT = {"adamw": range(-12, 1), "sgd": range(-8, 3)}  # half decades


def guard_grid(
    tasks: Sequence[str],
    optimizers: Sequence[str],
    methods: Sequence[str],
    multiples: Sequence[int],
    seeds: Iterable[int],
    steps: int | None,
) -> Iterator[Run]:
    """Yield every method at multiples of the best rate."""
    for seed in seeds:
        yield from _shuffled(
            [
                Run(task, optimizer, method, multiple, lr, seed, steps or ALL_TASKS[task].steps)
                for task in tasks
                for optimizer in optimizers
                for multiple in multiples
                for lr in [_rate(task, optimizer, multiple)]
                for method in methods
            ],
            seed,
        )


def sweep_grid(
    tasks: Sequence[str], optimizers: Sequence[str], seeds: Iterable[int], steps: int | None
) -> Iterator[Run]:
    """Yield plain runs over all rates: what the best rates and losses are taken from."""
    for seed in seeds:
        yield from _shuffled(
            [
                Run(task, optimizer, "plain", None, lr, seed, steps or ALL_TASKS[task].steps)
                for task in tasks
                for optimizer in optimizers
                for lr in map(half_decade, SWEPT[optimizer])
            ],
            seed,
        )


def search_grid(
    tasks: Sequence[str],
    optimizers: Sequence[str],
    methods: Sequence[str],
    seeds: Iterable[int],
    steps: int | None,
) -> Iterator[Run]:
    """Yield runs that find their rate by themselves, from rates far apart."""
    for seed in seeds:
        yield from _shuffled(
            [
                Run(task, optimizer, method, None, start, seed, steps or ALL_TASKS[task].steps)
                for task in tasks
                for optimizer in optimizers
                for start in STARTS[optimizer]
                for method in methods
            ],
            seed,
        )


def _rate(task: str, optimizer: str, multiple: int) -> float:
    best = ALL_TASKS[task].best(optimizer)
    if best is None:
        raise ValueError(f"{task} has no best rate for {optimizer} yet; measure it with --sweep")
    return best.lr * half_decade(MULTIPLES.index(multiple))


def _shuffled(runs: list[Run], seed: int) -> list[Run]:
    # A measurement that is cut off then covers every task, method and multiple about equally.
    random.Random(seed).shuffle(runs)
    return runs


def read_rows(file: Path) -> list[dict]:
    """Return the finished runs in a file of results; headers and failures are left out."""
    if not file.exists():
        return []
    rows = map(json.loads, file.read_text().splitlines())
    return [row for row in rows if "eval_loss" in row]


def key_of(row: dict) -> tuple:
    """Return the key of the run that a row is the result of."""
    return Run(**{name: row[name] for name in Run.__dataclass_fields__}).key()
