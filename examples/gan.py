"""Two optimizers, two controllers: a small GAN that draws scikit-learn's digits.

Each controller sees the loss of its own network. Those losses are a contest and no measure of
progress, so the guards only watch: mode="observe" reports what looks like trouble and leaves the
schedule alone. Needs scikit-learn.
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn

import adaptlr

NOISE, BATCH = 16, 64


def attach(network: nn.Module, steps: int) -> adaptlr.AdaptiveLR:
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, betas=(0.5, 0.99))
    watch = adaptlr.Guard(mode="observe")
    return adaptlr.AdaptiveLR(optimizer, steps, decay="linear", warmup=0.05, guard=watch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    steps = parser.parse_args().steps

    torch.manual_seed(0)
    real = torch.tensor(load_digits().data).float() / 8 - 1
    generator = nn.Sequential(nn.Linear(NOISE, 128), nn.ReLU(), nn.Linear(128, 64), nn.Tanh())
    critic = nn.Sequential(nn.Linear(64, 128), nn.LeakyReLU(0.2), nn.Linear(128, 1))
    drawing, judging = attach(generator, steps), attach(critic, steps)

    for _ in range(steps):
        fake = generator(torch.randn(BATCH, NOISE))
        truth = real[torch.randint(len(real), (BATCH,))]
        critic_loss = nn.functional.softplus(torch.cat([-critic(truth), critic(fake.detach())]))
        critic_loss = critic_loss.mean()
        critic_loss.backward()
        judging.step(critic_loss)

        generator_loss = nn.functional.softplus(-critic(fake)).mean()
        generator_loss.backward()
        drawing.step(generator_loss)
        drawing.zero_grad()
        judging.zero_grad()  # the generator's backward has left gradients here as well

    print(f"generator {drawing.status()}")
    print(f"critic    {judging.status()}")
    for row in generator(torch.randn(1, NOISE)).view(8, 8):
        print("".join(" .:-=+*#%@"[min(int(5 * (shade + 1)), 9)] * 2 for shade in row))


if __name__ == "__main__":
    main()
