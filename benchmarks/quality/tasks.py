"""The tasks: which model on which data, for how long, and how well the best swept rate did.

The best rates and losses are those of a cosine sweep in half decades, three seeds, on an H100.
``run.py --sweep`` measures them again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

from torch import nn

from benchmarks.quality import models, scratch
from benchmarks.quality.data import LENGTH


class Best(NamedTuple):
    """The best of a sweep."""

    lr: float
    loss: float  # held out, after the last step, mean of the seeds


@dataclass(frozen=True)
class Task:
    """One fine-tuning task.

    Attributes:
        data: Name of the file that ``build.py`` writes, without its ending.
        model: Makes the model for so many classes or characters.
        batch: Examples in a batch.
        steps: Budget of a run, warm-up included.
        adamw, sgd: The best of the sweep; ``None`` where the rate is held back for later.
        like: The task that this one is a variant of: its best rates are near.
    """

    data: str
    model: Callable[[int], nn.Module]
    batch: int
    steps: int
    adamw: Best | None = None
    sgd: Best | None = None
    like: str | None = None

    def best(self, optimizer: str) -> Best | None:
        """Return the best of the sweep with ``optimizer``, None where there is no sweep."""
        return {"adamw": self.adamw, "sgd": self.sgd}.get(optimizer)


def half_decade(exponent: int) -> float:
    """Return ``exponent`` half decades as a rate."""
    return 10 ** (exponent / 2)


_characters = partial(models.CharacterModel, length=LENGTH)

TASKS = {
    "minilm_debian": Task(
        *("debian", models.TextClassifier, 32, 300),
        adamw=Best(half_decade(-7), 1.0752),
        sgd=Best(half_decade(-3), 1.1120),
    ),
    "minilm_spam": Task(
        *("spam", models.TextClassifier, 16, 200),
        adamw=Best(half_decade(-7), 0.1076),
        sgd=Best(half_decade(-4), 0.1204),
    ),
    "minilm_lora": Task(
        *("debian", models.lora_text_classifier, 32, 300),
        adamw=Best(half_decade(-5), 1.0909),
        sgd=Best(half_decade(-2), 1.0809),
    ),
    "gpt": Task(
        *("shakespeare", _characters, 32, 600),
        adamw=Best(half_decade(-5), 2.0636),
        sgd=Best(half_decade(-1), 2.3230),
    ),
    "effnet_emoji": Task(
        *("emoji", models.ImageClassifier, 32, 250),
        adamw=Best(half_decade(-7), 1.0117),
        sgd=Best(half_decade(-3), 1.1137),
    ),
    "digits": Task(
        *("digits", models.DigitClassifier, 64, 300),
        adamw=Best(half_decade(-4), 0.0389),
        sgd=Best(half_decade(-1), 0.0227),
    ),
}

# Nobody has designed with these: they are for the one measurement at the end.
HELD_OUT_TASKS = {
    "minilm_docstrings": Task(
        *("docstrings", models.TextClassifier, 32, 300),
        adamw=Best(half_decade(-7), 0.8750),
        sgd=Best(half_decade(-3), 0.9278),
    ),
    "lm_pydoc": Task(
        *("pydoc", _characters, 32, 600),
        adamw=Best(half_decade(-5), 1.5840),
        sgd=Best(half_decade(-1), 1.8911),
    ),
}

# Other kinds of models and losses, from scratch, small enough for a CPU. No rule was made on them.
# The sweep has one seed.
SCRATCH_TASKS = {
    "autoencoder": Task(
        *("digits", scratch.Autoencoder, 64, 500),
        adamw=Best(half_decade(-3), 0.0100),
        sgd=Best(half_decade(1), 0.0119),
    ),
    "vae": Task(
        *("digits", scratch.VariationalAutoencoder, 64, 500),
        adamw=Best(half_decade(-4), 22.794),
        sgd=Best(half_decade(-2), 23.022),
    ),
    "lower_half": Task(
        *("digits", scratch.LowerHalf, 64, 500),
        adamw=Best(half_decade(-3), -1.6596),
        sgd=Best(half_decade(-1), -1.6140),
    ),
    "vit": Task(
        *("digits", scratch.VisionTransformer, 32, 400),
        adamw=Best(half_decade(-3), 0.2313),
        sgd=Best(half_decade(-1), 0.2199),
    ),
    "lstm": Task(
        *("pydoc", scratch.CharacterLSTM, 16, 400),
        adamw=Best(half_decade(-2), 1.5769),
        sgd=Best(half_decade(1), 1.5029),
    ),
}

# Longer runs and larger batches, each measured against a sweep of its own.
_VARIED = {name: TASKS[name] for name in ("minilm_debian", "gpt", "digits")}
LONG_TASKS = {
    f"{name}_3x_steps": replace(task, steps=3 * task.steps, adamw=None, sgd=None, like=name)
    for name, task in _VARIED.items()
}
LARGE_BATCH_TASKS = {
    f"{name}_4x_batch": replace(task, batch=4 * task.batch, adamw=None, sgd=None, like=name)
    for name, task in _VARIED.items()
}
ALL_TASKS = TASKS | HELD_OUT_TASKS | SCRATCH_TASKS | LONG_TASKS | LARGE_BATCH_TASKS


def progress_recovered(start: float, end: float, best: float) -> float:
    """Return 1 for a run that ends as well as the best of the sweep, 0 for one that learnt nothing.

    Above 1 where a run was better than the mean of the sweep; never below 0. NaN counts as 0.
    """
    # Not max and min: their result with NaN depends on the order of the arguments.
    return (start - end) / (start - best) if end < start else 0.0
