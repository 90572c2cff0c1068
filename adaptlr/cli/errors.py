"""How a command ends when something is wrong: one line on stderr and an exit code."""

from __future__ import annotations

import errno
import os
import sys
from typing import Any

import typer
from typer.core import TyperGroup

BAD_OPTION = 2  # the exit code that the option parser uses too


class CommandError(Exception):
    """Trouble that the user can put right; its text is the whole message.

    Args:
        message: One line that says what was accepted, what was received and what to do.
        exit_code: 1 for something missing or broken, `BAD_OPTION` for an option out of range.
    """

    def __init__(self, message: str, exit_code: int = 1) -> None:
        """Keep the message and the exit code."""
        super().__init__(message)
        self.exit_code = exit_code


class CommandGroup(TyperGroup):
    """A group whose commands may raise `CommandError` anywhere."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command and turn a `CommandError` into its line."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except CommandError as error:
            typer.echo(f"adaptlr: {error}", err=True)
            raise typer.Exit(error.exit_code) from None
        except OSError as error:
            if error.errno != errno.ENOSPC:  # a pipe that was closed is the parser's to handle
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or exiting complains
            typer.echo("adaptlr: the output cannot be written: the disk is full", err=True)
            raise typer.Exit(1) from None
