"""``adaptlr bench``: what adaptlr costs on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from adaptlr.cli.errors import BAD_OPTION, CommandError

if TYPE_CHECKING:
    import torch

    from adaptlr.bench import Report


ROUNDS = 400  # adaptlr.bench.DEFAULT_ROUNDS, which is slow to import


def bench(
    device: Annotated[
        str, typer.Option(help="cpu, cuda or cuda:N; auto: the GPU, if there is one.")
    ] = "auto",
    rounds: Annotated[
        int, typer.Option(min=10, help="Rounds of a comparison; more make it steadier.")
    ] = ROUNDS,
    csv: Annotated[Path | None, typer.Option(help="Write the rows to this file too.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON in place of Markdown.")] = False,
) -> None:
    """Measure what adaptlr adds to an optimizer step on this machine.

    Prints Markdown tables: whether the targets are met, then host time and, on a GPU, device time
    of steps with and without adaptlr, and of what a training loop pays anyway. Takes half a minute.
    Close other programs: they make the figures larger and less certain.
    """
    if csv is not None and not csv.parent.is_dir():
        raise CommandError(f"csv must be in a directory that exists, got {csv}", BAD_OPTION)
    report = measure_with_progress(check_device(device), rounds)
    if csv is not None:
        csv.write_text(report.csv())
    typer.echo(report.json() if json else report.markdown(), nl=json)


def check_device(device: str) -> torch.device:
    """Return the device to measure on, or end with what is wrong."""
    import torch

    available = torch.cuda.is_available()
    name = ("cuda" if available else "cpu") if device == "auto" else device
    try:
        chosen = torch.device(name)
    except RuntimeError:
        chosen = torch.device("meta")
    if chosen.type not in ("cpu", "cuda"):
        raise CommandError(f"device must be auto, cpu, cuda or cuda:N, got {device}", BAD_OPTION)
    if chosen.type == "cuda" and not available:
        raise CommandError(f"device {device} needs a GPU that torch can use; use --device cpu")
    return chosen


def measure_with_progress(device: torch.device, rounds: int) -> Report:
    """Measure, with a progress bar on stderr."""
    from rich.console import Console
    from rich.progress import Progress

    from adaptlr.bench import measure

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("measuring", total=1.0)
        try:
            return measure(device, rounds, lambda share: progress.update(task, completed=share))
        except RuntimeError as error:
            raise CommandError(str(error)) from error
