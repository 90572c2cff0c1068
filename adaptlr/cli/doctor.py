"""``adaptlr doctor``: whether this installation works, and what it can do here."""

from __future__ import annotations

import json
from typing import Annotated

import typer

MARKS = {"ok": "[green]ok[/green]", "note": "[yellow]note[/yellow]", "bad": "[red]BAD[/red]"}


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show versions and kernels, the path of every torch optimizer here, and run a self-test.

    The self-test compares the control step on each device with the oracle in NumPy. Exit code 1 if
    anything is bad; what is merely not there is a note.
    """
    from adaptlr.doctor import SKIPS, devices, examine, optimizer_paths

    checks = list(examine())
    paths = {str(device): optimizer_paths(device) for device in devices()}
    if as_json:
        found = [check._asdict() for check in checks]
        typer.echo(json.dumps({"checks": found, "paths": paths}, indent=1))
    else:
        from rich.console import Console
        from rich.table import Column, Table

        console = Console()
        table = Table("", "", Column(overflow="fold"), box=None, pad_edge=False, show_header=False)
        for check in checks:
            table.add_row(MARKS[check.status], check.name, check.detail)
        console.print(table)
        for device, path_of in paths.items():
            table = Table("optimizer", "path", "a skipped step", box=None, pad_edge=False)
            for name, path in path_of.items():
                table.add_row(name, path, SKIPS[path])
            console.print(f"\nWith parameters on {device} and default flags:")
            console.print(table)
    if any(check.status == "bad" for check in checks):
        raise typer.Exit(1)
