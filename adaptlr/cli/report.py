"""``adaptlr report``: a recording as a page, or as a picture."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Annotated

import typer

from adaptlr.cli.errors import BAD_OPTION, CommandError
from adaptlr.cli.recordings import read_recording


def report(
    recordings: Annotated[list[Path], typer.Argument(help="Files of adaptlr.Recorder.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The page; else beside the recording.")
    ] = None,
    title: Annotated[str | None, typer.Option(help="Heading of the page.")] = None,
    png: Annotated[bool, typer.Option("--png", help="A picture in place of a page.")] = False,
) -> None:
    """Make a page of one or several recordings that shows and explains what happened.

    The page is one file that needs no network: loss, learning rate and slope with the events, which
    explain themselves, and the events in sentences. With --png a picture is drawn instead.
    """
    suffix = ".png" if png else ".html"
    target = recordings[0].with_suffix(suffix) if output is None else output
    if target.is_dir() or not target.absolute().parent.is_dir():
        raise CommandError(
            f"--output must be a file in an existing folder, got {target}", BAD_OPTION
        )
    runs = [read_recording(path) for path in recordings]
    try:
        if png:
            from adaptlr.plot import plot

            figure = plot([(run.path.name, run.records, run.events) for run in runs])
            picture = BytesIO()  # matplotlib does not notice that a disk is full
            figure.savefig(picture, format=target.suffix.removeprefix(".") or "png")
            target.write_bytes(picture.getvalue())
        else:
            from adaptlr.report import make_page

            target.write_text(make_page(runs, title), encoding="utf-8")
    except (ModuleNotFoundError, ValueError) as error:
        raise CommandError(str(error)) from None
    except OSError as error:
        raise CommandError(f"{target} cannot be written: {error.strerror}") from None
    typer.echo(target)
