"""Data on the device, addressed by index: a batch is a row of indices, of the same shape always.

So a captured graph gathers its batch by itself, and the host only copies a row in.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

LENGTH = 64  # characters of context
WINDOWS = 256  # of held-out text, evenly spaced
EVALUATION_BATCH = 256


class Data(Protocol):
    """What training and evaluation ask of data.

    Attributes:
        outputs: Classes, or characters.
        train: What a batch is drawn from, shape ``(examples,)``, int64.
        held_out: What the evaluation covers, shape ``(examples,)``, int64.
    """

    outputs: int
    train: Tensor
    held_out: Tensor

    def loss(self, model: nn.Module, index: Tensor) -> Tensor:
        """Return the mean loss of the examples at ``index``."""


class Labelled:
    """Inputs with one label each."""

    def __init__(self, arrays: dict[str, np.ndarray], device: torch.device) -> None:
        self.inputs = torch.as_tensor(arrays["inputs"], device=device)
        if self.inputs.dtype == torch.int16:  # token ids: embeddings want int64
            self.inputs = self.inputs.long()
        self.labels = torch.as_tensor(arrays["labels"], device=device).long()
        self.outputs = int(arrays["labels"].max()) + 1
        self.train = torch.as_tensor(arrays["train"], device=device).long()
        self.held_out = torch.as_tensor(arrays["held_out"], device=device).long()

    def loss(self, model: nn.Module, index: Tensor) -> Tensor:
        inputs, labels = self.inputs[index], self.labels[index]
        own = getattr(model, "loss", None)
        return own(inputs, labels) if own else cross_entropy(model(inputs), labels)


class Characters:
    """One long text; an index is where a window begins. Its last tenth is held out."""

    def __init__(self, arrays: dict[str, np.ndarray], device: torch.device) -> None:
        self.text = torch.as_tensor(arrays["text"], device=device).long()
        self.outputs = int(arrays["text"].max()) + 1
        self.window = torch.arange(LENGTH + 1, device=device)
        begin = int(len(self.text) * 0.9)
        self.train = torch.arange(begin - LENGTH - 1, device=device)
        spacing = (len(self.text) - begin - LENGTH - 1) // WINDOWS
        self.held_out = begin + spacing * torch.arange(WINDOWS, device=device)

    def loss(self, model: nn.Module, index: Tensor) -> Tensor:
        text = self.text[index.unsqueeze(1) + self.window]
        return cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())


def load(file: Path, device: torch.device) -> Data:
    """Read what ``build.py`` has written."""
    with np.load(file) as arrays:
        kind = Characters if "text" in arrays else Labelled
        return kind(dict(arrays), device)


def draw(data: Data, steps: int, batch: int, seed: int) -> Tensor:
    """Draw the batches of a run, the same ones on every device, shape ``(steps, batch)``."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(data.train), (steps, batch), generator=generator)
    return data.train[chosen.to(data.train.device)]


@torch.no_grad()
def evaluate(data: Data, model: nn.Module) -> float:
    """Return the mean loss of what is held out; the model is in training mode afterwards."""
    model.eval()
    parts = torch.split(data.held_out, EVALUATION_BATCH)
    total = sum(data.loss(model, part) * len(part) for part in parts)
    model.train()
    return float(total) / len(data.held_out)
