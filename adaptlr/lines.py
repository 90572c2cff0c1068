"""The lines of a recording: what each says, and how it is written as JSON.

A recording is JSON Lines in UTF-8. Every line is one object, told apart by its first key:

- ``format``: a header. The first line of every part, and of everything that a resumed run appends.
- ``step``: a record of one step. Left out where they say nothing: ``grad_norm`` that was not handed
  in, ``phase`` in RUN, ``flags`` without any, ``action`` of a step that was taken, and the slots of
  snapshots that were ``saved`` or ``restored``. The first record of each write has ``time``, the
  Unix time at which the host read it.
- ``event``: the kind of an event, with ``step``, ``reason``, ``lr``, ``factor`` and ``time``.
- ``gap``: a number of records or events (``of``) that are lost, and ``why``.
- ``end``: ``closed``, or ``failed`` where the recorder itself has failed. Without this line the
  process was killed, or still runs.

JSON knows no NaN and no infinity: they are the strings "NaN", "Infinity" and "-Infinity", which
``float()`` reads. Numbers have nine significant digits, enough to give a float32 back exactly.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from adaptlr._extension import record_lines
from adaptlr.events import Event
from adaptlr.telemetry import Flag, Phase, action_of, restore_order, saved_slot

FORMAT = 1
NUMBERS = ("loss", "level", "scale", "slope", "t_statistic", "lr", "factor")

Row = npt.NDArray[Any]
Line = dict[str, Any]


def to_json(line: Mapping[str, Any]) -> str:
    """Write one line, with its end."""
    return json.dumps(_valid(line), separators=(",", ":"), allow_nan=False) + "\n"


def _valid(value: Any) -> Any:
    """Replace what JSON does not know."""
    if isinstance(value, float):
        return value if math.isfinite(value) else _name(value)
    if isinstance(value, Mapping):
        return {key: _valid(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_valid(inner) for inner in value]
    return value


def _name(value: float) -> str:
    return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")


def records_to_json(rows: Row, time: float) -> bytes:
    """Write records, oldest first; the first one with the time at which they were read.

    The extension does it without the interpreter lock: in Python a record takes 4 us, in which a
    training loop has to wait.
    """
    return record_lines(rows, f',"time":{time:.2f}', _words_to_json)


def _words_to_json(row: Row) -> str:
    words = _words(row).items()
    return "".join(f',"{name}":{json.dumps(to, separators=(",", ":"))}' for name, to in words)


def worth_keeping(rows: Row, every: int) -> Row:
    """Return every so many-th step, and all in which something was noticed or done."""
    if every == 1:
        return rows
    speaks = (rows["flags"] | rows["phase"] | rows["action"]) != 0
    kept: Row = rows[(rows["step"] % every == 0) | speaks]
    return kept


def record_line(row: Row) -> Line:
    """Return a record as the object that its line says."""
    line: Line = {"step": int(row["step"])}
    line |= {name: float(row[name]) for name in NUMBERS}
    if not np.isnan(row["grad_norm"]):
        line["grad_norm"] = float(row["grad_norm"])
    return line | _words(row)


def _words(row: Row) -> Line:
    words: Line = {}
    if row["phase"]:
        words["phase"] = Phase(int(row["phase"])).name
    if row["flags"]:
        words["flags"] = [flag.name for flag in Flag if flag & int(row["flags"])]
    for name, code in (
        ("action", action_of(row)),
        ("saved", saved_slot(row)),
        ("restored", restore_order(row)),
    ):
        if code:
            words[name] = code.name
    return words


def event_line(event: Event, time: float) -> Line:
    """Return an event as the object that its line says."""
    return {
        "event": event.kind,
        "step": event.step,
        "reason": event.reason,
        "lr": event.lr,
        "factor": event.factor,
        "time": round(time, 2),
    }


def gap_line(count: int, of: str, why: str) -> Line:
    """Return the line that stands for what is lost."""
    return {"gap": count, "of": of, "why": why}
