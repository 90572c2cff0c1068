"""Makes the tables of `lr="auto"`: how well runs end that were not told a rate."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from statistics import fmean, quantiles

from benchmarks.quality.tasks import progress_recovered

Rows = list[dict]
TOP = """\
{facts}

# Learning rates that adaptlr finds by itself

`lr="auto"` from rates that say nothing. Progress recovered, (e0 - e) / (e0 - L\\*): 1 is the best
held-out loss of a sweep of the learning rate, 0 is nothing learnt. Every run pays for its search
with its own steps. {runs} runs; seeds {seeds}.
"""
SWEEPS = """
## The sweeps that these scores refer to

Warm-up and cosine, one run a rate: its held-out loss. The lowest is L\\*; where it is the first or
the last, the best rate may lie beyond.
"""


def scored(rows: Rows, swept: Rows) -> Rows:
    """Return the rows with a score; where tasks.py has no best loss, it comes from ``swept``."""
    best: dict[tuple, float] = defaultdict(lambda: math.inf)
    for row in swept:
        if row["eval_loss"] is not None:
            best[_setting(row)] = min(best[_setting(row)], row["eval_loss"])
    return [
        row if row["score"] is not None else row | _score(row, best[_setting(row)]) for row in rows
    ]


def _setting(row: dict) -> tuple:
    return row["task"], row["optimizer"], row["steps"]


def _score(row: dict, best: float) -> dict:
    if not math.isfinite(best):
        raise ValueError(f"{_setting(row)} needs the rows of a sweep: run.py --near 3")
    end = math.nan if row["eval_loss"] is None else row["eval_loss"]
    return {"best_loss": best, "score": round(progress_recovered(row["e0"], end, best), 4)}


def search_steps(row: dict) -> float:
    """Return the steps that went into the search; NaN if the run ended before."""
    return next((step + 1 for step, kind, _ in row["events"] if kind == "found"), math.nan)


def figures(rows: Rows) -> list[object]:
    """Return mean, quantiles and worst of the scores, and how long the searches were."""
    scores = [row["score"] for row in rows]
    steps = [search_steps(row) for row in rows]
    cuts = quantiles(scores, n=20, method="inclusive") if len(scores) > 1 else scores * 19
    shown = [fmean(scores), cuts[9], cuts[1], cuts[0], min(scores)]
    restarts = sum(row["counts"].get("restart", 0) > 0 for row in rows)
    return [len(rows), *(f"{x:.3f}" for x in shown), f"{min(steps)}-{max(steps)}", restarts]


HEAD = ["runs", "mean", "median", "10 %", "5 %", "worst", "search steps", "runs with a restart"]


def search_report(
    rows: Rows, facts: str, table: Callable, grouped: Callable, swept: Rows = ()
) -> str:
    """Return the whole report; `table` and `grouped` are those of report.py."""
    by_optimizer = grouped(rows, "optimizer").items()
    by_task = grouped(rows, "task", "optimizer").items()
    seeds = ", ".join(map(str, sorted({row["seed"] for row in rows})))
    parts = [
        TOP.format(facts=facts, runs=len(rows), seeds=seeds),
        table(["optimizer", *HEAD], [[*key, *figures(group)] for key, group in by_optimizer]),
        "\n## By task\n",
        table(["task", "optimizer", *HEAD], [[*key, *figures(group)] for key, group in by_task]),
    ]
    for (optimizer,), group in by_optimizer:
        starts = sorted({row["lr"] for row in group})
        lines = [
            [task, *(every_seed(cell, start) for start in starts)]
            for (task,), cell in grouped(group, "task").items()
        ]
        parts += [f"\n## By start, {optimizer}: every seed\n", table(["task", *starts], lines)]
    if swept:
        lines = [[*key, curve(group)] for key, group in grouped(swept, "task", "optimizer").items()]
        parts += [SWEEPS, table(["task", "optimizer", "rate: loss"], lines)]
    return "\n".join(parts) + "\n"


def every_seed(rows: Rows, start: float) -> str:
    chosen = sorted((r for r in rows if r["lr"] == start), key=lambda row: row["seed"])
    return " ".join(f"{row['score']:.2f}" for row in chosen)


def curve(rows: Rows) -> str:
    """Return the loss of every rate, the lowest in bold."""
    losses = {row["lr"]: row["eval_loss"] for row in sorted(rows, key=lambda row: row["lr"])}
    lowest = min(loss for loss in losses.values() if loss is not None)
    shown = {lr: "nan" if loss is None else f"{loss:.4g}" for lr, loss in losses.items()}
    mark = {lr: "**" if loss == lowest else "" for lr, loss in losses.items()}
    return ", ".join(f"{lr:.2g}: {mark[lr]}{text}{mark[lr]}" for lr, text in shown.items())
