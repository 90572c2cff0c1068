"""Reads the flight record piece by piece, in another thread, and says what it came too late for."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from adaptlr.events import Event, make_events

Row = npt.NDArray[Any]

_ARRIVING = 8  # lines that the count may be ahead of, as in csrc/flight_record.cpp


class Core(Protocol):
    """The flight record of a controller of the extension: plain memory of the host."""

    @property
    def written(self) -> int:
        """Records so far."""

    @property
    def written_events(self) -> int:
        """Events so far."""

    def records(self, since: int = 0, /) -> Row:
        """Copy the records that are still there."""

    def events(self, since: int = 0, /) -> Row:
        """Copy the events that are still there."""


class News(NamedTuple):
    """What has been written since the last look.

    Attributes:
        records: Structured array, oldest first.
        events: Of the control step, oldest first.
        lost_records: Overwritten before they were read.
        lost_events: The same of events.
    """

    records: Row
    events: list[Event]
    lost_records: int
    lost_events: int


class RingReader:
    """Takes every line once and in order. A GPU's lines may arrive after the count of them."""

    def __init__(self, core: Core) -> None:
        """Begin with the oldest line that is there."""
        self._core = core
        self._records = _Position()
        self._events = _Position()
        self._last_event: Row | None = None

    def read(self, last: bool = False) -> News:
        """Return what is new; at the ``last`` look nothing is waited for any more."""
        core = self._core
        written, written_events = core.written, core.written_events
        records, lost = self._records.take(core.records(self._records.seen), written, last)
        rows, lost_events = self._events.take(core.events(self._events.seen), written_events, last)
        return News(records, self._explain(rows), lost, lost_events)

    def _explain(self, rows: Row) -> list[Event]:
        """Make events; what a record means depends on the one before it."""
        before = [] if self._last_event is None else [self._last_event]
        if len(rows):
            self._last_event = rows[-1]
        return make_events([*before, *rows])[len(before) :]


class _Position:
    """How far one ring has been read.

    A line that is missing among the newest may still be on its way over the bus. Looked for once
    more at the next read, it is either there or lost.
    """

    def __init__(self) -> None:
        self.seen = 0
        self._missed = -1

    def take(self, rows: Row, written: int, last: bool) -> tuple[Row, int]:
        """Return the lines that follow on those seen, and how many are lost before them."""
        if last:  # whatever is there, holes and all
            lost = max(written - self.seen - len(rows), 0)
            self.seen += lost + len(rows)
            return rows, lost
        if not len(rows):
            return rows, 0
        numbers = rows["sequence"]
        first = int(numbers[0])
        missing = first - self.seen - 1
        if missing and first > written - _ARRIVING and self._missed != self.seen:
            self._missed = self.seen
            return rows[:0], 0
        self.seen += missing
        if numbers[-1] != self.seen + len(rows):  # they only grow, so there is a hole
            rows = rows[: int((numbers == first + np.arange(len(rows))).sum())]
        self.seen += len(rows)
        return rows, missing
