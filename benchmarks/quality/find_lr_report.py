"""Makes results/find_lr_<device>.md from rows of find_lr.py and recorded ramps and gradients.

``python -m benchmarks.quality.find_lr_report find_lr.jsonl``. Every pick is compared with the best
rate of a sweep in half decades, and scored by what the sweep's runs had made of such a rate.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np

from adaptlr import peer_rules
from adaptlr.ramp import Baseline, Ramp
from benchmarks.quality.find_lr import peer_picks
from benchmarks.quality.report import RESULTS, SWEEP, headers, table
from benchmarks.quality.tasks import ALL_TASKS, TASKS, progress_recovered

RECORDED = RESULTS / "lr_ramps_nvidia-h100-80gb-hbm3.jsonl"
BASELINE = 8  # losses of a recorded ramp that were taken at harmless rates
FACTOR = 3.0

TOP = """\
{facts}

# How near a learning-rate finder comes to the best swept rate

Best rate: the lowest held-out loss of a cosine sweep in half decades, 10 % warm-up, clipped
gradients, three seeds, on an H100 (all of it in [{sweep}]({sweep})). The basin within 5 % of the
best loss is often one point of that sweep wide, so a factor of 1.8 is the resolution.
*Score*: progress recovered by a run at the pick, interpolated on the sweep; 1 is the best of the
sweep, 0 is nothing learnt.
*Error*: log10(pick / best), in decades; its root mean square. NaN picks count as a score of 0 and
as beyond any factor.
"""
MEASURED = """
## Measured here: {count} searches

`find_lr` with every default (8 gradients, 3 ramps of 16 steps a decade), and one ramp of 100
steps over 8 decades, from which the other rules are read as fastai (1e-7 to 10) and Lightning
(1e-8 to 1) would. Tasks {tasks}; seeds {seeds}. The best rates are the H100's. Every task and
optimizer counts the same in the means, however many seeds it has.
"""
RECORDED_TEXT = """
## Recorded: 90 gradients and fast ramps, 24 slow ramps

From the search experiments that the rules come from: the rows of [{file}]({file}). MiniLM,
EfficientNet and GPT on an H100, digits on a CPU. *One gradient* and *fast ramp* (8 to 24 steps a
decade; the detector of `adaptlr.ramp` but for its cut of outliers): seven or eight seeds for each
task and optimizer. Slow ramps: 30 steps a decade from 1e-8 up to 0.3, whatever came, two seeds
each; for SGD they end before the cliff. The other rules are made for faster ramps than these.

