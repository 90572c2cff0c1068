"""Reads the losses of a finished run from what other tools have written."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from adaptlr.recording import read

NAMES = ("loss", "train_loss", "train/loss", "loss/train", "training_loss", "adaptlr/loss")


class LossCurve(NamedTuple):
    """The losses of one run.

    Attributes:
        losses: Shape ``(steps,)``.
        grad_norms: Shape ``(steps,)``, negative where none was given; None if there are none.
        lr: Peak of the run, if the file tells it.
        total_steps: Length that the run was planned with, if the file tells it.
    """

    losses: npt.NDArray[np.float64]
    grad_norms: npt.NDArray[np.float64] | None = None
    lr: float | None = None
    total_steps: int | None = None


def read_losses(path: str | os.PathLike[str], name: str | None = None) -> LossCurve:
    """Read a recording (``.jsonl``), a table (``.csv``, ``.txt``) or the logs of TensorBoard.

    The columns of a table may be separated by commas, semicolons or tabs.

    Args:
        path: A file, or the folder that TensorBoard has written.
        name: Column or tag of the loss; None: the first of `NAMES` that is there. A recording has
            one loss, and takes none.

    Raises:
        OSError: if it cannot be read.
        ValueError: if there are no losses in it.
        ModuleNotFoundError: if TensorBoard's logs are to be read and it is not installed.
    """
    path = Path(path)
    if path.is_dir() or "tfevents" in path.name:
        curve = LossCurve(_from_tensorboard(path, name))
    elif path.suffix == ".jsonl":
        if name is not None:
            raise ValueError(f"name must be None for a recording, which has one loss, got {name!r}")
        curve = _from_recording(path)
    else:
        curve = LossCurve(_from_table(path, name))
    if not len(curve.losses):
        raise ValueError(f"{path} holds no losses")
    return curve


def _from_recording(path: Path) -> LossCurve:
    recording = read(path)
    records, config = recording.records, recording.headers[-1].get("config", {})
    if len(records) and records["step"][-1] - records["step"][0] + 1 != len(records):
        raise ValueError(
            f"{path} must have every step, but {len(records)} are recorded up to step "
            f"{records['step'][-1]}: it was recorded with every=..., or some are lost"
        )
    norms = np.where(np.isnan(records["grad_norm"]), -1.0, records["grad_norm"])
    return LossCurve(
        records["loss"].copy(),
        norms if (norms >= 0).any() else None,
        config.get("peak"),
        config.get("total_steps") or None,
    )


def _from_table(path: Path, name: str | None) -> npt.NDArray[np.float64]:
    """Read a table with names above its columns, or one number a line."""
    rows = _rows(path)
    if not rows:
        return np.zeros(0)
    if name is None and len(rows[0]) == 1 and _is_number(rows[0][0]):
        column = 0
    else:
        column = rows[0].index(_choose(name, rows[0], f"{path} must have a column"))
        rows = rows[1:]
    cells = [row[column] if column < len(row) else "" for row in rows]
    for line, cell in enumerate(cells, start=1):
        if cell and not _is_number(cell):
            raise ValueError(f"{path} must hold numbers, got {cell!r} in row {line}")
    return np.array([float(cell) for cell in cells if cell])


def _rows(path: Path) -> list[list[str]]:
    """Read the cells of a table, whose first line tells how they are separated."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            delimiter = max(",;\t", key=file.readline().count)
            file.seek(0)
            rows = [row for row in csv.reader(file, delimiter=delimiter) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} must be a table of text, got something else: {error}") from None
    for line, row in enumerate(rows):
        if len(row) > len(rows[0]):
            raise ValueError(
                f"{path} must have {len(rows[0])} cells in a row, got {len(row)} in row {line}"
            )
    return rows


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _choose(name: str | None, there: list[str], message: str) -> str:
    wanted = NAMES if name is None else (name,)
    for candidate in wanted:
        if candidate in there:
            return candidate
    raise ValueError(f"{message} called {' or '.join(wanted)}, got {', '.join(there) or 'none'}")


def _from_tensorboard(path: Path, name: str | None) -> npt.NDArray[np.float64]:
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ModuleNotFoundError:
        message = "reading TensorBoard's logs needs tensorboard; pip install tensorboard"
        raise ModuleNotFoundError(message, name="tensorboard") from None
    logs: Any = EventAccumulator(str(path), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    tags = logs.Tags()
    tag = _choose(name, [*tags["scalars"], *tags["tensors"]], f"{path} must have a tag")
    if tag in tags["scalars"]:
        points = {point.step: point.value for point in logs.Scalars(tag)}
    else:
        from tensorboard.util.tensor_util import make_ndarray

        points = {p.step: float(make_ndarray(p.tensor_proto)) for p in logs.Tensors(tag)}
    return np.array([points[step] for step in sorted(points)], dtype=np.float64)
