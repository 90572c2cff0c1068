"""Follows a recording that is still being written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

from adaptlr.log_file import finished_parts
from adaptlr.recording import Reader, Recording


class Follower:
    """Reads what has been added since the last look; a line that is not whole waits."""

    def __init__(self, path: Path) -> None:
        """Read all that is there already.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is no recording.
        """
        self._path = path
        self._reader = Reader(path)
        for part in finished_parts(path.absolute()):
            self._reader.feed(part.read_bytes().splitlines(keepends=True))
        self._file: BinaryIO = path.open("rb")
        self._rest = b""
        try:
            self._take()
        except ValueError:
            self._file.close()
            raise

    def _take(self) -> bool:
        *lines, self._rest = (self._rest + self._file.read()).split(b"\n")
        self._reader.feed(lines)
        return bool(lines)

    def look(self) -> bool:
        """Read on; return whether there was anything new."""
        news = self._take()
        if self._was_put_aside():
            news |= self._take()  # what came between the two
            self._file.close()
            self._file = self._path.open("rb")
            self._rest = b""
            news |= self._take()
        return news

    def _was_put_aside(self) -> bool:
        try:
            now = self._path.stat()
        except FileNotFoundError:
            return False  # between two parts
        here = os.fstat(self._file.fileno())
        return (now.st_dev, now.st_ino) != (here.st_dev, here.st_ino)

    def recording(self) -> Recording:
        """Return what has been read so far.

        Raises:
            ValueError: if there was no header yet.
        """
        return self._reader.recording()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
