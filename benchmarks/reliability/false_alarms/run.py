"""How often does the guard find trouble in a healthy run, and what does that cost the run?

Simulated losses that no learning rate changes, through the control step of the extension, with the
defaults of the product. Writes ``false_alarms.md`` and ``.csv``. Needs rich and scipy.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import torch
from measure import Results, Runs, Task, measure_all, tasks_of
from report import Report
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from adaptlr.bench.facts import facts_of

RESULTS = Path(__file__).parents[2] / "results"


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    counts = {
        "windows": (1000, "runs of 300 steps for alarms"),
        "loops": (1000, "runs of 300 steps for cuts"),
        "long": (5, "runs of 100,000 steps, once for alarms and once for cuts"),
        "dial-short": (200, "runs of 300 steps at other sensitivities than 1"),
        "dial-long": (1, "runs of 100,000 steps at other sensitivities than 1"),
        "jobs": (1, "processes"),
    }
    for name, (default, text) in counts.items():
        parser.add_argument(f"--{name}", type=positive, default=default, help=text)
    parser.add_argument("--output-dir", type=Path, default=RESULTS)
    parser.add_argument("--commit", default="", help="commit of the sources, outside of a clone")
    return parser.parse_args()


def measure_with_progress(tasks: Sequence[Task], jobs: int) -> Results:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    results: Results = {}
    with ExitStack() as stack:
        console = Console(stderr=True)
        progress = stack.enter_context(Progress(*columns, TimeRemainingColumn(), console=console))
        pool = stack.enter_context(ProcessPoolExecutor(jobs)) if jobs > 1 else None
        bar = progress.add_task("false alarms", total=len(tasks))
        for task, counts in measure_all(tasks, pool):
            results[task] = counts
            progress.update(bar, advance=1, description=f"{task.family}, {task.part.value}")
    return results


def main() -> None:
    arguments = parse_arguments()
    facts = facts_of(torch.device("cpu"), arguments.commit).line()
    runs = Runs(arguments.windows, arguments.loops, arguments.long)
    dial_runs = Runs(arguments.dial_short, arguments.dial_short, arguments.dial_long)
    results = measure_with_progress(tasks_of(runs, dial_runs), arguments.jobs)
    report = Report(facts, runs, dial_runs, results)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    (arguments.output_dir / "false_alarms.md").write_text(report.markdown())
    (arguments.output_dir / "false_alarms.csv").write_text(report.csv())
    print(report.markdown())


if __name__ == "__main__":
    main()
