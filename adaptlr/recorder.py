"""`Recorder`: writes the flight record to a file while the run goes on, and never harms the run."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptlr.config import require
from adaptlr.events import Event

if TYPE_CHECKING:
    from adaptlr.lines import Line
    from adaptlr.recorder_thread import RecorderThread
    from adaptlr.ring_reader import Core
    from adaptlr.sinks import Sink

_MIN_BYTES = 4096


class Recorder:
    """Writes every step and event of one controller to a JSON Lines file, from a thread of its own.

    The thread reads host memory twice a second; it never calls CUDA, and training never waits for
    it. A process that is killed loses the last half second. An existing file is appended to, behind
    a new header, so a resumed run continues its recording. ``adaptlr report`` makes a page of it.

    Args:
        path: The file; its folder must exist. Every controller needs a file of its own.
        sinks: Called with every line as a dict, in the recorder's thread (`adaptlr.sinks` has some
            for TensorBoard, W&B, trackio and CSV). One that raises is dropped, with a warning.
        every: Steps between records, at least 1; steps with a flag, an action or an event are
            always recorded.
        max_bytes: Size at which the file is put aside as ``NAME.0001.jsonl``, ``0002``, ... and a
            new one begun, at least 4096; None: never. Nothing is deleted.
        on_event: Called with every `Event`, in the recorder's thread; or a shell command that reads
            what happened on its standard input, such as ``"mail -s adaptlr me@example.org"``
            (`adaptlr.sinks.Command`).

    Raises:
        OSError: if ``path`` cannot be written.
        TypeError: if an argument is of the wrong kind.
        ValueError: if another recorder writes to it, or an argument is out of range.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> optimizer = torch.optim.SGD([torch.zeros(2, requires_grad=True)], lr=0.1)
        >>> recorder = Recorder(folder.name + "/run.jsonl")
        >>> controller = AdaptiveLR(optimizer, total_steps=100, recorder=recorder)
        >>> controller.step(2.0)
        >>> controller.detach()  # closes the file; so does the end of the program
        >>> folder.cleanup()
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        sinks: Iterable[Sink] = (),
        every: int = 1,
        max_bytes: int | None = None,
        on_event: Callable[[Event], Any] | str | None = None,
    ) -> None:
        """Open the file."""
        # Not at the top, so that importing adaptlr stays quick for those who record nothing.
        from adaptlr.log_file import LogFile
        from adaptlr.recorder_thread import RecorderThread
        from adaptlr.sinks import Command

        if isinstance(every, bool) or not isinstance(every, int):
            raise TypeError(f"every must be an int, got {type(every).__name__}")
        require(every >= 1, "every", "at least 1", every)
        if max_bytes is not None:
            require(max_bytes >= _MIN_BYTES, "max_bytes", f"at least {_MIN_BYTES}", max_bytes)
        sinks = list(sinks)
        for sink in sinks:
            if not callable(sink):
                raise TypeError(f"sinks must be callable, got {type(sink).__name__}")
        if on_event is not None and not callable(on_event) and not isinstance(on_event, str):
            kind = type(on_event).__name__
            raise TypeError(f"on_event must be callable or a shell command, got {kind}")
        told = Command(on_event) if isinstance(on_event, str) else on_event
        self.path = Path(path)
        self._thread = RecorderThread(LogFile(self.path), sinks, every, max_bytes, told)
        self._close = weakref.finalize(self, _close, self._thread, os.getpid())

    def attach(self, core: Core, own_events: Sequence[Event], header: Line) -> None:
        """Begin to record; `AdaptiveLR` calls this.

        Args:
            core: The controller of the extension.
            own_events: What the host did by itself; grows as the run goes on.
            header: Facts about the run.

        Raises:
            RuntimeError: if the recorder has a controller already, or is closed.
            OSError: if the header cannot be written.
        """
        self.check()
        self._thread.begin(core, own_events, header)

    def check(self) -> None:
        """Raise unless the recorder is open and still without a controller.

        Raises:
            RuntimeError: if it is not.
        """
        if self._thread.begun or not self._close.alive:
            state = "has a controller already" if self._close.alive else "is closed"
            raise RuntimeError(f"recorder {self.path} {state}; make one Recorder a controller")

    def close(self) -> None:
        """Write what is left, close the sinks and the file. Further calls do nothing."""
        self._close()

    def __enter__(self) -> Recorder:
        """Return the recorder itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def __repr__(self) -> str:
        """Show the file."""
        return f"Recorder({str(self.path)!r})"


def open_recorder(recorder: Recorder | str | os.PathLike[str]) -> Recorder:
    """Return a recorder that is free for a controller, from itself or from its path."""
    if not isinstance(recorder, (Recorder, str, os.PathLike)):
        kind = type(recorder).__name__
        raise TypeError(f"recorder must be a Recorder, a path or None, got {kind}")
    recorder = recorder if isinstance(recorder, Recorder) else Recorder(recorder)
    recorder.check()
    return recorder


def _close(thread: RecorderThread, process: int) -> None:
    """Close from any thread, at the end of the interpreter too; a forked child has no say."""
    if os.getpid() == process:
        thread.close(wait=threading.current_thread() is not thread)
