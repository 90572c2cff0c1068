"""scikit-learn's digits, in the form of the other tasks."""

from __future__ import annotations

import numpy as np
import torch


def digits() -> dict[str, np.ndarray]:
    """Return pictures as bytes from 0 to 16, labels, and which of them are held out."""
    from sklearn.datasets import load_digits

    inputs, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1)).int().numpy()
    return {
        "inputs": inputs.reshape(-1, 1, 8, 8).astype(np.uint8),
        "labels": labels.astype(np.int16),
        "train": order[:1400],
        "held_out": order[1400:],
    }
