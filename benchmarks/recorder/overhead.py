"""Question: what does recording cost a training loop on the CPU?

The recorder works in a thread of its own, so its cost is the processor time of that thread: what it
would take from training in the worst case, where there is one core and the interpreter lock is
always wanted. It is measured as the time of the whole process less that of the training thread, on
the task of ``adaptlr demo`` and on a model so small that steps are as short as they get.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from adaptlr import AdaptiveLR
from adaptlr.cli.demo_task import load_task
from adaptlr.cli.demo_training import BATCH_SIZE, Classifier, backward, draw_batches, trainable

DEMO_STEPS = 24
SMALL_STEPS = 20_000

LossOf = Callable[[int], torch.Tensor]


class Cost(NamedTuple):
    """Medians of one loop, in microseconds a step."""

    task: str
    steps: int
    step: float
    recorder: float

    @property
    def share(self) -> float:
        return self.recorder / self.step


def measure(
    task: str, optimizer: torch.optim.Optimizer, loss_of: LossOf, steps: int, path: Path
) -> Cost:
    """Train with a recorder; ``loss_of`` does everything up to the step."""
    controller = AdaptiveLR(optimizer, steps, recorder=path)
    times = []
    before = time.process_time() - time.thread_time()
    for step in range(steps):
        start = time.perf_counter()
        controller.step(loss_of(step))
        controller.zero_grad()
        times.append(time.perf_counter() - start)
    controller.detach()
    others = time.process_time() - time.thread_time() - before
    return Cost(task, steps, 1e6 * statistics.median(times), 1e6 * others / steps)


def demo(path: Path) -> Cost:
    """Fine-tune MiniLM as the demo does."""
    torch.manual_seed(0)
    task = load_task()
    model = Classifier(len(task.packages)).train()
    optimizer = torch.optim.AdamW(trainable(model), lr=3e-4)
    batches = draw_batches(task.train, DEMO_STEPS, seed=0)
    name = f"MiniLM of `adaptlr demo`, batches of {BATCH_SIZE}"
    return measure(name, optimizer, lambda step: backward(model, batches[step]), DEMO_STEPS, path)


def small(path: Path) -> Cost:
    """Train a linear model of 17 parameters."""
    torch.manual_seed(0)
    model = torch.nn.Linear(16, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    inputs = torch.randn(32, 16)

    def loss_of(_: int) -> torch.Tensor:
        loss = model(inputs).pow(2).mean()
        loss.backward()
        return loss

    return measure("a linear model of 17 parameters", optimizer, loss_of, SMALL_STEPS, path)


def main() -> None:
    torch.set_num_threads(1)  # else torch's own threads would count as the recorder's
    print("| task | steps | step, µs | recorder's thread, µs a step | share |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for index, run in enumerate((demo, small)):
            cost = run(Path(folder, f"{index}.jsonl"))
            print(
                f"| {cost.task} | {cost.steps} | {cost.step:,.0f} | {cost.recorder:.1f} "
                f"| {100 * cost.share:.3f} % |"
            )


if __name__ == "__main__":
    main()
