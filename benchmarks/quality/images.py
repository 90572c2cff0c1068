"""Emoji as small pictures, labelled with their Unicode category."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.quality import sources

SIZE = 32
NOT_USED = ("Component", "Flags")  # parts of other emoji; many, and trivially different


def emoji(cache: Path) -> dict[str, np.ndarray]:
    """Return the arrays of the task: ``inputs``, ``labels``, ``train`` and ``held_out``."""
    drawn = {vendor: _pictures(vendor, cache) for vendor in sources.EMOJI_VENDORS}
    names: dict[str, int] = {}
    inputs, labels, points = [], [], []
    for point, entry in enumerate(_entries(cache)):
        if entry["category"] in NOT_USED:
            continue
        for vendor in sources.EMOJI_VENDORS:
            if picture := drawn[vendor].get(entry["image"]):
                inputs.append(_pixels(picture))
                labels.append(names.setdefault(entry["category"], len(names)))
                points.append(point)
    held_out = np.isin(points, _held_out_points(points))
    return {
        "inputs": np.stack(inputs),
        "labels": np.array(labels, np.int16),
        "train": np.flatnonzero(~held_out).astype(np.int32),
        "held_out": np.flatnonzero(held_out).astype(np.int32),
    }


def _held_out_points(points: list[int]) -> list[int]:
    # By code point: the two vendors draw the same emoji much alike, one must not teach the other.
    unique = sorted(set(points))
    random.Random(1).shuffle(unique)
    return unique[: len(unique) // 5]


def _entries(cache: Path) -> list[dict]:
    package = sources.EMOJI.format(vendor=sources.EMOJI_VENDORS[0])
    files = sources.npm_files(package, cache, lambda name: name == "package/emoji.json")
    return json.loads(next(files)[1])


def _pictures(vendor: str, cache: Path) -> dict[str, bytes]:
    package, folder = sources.EMOJI.format(vendor=vendor), f"/img/{vendor}/64/"
    files = sources.npm_files(package, cache, lambda name: folder in name)
    return {Path(name).name: contents for name, contents in files}


def _pixels(picture: bytes) -> np.ndarray:
    """Return a picture on white, shape ``(3, SIZE, SIZE)``, uint8."""
    image = Image.open(io.BytesIO(picture)).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image)
    small = white.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    return np.asarray(small).transpose(2, 0, 1)
