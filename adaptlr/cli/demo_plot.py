"""The picture of the demo: loss above, learning rate below, the controller's events marked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from adaptlr.cli.demo_report import headline

if TYPE_CHECKING:
    from adaptlr import Event
    from adaptlr.cli.demo_training import Pair, Run

INK, FAINT = "#222222", "#767676"
# Blue and vermilion of Okabe and Ito stay apart in every kind of colour blindness. The plain run is
# the wide one below, so that both show where they coincide.
STYLES: dict[str, dict[str, Any]] = {
    "plain": {"color": "#D55E00", "linewidth": 4.5, "alpha": 0.55, "solid_capstyle": "round"},
    "adaptlr": {"color": "#0072B2", "linewidth": 1.8},
}
COLUMN_WIDTH, HEIGHT, DPI = 8.0, 5.4, 150
LABEL_ROWS = (
    3  # event labels that would overlap go one below the other; beyond that they are left out
)
LETTER_WIDTH = 0.0145  # of an event label, as a share of the axes
UNMARKED = frozenset({"hold", "regrow", "run", "resume"})  # the curve of the learning rate has them
DECADES = 2.5  # of learning rate below the peak; the last step of a cosine is 0

Curve = npt.NDArray[np.float64]


def save(pairs: Sequence[Pair], path: Path) -> None:
    """Draw one column of panels for each pair and save them as a PNG."""
    figure = Figure(figsize=(COLUMN_WIDTH * len(pairs), HEIGHT), dpi=DPI, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)  # type: ignore[union-attr, call-arg]
    panels = figure.subplots(
        2, len(pairs), sharex="col", sharey="row", height_ratios=(2, 1), squeeze=False
    )
    for (upper, lower), pair in zip(panels.T, pairs, strict=True):
        draw_losses(upper, pair)
        draw_lrs(lower, pair)
        mark_events(upper, lower, pair.adaptlr)
    peaks = [pair.peak for pair in pairs]
    top = highest_loss(pairs)
    panels[0, 0].set_ylim(0, top)
    panels[1, 0].set_ylim(lowest_lr(pairs), max(peaks) * 2)
    for axes, pair in zip(panels[0], pairs, strict=True):
        name_curves(axes, pair, gap=top / 15)
    figure.savefig(path, format="png")


def draw_losses(axes: Axes, pair: Pair) -> None:
    """Draw every loss faintly and a moving mean on top, anew wherever weights were put back."""
    tidy(axes, "training loss")
    axes.set_title(headline(pair), loc="left", fontsize=14, fontweight="bold", color=INK, pad=24)
    subtitle = f"Fine-tuning MiniLM, peak learning rate {pair.peak:g}; labels: held-out accuracy"
    if pair.adaptlr.rollbacks:
        subtitle += "; dots: weights put back"
    axes.annotate(subtitle, (0, 1), (0, 8), "axes fraction", "offset points", color=FAINT)
    axes.axhline(pair.untrained[0], color=FAINT, linewidth=1, linestyle=(0, (1, 3)))
    for run in (pair.plain, pair.adaptlr):
        style, losses = STYLES[run.name], np.array(run.losses)
        for steps, means in stretches(run):
            axes.plot(steps, losses[steps], color=style["color"], linewidth=0.8, alpha=0.25)
            axes.plot(steps, means, **style)
            if steps[0] > 0:
                axes.plot(steps[0], means[0], "o", color=style["color"], markersize=5)
        broken = np.flatnonzero(~np.isfinite(losses))
        crosses = {"transform": axes.get_xaxis_transform(), "color": style["color"]}
        axes.plot(broken, np.full(len(broken), 0.98), "x", markersize=4, **crosses)


def draw_lrs(axes: Axes, pair: Pair) -> None:
    """Draw the learning rate of every step."""
    tidy(axes, "learning rate")
    axes.set_xlabel("step", color=FAINT)
    axes.set_yscale("log")
    for run in (pair.plain, pair.adaptlr):
        lrs = np.array(run.lrs)
        axes.plot(np.where(lrs > 0, lrs, np.nan), **STYLES[run.name])


def tidy(axes: Axes, title: str) -> None:
    """Leave only what is read: light axes and a few ticks."""
    axes.set_ylabel(title, color=FAINT)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#BBBBBB")
    axes.tick_params(colors=FAINT, which="both", length=3)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.margins(x=0.01)


def stretches(run: Run) -> Iterator[tuple[npt.NDArray[np.int64], Curve]]:
    """Yield steps and smooth losses between rollbacks: a mean over both sides would hide them."""
    losses, steps = np.array(run.losses), np.arange(len(run.losses))
    starts = [step + 1 for step in run.rollbacks if step + 1 < len(losses)]
    for part in np.split(steps, starts):
        if len(part):
            yield part, smooth(losses[part])


def smooth(losses: Curve, reach: int = 4) -> Curve:
    """Return the mean over the steps within ``reach``; NaN where the loss is not finite."""
    means = np.full(len(losses), np.nan)
    for step in np.flatnonzero(np.isfinite(losses)):
        near = losses[max(0, step - reach) : step + reach + 1]
        means[step] = near[np.isfinite(near)].mean()
    return means


def name_curves(axes: Axes, pair: Pair, gap: float) -> None:
    """Write name and held-out accuracy beside the end of each curve, at least ``gap`` apart."""
    labels = [(pair.untrained[0], f"untrained  {pair.untrained[1]:.0%}", FAINT)]
    for run in (pair.plain, pair.adaptlr):
        finite = np.isfinite(run.eval_loss)
        text = f"{run.name}  {run.accuracy:.0%}" if finite else f"{run.name}  loss not finite"
        labels.append((last_height(run, pair), text, STYLES[run.name]["color"]))
    heights = spread([height for height, _, _ in labels], gap)
    for (_, text, color), height in zip(labels, heights, strict=True):
        axes.annotate(
            text, (1.01, height), xycoords=("axes fraction", "data"), color=color, va="center"
        )


def last_height(run: Run, pair: Pair) -> float:
    """Return where a curve ends; the loss of the untrained model if it never began."""
    means = np.concatenate([np.empty(0), *(means for _, means in stretches(run))])
    finite = means[np.isfinite(means)]
    return float(finite[-1]) if len(finite) else pair.untrained[0]


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Move labels down until they are a gap apart, in the order of their heights."""
    placed = list(heights)
    order = sorted(range(len(placed)), key=lambda index: -heights[index])
    for above, below in pairwise(order):
        placed[below] = min(placed[below], placed[above] - gap)
    return placed


