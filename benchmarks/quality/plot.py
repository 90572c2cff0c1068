"""The plot of a guard measurement: score over the multiple of the best rate."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.quality.grid import MULTIPLES
from benchmarks.quality.methods import METHODS
from benchmarks.quality.report import Rows, grouped, scores

# Colours of Okabe and Ito, which stay apart in every kind of colour blindness.
STYLES = {
    "adaptlr": {"color": "#0072B2", "label": "adaptlr", "linewidth": 2.6},
    "plain": {"color": "#D55E00", "label": "warm-up + cosine"},
    "plateau": {"color": "#009E73", "label": "ReduceLROnPlateau"},
    "greedy": {"color": "#CC79A7", "label": "GreedyLR"},
    "skip6": {"color": "#555555", "label": "skip over 6 sigma", "linestyle": "--"},
}
TITLES = {"adamw": "AdamW", "sgd": "SGD with momentum"}
LABELS = {
    "auto": 'adaptlr, lr="auto"',
    "fixed": "best single rate",
    "prodigy": "Prodigy",
    "dadaptation": "D-Adaptation",
    "dog": "DoG",
    "schedulefree": "schedule-free",
    "plateau": "ReduceLROnPlateau",
    "greedy": "GreedyLR",
    "greedy_up": "GreedyLR, may raise",
    "dlrs": "DLRS",
}


def draw_scores(rows: Rows, file: Path) -> None:
    """Draw one panel for each optimizer: mean of each method, quartiles of adaptlr."""
    panels = grouped(rows, "optimizer")
    figure = Figure(figsize=(4.8 * len(panels), 3.9), dpi=150, layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, ((optimizer,), group) in zip(axes, panels.items(), strict=True):
        _draw_panel(axis, group)
        axis.set_title(TITLES[optimizer], loc="left")
    axes[0].set_ylabel("progress recovered")
    named = dict(zip(*reversed(axes[0].get_legend_handles_labels()), strict=True))
    order = [STYLES[method]["label"] for method in METHODS if STYLES[method]["label"] in named]
    legend = {"loc": "outside lower center", "ncols": len(order), "frameon": False, "fontsize": 9}
    figure.legend([named[label] for label in order], order, **legend)
    figure.savefig(file, format="png")


def _draw_panel(axis: Axes, rows: Rows) -> None:
    # From the last to the first, so that adaptlr lies on top where lines coincide.
    for (method,), group in reversed(grouped(rows, "method").items()):
        cells = grouped(group, "multiple")
        multiples = [multiple for (multiple,) in cells]
        means = [fmean(scores(cell)) for cell in cells.values()]
        axis.plot(multiples, means, marker="o", markersize=4, **STYLES[method])
        if method == "adaptlr":
            quartiles = [np.quantile(scores(cell), (0.25, 0.75)) for cell in cells.values()]
            low, high = np.transpose(quartiles)
            axis.fill_between(multiples, low, high, color=STYLES[method]["color"], alpha=0.15)
    axis.set_xscale("log")
    axis.set_xticks(MULTIPLES, [f"x{multiple}" for multiple in MULTIPLES])
    axis.minorticks_off()
    axis.set_ylim(-0.03, 1.08)
    axis.set_xlabel("learning rate, in multiples of the best")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def draw_methods(rows: Rows, file: Path) -> None:
    """Draw one panel for each optimizer: a dot for each task, a line for the mean of all."""
    panels = grouped(rows, "optimizer")
    figure = Figure(figsize=(4.8 * len(panels), 3.6), dpi=150, layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, ((optimizer,), group) in zip(axes, panels.items(), strict=True):
        methods = {method: cell for (method,), cell in grouped(group, "method").items()}
        order = sorted(methods, key=lambda method: fmean(scores(methods[method])))
        for place, method in enumerate(order):
            means = [fmean(scores(cell)) for cell in grouped(methods[method], "task").values()]
            color = "#0072B2" if method == "auto" else "#555555"
            axis.plot(means, [place] * len(means), "o", markersize=5, alpha=0.5, color=color)
            axis.vlines(fmean(means), place - 0.35, place + 0.35, color=color, linewidth=2.6)
        axis.set_yticks(range(len(order)), [LABELS[method] for method in order])
        axis.set_title(f"in the place of {TITLES[optimizer]}", loc="left", fontsize=10)
        axis.set_xlabel("progress recovered")
        axis.grid(axis="x", alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, format="png")
