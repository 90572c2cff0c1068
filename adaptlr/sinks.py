"""Where a `Recorder` can send what it records, beside its file.

A sink is anything that can be called with a line of the recording as a dict (`adaptlr.lines` lists
the kinds); ``close()`` is called at the end if it has one. It runs in the recorder's thread, and is
dropped with one warning if it raises.
"""

from __future__ import annotations

import csv
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from adaptlr.lines import NUMBERS, Line

Sink = Callable[[Line], Any]

_COLUMNS = ("step", *NUMBERS, "grad_norm", "phase", "flags", "action")


class TensorBoard:
    """Writes scalars ``adaptlr/...`` and events as text, for TensorBoard.

    Args:
        log_dir: Folder of the run.

    Raises:
        ModuleNotFoundError: if the package ``tensorboard`` is not installed.
    """

    def __init__(self, log_dir: str | os.PathLike[str]) -> None:
        """Open the folder."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError:
            raise _missing("TensorBoard", "tensorboard") from None
        self._writer: Any = SummaryWriter(os.fspath(log_dir))

    def __call__(self, line: Line) -> None:
        """Take one line."""
        for name, value in _scalars(line).items():
            self._writer.add_scalar(f"adaptlr/{name}", value, line["step"])
        if "event" in line:
            self._writer.add_text(
                "adaptlr/events", f"{line['event']}: {line['reason']}", line["step"]
            )

    def close(self) -> None:
        """Write what is still held back."""
        self._writer.close()


class WandB:
    """Logs to a Weights & Biases run of its own, so that its steps never disturb those of yours.

    Args:
        mode: ``"offline"`` keeps all on this machine until ``wandb sync``.
        **settings: Anything else that ``wandb.init`` takes: ``project``, ``name``, ``dir``, ...

    Raises:
        ModuleNotFoundError: if the package ``wandb`` is not installed.
    """

    def __init__(self, mode: str = "offline", **settings: Any) -> None:
        """Start the run."""
        try:
            import wandb
        except ModuleNotFoundError:
            raise _missing("WandB", "wandb") from None
        settings = {"project": "adaptlr", "reinit": "create_new", **settings}
        self._run = wandb.init(mode=mode, **settings)
        self._run.define_metric("adaptlr/*", step_metric="adaptlr/step")

    def __call__(self, line: Line) -> None:
        """Take one line. W&B's own step only grows; ours goes back where a run is resumed."""
        if "format" in line:
            self._run.config.update({"adaptlr": line})
        elif "step" in line:
            self._run.log({**_named(line), "adaptlr/step": line["step"]})

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class Trackio:
    """Logs to a trackio project, kept on this machine.

    Args:
        project: Name of the project.
        **settings: Anything else that ``trackio.init`` takes.

    Raises:
        ModuleNotFoundError: if the package ``trackio`` is not installed.
    """

    def __init__(self, project: str = "adaptlr", **settings: Any) -> None:
        """Start the run."""
        try:
            import trackio
        except ModuleNotFoundError:
            raise _missing("Trackio", "trackio") from None
        self._run = trackio.init(project=project, **settings)

    def __call__(self, line: Line) -> None:
        """Take one line."""
        if "step" in line:
            self._run.log(_named(line), step=line["step"])

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class CSV:
    """Writes the records as a table; events are in the recording alone.

    Args:
        path: The file; an existing one is appended to.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open the file, and name the columns if it is new."""
        self._file = Path(path).open("a", newline="", encoding="utf-8")
        self._table = csv.DictWriter(self._file, _COLUMNS)
        if self._file.tell() == 0:
            self._table.writeheader()

    def __call__(self, line: Line) -> None:
        """Take one line."""
        if "event" not in line and "step" in line:
            flags = " ".join(line.get("flags", ()))
            self._table.writerow({**line, "flags": flags})

    def close(self) -> None:
        """Write what is still held back."""
        self._file.close()


class Command:
    """Runs a shell command for events: the way to a mail, a chat or a notification.

    The command finds the sentences of the events on its standard input, one a line, and the last
    one in the variables ADAPTLR_EVENT, ADAPTLR_STEP and ADAPTLR_REASON. It is not waited for. What
    happens within a minute after it was started is told together, by the next call.

    Args:
        command: A line for the system's shell, such as ``"mail -s adaptlr me@example.org"``.
    """

    PAUSE = 60.0  # seconds; a run that skips step after step must not send a mail for each

    def __init__(self, command: str) -> None:
        """Keep the command; the system's shell reads it when there is an event."""
        self._command = command
        self._waiting: list[Line] = []
        self._started = -self.PAUSE
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self, line: Line) -> None:
        """Take one event."""
        self._waiting.append(line)

    def poll(self, last: bool = False) -> None:
        """Start the command if there is something to tell and the last call is a minute ago.

        Args:
            last: Do not wait for that minute: the run is at its end.
        """
        if not self._waiting or (not last and time.monotonic() < self._started + self.PAUSE):
            return
        self._reap()
        lines, self._waiting, self._started = self._waiting, [], time.monotonic()
        newest = lines[-1]
        told = {name: str(newest[name.lower()]) for name in ("EVENT", "STEP", "REASON")}
        environment = os.environ | {f"ADAPTLR_{name}": value for name, value in told.items()}
        text = "".join(f"step {line['step']}: {line['reason']}\n" for line in lines)
        self._process = subprocess.Popen(
            self._command, shell=True, stdin=subprocess.PIPE, env=environment
        )
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(text.encode())
            self._process.stdin.close()
        except BrokenPipeError:
            pass  # a command that does not read it

    def close(self) -> None:
        """Tell what is left."""
        self.poll(last=True)
        self._reap()

    def _reap(self) -> None:
        """Wait for the last call a little; give up on one that hangs."""
        if self._process is not None:
            try:
                self._process.wait(timeout=5.0)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


def _missing(sink: str, package: str) -> ModuleNotFoundError:
    return ModuleNotFoundError(f"{sink} needs {package}; pip install {package}")


def _scalars(line: Line) -> dict[str, float]:
    """Return the numbers of a record; nothing of other lines."""
    if "event" in line or "step" not in line:
        return {}
    return {name: line[name] for name in (*NUMBERS, "grad_norm") if name in line}


def _named(line: Line) -> dict[str, Any]:
    """Return what a tracker is to show of a record or an event."""
    if "event" in line:
        return {"adaptlr/event": f"{line['event']}: {line['reason']}"}
    return {f"adaptlr/{name}": value for name, value in _scalars(line).items()}
