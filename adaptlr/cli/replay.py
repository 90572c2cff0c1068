"""``adaptlr replay``: what adaptlr would have done to a run whose losses are recorded."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adaptlr.cli.errors import BAD_OPTION, CommandError

if TYPE_CHECKING:
    from adaptlr.config import ResolvedConfig
    from adaptlr.loss_curves import LossCurve
    from adaptlr.replay import Replay

DEFAULT_LR = 1e-3  # where the file does not tell: every rate that is shown is in proportion to it
NOTE = (
    "The recorded losses do not react to what is shown here: after the first event that changes "
    "the learning rate or the weights, the real run would have gone another way."
)


def replay(
    source: Annotated[
        Path, typer.Argument(help="A recording, a CSV file, or a folder of TensorBoard.")
    ],
    name: Annotated[str | None, typer.Option(help="Column or tag of the loss.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    total_steps: Annotated[int | None, typer.Option(help="Length of the run in steps.")] = None,
    warmup: Annotated[str, typer.Option(help="Steps (100) or a share of the run (0.1).")] = "0.1",
    decay: Annotated[str, typer.Option(help="cosine, linear, constant, wsd, ...")] = "cosine",
    mode: Annotated[str, typer.Option(help="act, or observe to list every alarm.")] = "act",
    sensitivity: Annotated[float, typer.Option(help="Of the collapse charts, 0.5 to 2.")] = 1.0,
    max_restarts: Annotated[int, typer.Option(help="Rollbacks and experiments allowed.")] = 8,
    snapshots: Annotated[bool, typer.Option(help="Whether it could have gone back.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what adaptlr would have done to a run, from its losses alone.

    Reads a recording of adaptlr.Recorder, a CSV file with a column "loss" (or one number a line),
    or what TensorBoard has written, and runs the real control step over it. Hand in the loss of
    every step: values that were averaged or logged now and then raise other alarms.
    """
    from adaptlr.replay import replay as replay_losses

    curve = read_curve(source, name)
    config = resolve(curve, lr, total_steps, warmup, decay, mode, sensitivity, max_restarts)
    config.set_snapshot_slots(3 if snapshots and mode == "act" else 0)
    result = replay_losses(config, curve.losses, curve.grad_norms)
    if as_json:
        typer.echo(json.dumps(as_dict(result), indent=1))
    else:
        show(result, source, config, len(curve.losses))


def read_curve(source: Path, name: str | None) -> LossCurve:
    """Read the losses, or end with what is wrong."""
    from adaptlr.loss_curves import read_losses

    try:
        return read_losses(source, name)
    except OSError as error:
        raise CommandError(f"{source} cannot be read: {error.strerror or error}") from None
    except (ValueError, ModuleNotFoundError) as error:
        raise CommandError(str(error)) from None


def resolve(
    curve: LossCurve,
    lr: float | None,
    total_steps: int | None,
    warmup: str,
    decay: Any,
    mode: Any,
    sensitivity: float,
    max_restarts: int,
) -> ResolvedConfig:
    """Turn the options into settings, or end with what is wrong."""
    from adaptlr.config import DECAYS, Guard, ResolvedConfig, require

    try:
        require(decay in DECAYS[:-1], "decay", f"one of {', '.join(DECAYS[:-1])}", decay)
        return ResolvedConfig(
            total_steps=_first(total_steps, curve.total_steps, len(curve.losses)),
            warmup=parse_warmup(warmup),
            decay=decay,
            min_lr_ratio=0.0,
            guard=Guard(mode=mode, sensitivity=sensitivity, max_restarts=max_restarts),
            peaks=[_first(lr, curve.lr, DEFAULT_LR)],
        )
    except (ValueError, TypeError) as error:
        raise CommandError(str(error), BAD_OPTION) from None


def _first(*values: Any) -> Any:
    """Return the first value that was given; 0 was, too, and is refused where it cannot be."""
    return next(value for value in values if value is not None)


def parse_warmup(text: str) -> float:
    """Read steps or a share."""
    try:
        return int(text) if text.isdigit() else float(text)
    except ValueError:
        raise ValueError(f"warmup must be steps (100) or a share (0.1), got {text!r}") from None


def as_dict(result: Replay) -> dict[str, Any]:
    """Return what a script wants to know."""
    return {
        "steps": len(result.records),
        "ended": result.ended,
        "factor": float(result.records["factor"][-1]),
        "events": [asdict(event) for event in result.events],
        "note": NOTE,
    }


def show(result: Replay, source: Path, config: ResolvedConfig, losses: int) -> None:
    """Print a table of events with their sentences."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    last = result.records[-1]
    console.print(
        f"{source}: {losses:,} losses, {config.total_steps:,} steps planned, "
        f"{config.warmup_steps:,} of warm-up, peak {config.peaks[0]:.3g}"
    )
    if not result.events:
        console.print("Nothing would have been done: no step skipped, no rate cut, no alarm.")
    else:
        table = Table(box=None, pad_edge=False, header_style="dim")
        for title in ("step", "event", "lr", "why"):
            table.add_column(title, justify="right" if title in ("step", "lr") else "left")
        for event in result.events:
            table.add_row(f"{event.step:,}", event.kind, f"{event.lr:.2e}", event.reason)
        console.print(table)
    if result.ended:
        console.print(f"The guard would have ended the run at step {int(last['step']):,}.")
    console.print(
        f"In the end: level {last['level']:.4g}, noise {last['scale']:.2g}, factor "
        f"{last['factor']:.3g}."
    )
    if result.events:
        console.print(f"[dim]{NOTE}[/dim]")
