"""Which runs make up a measurement, and in which order."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from benchmarks.quality.tasks import ALL_TASKS, half_decade
from benchmarks.quality.training import Run

OPTIMIZERS = ("adamw", "sgd")
# Optimizers without a sweep, with the half decades that their best rates are expected from AdamW's.
FURTHER = {"rmsprop": 0, "nadam": 0, "lion": -2, "adagrad": 2}
ALL_OPTIMIZERS = (*OPTIMIZERS, *FURTHER)
MULTIPLES = (1, 3, 10, 32, 100, 316, 1000)  # names of the half decades from 0 to 6
LOW_MULTIPLES = (0.001, 0.01, 0.032, 0.1, 0.316)
# What searches begin with: rates that say nothing.
STARTS = {
    "adamw": (1e-7, 1e-4, 1e-2, 1.0),
    "sgd": (1e-5, 1e-3, 1e-1, 10.0),
    **dict.fromkeys(FURTHER, (1e-2,)),
}
SWEPT = {"adamw": range(-12, 1), "sgd": range(-8, 3)}  # half decades
# The best single rate of the sweep over all tasks, in half decades: for rules that want one.
SINGLE = {"adamw": -7, "sgd": -3}
# Rates of the peers that are given the same ones on every task; free.py has most of them.
FIXED_RATES = {
    "prodigy": {"adamw": (0,)},
    "dadaptation": {"adamw": (0,), "sgd": (0,)},
    "dog": {"sgd": (0,)},
    "schedulefree": {"adamw": (-7, -6, -5), "sgd": (-1, 0, 1)},
    **{
        rule: {optimizer: (single,) for optimizer, single in SINGLE.items()}
        for rule in ("plateau", "greedy", "greedy_up", "dlrs")
    },
}


def guard_grid(
    tasks: Sequence[str],
    optimizers: Sequence[str],
    methods: Sequence[str],
    multiples: Sequence[float],
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


def near_grid(
    tasks: Sequence[str], optimizers: Sequence[str], half_decades: int, steps: int | None
) -> Iterator[Run]:
    """Yield plain runs to both sides of the expected best rate: a sweep where there is none yet."""
    yield from _shuffled(
        [
            Run(task, optimizer, "plain", None, lr, 0, steps or ALL_TASKS[task].steps)
            for task in tasks
            for optimizer in optimizers
            for offset in range(-half_decades, half_decades + 1)
            for lr in [_expected(task, optimizer) * half_decade(offset)]
        ],
        0,
    )


def fixed_grid(
    tasks: Sequence[str],
    optimizers: Sequence[str],
    methods: Sequence[str],
    seeds: Iterable[int],
    steps: int | None,
) -> Iterator[Run]:
    """Yield the peers that are given one rate, or a few, for all tasks."""
    for seed in seeds:
        yield from _shuffled(
            [
                Run(task, optimizer, method, None, lr, seed, steps or ALL_TASKS[task].steps)
                for task in tasks
                for method in methods
                for optimizer in optimizers
                for lr in map(half_decade, FIXED_RATES[method].get(optimizer, ()))
            ],
            seed,
        )


def search_grid(
    tasks: Sequence[str],
    optimizers: Sequence[str],
    methods: Sequence[str],
    seeds: Iterable[int],
    steps: int | None,
    starts: int | None = None,
) -> Iterator[Run]:
    """Yield runs that find their rate by themselves, from so many rates far apart."""
    for seed in seeds:
        yield from _shuffled(
            [
                Run(task, optimizer, method, None, start, seed, steps or ALL_TASKS[task].steps)
                for task in tasks
                for optimizer in optimizers
                for start in STARTS[optimizer][:starts]
                for method in methods
            ],
            seed,
        )


def _rate(task: str, optimizer: str, multiple: float) -> float:
    best = ALL_TASKS[task].best(optimizer)
    if best is None:
        raise ValueError(f"{task} has no best rate for {optimizer} yet; measure it with --sweep")
    return best.lr * half_decade(round(2 * math.log10(multiple)))


def _expected(task: str, optimizer: str) -> float:
    """Return about where the best rate lies, of a variant or with an optimizer without a sweep."""
    known = ALL_TASKS[ALL_TASKS[task].like or task]
    best = known.best("adamw" if optimizer in FURTHER else optimizer)
    return best.lr * half_decade(FURTHER.get(optimizer, 0))


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
