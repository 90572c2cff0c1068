"""Puts the page together: data, charts, facts and sentences in one file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import numpy as np
import numpy.typing as npt

from adaptlr.recording import RecordedEvent, Recording
from adaptlr.report.decimate import choose
from adaptlr.report.summary import facts, is_failed, reservations, state, verdict

POINTS = 16_000  # over all runs; about 60 bytes each
LISTED = 500  # events a run
_SERIES = ("loss", "level", "scale", "lr", "slope", "t_statistic")


def make_page(recordings: Sequence[Recording], title: str | None = None) -> str:
    """Return a page in HTML that needs nothing but a browser.

    Args:
        recordings: The runs to compare, one at least.
        title: Heading; the names of the files if None.

    Raises:
        ModuleNotFoundError: if jinja2 is not installed.
    """
    try:
        import jinja2
    except ModuleNotFoundError:
        message = 'the report needs jinja2; pip install "adaptlr[report]"'
        raise ModuleNotFoundError(message, name="jinja2") from None
    names = _names(recordings)
    runs = [_run(recording, len(recordings)) for recording in recordings]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["step"] = lambda step: f"{step:,}"
    return environment.from_string(_asset("page.html.j2")).render(
        title=title or ", ".join(names),
        runs=[
            {"name": name, **_words(recording)}
            for name, recording in zip(names, recordings, strict=True)
        ],
        data=_embedded([{"name": name, **run} for name, run in zip(names, runs, strict=True)]),
        assets={name: _asset(name) for name in _ASSETS},
    )


_ASSETS = ("page.css", "page.js", "uPlot.min.css", "uPlot.iife.min.js", "uPlot.LICENSE")


def _asset(name: str) -> str:
    return files("adaptlr.report").joinpath(name).read_text(encoding="utf-8")


def _names(recordings: Sequence[Recording]) -> list[str]:
    """Return the names of the files, with their folders where they are called the same."""
    names = [recording.path.name for recording in recordings]
    if len(set(names)) == len(names):
        return names
    return [str(recording.path) for recording in recordings]


def _words(recording: Recording) -> dict[str, Any]:
    return {
        "state": state(recording),
        "is_failed": is_failed(recording),
        "is_open": not recording.closed,
        "verdict": verdict(recording),
        "facts": list(facts(recording)),
        "reservations": list(reservations(recording)),
        "events": listed(recording.events),
        "unlisted": max(len(recording.events) - LISTED, 0),
    }


def listed(events: Sequence[RecordedEvent]) -> Sequence[RecordedEvent]:
    """Return the events that are shown: of very many the newest."""
    return events[-LISTED:]


def _run(recording: Recording, runs: int) -> dict[str, Any]:
    """Return what the charts of one run are drawn from."""
    events = listed(recording.events)
    steps = sorted({event.step for event in events})
    chosen = recording.records[choose(recording.records, POINTS // runs, steps)]
    series = {name: _numbers(chosen[name]) for name in _SERIES}
    broken = chosen["step"][~np.isfinite(chosen["loss"])].tolist()
    marks = [[event.step, event.kind, event.reason] for event in events]
    return {
        "step": chosen["step"].tolist(),
        **series,
        "broken": broken,
        "events": marks,
        "records": len(recording.records),
    }


def _numbers(values: npt.NDArray[np.float64]) -> list[float | None]:
    """Round to what a screen can show; what is not finite is a gap in the line."""
    return [float(f"{v:.5g}") if np.isfinite(v) else None for v in values.tolist()]


def _embedded(data: Any) -> str:
    """Write JSON that cannot end the script element it stands in."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
