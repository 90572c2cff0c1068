"""Reads what a `Recorder` has written: parts, seams, torn lines and all."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import chain, islice
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from adaptlr import _extension
from adaptlr.lines import FORMAT, NUMBERS, Line
from adaptlr.log_file import finished_parts
from adaptlr.telemetry import Action, Flag, Phase, Slot

try:
    from orjson import loads  # three times as fast
except ModuleNotFoundError:
    from json import loads  # type: ignore[assignment]

RECORD = np.dtype(
    [("step", "i8"), ("phase", "i2"), ("flags", "i4"), ("action", "i2"), ("time", "f8")]
    + [(name, "f8") for name in (*NUMBERS, "grad_norm")]
)
_ACTIONS: dict[str, tuple[type[Action] | type[Slot], int]] = {
    "action": (Action, 0),
    "saved": (Slot, _extension.SAVE_SHIFT),
    "restored": (Slot, _extension.RESTORE_SHIFT),
}
_CHUNK = 1000  # lines parsed at a time; what fits into a cache is quickest
_START_OF_RECORD = b'{"step":'
_ALWAYS = 1 + len(NUMBERS)  # what every record says
_always = itemgetter("step", *NUMBERS)


@dataclass(frozen=True)
class RecordedEvent:
    """An event as it was recorded.

    Attributes:
        step: The optimizer step at which it happened.
        kind: As of `adaptlr.Event`.
        reason: One sentence with the numbers.
        lr: Learning rate of the largest group in that step.
        factor: What the guard multiplies the scheduled rate by, once re-warmed.
        time: When the host heard of it, in Unix seconds.
    """

    step: int
    kind: str
    reason: str
    lr: float
    factor: float
    time: float


@dataclass(frozen=True)
class Recording:
    """One run, however often it was resumed.

    Attributes:
        path: The file.
        headers: The header of every start, oldest first; those of further parts are left out.
        records: Structured array of dtype `RECORD`, by rising step; NaN where nothing was recorded.
            Where a run went back to an earlier step, what was recorded later counts.
        events: What was done and why, by rising step; of the same stretches as the records.
        replaced: Records that a resumed run has recorded once more.
        lost: What the recorder itself says is missing: sentences.
        damaged: Lines that cannot be read. One at the end of a killed run is usual.
        closed: Whether the recording was closed in good order, or its process was killed or runs.
    """

    path: Path
    headers: list[Line]
    records: npt.NDArray[Any]
    events: list[RecordedEvent]
    replaced: int
    lost: list[str]
    damaged: int
    closed: bool


def read(path: str | os.PathLike[str]) -> Recording:
    """Read a recording with all its parts.

    Args:
        path: The file that the `Recorder` was given; finished parts beside it are found.

    Returns:
        What was recorded, as one run, however many files and starts it took.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is no recording, or was written in a format that is not known here.
    """
    path = Path(path)
    parts = [*finished_parts(path.absolute()), path]
    if not path.exists() and len(parts) == 1:
        raise FileNotFoundError(f"path must be a recording, got {path}, which does not exist")
    reader = Reader(path)
    for part in parts:
        if part.exists():
            with part.open("rb") as file:
                reader.feed(file)
    return reader.recording()


class Reader:
    """Takes lines as they come, and tells at any time what they say together."""

    def __init__(self, path: Path) -> None:
        """Begin before the first line; ``path`` is for messages."""
        self._path = path
        self._headers: list[Line] = []
        self._blocks: list[npt.NDArray[Any]] = []
        self._events: list[tuple[int, RecordedEvent]] = []  # with the records before it
        self._lost: list[str] = []
        self._damaged = 0
        self._count = 0
        self._closed = False

    def feed(self, lines: Iterable[bytes]) -> None:
        """Take further lines."""
        rest = iter(lines)
        while chunk := list(islice(rest, _CHUNK)):
            for is_records, run in _runs(chunk):
                if is_records and self._headers:
                    self._take_records(run)
                else:
                    for line in run:
                        self._take(line)

    def _take_records(self, lines: list[bytes]) -> None:
        try:
            objects = loads(b"[" + b",".join(lines) + b"]")
            block = _table(objects)
        except (ValueError, KeyError, TypeError):
            if len(lines) > 1:
                middle = len(lines) // 2
                self._take_records(lines[:middle])
                self._take_records(lines[middle:])
            else:
                self._damaged += 1
            return
        self._blocks.append(block)
        self._count += len(block)
        self._closed = False

    def _take(self, text: bytes) -> None:
        line = _parse(text)
        self._closed = line.get("end") == "closed"
        if "format" in line:
            self._take_header(line)
        elif not self._headers:
            raise ValueError(
                f"{self._path} is not a recording of adaptlr: its first line must be a header"
            )
        else:
            self._take_news(line, text)

    def _take_news(self, line: Line, text: bytes) -> None:
        """Take a line that is no header, or count it as damaged."""
        try:
            if "event" in line:
                self._events.append((self._count, _event(line)))
            elif "gap" in line:
                self._lost.append(f"{line['gap']} {line['of']}: {line['why']}")
            elif "step" in line:  # a record that something else has written again
                self._take_records([text])
            elif "end" not in line:
                self._damaged += bool(text.strip())
        except (ValueError, KeyError, TypeError):
            self._damaged += 1

    def _take_header(self, line: Line) -> None:
        if line["format"] != FORMAT:
            raise ValueError(
                f"{self._path} must be of format {FORMAT}, got {line['format']}, written by "
                f"adaptlr {line.get('adaptlr', 'of unknown version')}; read it with that version"
            )
        if not _is_header(line):
            raise ValueError(f"{self._path} is not a recording of adaptlr: a header is damaged")
        if line.get("part", 1) == 1 or not self._headers:
            self._headers.append(line)

    def recording(self) -> Recording:
        """Return what has been taken so far.

        Raises:
            ValueError: if there was no header.
        """
        if not self._headers:
            raise ValueError(f"{self._path} is empty: a recording begins with a header")
        records = np.concatenate(self._blocks) if self._blocks else np.zeros(0, RECORD)
        self._blocks = [records]
        # The smallest step from each place on: a record that a later one undercuts is replaced.
        steps = np.ascontiguousarray(records["step"])
        lowest = np.minimum.accumulate(steps[::-1])[::-1]
        after = np.append(lowest[1:], np.iinfo(np.int64).max)
        bound = np.append(lowest, np.iinfo(np.int64).max)
        kept = steps < after
        events = [event for place, event in self._events if event.step < bound[place]]
        # An event may be written just before its record or just after it.
        events += [event for place, event in self._events if event.step == bound[place]]
        return Recording(
            self._path,
            list(self._headers),
            records if kept.all() else records[kept],
            sorted(events, key=lambda event: event.step),
            int((~kept).sum()),
            list(self._lost),
            self._damaged,
            self._closed,
        )


def _runs(lines: list[bytes]) -> Iterator[tuple[bool, list[bytes]]]:
    """Split lines into runs of records and runs of anything else."""
    if b"".join(lines).count(_START_OF_RECORD) == len(lines):  # quick, and the usual case
        yield True, lines
        return
    start = 0
    kinds = [line.startswith(_START_OF_RECORD) for line in lines]
    for place in range(1, len(lines) + 1):
        if place == len(lines) or kinds[place] != kinds[start]:
            yield kinds[start], lines[start:place]
            start = place


def _is_header(line: Line) -> bool:
    """Tell whether what readers count on is of its kind, where it is there."""
    config, versions = line.get("config", {}), line.get("versions", {})
    if not (isinstance(config, dict) and isinstance(versions, dict)):
        return False
    numbers = (config.get("total_steps") or 0, config.get("peak", 0.0))
    try:
        datetime.fromisoformat(line.get("time", "2000-01-01"))
    except (ValueError, TypeError):
        return False
    return all(isinstance(number, (int, float)) for number in numbers)


def _parse(text: bytes) -> Line:
    """Return the object of a line; an empty one for what is none."""
    try:
        line = loads(text)
    except ValueError:
        return {}
    return line if isinstance(line, dict) else {}


def _event(line: Line) -> RecordedEvent:
    numbers = (float(line[name]) for name in ("lr", "factor", "time"))
    return RecordedEvent(int(line["step"]), line["event"], line["reason"], *numbers)


def _table(lines: list[Line]) -> npt.NDArray[Any]:
    """Turn records into a table; what they leave out has its usual value."""
    table = np.zeros(len(lines), RECORD)
    table["grad_norm"] = table["time"] = np.nan
    values = chain.from_iterable(map(_always, lines))
    # fromiter takes the strings that stand for NaN and infinity as float() does
    columns = np.fromiter(values, float, len(lines) * _ALWAYS).reshape(-1, _ALWAYS)
    if not ((columns[:, 0] >= 0) & (columns[:, 0] < 2.0**53)).all():
        raise ValueError("a step is a count")
    for place, name in enumerate(("step", *NUMBERS)):
        table[name] = columns[:, place]
    for place, count in enumerate(map(len, lines)):
        if count > _ALWAYS:
            _fill_in(table, place, lines[place])
    return table


def _fill_in(table: npt.NDArray[Any], place: int, line: Line) -> None:
    for name in ("grad_norm", "time"):
        if name in line:
            table[name][place] = float(line[name])
    if "phase" in line:
        table["phase"][place] = Phase[line["phase"]]
    if "flags" in line:
        table["flags"][place] = sum(Flag[name] for name in line["flags"])
    for name, (kind, shift) in _ACTIONS.items():
        if name in line:
            table["action"][place] |= kind[line[name]] << shift
