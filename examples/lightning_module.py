"""A Lightning module on scikit-learn's digits; adaptlr is one of the Trainer's callbacks.

Needs scikit-learn and adaptlr[lightning].
"""

from __future__ import annotations

import argparse
import tempfile

import lightning.pytorch as lightning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from adaptlr.integrations.lightning import AdaptiveLRCallback


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def training_step(self, batch, number):
        images, labels = batch
        return nn.functional.cross_entropy(self.network(images), labels)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)  # and no scheduler


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps")
    steps = parser.parse_args().steps

    lightning.seed_everything(0)
    pixels, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
    data = TensorDataset(pixels.float() / 16, labels)
    callback = AdaptiveLRCallback(warmup=0.05)
    with tempfile.TemporaryDirectory() as folder:
        trainer = lightning.Trainer(
            max_steps=steps, callbacks=[callback], default_root_dir=folder, logger=False
        )
        trainer.fit(Classifier(), DataLoader(data, batch_size=32, shuffle=True))
    print(callback.controller.status())
    for event in callback.controller.events():
        print(f"step {event.step}: {event.reason}")


if __name__ == "__main__":
    main()
