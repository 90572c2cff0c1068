"""One run: a task, an optimizer, a method, a rate and a seed, from the untrained model to a row."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from benchmarks.quality.data import Data, draw, evaluate
from benchmarks.quality.method import Method
from benchmarks.quality.methods import ALL_METHODS
from benchmarks.quality.stages import Gradients, Stage, captured
from benchmarks.quality.tasks import ALL_TASKS, progress_recovered

CURVE_POINTS = 60


@dataclass(frozen=True)
class Run:
    """What is to be run.

    Attributes:
        multiple: The rate as a multiple of the best swept one; ``None`` in a sweep or a search.
        steps: Budget; the task's own unless a smoke test shortens it.
    """

    task: str
    optimizer: str
    method: str
    multiple: float | None
    lr: float
    seed: int
    steps: int

    def key(self) -> tuple:
        """Return what tells a run from every other, also after a trip through JSON."""
        return self.task, self.optimizer, self.method, f"{self.lr:.4g}", self.seed, self.steps


def train(run: Run, data: Data, device: torch.device, graphs: bool) -> dict:
    """Train and evaluate; return the row of the results."""
    begun = time.perf_counter()
    task = ALL_TASKS[run.task]
    torch.manual_seed(run.seed)
    model = task.model(data.outputs).to(device).train()
    start = evaluate(data, model)
    batches = draw(data, run.steps, task.batch, run.seed)
    gradients = Gradients(model, data, batches[0])
    method = ALL_METHODS[run.method](run.optimizer, gradients, run.lr, run.steps)
    stages = method.stages()
    if graphs:
        stages = captured(stages, model, method.suspended())
        method.captured()
    torch.manual_seed(run.seed)  # dropout, whatever was drawn before
    losses = _loop(method, stages, gradients, batches)
    story = method.finish()
    end = evaluate(data, model)
    best = task.best(run.optimizer)
    return {
        **asdict(run),
        "eval_loss": _finite(end),
        "e0": start,
        "best_loss": best and best.loss,
        "score": best and round(progress_recovered(start, end, best.loss), 4),
        "seconds": round(time.perf_counter() - begun, 2),
        "diverged": story.diverged,
        "found": story.found,
        "counts": story.counts(),
        "events": story.events[:CURVE_POINTS],
        "curve": _curve(losses, story.lrs),
    }


def _loop(
    method: Method, stages: list[Stage], gradients: Gradients, batches: Tensor
) -> list[float]:
    """Take all steps, or those until the method gives up; return their losses."""
    losses = torch.full((len(batches),), math.nan, device=batches.device)
    for index, batch in enumerate(batches.unbind()):
        gradients.index.copy_(batch)
        goes_on = method.step(index, stages)
        losses[index].copy_(gradients.loss)
        if not goes_on:
            break
    return losses[: index + 1].tolist()


def _curve(losses: Sequence[float], lrs: Sequence[float]) -> list[tuple]:
    """Return (step, loss, rate) of at most CURVE_POINTS steps, evenly spaced."""
    count = min(len(losses), len(lrs))
    every = max(1, math.ceil(count / CURVE_POINTS))
    return [
        (step, _finite(losses[step]), float(f"{lrs[step]:.4g}")) for step in range(0, count, every)
    ]


def _finite(value: float) -> float | None:
    """Return a value that JSON knows."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def clean_up() -> None:
    """Give back the memory of a run: graphs and hooks lie in cycles of references."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
