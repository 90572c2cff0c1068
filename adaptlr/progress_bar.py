"""A progress bar on terminals, if rich is installed; otherwise nothing at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(name: str, total: int, wanted: bool) -> Iterator[Callable[[], object]]:
    """Give a function that is called after every step."""
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        wanted = False
    if not (wanted and (console := Console(stderr=True)).is_terminal):
        yield lambda: None
        return
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task(name, total=total)
        yield lambda: progress.advance(bar)
