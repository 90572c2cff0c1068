"""Where do searches lose what they lose? ``python -m benchmarks.quality.judge ROWS...``.

From rows of the method ``auto``, without a run: how far the ramp, the first gradient and the peak
were off the best swept rate, what whole runs at these rates come to by the sweep, and what the
searched runs came to. What the peak lacks is the rule's; what a searched run lacks beside it is the
steps of the search, and noise. Other rules can be tried: ``--divisor``, ``--weight``, ``--shift``,
``--trust``. A row does not tell how sure its ramp was: the bound on one that was not is left out.

Optimizers and variants without a sweep in ``results/`` need the rows of their own (``--near``).
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np

from adaptlr.reference_recovery import RAMP_DIVISOR
from adaptlr.reference_search import RAMP_TRUST
from benchmarks.quality.grid import read_rows
from benchmarks.quality.peers_report import fixed_rows
from benchmarks.quality.report import SWEEP, grouped, table
from benchmarks.quality.search_report import scored
from benchmarks.quality.tasks import ALL_TASKS

Rows = list[dict]
Curve = dict[float, float]  # progress recovered, by rate
Setting = tuple[str, str]  # task, optimizer


class Rule(NamedTuple):
    """How a peak is made of what a search has told; by default as the search does it."""

    divisor: float = RAMP_DIVISOR  # of the lowest rate
    weight: float = 0.5  # of the ramp in log(peak)
    shift: float = 0.0  # of the peak, in decades
    trust: float = RAMP_TRUST  # what a ramp counts at most, in times of the gradient's rate


RATES = ("ramp", "gradient", "peak")
COLUMNS = [*(f"{name} off" for name in RATES), *RATES, "searched", "shifted"]
NOTE = """
*off*: log10(rate / best swept rate), in decades. *ramp*, *gradient*, *peak*: progress recovered by
a whole run at that rate, interpolated on the sweep. *searched*: by the runs that had found the
peak. *shifted*: a peak shifted by its mean error on the other tasks with that optimizer, where
longer runs and larger batches count as the task that they vary. Means of the runs; those of an
optimizer are means of its tasks. {silent} searches without a ramp or a gradient are left out.
"""


def curves(swept: Rows) -> dict[Setting, Curve]:
    """Return the mean score of every rate, for each task and optimizer of a sweep."""
    found: dict[Setting, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in swept:
        found[row["task"], row["optimizer"]][row["lr"]].append(row["score"])
    return {
        setting: {lr: fmean(by_rate[lr]) for lr in sorted(by_rate)}
        for setting, by_rate in found.items()
    }


def score(curve: Curve, lr: float) -> float:
    """Return the score of a whole run at ``lr``, interpolated in log(lr)."""
    rates = [math.log(rate) for rate in curve]
    return float(np.interp(math.log(lr), rates, list(curve.values())))


def rates_of(row: dict, rule: Rule) -> tuple[float, float, float]:
    """Return what the ramp suggests, what the first gradient does, and the peak of both."""
    found = row["found"]
    ramp, gradient = found["lowest_lr"] / rule.divisor, found["estimate"]
    believed = min(ramp, rule.trust * gradient)
    peak = believed**rule.weight * gradient ** (1.0 - rule.weight) * 10.0**rule.shift
    return ramp, gradient, peak


def judged(rows: Rows, curve: Curve, rule: Rule) -> dict[str, float]:
    """Return the means over the runs of one task and optimizer, by column."""
    best = max(curve, key=curve.__getitem__)
    means = {"searched": fmean(row["score"] for row in rows)}
    for index, name in enumerate(RATES):
        rates = [rates_of(row, rule)[index] for row in rows]
        means[f"{name} off"] = fmean(math.log10(rate / best) for rate in rates)
        means[name] = fmean(score(curve, rate) for rate in rates)
    return means


def error_elsewhere(setting: Setting, all_means: dict[Setting, dict[str, float]]) -> float:
    """Return the mean error of the peak on the other tasks; 0 if there are none."""
    own = ALL_TASKS[setting[0]].like or setting[0]
    others: dict[str, list[float]] = defaultdict(list)
    for (task, optimizer), means in all_means.items():
        varied = ALL_TASKS[task].like or task
        if optimizer == setting[1] and varied != own:
            others[varied].append(means["peak off"])
    return fmean(map(fmean, others.values())) if others else 0.0


def judgement(rows: Rows, swept: Rows, rule: Rule) -> str:
    """Return a table with a line for every task and optimizer, and one for every optimizer."""
    told = [row for row in rows if row["found"] and all(row["found"].values())]
    by_setting, known = grouped(told, "task", "optimizer"), curves(swept)
    means = {setting: judged(group, known[setting], rule) for setting, group in by_setting.items()}
    for setting, group in by_setting.items():
        shifted = rule._replace(shift=rule.shift - error_elsewhere(setting, means))
        means[setting]["shifted"] = judged(group, known[setting], shifted)["peak"]
    optimizers = dict.fromkeys(optimizer for _, optimizer in means)
    for optimizer in optimizers:
        of_tasks = [means[setting] for setting in by_setting if setting[1] == optimizer]
        means["all", optimizer] = {name: fmean(m[name] for m in of_tasks) for name in COLUMNS}
    lines = []
    for setting, values in means.items():
        runs = len(by_setting.get(setting, ())) or ""
        shown = [f"{values[name]:{'+.2f' if 'off' in name else '.3f'}}" for name in COLUMNS]
        lines.append([*setting, runs, *shown])
    head = ["task", "optimizer", "runs", *COLUMNS]
    return table(head, lines) + "\n" + NOTE.format(silent=len(rows) - len(told))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=Path, nargs="+", help="files that run.py has written")
    parser.add_argument("--sweep", type=Path, default=SWEEP, help="where rates are read off")
    for name, default in Rule()._asdict().items():
        parser.add_argument(f"--{name}", type=float, default=default, help="see Rule")
    arguments = parser.parse_args()
    rows = [row for file in arguments.rows for row in read_rows(file)]
    plain = [row for row in rows if row["method"] == "plain" and row["best_loss"] is None]
    searched = scored([row for row in rows if row["method"] == "auto"], plain)
    swept = [*fixed_rows(arguments.sweep), *scored(plain, plain)]
    rule = Rule(*(getattr(arguments, name) for name in Rule._fields))
    print(judgement(searched, swept, rule))


if __name__ == "__main__":
    main()
