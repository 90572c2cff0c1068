"""What is learned: digits under noise, or where these are not at hand, what another network knows.

Fresh noise on every picture keeps the final loss well above zero, where 2 % of it mean something.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.quality.digits import digits

BATCH = 64
CLASSES = 10
PIXEL_NOISE = 0.5  # of the range of a pixel
COPIES = 5  # of every held-out picture, each with noise of its own


@dataclass(frozen=True)
class Course:
    """All that one run is shown, in the order of its steps.

    Attributes:
        inputs: Shape ``(steps, batch, ...)``, float32.
        labels: Shape ``(steps, batch)``, int64.
        held_out_inputs, held_out_labels: Of the evaluation.
    """

    inputs: Tensor
    labels: Tensor
    held_out_inputs: Tensor
    held_out_labels: Tensor

    def copy(self) -> Course:
        """Return one that may be written into."""
        return Course(*(getattr(self, name).clone() for name in self.__dataclass_fields__))

    def to(self, device: torch.device) -> Course:
        return Course(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


class Task:
    """A model and what it learns from.

    Attributes:
        name: As the tables have it.
        held_out: Examples of the evaluation.
    """

    name: str
    held_out: int

    def model(self) -> nn.Module:
        """Return an untrained model, drawn from torch's generator."""
        raise NotImplementedError

    def course(self, steps: int, seed: int) -> Course:
        """Draw all batches of a run, and the evaluation, which is the same for every seed."""
        raise NotImplementedError


class NoisyDigits(Task):
    """A small CNN, the digits, and noise on every pixel."""

    name = "digits"

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        self.inputs = torch.as_tensor(arrays["inputs"]).float() / 16.0
        self.labels = torch.as_tensor(arrays["labels"]).long()
        self.train = torch.as_tensor(arrays["train"]).long()
        self.test = torch.as_tensor(arrays["held_out"]).long().repeat(COPIES)
        self.held_out = len(self.test)

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(512, 64),
            nn.ReLU(),
            nn.Linear(64, CLASSES),
        )

    def course(self, steps: int, seed: int) -> Course:
        random = torch.Generator().manual_seed(1000 + seed)
        chosen = self.train[torch.randint(len(self.train), (steps, BATCH), generator=random)]
        fixed = torch.Generator().manual_seed(1)
        return Course(
            _noisy(self.inputs[chosen], random),
            self.labels[chosen],
            _noisy(self.inputs[self.test], fixed),
            self.labels[self.test],
        )


class Teacher(Task):
    """A small network learns the classes that another one assigns, nine times in ten."""

    name = "teacher"
    held_out = 4096
    width = 16

    def model(self) -> nn.Module:
        layers = (nn.Linear(self.width, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh())
        return nn.Sequential(*layers, nn.Linear(64, CLASSES))

    def course(self, steps: int, seed: int) -> Course:
        fixed = torch.Generator().manual_seed(1)
        weights = [torch.randn(shape, generator=fixed) for shape in ((self.width, 24), (24, 10))]
        held_out = self._draw((self.held_out,), weights, fixed)
        random = torch.Generator().manual_seed(1000 + seed)
        return Course(*self._draw((steps, BATCH), weights, random), *held_out)

    def _draw(
        self, shape: tuple[int, ...], weights: list[Tensor], random: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        inputs = torch.randn((*shape, self.width), generator=random)
        labels = ((inputs @ weights[0] / 4.0).tanh() @ weights[1]).argmax(-1)
        other = torch.randint(CLASSES, shape, generator=random)
        return inputs, torch.where(torch.rand(shape, generator=random) < 0.1, other, labels)


def digits_task(directory: Path | None) -> Task:
    """Return the digits: from ``digits.npz`` in ``directory``, or else from scikit-learn."""
    if directory is None:
        return NoisyDigits(digits())
    with np.load(directory / "digits.npz") as arrays:
        return NoisyDigits(dict(arrays))


def _noisy(pictures: Tensor, random: torch.Generator) -> Tensor:
    return pictures + PIXEL_NOISE * torch.randn(pictures.shape, generator=random)
