"""Recordings as commands take them: what is wrong with one becomes a line on stderr."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from adaptlr.cli.errors import CommandError

if TYPE_CHECKING:
    from adaptlr.recording import Recording


def read_recording(path: Path) -> Recording:
    """Read a recording, or end with what is wrong."""
    from adaptlr.recording import read

    try:
        return read(path)
    except OSError as error:
        why = f"{path} cannot be read: {error.strerror}" if error.strerror else str(error)
        raise CommandError(why) from None
    except ValueError as error:
        raise CommandError(str(error)) from None
