"""Makes the tables of what there is beside `lr="auto"`: one rate for all tasks, or none at all."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import fmean, median

from benchmarks.quality.search_report import scored
from benchmarks.quality.tasks import TASKS, progress_recovered

Rows = list[dict]
TOP = """\
{facts}

# Without a learning rate for each task

Progress recovered, (e0 - e) / (e0 - L\\*), where L\\* is the best of a full sweep with AdamW or SGD
on that task. No method is told anything of the task: each has one rate for all of them, or none. Of
several rates the one with the best mean is shown, which flatters it: nobody knows it beforehand.
Same model, batches, gradient clipping and number of steps for all; searches pay with their own.
*fixed*: warm-up and cosine at the best single rate, from the sweep itself (three seeds).

![Progress recovered, one dot a task]({plot})
"""


def with_best_rate(rows: Rows, grouped: Callable) -> Rows:
    """Return the rows of each method at the one rate that is best over all tasks."""
    chosen = []
    for _, group in grouped(rows, "optimizer", "method").items():
        by_rate: dict[float, Rows] = defaultdict(list)
        for row in group:
            by_rate[row["lr"]].append(row)
        # A rate whose runs were cut off would be judged by the tasks that are left.
        most = max(map(len, by_rate.values()))
        complete = [rows for rows in by_rate.values() if len(rows) == most]
        chosen += max(complete, key=lambda rows: fmean(row["score"] for row in rows))
    return chosen


def fixed_rows(file: Path) -> Rows:
    """Return every cell of a sweep (``lr_sweep_*.csv``) as rows of the method ``fixed``."""
    rows = []
    with file.open() as opened:
        for line in csv.DictReader(opened):
            best = TASKS[line["task"]].best(line["optimizer"])
            ends = float(line["untrained"]), float(line["eval_loss"] or "nan")
            row = {name: line[name] for name in ("task", "optimizer")} | {"method": "fixed"}
            rows.append(
                row | {"lr": float(line["lr"]), "score": progress_recovered(*ends, best.loss)}
            )
    return rows


def compared(rows: Rows, sweep: Path, grouped: Callable) -> Rows:
    """Return what is to be shown: every method once on each task, or with each of its seeds."""
    searched = [row for row in rows if row["method"] == "auto"]
    peers = [row for row in rows if row["method"] != "auto"] + fixed_rows(sweep)
    return scored(searched, []) + with_best_rate(peers, grouped)


def peers_report(rows: Rows, facts: str, plot: str, table: Callable, grouped: Callable) -> str:
    """Return the whole report; `table` and `grouped` are those of report.py."""
    parts = [TOP.format(facts=facts, plot=plot)]
    head = ["method", "rate", "runs", "mean", "median", "worst", ">= 0.95"]
    for (optimizer,), group in grouped(rows, "optimizer").items():
        by_method = {method: cell for (method,), cell in grouped(group, "method").items()}
        order = sorted(by_method, key=lambda m: -fmean(row["score"] for row in by_method[m]))
        tasks = [task for (task,) in grouped(group, "task")]
        parts += [
            f"\n## In the place of {optimizer}\n",
            table(head, [[method, *figures(by_method[method])] for method in order]),
            "",
            table(["method", *tasks], [[m, *by_task(by_method[m], tasks)] for m in order]),
        ]
    return "\n".join(parts) + "\n"


def figures(rows: Rows) -> list[object]:
    scores = [row["score"] for row in rows]
    rate = "none" if rows[0]["method"] == "auto" else f"{rows[0]['lr']:.3g}"
    share = sum(score >= 0.95 for score in scores) / len(scores)
    levels = (f"{level(scores):.3f}" for level in (fmean, median, min))
    return [rate, len(rows), *levels, f"{share:.2f}"]


def by_task(rows: Rows, tasks: Iterable[str]) -> list[str]:
    """Return the mean score on each task."""
    cells = ([row["score"] for row in rows if row["task"] == task] for task in tasks)
    return [f"{fmean(cell):.2f}" if cell else "" for cell in cells]
