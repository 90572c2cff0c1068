"""Draws docs/choosing_lr.png: a range test, and below it what whole runs make of each rate.

``python -m benchmarks.quality.find_lr_plot find_lr.jsonl docs/choosing_lr.png``
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.quality.find_lr_report import sweep
from benchmarks.quality.tasks import TASKS


def draw(row: dict, file: Path) -> None:
    """Draw one search over the sweep of its task."""
    figure = Figure(figsize=(7.0, 5.2), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    lrs, losses, low, high = np.array(row["curve"]).T
    above.fill_between(lrs, low, high, color="C0", alpha=0.25, linewidth=0)
    above.plot(lrs, losses, color="C0")
    above.set_ylabel("loss in the range test\n(median, quartiles)")
    above.set_ylim(losses.min() - 0.2, losses[0] + 1.0)
    runs = sorted(sweep()[row["task"], row["optimizer"]].items())
    below.plot([lr for lr, _ in runs], [loss for _, (loss, _) in runs], "o-", color="0.3", ms=4)
    below.set_ylabel("held-out loss after\na whole run at this peak")
    below.set_xlabel("learning rate")
    for axes in (above, below):
        _mark(axes, row)
    above.legend(frameon=False, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=3)
    below.set_xlim(1e-6, 1.0)
    below.set_xscale("log")
    figure.savefig(file, dpi=130)


def _mark(axes: Axes, row: dict) -> None:
    found, estimate = row["picks"]["find_lr"], row["picks"]["estimate_lr"]
    axes.axvspan(*row["interval"], color="C2", alpha=0.12, linewidth=0, label="its interval")
    axes.axvline(found, color="C2", label=f"find_lr: {found:.1e}")
    axes.axvline(estimate, color="C1", linestyle="--", label=f"estimate_lr: {estimate:.1e}")
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=Path, help="file that find_lr.py has written")
    parser.add_argument("picture", type=Path)
    parser.add_argument("--task", choices=TASKS, default="minilm_debian")
    arguments = parser.parse_args()
    rows = map(json.loads, arguments.rows.read_text().splitlines())
    wanted = (arguments.task, "adamw")
    row = next(row for row in rows if (row.get("task"), row.get("optimizer")) == wanted)
    draw(row, arguments.picture)


if __name__ == "__main__":
    main()
