"""Makes the tables of `lr="auto"`: how well runs end that were not told a rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import fmean, quantiles

from benchmarks.quality.grid import STARTS

Rows = list[dict]
TOP = """\
{facts}

# Learning rates that adaptlr finds by itself

`lr="auto"` from rates that say nothing, over seven decades (AdamW) and six (SGD). Progress
recovered, (e0 - e) / (e0 - L\\*): 1 is the best held-out loss of a full sweep of the learning rate,
0 is nothing learnt. Every run pays for its search with its own steps. {runs} runs; seeds {seeds}.
"""


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


def search_report(rows: Rows, facts: str, table: Callable, grouped: Callable) -> str:
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
        starts = STARTS[optimizer]
        lines = [
            [task, *(every_seed(cell, start) for start in starts)]
            for (task,), cell in grouped(group, "task").items()
        ]
        parts += [f"\n## By start, {optimizer}: every seed\n", table(["task", *starts], lines)]
    return "\n".join(parts) + "\n"


def every_seed(rows: Rows, start: float) -> str:
    chosen = sorted((r for r in rows if r["lr"] == start), key=lambda row: row["seed"])
    return " ".join(f"{row['score']:.2f}" for row in chosen)
