"""``adaptlr watch``: a run as it goes on, from its recording."""

from __future__ import annotations

import json
import time
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adaptlr.cli.errors import CommandError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from adaptlr.follow import Follower
    from adaptlr.recording import Recording

GAVE_UP = 3  # exit code: the guard has ended the run


def watch(
    recording: Annotated[Path, typer.Argument(help="File of an adaptlr.Recorder.")],
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Show how it stands and end.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="With --once: print JSON for a script.")
    ] = False,
) -> None:
    """Follow a run in the terminal until its recording is closed; Ctrl-C ends it sooner.

    Reads the file alone, so it may run anywhere that sees it. Exit code 0: the run was closed in
    good order, or is still going; 3: the guard has ended it.
    """
    from rich.console import Console

    from adaptlr.report.summary import is_failed

    console = Console()
    with closing(open_follower(recording)) as follower:
        if as_json:
            typer.echo(json.dumps(as_dict(current(follower))))
        elif once:
            console.print(view(current(follower), console.width))
        else:
            follow(follower, console, interval)
        if is_failed(current(follower)):
            raise typer.Exit(GAVE_UP)


def open_follower(path: Path) -> Follower:
    """Open the recording, or end with what is wrong."""
    from adaptlr.follow import Follower

    try:
        return Follower(path)
    except OSError as error:
        raise CommandError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise CommandError(str(error)) from None


def current(follower: Follower) -> Recording:
    """Return the recording as it stands, or end with what is wrong."""
    try:
        return follower.recording()
    except ValueError as error:
        raise CommandError(str(error)) from None


def follow(follower: Follower, console: Any, interval: float) -> None:
    """Refresh the view until the recording is closed."""
    from rich.live import Live

    with Live(console=console, auto_refresh=False) as live:
        try:
            while True:
                recording = current(follower)
                live.update(view(recording, console.width), refresh=True)
                if recording.closed:
                    return
                time.sleep(interval)
                follower.look()
        except KeyboardInterrupt:
            return


def as_dict(recording: Recording) -> dict[str, Any]:
    """Return what a script wants to know."""
    from adaptlr.report.summary import is_failed, state

    last = recording.records[-1] if len(recording.records) else None
    names = ("loss", "level", "scale", "slope", "t_statistic", "lr", "factor")
    numbers = {name: float(last[name]) for name in names} if last is not None else {}
    return {
        "state": state(recording),
        "failed": is_failed(recording),
        "steps": int(last["step"]) + 1 if last is not None else 0,
        "total_steps": recording.headers[-1].get("config", {}).get("total_steps"),
        **{name: value if value - value == 0 else str(value) for name, value in numbers.items()},
        "last_event": asdict(recording.events[-1]) if recording.events else None,
    }


def view(recording: Recording, width: int) -> RenderableType:
    """Return the view of a recording for a terminal of that width."""
    from adaptlr.cli.watch_view import make_view

    return make_view(recording, width, time.time())
