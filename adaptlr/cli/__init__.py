"""The command line: ``adaptlr COMMAND``.

Each command is a function in a file of its own, registered at the end of this one. It raises
`adaptlr.cli.errors.CommandError` for whatever the user can put right. What is slow to import
(transformers, matplotlib) is imported inside the function, so that ``--help`` answers quickly.
"""

from __future__ import annotations

from typing import Annotated

try:
    import typer
except ModuleNotFoundError:
    raise SystemExit('adaptlr: the command line needs typer; pip install "adaptlr[cli]"') from None

from adaptlr import __version__
from adaptlr.cli.bench import bench
from adaptlr.cli.demo import demo
from adaptlr.cli.doctor import doctor
from adaptlr.cli.errors import CommandGroup
from adaptlr.cli.replay import replay
from adaptlr.cli.report import report
from adaptlr.cli.watch import watch

app = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def print_version(wanted: bool) -> None:
    """Print the version and end, if that is what was asked for."""
    if wanted:
        typer.echo(f"adaptlr {__version__}")
        raise typer.Exit


@app.callback()
def adaptlr(
    _version: Annotated[
        bool,
        typer.Option("--version", callback=print_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """See what adaptlr does to a learning rate, follow it, and read what it did."""


# One line for each command, in the order of the list that --help prints.
app.command(short_help="Fine-tune a model at a rate far too high, twice.")(demo)
app.command(short_help="Make a page of what a run has recorded.")(report)
app.command(short_help="Follow a run in the terminal.")(watch)
app.command(short_help="Tell what adaptlr would have done to other losses.")(replay)
app.command(short_help="Check whether this installation works.")(doctor)
app.command(short_help="Measure what a step costs on this machine.")(bench)
