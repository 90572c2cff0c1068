"""Question: how much host time a step does recording cost a training loop?

The recorder is a thread that sleeps but for a turn twice a second, in which it takes from the loop
what it takes of the interpreter lock and of the machine. While it sleeps it takes nothing. So one
loop notes the time of every step, and each turn is compared with as much time just before and just
after it: steps that are missing there are what the turn has cost. Pairs that lie milliseconds apart
share what else goes on in the machine, and nothing of the recorder's work is left out. Steps are
nothing but ``controller.step`` on a tiny optimizer, with losses that are there already: there is
little to make noise, and a turn has more to write than in any training.

A turn also costs something where there is little to write, as after long steps. That is measured by
having turns more often; so many records in a turn are those of training with steps of that length.

On the CPU the processor time of the recorder's thread is set beside the step of ``adaptlr demo``
too: what it would take from training if there were one core, and no other work for it.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import threading
import time
from array import array
from bisect import bisect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch

from adaptlr import AdaptiveLR, Guard, recorder_thread
from adaptlr.bench.facts import facts_of

USUAL = recorder_thread.INTERVAL
RUNS = {USUAL: 0.75, 0.02: 0.25}  # seconds between turns, and the share of the time for them
SECONDS = 48.0
MARGIN = 0.0005  # seconds around a turn: the thread wakes before it, and the loop after it
HISTORY = 1 << 17  # more records than the loop makes between two turns
DEMO_STEPS = 24
HOST_LIMIT = 1.0  # microseconds a step
DEMO_LIMIT = 0.01  # of a step


class Turn(NamedTuple):
    """When the recorder had a turn, and the processor time of its thread until then."""

    start: float
    end: float
    busy: float


class Cost(NamedTuple):
    """What one turn took, in microseconds."""

    records: int
    step: float  # beside the turn
    lost: float  # by the loop
    busy: float  # of the recorder's thread


# -- the loop --------------------------------------------------------------------------------------


def run_loop(device: torch.device, seconds: float, path: Path) -> array[float]:
    """Step with a recorder for so long; return the time after every step."""
    parameter = torch.nn.Parameter(torch.zeros(16, device=device))
    parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.SGD([parameter], lr=0.1, fused=device.type == "cuda")
    controller = AdaptiveLR(
        optimizer, 10**8, guard=Guard(mode="observe"), history_size=HISTORY, recorder=path
    )
    draw = torch.Generator().manual_seed(0)
    losses = list((2 + 0.1 * torch.randn(128, generator=draw)).to(device))
    times, clock = array("d"), time.perf_counter
    end = clock() + seconds
    while clock() < end:
        for loss in losses:
            controller.step(loss)
            times.append(clock())
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    controller.detach()
    assert b'{"gap"' not in path.read_bytes(), "the recorder was too slow for so short a step"
    return times


@contextmanager
def noted_turns(interval: float) -> Iterator[list[Turn]]:
    """Have recorders take a turn so often, and note when."""
    turns: list[Turn] = []
    usual = recorder_thread.RecorderThread._turn

    def noted(thread: recorder_thread.RecorderThread, last: bool) -> None:
        start = time.perf_counter()
        usual(thread, last)
        turns.append(Turn(start, time.perf_counter(), time.thread_time()))

    recorder_thread.RecorderThread._turn = noted  # type: ignore[method-assign]
    recorder_thread.INTERVAL = interval
    try:
        yield turns
    finally:
        recorder_thread.RecorderThread._turn = usual  # type: ignore[method-assign]
        recorder_thread.INTERVAL = USUAL


# -- what it costs ---------------------------------------------------------------------------------


def costs_of(times: array[float], turns: list[Turn]) -> list[Cost]:
    """Compare every turn with as much time on both of its sides."""
    steps_until = partial(steps_before, times)
    costs = []
    for before, turn in pairwise(turns[1:]):  # the first two warm up
        start, end = turn.start - MARGIN, turn.end + MARGIN
        width = end - start
        if end + width > times[-1]:
            break
        around = steps_until(end + width) - steps_until(start - width)
        within = steps_until(end) - steps_until(start)
        step = 2 * width / (around - within)
        records = bisect(times, turn.start) - bisect(times, before.start)
        costs.append(
            Cost(
                records, 1e6 * step, 1e6 * (width - within * step), 1e6 * (turn.busy - before.busy)
            )
        )
    return costs


def steps_before(times: array[float], moment: float) -> float:
    """Return how many steps were done by then, with the part of the one that was not."""
    done = bisect(times, moment)
    return done + (moment - times[done - 1]) / (times[done] - times[done - 1])


class Estimate(NamedTuple):
    """A median with its quartiles and its standard error."""

    low: float
    median: float
    high: float
    error: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Estimate:
        """Take the error from the quartiles, as if the values were normal: outliers are not."""
        values = list(values)
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(low, median, high, 1.25 * (high - low) / 1.35 / math.sqrt(len(values)))

    def __str__(self) -> str:
        """Show the quartiles too."""
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def measure(device: torch.device, interval: float, seconds: float) -> list[Cost]:
    """Return what turns cost that are so far apart."""
    with tempfile.TemporaryDirectory() as folder, noted_turns(interval) as turns:
        return costs_of(run_loop(device, seconds, Path(folder, "run.jsonl")), turns)


def row(interval: float, costs: list[Cost]) -> str:
    records = statistics.median(cost.records for cost in costs)
    lost = Estimate.of(cost.lost / cost.records for cost in costs)
    busy = statistics.median(cost.busy / cost.records for cost in costs)
    turn = statistics.median(cost.lost for cost in costs)
    return (
        f"| {interval:g} | {len(costs)} | {records:,.0f} | {Estimate.of(c.step for c in costs)} "
        f"| {turn:,.0f} | {lost} | {lost.error:.3f} | {busy:.2f} |"
    )


def loop_table(device: torch.device, seconds: float) -> str:
    """Print what turns cost; return the line that says whether the limit is met."""
    print(
        "| s between turns | turns | records a turn | host time of a step beside a turn, µs "
        "| the loop loses, µs a turn | µs a step | standard error | the thread is busy, µs a step |"
    )
    print("|---|---|---|---|---|---|---|---|")
    costs = {}
    for interval, share in RUNS.items():
        costs[interval] = measure(device, interval, share * seconds)
        print(row(interval, costs[interval]), flush=True)
    return loop_verdict(costs[USUAL], costs[min(RUNS)])


def loop_verdict(usual: list[Cost], short: list[Cost]) -> str:
    """Say whether the limit is met, as far as noise lets one say it."""
    lost = Estimate.of(cost.lost / cost.records for cost in usual)
    low, high = lost.median - 2 * lost.error, lost.median + 2 * lost.error
    met = "met" if high <= HOST_LIMIT else "not met" if low > HOST_LIMIT else "not decided"
    records = statistics.median(cost.records for cost in short)
    turn = statistics.median(cost.lost for cost in short)
    return (
        f"{HOST_LIMIT:g} µs of host time a step: {met}, {lost.median:.2f} ± {2 * lost.error:.2f} "
        f"µs; at {1e3 * USUAL / records:.1f} ms a step {turn / records:.2f} µs, or "
        f"{100 * turn / (1e6 * USUAL):.3f} %"
    )


# -- the demo --------------------------------------------------------------------------------------


def demo_table() -> float:
    """Print what the recorder's thread takes of a step of the demo; return the share."""
    step, busy = measure_demo()
    print("\n| task | steps | a step, µs | its thread, µs a step | share |")
    print("|---|---|---|---|---|")
    print(
        f"| MiniLM of `adaptlr demo` | {DEMO_STEPS} | {step:,.0f} | {busy:.1f} "
        f"| {100 * busy / step:.3f} % |"
    )
    return busy / step


