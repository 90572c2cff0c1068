"""Question: what does recording cost a training loop?

The recorder works in a thread of its own. Its processor time is what it would take from training in
the worst case, where there is one core and the interpreter lock is always wanted; it is read from
the clock of that thread. What a loop really loses is measured beside it, as the host time of the
same loop with a recorder and without, in turns. On the CPU this is asked of the task of ``adaptlr
demo`` too; the other model is so small that steps are as short as they get.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from adaptlr import AdaptiveLR
from adaptlr.bench.facts import facts_of
from adaptlr.recorder_thread import INTERVAL

DEMO_STEPS = 24
SMALL_STEPS = 20_000
PAIRS = 5

LossOf = Callable[[int], torch.Tensor]


class Cost(NamedTuple):
    """What one loop took, in microseconds a step."""

    step: float
    recorder: float


class Task(NamedTuple):
    """A loop that can be run again and again."""

    name: str
    steps: int
    make: Callable[[], tuple[torch.optim.Optimizer, LossOf]]  # the loss is ready to be stepped on


def measure(task: Task, path: Path | None) -> Cost:
    """Train once; with a recorder if there is a path."""
    optimizer, loss_of = task.make()
    controller = AdaptiveLR(optimizer, task.steps, recorder=path)
    loss_of(0)  # what is slow once; its gradients are dropped
    controller.zero_grad()
    start = time.perf_counter()
    for step in range(task.steps):
        controller.step(loss_of(step))
        controller.zero_grad()
    host = time.perf_counter() - start
    recorder = busy_time(path is not None)
    controller.detach()
    return Cost(1e6 * host / task.steps, 1e6 * recorder / task.steps)


def busy_time(has_recorder: bool) -> float:
    """Return the processor seconds of the recorder's thread, once it has written everything."""
    if not has_recorder:
        return 0.0
    time.sleep(2 * INTERVAL + 0.2)
    (thread,) = (one for one in threading.enumerate() if one.name == "adaptlr-recorder")
    assert thread.ident is not None
    return time.clock_gettime(time.pthread_getcpuclockid(thread.ident))


def demo() -> Task:
    """Fine-tune MiniLM as the demo does."""
    from adaptlr.cli import demo_task, demo_training

    task = demo_task.load_task()
    batches = demo_training.draw_batches(task.train, DEMO_STEPS, seed=0)

    def make() -> tuple[torch.optim.Optimizer, LossOf]:
        torch.manual_seed(0)
        model = demo_training.Classifier(len(task.packages)).train()
        optimizer = torch.optim.AdamW(demo_training.trainable(model), lr=3e-4)
        return optimizer, lambda step: demo_training.backward(model, batches[step])

    name = f"MiniLM of `adaptlr demo`, batches of {demo_training.BATCH_SIZE}"
    return Task(name, DEMO_STEPS, make)


def small(device: torch.device, steps: int) -> Task:
    """Train a linear model of 17 parameters."""

    def make() -> tuple[torch.optim.Optimizer, LossOf]:
        torch.manual_seed(0)
        model = torch.nn.Linear(16, 1, device=device)
        inputs = torch.randn(32, 16, device=device)

        def loss_of(_: int) -> torch.Tensor:
            loss = model(inputs).pow(2).mean()
            loss.backward()
            return loss

        return torch.optim.SGD(model.parameters(), lr=1e-3), loss_of

    return Task("a linear model of 17 parameters", steps, make)


def row(task: Task, pairs: int) -> str:
    """Measure a task with and without a recorder, in turns; the medians as a row."""
    costs: dict[bool, list[Cost]] = {False: [], True: []}
    with tempfile.TemporaryDirectory() as folder:
        for pair in range(pairs):
            costs[False].append(measure(task, None))
            costs[True].append(measure(task, Path(folder, f"{pair}.jsonl")))
    steps = sorted(cost.step for cost in costs[False])
    plain = statistics.median(steps)
    more = statistics.median(cost.step for cost in costs[True]) - plain
    added = f"{more:+,.1f}" if pairs > 1 else "not asked"  # one run tells noise alone
    recorder = statistics.median(cost.recorder for cost in costs[True])
    return (
        f"| {task.name} | {task.steps} | {pairs} | {plain:,.1f} | {steps[0]:,.1f} to "
        f"{steps[-1]:,.1f} | {added} | {recorder:.1f} | {100 * recorder / plain:.3f} % |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--steps", type=int, default=SMALL_STEPS, help="of the small model")
    parser.add_argument("--commit", default="", help="commit of the sources, outside of a clone")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.set_num_threads(1)
    if device.type == "cuda":
        print(f"# The recorder on a GPU\n\n{facts_of(device, options.commit).line()}\n")
    print(
        "| task | steps | runs | host time of a step without it, µs | range | with it, µs more "
        "| its thread, µs a step | share |"
    )
    print("|---|---|---|---|---|---|---|---|")
    if device.type != "cuda":
        print(row(demo(), 1))
    print(row(small(device, options.steps), options.pairs))


if __name__ == "__main__":
    main()
