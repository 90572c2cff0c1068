"""Chooses the records that a chart needs: few enough to draw, and no spike is lost."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

Index = npt.NDArray[np.intp]


def choose(records: npt.NDArray[Any], most: int, steps: Iterable[int] = ()) -> Index:
    """Return the places of at most about ``most`` records: real ones, nothing is averaged.

    Of every stretch of equal length those with the lowest and the highest loss are taken; and
    besides them the first and the last record, and those of ``steps`` with their neighbours.

    Args:
        records: Structured array with ``step`` and ``loss``, by rising step.
        most: About how many.
        steps: Of events; a few hundred at most.
    """
    count = len(records)
    if count <= most:
        return np.arange(count)
    places = np.searchsorted(records["step"], np.fromiter(steps, np.int64))
    around = (places[:, None] + np.arange(-1, 2)).ravel()
    ends = np.array([0, count - 1])
    chosen = np.concatenate([_extremes(records["loss"], max(most // 2, 1)), around, ends])
    return np.unique(np.clip(chosen, 0, count - 1))


def _extremes(values: npt.NDArray[np.float64], bins: int) -> Index:
    """Return where the lowest and the highest value of each bin are; NaN is neither."""
    width = -(-len(values) // bins)
    missing = -len(values) % width
    finite = np.isfinite(values)
    starts = np.arange(0, len(values), width)
    found = []
    for fill, pick in ((np.inf, np.argmin), (-np.inf, np.argmax)):
        padded = np.append(np.where(finite, values, fill), np.full(missing, fill))
        found.append(starts + pick(padded.reshape(-1, width), axis=1))
    return np.concatenate(found)
