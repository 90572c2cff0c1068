"""One small real task for the tests of all frameworks: scikit-learn's digits."""

from __future__ import annotations

import pytest
import torch

sklearn_datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed")

BATCH, STEPS = 16, 24


def digits(steps: int = STEPS) -> list[dict[str, torch.Tensor]]:
    """Return images of 64 pixels, in 17 shades, each with its label: ``steps`` batches of them."""
    images, labels = sklearn_datasets.load_digits(return_X_y=True)
    count = steps * BATCH
    pixels = torch.tensor(images[:count], dtype=torch.int64)
    return [
        {"input_ids": image, "labels": label}
        for image, label in zip(pixels, torch.tensor(labels[:count]), strict=True)
    ]


def batches_of(data: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    """Return the batches, in the order of the data."""
    parts = [data[start : start + BATCH] for start in range(0, len(data), BATCH)]
    return [{key: torch.stack([one[key] for one in part]) for key in part[0]} for part in parts]


def make_network() -> torch.nn.Module:
    """Return a small convolutional network; always with the same parameters."""
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Unflatten(1, (1, 8, 8)),
        torch.nn.Conv2d(1, 8, 3, stride=2),
        torch.nn.BatchNorm2d(8),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(72, 10),
    )


def loss_of(network: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the mean cross entropy of a batch."""
    logits = network(batch["input_ids"].float() / 16)
    return torch.nn.functional.cross_entropy(logits, batch["labels"])


def state_of(module: torch.nn.Module) -> list[torch.Tensor]:
    """Return parameters and buffers."""
    return [tensor.detach().clone() for tensor in module.state_dict().values()]
