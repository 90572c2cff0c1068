"""A run in a few sentences and numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from datetime import datetime

import numpy as np

from adaptlr.recording import Recording

_ACTS = {
    "skip": "step skipped|steps skipped",
    "overflow": "overflow|overflows",
    "cut": "cut|cuts",
    "restart": "restart|restarts",
    "rescue": "rescue|rescues",
    "trial": "trial|trials",
    "test": "test|tests",
    "raise": "raise|raises",
    "probe": "probe|probes",
    "alarm": "alarm noted|alarms noted",
}


def is_failed(recording: Recording) -> bool:
    """Whether the guard has ended the run."""
    return any(event.kind == "failed" for event in recording.events)


def state(recording: Recording) -> str:
    """Say how the recording ends."""
    if is_failed(recording):
        return "ended by the guard"
    return "closed" if recording.closed else "killed, or still running"


def verdict(recording: Recording) -> str:
    """Say what became of the loss, and what had to be done, in two sentences."""
    records = recording.records
    if not len(records):
        return "No step was recorded."
    total = recording.headers[-1].get("config", {}).get("total_steps")
    steps = f"{int(records['step'][-1]) + 1:,}" + (f" of {total:,}" if total else "") + " steps"
    level = records["level"][np.isfinite(records["level"])]
    course = ""
    if len(level):
        moved = "fell" if level[-1] < level[0] else "rose"
        course = f"; the level of the loss {moved} from {level[0]:.4g} to {level[-1]:.4g}"
        course += f", its lowest was {level.min():.4g}"
    return f"{steps}{course}. {_acts(recording)}"


def _acts(recording: Recording) -> str:
    counts = Counter(event.kind for event in recording.events)
    acts = [
        f"{counts[kind]} {names.split('|')[counts[kind] > 1]}"
        for kind, names in _ACTS.items()
        if counts[kind]
    ]
    if is_failed(recording):
        acts.append("and the budget was spent in the end")
    return ", ".join(acts) + "." if acts else "Nothing had to be done."


def facts(recording: Recording) -> Iterator[tuple[str, str]]:
    """Yield the name and the value of what the page lists."""
    header, records = recording.headers[-1], recording.records
    config = header.get("config", {})
    if len(records):
        last = records[-1]
        yield "last loss", f"{last['loss']:.5g}"
        yield "level, noise", f"{last['level']:.5g} ± {last['scale']:.2g}"
        yield "learning rate", f"{last['lr']:.3g} (peak {config.get('peak', np.nan):.3g})"
        yield "factor", f"{last['factor']:.3g}"
        yield from _timing(recording)
    yield "optimizer", f"{header.get('optimizer', '')}, {header.get('device', '')}"
    yield "schedule", f"{config.get('decay', '')}, {config.get('warmup_steps', 0)} steps of warm-up"
    yield "guard", str(config.get("guard_mode", ""))
    versions = header.get("versions", {})
    yield "adaptlr, torch", f"{header.get('adaptlr', '')}, {versions.get('torch', '')}"
    yield "started", f"{header.get('time', '')} on {header.get('host', '')}"


def _timing(recording: Recording) -> Iterator[tuple[str, str]]:
    times = recording.records["time"]
    times = times[np.isfinite(times)]
    began = recording.headers[-1].get("time")
    if not len(times) or began is None:
        return
    seconds = times[-1] - datetime.fromisoformat(began).timestamp()
    since = int(np.flatnonzero(recording.records["time"] >= times[-1] - seconds)[0])
    steps = len(recording.records) - since
    if seconds > 0:
        yield "last start took", f"{duration(seconds)}, {steps / seconds:.3g} records/s"


def duration(seconds: float) -> str:
    """Return a length of time as a person says it."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"


def reservations(recording: Recording) -> Iterator[str]:
    """Yield what a reader has to know about the data."""
    if recording.replaced:
        yield (
            f"{recording.replaced:,} records of an earlier stretch were replaced, because the run "
            "went back to a checkpoint"
        )
    if len(recording.headers) > 1:
        yield f"the run was started {len(recording.headers)} times"
    if recording.damaged:
        lines = "line" if recording.damaged == 1 else "lines"
        yield f"{recording.damaged} {lines} cannot be read, as where a machine goes down"
    yield from (f"missing: {text}" for text in recording.lost)
