"""A file that whole lines are appended to: nothing torn, one writer, cut into parts by size."""

from __future__ import annotations

import os
from pathlib import Path

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]

_open_paths: set[Path] = set()


def part_path(path: Path, number: int) -> Path:
    """Return where a finished part goes: ``run.jsonl`` becomes ``run.0001.jsonl``."""
    return path.with_name(f"{path.stem}.{number:04d}{path.suffix}")


def finished_parts(path: Path) -> list[Path]:
    """Return the finished parts of a recording that are there, the oldest first."""
    if not path.parent.is_dir():
        return []
    start, end = f"{path.stem}.", path.suffix
    named = (p for p in path.parent.iterdir() if p.name.startswith(start) and p.suffix == end)
    numbered = ((p.name[len(start) : len(p.name) - len(end)], p) for p in named)
    return [p for number, p in sorted(numbered) if len(number) >= 4 and number.isdigit()]


class LogFile:
    """Appends to a file with one system call a write, so that a killed process tears no line.

    Attributes:
        size: Of the current part, in bytes.
    """

    def __init__(self, path: Path) -> None:
        """Open or create ``path``; end a last line that was torn.

        Raises:
            OSError: if it cannot be written, with a text that says what to do.
            ValueError: if another recorder writes to it.
        """
        self.path = path.absolute()
        if self.path in _open_paths:
            raise ValueError(
                f"path must be of one recorder only, but another one writes to {path}; detach() "
                "its controller, or choose another path"
            )
        try:
            self._open()
        except OSError as error:
            raise type(error)(
                error.errno,
                f"path must be a file that can be written, got {path} ({error.strerror}); "
                "create the folder, or choose another",
            ) from None
        _open_paths.add(self.path)
        if self.size and os.pread(self._descriptor, 1, self.size - 1) != b"\n":
            self.write(b"\n")  # after a last line that was torn

    def _open(self) -> None:
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            _lock(descriptor, self.path)
        except ValueError:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        self.size = os.fstat(descriptor).st_size

    def write(self, data: bytes) -> None:
        """Append whole lines; all of them or, if that fails, none.

        Raises:
            OSError: if the disk is full, for one.
        """
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._descriptor, view) :]
        except OSError:
            os.ftruncate(self._descriptor, self.size)
            raise
        self.size += len(data)

    def sync(self) -> None:
        """Have the system carry all of it to the disk: for the day when the machine goes down."""
        os.fsync(self._descriptor)

    def rotate(self) -> int:
        """Put the current part aside under the next number and begin an empty one.

        Returns:
            The number of the new part, from 1.

        Raises:
            OSError: if that cannot be done; the file stays usable.
        """
        parts = finished_parts(self.path)
        number = int(parts[-1].name[len(self.path.stem) + 1 :].split(".")[0]) if parts else 0
        old = self._descriptor
        self.sync()
        os.rename(self.path, part_path(self.path, number + 1))
        self._open()
        os.close(old)
        return number + 2

    def close(self) -> None:
        """Close the file; it may be opened again."""
        os.close(self._descriptor)
        _open_paths.discard(self.path)


def _lock(descriptor: int, path: Path) -> None:
    """Keep other processes from writing to the file; file systems without locks let it pass."""
    if fcntl is None:
        return
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise ValueError(
            f"path must be of one recorder only, but another process writes to {path}; "
            "give every run and every rank a file of its own"
        ) from None
    except OSError:
        pass