def busy_time() -> float:
    """Return the processor seconds of the recorder's thread."""
    (thread,) = (one for one in threading.enumerate() if one.name == "adaptlr-recorder")
    assert thread.ident is not None
    return time.clock_gettime(time.pthread_getcpuclockid(thread.ident))


def measure_demo() -> tuple[float, float]:
    """Fine-tune MiniLM as the demo does; microseconds a step, of the loop and of the recorder."""
    from adaptlr.cli import demo_task, demo_training

    task = demo_task.load_task()
    batches = demo_training.draw_batches(task.train, DEMO_STEPS, seed=0)
    torch.manual_seed(0)
    model = demo_training.Classifier(len(task.packages)).train()
    optimizer = torch.optim.AdamW(demo_training.trainable(model), lr=3e-4)
    with tempfile.TemporaryDirectory() as folder:
        controller = AdaptiveLR(optimizer, DEMO_STEPS, recorder=Path(folder, "run.jsonl"))
        demo_training.backward(model, batches[0])  # what is slow once; its gradients are dropped
        controller.zero_grad()
        start = time.perf_counter()
        for batch in batches:
            controller.step(demo_training.backward(model, batch))
            controller.zero_grad()
        seconds = time.perf_counter() - start
        time.sleep(2 * USUAL)  # until everything is written
        busy = busy_time()
        controller.detach()
    return 1e6 * seconds / DEMO_STEPS, 1e6 * busy / DEMO_STEPS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for the loop, at least 8")
    parser.add_argument("--commit", default="", help="commit of the sources, outside of a clone")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.set_num_threads(1)
    if device.type == "cuda":
        print(f"# The recorder on a GPU\n\n{facts_of(device, options.commit).line()}\n")
    verdicts = [loop_table(device, options.seconds)]
    if device.type != "cuda":
        share = demo_table()
        met = "met" if share <= DEMO_LIMIT else "not met"
        verdicts.append(f"{DEMO_LIMIT:.0%} of a step of the demo: {met}, {100 * share:.3f} %")
    print(f"\n{'. '.join(verdicts)}.")


if __name__ == "__main__":
    main()
