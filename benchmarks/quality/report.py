"""Makes tables and a plot of the rows of run.py: ``python -m benchmarks.quality.report ROWS...``.

Writes ``guard_<device>.md``, ``.csv`` and ``.png``, ``search_<device>.md`` of the method ``auto``,
and ``raise_<device>.md`` and ``.csv`` where rates are too low. Rows of a sweep give a table of the
best rates instead, on stdout, for tasks.py, and with ``--sweep-to`` a file of all rates.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean, median

from benchmarks.quality.grid import (
    ALL_OPTIMIZERS,
    FIXED_RATES,
    LOW_MULTIPLES,
    MULTIPLES,
    read_rows,
)
from benchmarks.quality.methods import ALL_METHODS, SEARCHES
from benchmarks.quality.peers_report import compared, peers_report
from benchmarks.quality.search_report import scored, search_report
from benchmarks.quality.tasks import ALL_TASKS
from benchmarks.quality.training import Run

RESULTS = Path(__file__).parents[1] / "results"
SWEEP = RESULTS / "lr_sweep_nvidia-h100-80gb-hbm3.csv"

ORDER = {
    "task": list(ALL_TASKS),
    "optimizer": list(ALL_OPTIMIZERS),
    "method": [*ALL_METHODS, "fixed"],
    "multiple": [*LOW_MULTIPLES, *MULTIPLES],
}
Rows = list[dict]
TOP = """\
{facts}

# Learning rates that are too {what}

Progress recovered, (e0 - e) / (e0 - L\\*): 1 is the best held-out loss of a full sweep of the
learning rate, 0 is nothing learnt. The same warm-up, gradient clipping and number of steps for all;
benchmarks/README.md tells how the runs are made. {runs} runs; seeds {seeds}; tasks {tasks}.
"""
PLOT = "![Mean progress recovered over the multiple of the best learning rate]({plot})\n"


def table(head: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table."""
    rule = ["---"] * len(head)
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in (head, rule, *lines))


def grouped(rows: Rows, *names: str) -> dict[tuple, Rows]:
    """Return the rows by the values of some of their fields, in the order of the grid."""
    groups: dict[tuple, Rows] = defaultdict(list)
    for row in rows:
        groups[tuple(row[name] for name in names)].append(row)

    def place(values: tuple) -> list[int]:
        return [ORDER[name].index(value) for name, value in zip(names, values, strict=True)]

    return {values: groups[values] for values in sorted(groups, key=place)}


def scores(rows: Rows) -> list[float]:
    return [row["score"] for row in rows]


def share(values: list[float], least: float) -> str:
    return f"{sum(value >= least for value in values) / len(values):.2f}"


def summary(rows: Rows) -> str:
    head = ["optimizer", "method", "runs", "mean", "median", "worst", ">= 0.9", ">= 0.7", "ended"]
    lines = []
    for (optimizer, method), group in grouped(rows, "optimizer", "method").items():
        values = scores(group)
        levels = [f"{figure(values):.3f}" for figure in (fmean, median, min)]
        shares = [share(values, least) for least in (0.9, 0.7)]
        ended = sum(row["diverged"] is not None for row in group)
        lines.append([optimizer, method, len(group), *levels, *shares, ended])
    return table(head, lines)


def by_multiple(rows: Rows, names: Sequence[str], cell: Callable[[Rows], str]) -> str:
    """Return a table with a column for each multiple, and a line for each value of ``names``."""
    lines = []
    multiples = [multiple for (multiple,) in grouped(rows, "multiple")]
    for values, group in grouped(rows, *names).items():
        cells = grouped(group, "multiple")
        lines.append([*values, *(cell(cells[(m,)]) if (m,) in cells else "" for m in multiples)])
    return table([*names, *(f"x{multiple:g}" for multiple in multiples)], lines)


def mean_and_worst(rows: Rows) -> str:
    return f"{fmean(scores(rows)):.2f} / {min(scores(rows)):.2f}"


def every_seed(rows: Rows) -> str:
    return " ".join(f"{row['score']:.2f}" for row in sorted(rows, key=lambda row: row["seed"]))


def events(rows: Rows) -> str:
    """Return how often each kind of event came in a run, on average."""
    counts: dict[str, int] = defaultdict(int)
    for row in rows:
        for kind, count in row["counts"].items():
            counts[kind] += count
    shown = (f"{kind} {count / len(rows):.1f}" for kind, count in sorted(counts.items()))
    return ", ".join(shown) or "none"


def guard_report(rows: Rows, facts: str, plot: str | None) -> str:
    """Return the whole report; without a plot it is of rates that are too low."""
    what = "low" if plot is None else "high"
    seeds = ", ".join(map(str, sorted({row["seed"] for row in rows})))
    tasks = ", ".join(task for (task,) in grouped(rows, "task"))
    method = ("optimizer", "method")
    parts = [
        TOP.format(what=what, facts=facts, runs=len(rows), seeds=seeds, tasks=tasks),
        *([] if plot is None else [PLOT.format(plot=plot)]),
        summary(rows),
        "\n*ended*: runs that the guard gave up (`TrainingDiverged`); their score counts.",
        "\n## By multiple of the best rate: mean / worst\n",
        by_multiple(rows, method, mean_and_worst),
        "\n## By task: every seed\n",
        by_multiple(rows, ("task", *method), every_seed),
        "\n## What was done: events in a run\n",
        by_multiple(rows, method, events),
    ]
    return "\n".join(parts) + "\n"