*Constants from the other tasks*: the shift of each rule is fitted anew on five tasks and judged
on the sixth, one constant for each optimizer family in the estimate and one for both in the ramp.
It is the only honest line for rules that were chosen on these very tasks.
"""


class Pick(NamedTuple):
    """A rate that a rule has chosen."""

    task: str
    optimizer: str
    rule: str
    lr: float


@cache
def sweep() -> dict[tuple[str, str], dict[float, tuple[float, float]]]:
    """Return (held-out loss, that of the untrained model) by rate, for every task and optimizer."""
    found: dict[tuple[str, str], dict[float, tuple[float, float]]] = defaultdict(dict)
    with SWEEP.open() as file:
        for row in csv.DictReader(file):
            losses = float(row["eval_loss"]), float(row["untrained"])
            found[row["task"], row["optimizer"]][float(row["lr"])] = losses
    return found


def error(pick: Pick) -> float:
    """Return how far a pick is from the best rate, in decades."""
    best = ALL_TASKS[pick.task].best(pick.optimizer)
    assert best is not None
    return math.log10(pick.lr / best.lr)


def score(pick: Pick) -> float:
    """Return the progress that a run at the pick recovers, interpolated in log(lr)."""
    if not math.isfinite(pick.lr):
        return 0.0
    runs = sorted(sweep()[pick.task, pick.optimizer].items())
    untrained = runs[0][1][1]
    losses = [min(loss, untrained) if loss == loss else untrained for _, (loss, _) in runs]
    loss = float(np.interp(math.log10(pick.lr), [math.log10(lr) for lr, _ in runs], losses))
    return progress_recovered(untrained, loss, min(losses))


def balanced_mean(group: list[Pick], values: list[float]) -> float:
    """Return the mean over tasks and optimizers of the means over their seeds."""
    cells: dict[tuple[str, str], list[float]] = defaultdict(list)
    for pick, value in zip(group, values, strict=True):
        cells[pick.task, pick.optimizer].append(value)
    return fmean(map(fmean, cells.values()))


def summary(picks: Iterable[Pick]) -> str:
    """Return a table with a line for each rule; every task and optimizer counts the same."""
    by_rule: dict[str, list[Pick]] = defaultdict(list)
    for pick in picks:
        by_rule[pick.rule].append(pick)
    head = ["rule", "picks", f"within a factor of {FACTOR:g}", "error", "largest", "mean score"]
    lines = []
    for rule, group in by_rule.items():
        errors = [abs(error(pick)) if math.isfinite(pick.lr) else math.inf for pick in group]
        within = balanced_mean(group, [float(value <= math.log10(FACTOR)) for value in errors])
        root = math.sqrt(balanced_mean(group, [value**2 for value in errors]))
        scores = [score(pick) for pick in group]
        figures = [
            f"{within:.2f}",
            f"{root:.2f}",
            f"{max(errors):.2f}",
            f"{balanced_mean(group, scores):.3f}",
        ]
        lines.append([rule, len(group), *figures, f"{min(scores):.2f}"])
    return table([*head, "worst"], lines)


def left_out(estimates: list[Pick], ramps: list[Pick]) -> Iterator[Pick]:
    """Yield the picks of both rules and their mean, with constants from the other tasks."""
    for estimate, ramp in zip(estimates, ramps, strict=True):
        family = [pick for pick in estimates if pick.optimizer == estimate.optimizer]
        lr = estimate.lr / _shift(family, estimate.task)
        ramp_lr = ramp.lr / _shift(ramps, ramp.task)
        for rule, value in ((estimate.rule, lr), (ramp.rule, ramp_lr)):
            yield estimate._replace(rule=f"{rule}, constants from the other tasks", lr=value)
        mean = math.sqrt(lr * ramp_lr)
        yield estimate._replace(rule="mean of both, constants from the other tasks", lr=mean)


def _shift(picks: list[Pick], left_out: str) -> float:
    """Return by how much the rule is too high on the tasks that are not left out.

    NaN if there are none.
    """
    by_task: dict[str, list[float]] = defaultdict(list)
    for pick in picks:
        if pick.task != left_out and math.isfinite(pick.lr):
            by_task[pick.task].append(error(pick))
    means = [fmean(errors) for errors in by_task.values()]
    return 10 ** fmean(means) if means else math.nan


def unique_rows(lines: list[dict]) -> list[dict]:
    """Return the newest row of each search, by task, optimizer and seed."""
    rows = {(r["task"], r["optimizer"], r["seed"]): r for r in lines if "picks" in r}
    order = list(ALL_TASKS)
    return [rows[key] for key in sorted(rows, key=lambda key: (order.index(key[0]), *key[1:]))]


def all_picks(row: dict) -> dict[str, float]:
    """Return our picks and those that other rules read off the ramp beside them."""
    return row["picks"] | peer_picks(*zip(*row["peer_curve"], strict=True))


def measured_picks(rows: list[dict]) -> list[Pick]:
    return [
        Pick(row["task"], row["optimizer"], rule, lr)
        for row in rows
        for rule, lr in all_picks(row).items()
    ]


def recorded_picks(lines: list[dict]) -> Iterator[Pick]:
    pairs = [line for line in lines if "one gradient" in line]
    estimates, ramps = (
        [Pick(line["task"], line["optimizer"], rule, line[rule]) for line in pairs]
        for rule in ("one gradient", "fast ramp")
    )
    yield from estimates
    yield from ramps
    for estimate, ramp in zip(estimates, ramps, strict=True):
        yield estimate._replace(rule="mean of both", lr=math.sqrt(estimate.lr * ramp.lr))
    yield from left_out(estimates, ramps)
    for line in lines:
        if "losses" in line:
            yield from _slow_picks(line)


def _slow_picks(line: dict) -> Iterator[Pick]:
    losses = [math.nan if loss is None else loss for loss in line["losses"]]
    lrs = [line["first_lr"] * 10 ** (k / line["steps_per_decade"]) for k in range(len(losses))]
    ramp = Ramp(Baseline(losses[:BASELINE]))
    for lr, loss in zip(lrs[BASELINE:], losses[BASELINE:], strict=True):
        if not ramp.observe(lr, loss):
            break
    picks = {"slow ramp": ramp.suggestion(line["steps_per_decade"])}
    picks |= peer_rules.suggestions(np.array(lrs), np.array(losses))
    for rule, lr in picks.items():
        yield Pick(line["task"], line["optimizer"], rule, lr)


def cells(rows: list[dict]) -> str:
    """Return a table of pick / best for every search."""
    rules = list(all_picks(rows[0]))
    lines = []
    for row in rows:
        best = ALL_TASKS[row["task"]].best(row["optimizer"])
        low, high = row["interval"]
        ratios = [f"{lr / best.lr:.2g}" for lr in all_picks(row).values()]
        inside = "yes" if low <= best.lr <= high else "no"
        head = [row["task"], row["optimizer"], row["seed"], f"{best.lr:.2g}"]
        lines.append([*head, *ratios, inside, row["steps"]])
    return table(["task", "optimizer", "seed", "best", *rules, "in interval", "steps"], lines)


def both_halves(rows: list[dict]) -> Iterator[Pick]:
    """Yield what `find_lr` would have found with constants from the other tasks."""
    picks = measured_picks(rows)
    halves = ([p for p in picks if p.rule == rule] for rule in ("estimate_lr", "ramps alone"))
    return left_out(*halves)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=Path, nargs="*", help="files that find_lr.py has written")
    parser.add_argument("--output-dir", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    lines = [json.loads(line) for file in arguments.rows for line in file.read_text().splitlines()]
    rows = unique_rows(lines)
    measured_on = headers(arguments.rows)
    facts = "\n".join(dict.fromkeys(header["facts"] for header in measured_on))
    parts = [TOP.format(facts=facts, sweep=SWEEP.name)]
    if rows:
        seeds = ", ".join(map(str, sorted({row["seed"] for row in rows})))
        tasks = ", ".join(dict.fromkeys(row["task"] for row in rows))
        parts.append(MEASURED.format(count=len(rows), seeds=seeds, tasks=tasks))
        complete = len({(row["task"], row["optimizer"]) for row in rows}) == 2 * len(TASKS)
        again = both_halves(rows) if complete else []  # too few tasks to leave one out
        parts.append(summary([*measured_picks(rows), *again]))
        parts += ["\n### Pick / best\n", cells(rows)]
    parts.append(RECORDED_TEXT.format(file=RECORDED.name))
    recorded = [json.loads(line) for line in RECORDED.read_text().splitlines()]
    parts.append(summary(recorded_picks(recorded)))
    slug = measured_on[0]["slug"] if measured_on else "recorded"
    text = "\n".join(parts) + "\n"
    (arguments.output_dir / f"find_lr_{slug}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
