"""Host time of short calls: interleaved blocks, medians over many rounds, nothing waited for."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from time import perf_counter_ns
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

Action = Callable[[torch.Tensor], Any]
WARM_CALLS = 3  # at the head of every block, untimed: what ran in between has filled the caches


@dataclass(frozen=True)
class Subject:
    """One row to be measured.

    Attributes:
        name: Name of the row.
        action: One call of it; receives the loss of a step.
        calls: Calls in a block. On CUDA few enough that the launch queue (1024 deep) never fills.
    """

    name: str
    action: Action
    calls: int


class Quartiles(NamedTuple):
    """Quartiles of microseconds per call."""

    lower: float
    median: float
    upper: float


Times = npt.NDArray[np.float64]


def quartiles(times: Times) -> Quartiles:
    """Return the quartiles of ``times``."""
    lower, median, upper = np.percentile(times, [25, 50, 75])
    return Quartiles(float(lower), float(median), float(upper))


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the garbage collector and torch's other threads out of the measurement."""
    threads, collecting = torch.get_num_threads(), gc.isenabled()
    torch.set_num_threads(1)
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if collecting:
            gc.enable()


def synchronizer(device: torch.device) -> Callable[[], object]:
    """Return what waits for ``device``; on the CPU nothing does."""
    return partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None


def time_block(action: Action, losses: Sequence[torch.Tensor], wait: Callable[[], object]) -> float:
    """Return the microseconds of one call, averaged over a block; ``wait`` runs before it."""
    for loss in losses[:WARM_CALLS]:
        action(loss)
    wait()
    start = perf_counter_ns()
    for loss in losses:
        action(loss)
    return (perf_counter_ns() - start) / len(losses) / 1e3


def time_rounds(
    subjects: Sequence[Subject],
    losses: Sequence[torch.Tensor],
    rounds: int,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Times]:
    """Time all subjects in turn, round after round, in alternating order.

    Blocks of one round lie milliseconds apart, so that a disturbance meets all subjects alike and
    cancels in differences taken round by round. ``tick`` is called after every round.

    Returns:
        Microseconds per call by subject, shape ``(rounds,)``; the cost of an empty call is off.
    """
    wait = synchronizer(losses[0].device)
    subjects = [Subject("", lambda _: None, len(losses)), *subjects]
    times: dict[str, list[float]] = {subject.name: [] for subject in subjects}
    with quiet():
        for index in range(rounds):
            for subject in subjects if index % 2 else reversed(subjects):
                block = losses[: subject.calls]
                times[subject.name].append(time_block(subject.action, block, wait))
            tick()
    wait()
    empty = float(np.median(times.pop("")))
    return {name: np.array(values) - empty for name, values in times.items()}
