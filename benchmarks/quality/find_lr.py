"""How near does a learning-rate finder come to the best swept rate? ``... find_lr DATA``.

Runs `find_lr` on the untrained model of every task, and beside it one ramp as other finders run it,
which their rules are read off. One row for each task, optimizer and seed as JSON Lines; rows that
the file already has are not repeated. find_lr_report.py makes tables of them.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from rich.progress import track

from adaptlr import RangeTest, find_lr, peer_rules
from adaptlr.bench.facts import facts_of
from adaptlr.cli.demo_training import MAX_GRAD_NORM
from adaptlr.start import Start
from adaptlr.trial import Trial, lr_ratios, set_lr
from benchmarks.quality.data import Data, draw, load
from benchmarks.quality.grid import OPTIMIZERS
from benchmarks.quality.method import make_optimizer
from benchmarks.quality.tasks import ALL_TASKS, TASKS

BATCHES = 1000  # more than any search takes
USER_LR = 1e-3  # what the optimizer is made with; nothing depends on it
PEER_STEPS_PER_DECADE = 12.5  # 100 steps over 8 decades, in fastai and in Lightning
PEER_RANGE = (1e-8, 10.0)  # from Lightning's lowest to fastai's highest rate
FASTAI_FROM, LIGHTNING_TO = 1e-7, 1.0


def measure(task: str, optimizer: str, seed: int, data: Data, device: torch.device) -> dict:
    """Return the row of one search."""
    begun = time.perf_counter()
    torch.manual_seed(seed)
    model = ALL_TASKS[task].model(data.outputs).to(device).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    made = make_optimizer(optimizer, parameters, USER_LR)
    batches = draw(data, BATCHES, ALL_TASKS[task].batch, seed)

    def loss(index: torch.Tensor) -> torch.Tensor:
        return data.loss(model, index)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        found = find_lr(loss, made, batches, model=model, max_grad_norm=MAX_GRAD_NORM)
    ours = time.perf_counter() - begun
    lrs, losses = _peer_ramp(Trial(loss, made, batches, model, None, 1, MAX_GRAD_NORM))
    return {
        "task": task,
        "optimizer": optimizer,
        "seed": seed,
        "picks": _our_picks(found),
        "interval": found.interval,
        "steps": len(found.estimate.losses) + sum(len(ramp.losses) for ramp in found.replicas),
        "seconds": round(ours, 1),
        "curve": [[float(f"{value:.4g}") for value in line] for line in found.curve.tolist()],
        "peer_curve": [[float(f"{x:.4g}") for x in pair] for pair in zip(lrs, losses, strict=True)],
    }


def _our_picks(found: RangeTest) -> dict[str, float]:
    ramps = [math.log10(ramp.lr) for ramp in found.replicas if math.isfinite(ramp.lr)]
    return {
        "find_lr": found.lr,
        "ramps alone": 10 ** float(np.median(ramps)) if ramps else math.nan,
        "estimate_lr": found.estimate.lr,
        "one gradient": found.estimate.estimates[0],
    }


def _peer_ramp(trial: Trial) -> tuple[list[float], list[float]]:
    """Run one ramp over the whole range, to where the other finders stop at the latest."""
    lrs, losses = [], []
    ratios = lr_ratios(trial.optimizer)
    low, high = PEER_RANGE
    with Start(trial.optimizer, trial.model):
        for step in range(round(math.log10(high / low) * PEER_STEPS_PER_DECADE)):
            lr = low * 10 ** (step / PEER_STEPS_PER_DECADE)
            loss = trial.gradient()
            lrs, losses = [*lrs, lr], [*losses, loss]
            kept, _ = peer_rules.until_diverged(np.array(lrs), np.array(losses))
            if len(kept) < len(lrs):
                break
            set_lr(trial.optimizer, lr, ratios)
            trial.step()
    return lrs, losses


def peer_picks(lrs: list[float], losses: list[float]) -> dict[str, float]:
    """Read every rule off the part of the ramp that its finder would have run."""
    rates, values = np.array(lrs), np.array(losses)
    fastai, lightning = rates >= FASTAI_FROM, rates <= LIGHTNING_TO
    picks = peer_rules.suggestions(rates[fastai], values[fastai])
    picks["lightning"] = peer_rules.suggestions(rates[lightning], values[lightning])["lightning"]
    return picks


def planned(arguments: argparse.Namespace) -> Iterator[tuple[str, str, int]]:
    """Yield the searches that were asked for and are not in the file yet."""
    lines = arguments.output.read_text().splitlines() if arguments.output.exists() else []
    rows = [row for row in map(json.loads, lines) if "task" in row]
    done = {(row["task"], row["optimizer"], row["seed"]) for row in rows}
    for seed in range(arguments.seeds):
        for task in arguments.tasks:
            for optimizer in arguments.optimizers:
                if (task, optimizer, seed) not in done:
                    yield task, optimizer, seed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("data", type=Path, help="directory that build.py has filled")
    add("--output", type=Path, default=Path("find_lr.jsonl"), help="rows; appended to")
    add("--tasks", nargs="+", choices=ALL_TASKS, default=list(TASKS), metavar="TASK")
    add("--optimizers", nargs="+", choices=OPTIMIZERS, default=OPTIMIZERS)
    add("--seeds", type=int, default=2, help="how many, from 0")
    add("--minutes", type=float, default=math.inf, help="no search is started after so long")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--commit", default="", help="commit of the sources, outside of a clone")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    deadline = time.time() + 60 * arguments.minutes
    facts = facts_of(device, arguments.commit)
    searches = list(planned(arguments))
    with arguments.output.open("a") as file:
        print(json.dumps({"facts": facts.line(), "slug": facts.slug()}), file=file)
        for task, optimizer, seed in track(searches, "searches"):
            if time.time() > deadline:
                break
            data = load(arguments.data / f"{ALL_TASKS[task].data}.npz", device)
            row = measure(task, optimizer, seed, data, device)
            print(json.dumps(row), file=file, flush=True)


if __name__ == "__main__":
    main()
