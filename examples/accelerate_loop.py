"""An Accelerate loop with accumulation and a checkpoint, on scikit-learn's digits.

The losses reach adaptlr through accelerator.backward. Needs scikit-learn and adaptlr[accelerate].
"""

from __future__ import annotations

import argparse
import itertools
import tempfile

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from adaptlr.integrations.accelerate import attach


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps")
    steps = parser.parse_args().steps

    torch.manual_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=2)
    pixels, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
    data = TensorDataset(pixels.float() / 16, labels)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    model, optimizer, loader = accelerator.prepare(
        model,
        torch.optim.AdamW(model.parameters(), lr=3e-3),
        DataLoader(data, batch_size=32, shuffle=True, drop_last=True),
    )
    controller = attach(accelerator, optimizer, total_steps=steps)

    epochs = itertools.chain.from_iterable(itertools.repeat(loader))
    for images, targets in itertools.islice(epochs, 2 * steps):
        with accelerator.accumulate(model):
            loss = nn.functional.cross_entropy(model(images), targets)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    print(controller.status())

    with tempfile.TemporaryDirectory() as folder:
        accelerator.save_state(folder)
        accelerator.load_state(folder)
    print(controller.events()[-1].reason)


if __name__ == "__main__":
    main()