def sweep_report(rows: Rows) -> str:
    """Return the best rate and loss of every task and optimizer: the constants of tasks.py."""
    lines = []
    for (task, optimizer), group in grouped(rows, "task", "optimizer").items():
        by_rate: dict[float, list[float]] = defaultdict(list)
        for row in group:
            by_rate[row["lr"]].append(math.inf if row["eval_loss"] is None else row["eval_loss"])
        lr = min(by_rate, key=lambda rate: fmean(by_rate[rate]))
        start = fmean(row["e0"] for row in group)
        found = [f"{lr:.4g}", f"{fmean(by_rate[lr]):.4f}", f"{start:.4f}", len(by_rate[lr])]
        lines.append([task, optimizer, *found])
    return table(["task", "optimizer", "best lr", "its loss", "untrained", "seeds"], lines)


def write_sweep(rows: Rows, file: Path) -> None:
    """Write the mean loss of every rate: what other reports read scores off."""
    cells: dict[tuple, Rows] = defaultdict(list)
    for row in sorted(rows, key=lambda row: (row["task"], row["optimizer"], row["lr"])):
        cells[row["task"], row["optimizer"], row["lr"]].append(row)
    with file.open("w", newline="") as opened:
        writer = csv.writer(opened, lineterminator="\n")
        writer.writerow(["task", "optimizer", "lr", "eval_loss", "untrained", "seeds"])
        for (task, optimizer, lr), group in cells.items():
            ends = [math.nan if row["eval_loss"] is None else row["eval_loss"] for row in group]
            means = [f"{fmean(losses):.4f}" for losses in (ends, [row["e0"] for row in group])]
            writer.writerow([task, optimizer, f"{lr:.4g}", *means, len(group)])


def write_csv(rows: Rows, file: Path) -> None:
    """Write what the tables are made of; the rows' curves and reasons stay behind."""
    names = [*Run.__dataclass_fields__, "e0", "best_loss", "eval_loss", "score", "seconds"]
    ordered = [row for group in grouped(rows, *list(ORDER)).values() for row in group]
    with file.open("w", newline="") as opened:
        writer = csv.writer(opened)
        writer.writerow([*names, "events", "ended"])
        for row in ordered:
            ended = row["diverged"] is not None
            writer.writerow([*(row[name] for name in names), events([row]), int(ended)])


def headers(files: Iterable[Path]) -> list[dict]:
    """Return the lines that tell what the rows were measured on, each once."""
    lines = (line for file in files for line in file.read_text().splitlines())
    unique = dict.fromkeys(line for line in lines if line.startswith('{"facts"'))
    return [json.loads(line) for line in unique]


def write(text: str, stem: str, arguments: argparse.Namespace) -> None:
    """Write and show ``<stem>_<device>.md``."""
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    (arguments.output_dir / f"{stem}.md").write_text(text)
    print(text)


def write_search(rows: Rows, swept: Rows, facts: str, arguments: argparse.Namespace) -> None:
    """Write the tables of searches, and of the sweeps that they alone are judged by."""
    swept = [row for row in swept if row["best_loss"] is None]
    text = search_report(scored(rows, swept), facts, table, grouped, swept)
    write(text, f"{arguments.name}_{slug_of(arguments)}", arguments)


def write_peers(rows: Rows, facts: str, arguments: argparse.Namespace) -> None:
    """Write the tables and the plot of methods with one rate for all tasks."""
    from benchmarks.quality.plot import draw_methods

    stem = f"peers_{slug_of(arguments)}"
    shown = compared(rows, arguments.sweep, grouped)
    draw_methods(shown, arguments.output_dir / f"{stem}.png")
    write(peers_report(shown, facts, f"{stem}.png", table, grouped), stem, arguments)


def write_guard(rows: Rows, facts: str, arguments: argparse.Namespace) -> None:
    """Write the tables and the plot of methods at multiples of the best rate."""
    from benchmarks.quality.plot import draw_scores

    low = any(row["multiple"] < 1 for row in rows)
    stem = f"{'raise' if low else 'guard'}_{slug_of(arguments)}"
    if not low:
        draw_scores(rows, arguments.output_dir / f"{stem}.png")
    write_csv(rows, arguments.output_dir / f"{stem}.csv")
    write(guard_report(rows, facts, None if low else f"{stem}.png"), stem, arguments)


def slug_of(arguments: argparse.Namespace) -> str:
    return headers(arguments.rows)[0]["slug"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=Path, nargs="+", help="files that run.py has written")
    parser.add_argument("--output-dir", type=Path, default=RESULTS)
    parser.add_argument("--name", default="search", help="of the file with the searches")
    parser.add_argument("--sweep", type=Path, default=SWEEP, help="where fixed rates are read off")
    parser.add_argument("--sweep-to", type=Path, help="where the losses of a sweep are written")
    arguments = parser.parse_args()
    rows = [row for file in arguments.rows for row in read_rows(file)]
    facts = "\n".join(header["facts"] for header in headers(arguments.rows))
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    at_multiples = [row for row in rows if row["multiple"] is not None]
    searched = [row for row in rows if row["method"] in SEARCHES]
    swept = [row for row in rows if row["method"] == "plain" and row["multiple"] is None]
    fixed = [row for row in rows if row["method"] in FIXED_RATES and row["multiple"] is None]
    if fixed:
        write_peers([*searched, *fixed], facts, arguments)
    elif searched:
        write_search(searched, swept, facts, arguments)
    elif swept:
        print(sweep_report(swept))
        if arguments.sweep_to:
            write_sweep(swept, arguments.sweep_to)
    if at_multiples:
        write_guard(at_multiples, facts, arguments)


if __name__ == "__main__":
    main()
