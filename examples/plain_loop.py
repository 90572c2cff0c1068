"""Train a small network on scikit-learn's digits in a loop of one's own.

Needs scikit-learn. Try a learning rate that is far too high: --lr 3
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn

import adaptlr


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--lr", type=float, default=1e-2)
    options = parser.parse_args()

    torch.manual_seed(0)
    pixels, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
    images = pixels.float().view(-1, 1, 8, 8) / 16
    train, test = slice(0, 1500), slice(1500, None)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten()
    )
    model.append(nn.Linear(512, 10))

    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr)
    controller = adaptlr.AdaptiveLR(optimizer, total_steps=options.steps)
    for _ in range(options.steps):
        batch = torch.randint(1500, (64,))
        loss = nn.functional.cross_entropy(model(images[train][batch]), labels[train][batch])
        loss.backward()
        controller.step(loss)
        controller.zero_grad()

    with torch.no_grad():
        right = (model(images[test]).argmax(dim=1) == labels[test]).float().mean()
    print(controller.status())
    for event in controller.events():
        print(f"step {event.step}: {event.reason}")
    print(f"{right:.1%} of the digits held out are recognised")


if __name__ == "__main__":
    main()
