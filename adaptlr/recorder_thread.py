"""The thread of a recorder: twice a second, from the rings to the file and the sinks."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

from adaptlr.events import Event
from adaptlr.lines import (
    Line,
    event_line,
    gap_line,
    record_line,
    records_to_json,
    to_json,
    worth_keeping,
)
from adaptlr.log_file import LogFile
from adaptlr.ring_reader import Core, News, RingReader
from adaptlr.sinks import Command, Sink

logger = logging.getLogger("adaptlr")

INTERVAL = 0.5  # seconds; what a killed process loses at most
_PATIENCE = 30.0  # seconds that closing waits for a sink that hangs


class RecorderThread(threading.Thread):
    """Owns the file; everything but the header is written here.

    Attributes:
        begun: Whether it has a controller.
    """

    def __init__(
        self,
        file: LogFile,
        sinks: list[Sink],
        every: int,
        max_bytes: int | None,
        on_event: Callable[[Event], Any] | Command | None,
    ) -> None:
        """Keep the open file."""
        super().__init__(name="adaptlr-recorder", daemon=True)
        self.begun = False
        self._file = file
        self._sinks = sinks
        self._every = every
        self._max_bytes = max_bytes
        self._on_event = on_event
        self._stopping = threading.Event()
        self._header: Line = {}
        self._unwritten = 0  # lines that a full disk has cost
        self._told_trouble = False

    def begin(self, core: Core, own_events: Sequence[Event], header: Line) -> None:
        """Write the header and start."""
        self._rings = RingReader(core)
        self._own_events, self._own_told = own_events, 0
        self._header = {**header, "part": 1}
        self._file.write(to_json(self._stamped_header()).encode())
        self.begun = True
        self._tell_sinks([self._stamped_header()])
        self.start()

    def _stamped_header(self) -> Line:
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        return {"format": self._header["format"], "time": now, **self._header}

    def close(self, wait: bool) -> None:
        """Stop, and wait for the rest to be written, unless called by the thread itself."""
        self._stopping.set()
        if not self.begun:
            return self._finish("closed")
        if wait and self.is_alive():
            self.join(_PATIENCE)
            if self.is_alive():
                logger.warning("a sink of the recorder %s hangs; it is left", self._file.path)

    def run(self) -> None:
        """Write what is new until told to stop; then the rest."""
        try:
            while not self._stopping.wait(INTERVAL):
                self._turn(last=False)
            self._turn(last=True)
        except Exception:
            logger.warning("the recorder %s has failed and stops", self._file.path, exc_info=True)
            return self._finish("failed")
        self._finish("closed")

    def _finish(self, end: str) -> None:
        """Close everything. The file last: its end says that the run was left in good order."""
        for sink in self._sinks:
            if hasattr(sink, "close"):
                self._call(sink, sink.close)
        if isinstance(self._on_event, Command):
            self._call(self._on_event, self._on_event.close)
        if self.begun:
            self._write(to_json({"end": end, "time": round(time.time(), 2)}).encode())
        self._file.close()

    # -- one turn -------------------------------------------------------------

    def _turn(self, last: bool) -> None:
        now = time.time()
        news = self._rings.read(last)
        own = list(self._own_events[self._own_told :])
        self._own_told += len(own)
        events = sorted([*news.events, *own], key=lambda event: event.step)
        gaps = list(_gaps(news))
        rows = worth_keeping(news.records, self._every)
        event_lines = [event_line(event, now) for event in events]
        before, after = ("".join(map(to_json, lines)).encode() for lines in (gaps, event_lines))
        self._write(before + records_to_json(rows, now) + after)
        if events:
            self._sync()
        if self._sinks:
            self._tell_sinks([*gaps, *map(record_line, rows), *event_lines])
        self._tell(events, event_lines)

    def _write(self, lines: bytes) -> None:
        """Append the lines; a full disk costs lines and never the run."""
        if not lines:
            return
        gap = gap_line(self._unwritten, "lines", "they could not be written")
        before = to_json(gap).encode() if self._unwritten else b""
        try:
            self._file.write(before + lines)
        except OSError as error:
            self._unwritten += lines.count(b"\n")
            return self._tell_trouble("training goes on, and the lines are counted", error)
        self._unwritten = 0
        if self._max_bytes is not None and self._file.size >= self._max_bytes:
            self._rotate()

    def _rotate(self) -> None:
        try:
            self._header["part"] = self._file.rotate()
            self._file.write(to_json(self._stamped_header()).encode())
        except OSError as error:
            self._max_bytes = None
            self._tell_trouble("no further part is begun", error)

    def _tell_trouble(self, consequence: str, error: OSError) -> None:
        """Warn, once in a run."""
        if not self._told_trouble:
            self._told_trouble = True
            logger.warning(
                "the recorder cannot write to %s (%s): %s",
                self._file.path,
                error.strerror,
                consequence,
            )

    def _sync(self) -> None:
        try:
            self._file.sync()
        except OSError:
            pass  # a file system that cannot; the lines are with the system all the same

    # -- sinks ----------------------------------------------------------------

    def _tell_sinks(self, lines: list[Line]) -> None:
        for sink in list(self._sinks):
            for line in lines:
                if not self._call(sink, sink, line):
                    self._sinks.remove(sink)
                    break

    def _tell(self, events: list[Event], lines: list[Line]) -> None:
        on_event = self._on_event
        if isinstance(on_event, Command):
            for line in lines:
                on_event(line)
            told = self._call(on_event, on_event.poll)
        else:
            told = all(self._call(on_event, on_event, event) for event in events if on_event)
        if not told:
            self._on_event = None

    def _call(self, sink: object, method: Callable[..., Any], *arguments: object) -> bool:
        """Call a sink; if it raises, say so and return False."""
        try:
            method(*arguments)
        except Exception as error:
            name = getattr(sink, "__name__", type(sink).__name__)
            logger.warning(
                "the recorder's sink %s has raised %s: %s; it is dropped, the recording goes on",
                name,
                type(error).__name__,
                error,
            )
            return False
        return True


def _gaps(news: News) -> list[Line]:
    why = "newer ones had overwritten them before they were read"
    counts = {"records": news.lost_records, "events": news.lost_events}
    return [gap_line(count, of, why) for of, count in counts.items() if count]