def mark_events(upper: Axes, lower: Axes, run: Run) -> None:
    """Mark each event in both panels; equal ones in a row share a mark."""
    marks = marks_of(run.events)
    for step, _ in marks:
        for axes in (upper, lower):
            axes.axvline(step, color=INK, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
    rows = place_labels(marks, len(run.losses))
    for (step, text), row in zip(marks, rows, strict=True):
        if row is not None:
            upper.annotate(
                text,
                (step, 0.96 - 0.075 * row),
                (0, 0),
                upper.get_xaxis_transform(),
                "offset points",
                color=INK,
                ha=alignment(step, len(run.losses)),
                va="top",
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
            )
    if not run.events:
        lower.text(0.99, 0.86, "no events", transform=lower.transAxes, color=FAINT, ha="right")


def marks_of(events: Sequence[Event]) -> list[tuple[int, str]]:
    """Return step and label of each run of events of one kind, but for those of every cut."""
    marked = [event for event in events if event.kind not in UNMARKED]
    marks = []
    for kind, group in groupby(marked, lambda event: event.kind):
        steps = [event.step for event in group]
        marks.append((steps[0], f"{kind} x{len(steps)}" if len(steps) > 1 else kind))
    return marks


def place_labels(marks: Sequence[tuple[int, str]], steps: int) -> list[int | None]:
    """Give each label the first row in which it is free of the others; None where there is none."""
    taken: list[list[tuple[float, float]]] = [[] for _ in range(LABEL_ROWS)]
    rows: list[int | None] = []
    for step, text in marks:
        left, right = extent(step, text, steps)
        free = (
            row
            for row, others in enumerate(taken)
            if all(right < other[0] or left > other[1] for other in others)
        )
        row = next(free, None)
        rows.append(row)
        if row is not None:
            taken[row].append((left, right))
    return rows


def extent(step: int, text: str, steps: int) -> tuple[float, float]:
    """Return from where to where a label reaches, as shares of the axes."""
    place, width = step / max(steps, 1), LETTER_WIDTH * (len(text) + 1)
    left = {"left": place, "center": place - width / 2, "right": place - width}
    start = left[alignment(step, steps)]
    return start, start + width


def alignment(step: int, steps: int) -> str:
    """Say which part of a label stands at its mark; at the edges it must not leave the axes."""
    if step < 0.06 * steps:
        return "left"
    return "right" if step > 0.94 * steps else "center"


def highest_loss(pairs: Sequence[Pair]) -> float:
    """Return a limit above the losses, but for a few spikes, with room for the event labels."""
    runs = [run for pair in pairs for run in (pair.plain, pair.adaptlr)]
    losses = np.concatenate([run.losses for run in runs])
    high = np.percentile(losses[np.isfinite(losses)], 99) if np.isfinite(losses).any() else 0.0
    high = max(float(high), *(pair.untrained[0] for pair in pairs))
    return high * (1.35 if any(run.events for run in runs) else 1.15)


def lowest_lr(pairs: Sequence[Pair]) -> float:
    """Return a limit below the learning rates that matter: ramps begin far below the peak."""
    lowest = min(pair.peak for pair in pairs) / 10**DECADES
    begun = [pair.adaptlr.lrs[step] for pair in pairs for step in pair.adaptlr.rollbacks]
    return 0.7 * min([lowest, *(lr for lr in begun if lr > 0)])
