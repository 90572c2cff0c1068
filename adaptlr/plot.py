"""A run as a picture, drawn with matplotlib: for notebooks and for ``adaptlr report --png``."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from adaptlr.report.decimate import choose

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

POINTS = 6000  # a run; more than a picture has pixels
COLORS = ("#2563c9", "#c9541b", "#14866d", "#8b3fb5", "#a8901a", "#c2366f")
KIND_COLORS = {
    **dict.fromkeys(("skip", "overflow", "alarm"), "#a86400"),
    **dict.fromkeys(("cut", "restart", "rescue", "failed"), "#c2362b"),
    **dict.fromkeys(("run", "kept", "raised", "regrow"), "#1a7f4b"),
}
_OTHER_KINDS = "#7b8494"
_REACH = (
    6.0  # scales about the level that a loss is shown within; a spike must not flatten the rest
)
_MOST_MARKS = 300
_LEAST_LR = 1e-6  # of the largest: the last steps of a cosine go down to nothing


class _Event(Protocol):
    @property
    def step(self) -> int: ...
    @property
    def kind(self) -> str: ...


Run = tuple[str, npt.NDArray[Any], Sequence[_Event]]


def plot(runs: Sequence[Run]) -> Figure:
    """Draw loss, learning rate and slope of one or several runs.

    Args:
        runs: Of each its name, its records (structured, with ``step``, ``loss``, ``level``,
            ``scale``, ``lr`` and ``t_statistic``) and its events.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
        ValueError: if no run has a record.
    """
    runs = [run for run in runs if len(run[1])]
    if not runs:
        raise ValueError("a plot needs the record of one step at least, got none")
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        message = 'plots need matplotlib; pip install "adaptlr[report]"'
        raise ModuleNotFoundError(message, name="matplotlib") from None
    figure = Figure(figsize=(10, 7), layout="constrained", dpi=130)
    heights = {"height_ratios": [2.2, 1, 1]}
    loss, lr, slope = figure.subplots(3, 1, sharex=True, gridspec_kw=heights)
    shown = [(name, _chosen(records, events), events) for name, records, events in runs]
    for color, (name, records, events) in zip(_colors(len(runs)), shown, strict=True):
        _draw_loss(loss, name, records, color, alone=len(runs) == 1)
        positive = np.where(records["lr"] > 0, records["lr"], np.nan)
        lr.plot(records["step"], positive, color=color, linewidth=1.4)
        slope.plot(records["step"], records["t_statistic"], color=color, linewidth=1.2)
        _draw_events((loss, lr, slope), events)
    _finish(loss, lr, slope, [records for _, records, _ in shown])
    # Notebooks look for this method, and need no pyplot then.
    setattr(figure, "_repr_png_", lambda: _png(figure))  # noqa: B010
    return figure


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _colors(count: int) -> list[str]:
    return [COLORS[index % len(COLORS)] for index in range(count)]


def _chosen(records: npt.NDArray[Any], events: Sequence[_Event]) -> npt.NDArray[Any]:
    steps = [event.step for event in events[-_MOST_MARKS:]]
    chosen: npt.NDArray[Any] = records[choose(records, POINTS, steps)]
    return chosen


def _draw_loss(axes: Axes, name: str, records: npt.NDArray[Any], color: str, alone: bool) -> None:
    step, level, scale = records["step"], records["level"], records["scale"]
    axes.plot(step, records["loss"], color=color, linewidth=0.6, alpha=0.45)
    axes.fill_between(step, level - scale, level + scale, color=color, alpha=0.16, linewidth=0)
    axes.plot(step, level, color=color, linewidth=1.8, label="level ± noise" if alone else name)


def _draw_events(all_axes: Sequence[Axes], events: Sequence[_Event]) -> None:
    for event in events[-_MOST_MARKS:]:
        color = KIND_COLORS.get(event.kind, _OTHER_KINDS)
        for axes in all_axes:
            axes.axvline(event.step, color=color, linewidth=0.8, linestyle=(0, (3, 3)), alpha=0.5)
        top = all_axes[0].get_xaxis_transform()
        all_axes[0].plot(
            [event.step], [1.03], marker="v", color=color, transform=top, clip_on=False, zorder=5
        )


def _finish(loss: Axes, lr: Axes, slope: Axes, runs: Sequence[npt.NDArray[Any]]) -> None:
    for axes, label in ((loss, "loss"), (lr, "learning rate"), (slope, "t of the slope")):
        axes.set_ylabel(label)
        axes.grid(color="#ecece8", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
        axes.margins(x=0.01)
    _frame_loss(loss, runs)
    rates = np.concatenate([records["lr"][records["lr"] > 0] for records in runs])
    if len(rates):
        lr.set_yscale("log")
        lr.set_ylim(max(rates.min(), rates.max() * _LEAST_LR) / 1.5, rates.max() * 1.5)
    slope.axhspan(-3, 3, color="#7b8494", alpha=0.13, linewidth=0)
    slope.set_xlabel("step")
    loss.legend(frameon=False, loc="upper right")


def _frame_loss(axes: Axes, runs: Sequence[npt.NDArray[Any]]) -> None:
    """Show the losses as far as they are near their level."""
    lows, highs = [], []
    for records in runs:
        loss, reach = records["loss"], _REACH * records["scale"]
        near = np.clip(loss, records["level"] - reach, records["level"] + reach)
        near = near[np.isfinite(near)]
        if len(near):
            lows.append(near.min())
            highs.append(near.max())
    if lows:
        low, high = min(lows), max(highs)
        margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
        axes.set_ylim(low - margin, high + margin)
