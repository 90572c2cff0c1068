"""Small models from scratch, of other kinds than those the guard was designed with.

A model that has a method ``loss`` is trained by it in place of the cross-entropy of its labels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PIXELS, MAX_PIXEL = 64, 16.0  # of scikit-learn's digits


def pixels_of(pictures: Tensor) -> Tensor:
    """Map bytes (batch, 1, 8, 8) to (batch, 64), each in [0, 1]."""
    return pictures.flatten(1).float() / MAX_PIXEL


class Autoencoder(nn.Sequential):
    """Digits through 12 numbers; mean squared error, which comes near zero."""

    def __init__(self, _: int) -> None:
        wide, narrow = 128, 12
        super().__init__(
            *(nn.Linear(PIXELS, wide), nn.SiLU(), nn.Linear(wide, narrow)),
            *(nn.Linear(narrow, wide), nn.SiLU(), nn.Linear(wide, PIXELS)),
        )

    def loss(self, pictures: Tensor, _: Tensor) -> Tensor:
        pixels = pixels_of(pictures)
        return F.mse_loss(self(pixels), pixels)


class VariationalAutoencoder(nn.Module):
    """Digits through 8 normal variables; the evidence bound, a noisy loss of about 25."""

    def __init__(self, _: int) -> None:
        super().__init__()
        wide, self.latent = 128, 8
        self.encoder = nn.Sequential(
            nn.Linear(PIXELS, wide), nn.ReLU(), nn.Linear(wide, 2 * self.latent)
        )
        self.decoder = nn.Sequential(
            nn.Linear(self.latent, wide), nn.ReLU(), nn.Linear(wide, PIXELS)
        )

    def loss(self, pictures: Tensor, _: Tensor) -> Tensor:
        pixels = pixels_of(pictures)
        mean, log_variance = self.encoder(pixels).split(self.latent, 1)
        log_variance = log_variance.clamp(-8.0, 8.0)
        drawn = torch.randn_like(mean) if self.training else torch.zeros_like(mean)
        logits = self.decoder(mean + drawn * (0.5 * log_variance).exp())
        rebuilt = F.binary_cross_entropy_with_logits(logits, pixels, reduction="none").sum(1)
        divergence = 0.5 * (mean**2 + log_variance.exp() - 1.0 - log_variance).sum(1)
        return (rebuilt + divergence).mean()


class LowerHalf(nn.Sequential):
    """Normal densities of the lower half of a digit, given the upper one; a negative loss."""

    def __init__(self, _: int) -> None:
        super().__init__(nn.Linear(PIXELS // 2, 128), nn.Tanh(), nn.Linear(128, PIXELS))

    def loss(self, pictures: Tensor, _: Tensor) -> Tensor:
        upper, lower = pixels_of(pictures).chunk(2, 1)
        mean, scale = self(upper).chunk(2, 1)
        return F.gaussian_nll_loss(mean, lower, F.softplus(scale) ** 2 + 1e-3)


class VisionTransformer(nn.Module):
    """Two layers over 16 patches of 2 x 2 pixels; its loss stands still at first."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        width = 48
        self.patches = nn.Conv2d(1, width, 2, stride=2)
        self.position = nn.Parameter(0.02 * torch.randn(16, width))
        layer = nn.TransformerEncoderLayer(width, 4, 96, 0.1, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, classes)

    def forward(self, pictures: Tensor) -> Tensor:
        """Map bytes (batch, 1, 8, 8) to logits (batch, classes)."""
        patches = self.patches(pictures.float() / MAX_PIXEL).flatten(2).transpose(1, 2)
        return self.head(self.layers(patches + self.position).mean(1))


class CharacterLSTM(nn.Module):
    """One recurrent layer over characters."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        width = 96
        self.embedding = nn.Embedding(characters, 32)
        self.layer = nn.LSTM(32, width, batch_first=True)
        self.head = nn.Linear(width, characters)

    def forward(self, text: Tensor) -> Tensor:
        """Map characters (batch, length) to logits of the next (batch, length, characters)."""
        return self.head(self.layer(self.embedding(text))[0])
