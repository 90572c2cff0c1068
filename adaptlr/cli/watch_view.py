"""What ``adaptlr watch`` shows: where the run stands, its curves, its last events."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from adaptlr.recording import RecordedEvent, Recording
from adaptlr.report.summary import duration, is_failed
from adaptlr.telemetry import Phase

BARS = " ▁▂▃▄▅▆▇█"
ROWS = 6  # of the curve of the loss
EVENTS = 6
QUIET = 30.0  # seconds without news after which a run may hang
COLORS = {
    **dict.fromkeys(("skip", "overflow", "alarm"), "yellow"),
    **dict.fromkeys(("cut", "restart", "rescue", "failed"), "red"),
    **dict.fromkeys(("run", "kept", "raised", "regrow"), "green"),
}
_SPEED_OVER = 20  # reads of the recorder


def make_view(recording: Recording, width: int, now: float) -> RenderableType:
    """Return the whole view."""
    parts: list[RenderableType] = [_progress(recording, now)]
    if len(recording.records):
        inner = max(min(width, 120) - 6, 10)
        parts += [_numbers(recording), *_curves(recording, inner)]
    parts += [_events(recording.events)]
    title = f"[bold]{recording.path.name}[/bold]  {_state(recording, now)}"
    return Panel(Group(*parts), title=title, title_align="left", width=min(width, 120))


def _state(recording: Recording, now: float) -> str:
    if is_failed(recording):
        return "[red]ended by the guard[/red]"
    if recording.closed:
        return "[green]closed[/green]"
    times = _times(recording)
    silent = now - times[-1] if len(times) else 0.0
    if silent > QUIET:
        return f"[yellow]nothing new for {duration(silent)}[/yellow]"
    return "[cyan]running[/cyan]"


def _times(recording: Recording) -> npt.NDArray[np.float64]:
    times: npt.NDArray[np.float64] = recording.records["time"]
    return times[np.isfinite(times)]


def _speed(recording: Recording) -> float | None:
    """Return steps a second, over the last reads of the recorder."""
    records = recording.records
    marked = np.flatnonzero(np.isfinite(records["time"]))[-_SPEED_OVER:]
    if len(marked) < 2:
        return None
    first, last = records[marked[0]], records[marked[-1]]
    seconds, steps = last["time"] - first["time"], last["step"] - first["step"]
    return float(steps / seconds) if seconds > 0 else None


def _progress(recording: Recording, now: float) -> RenderableType:
    records = recording.records
    steps = int(records["step"][-1]) + 1 if len(records) else 0
    total = recording.headers[-1].get("config", {}).get("total_steps") or 0
    text = f"{steps:,}" + (f" of {total:,}" if total else "") + " steps"
    speed = _speed(recording)
    if speed:
        text += f", {speed:.3g} a second"
        if total > steps and not recording.closed:
            text += f", {duration((total - steps) / speed)} to go"
    row = Table.grid(padding=(0, 2))
    row.add_row(ProgressBar(total=total or 1, completed=steps, width=30) if total else "", text)
    return row


def _numbers(recording: Recording) -> RenderableType:
    last = recording.records[-1]
    grid = Table.grid(padding=(0, 3))
    t = float(last["t_statistic"])
    trend = "falling" if t < -3 else "rising" if t > 3 else "level"
    cells = {
        "loss": f"{last['loss']:.4g}",
        "level ± noise": f"{last['level']:.4g} ± {last['scale']:.2g}",
        "slope": f"{last['slope']:.2g} (t {t:.1f}, {trend})",
        "lr": f"{last['lr']:.3g}",
        "factor": f"{last['factor']:.3g}",
        "phase": Phase(int(last["phase"])).name.lower(),
    }
    grid.add_row(*(Text(name, style="dim") for name in cells))
    grid.add_row(*cells.values())
    return grid


def _curves(recording: Recording, width: int) -> Iterator[RenderableType]:
    records = recording.records
    yield Text("\nlevel of the loss, all steps", style="dim")
    yield from (Text(line, style="blue") for line in curve(records["level"], width, ROWS))
    yield Text("learning rate", style="dim")
    yield from (Text(line, style="magenta") for line in curve(records["lr"], width, 2))


def curve(values: npt.NDArray[np.float64], width: int, rows: int) -> list[str]:
    """Draw a curve with block characters: its lines, the top one first, with the range beside."""
    means = _means(values, max(width - 10, 1))
    finite = means[np.isfinite(means)]
    if not len(finite):
        return []
    low, high = float(finite.min()), float(finite.max())
    share = np.clip((means - low) / ((high - low) or 1.0), 0.0, 1.0)
    heights = np.where(np.isfinite(means), 1 + np.rint(share * (8 * rows - 1)), 0.0)
    lines = []
    for row in reversed(range(rows)):
        filled = np.clip(heights - 8 * row, 0, 8).astype(int)
        label = f"{high:9.3g}" if row == rows - 1 else f"{low:9.3g}" if row == 0 else " " * 9
        lines.append(f"{label} {''.join(BARS[height] for height in filled)}")
    return lines


def _means(values: npt.NDArray[np.float64], columns: int) -> npt.NDArray[np.float64]:
    """Average stretches of equal length, of what is finite."""
    edges = np.linspace(0, len(values), min(columns, len(values)) + 1).astype(int)
    finite = np.isfinite(values)
    sums = np.add.reduceat(np.where(finite, values, 0.0), edges[:-1])
    counts = np.add.reduceat(finite.astype(float), edges[:-1])
    means = np.full(len(sums), np.nan)
    np.divide(sums, counts, out=means, where=counts > 0)
    return means


def _events(events: list[RecordedEvent]) -> RenderableType:
    if not events:
        return Text("\nno event so far", style="dim")
    grid = Table.grid(padding=(0, 2))
    for event in events[-EVENTS:]:
        kind = Text(event.kind, style=COLORS.get(event.kind, "cyan"))
        grid.add_row(Text(f"{event.step:,}", style="dim", justify="right"), kind, event.reason)
    title = "the only event" if len(events) == 1 else f"{len(events):,} events, the last of them"
    return Group(Text(f"\n{title}", style="dim"), grid)
