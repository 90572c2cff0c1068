"""Optimizers from elsewhere that know lr as a number only, and what a skipped step is to them."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch


@dataclass(frozen=True)
class Case:
    """One optimizer of one package.

    Attributes:
        package: What pip calls it.
        module: What Python calls it.
        name: The class.
        arguments: As few as show every branch; ``lr`` is the peak.
        on_cpu: What a step without gradients does.
        on_cuda: What a step with zeroed gradients does.
        note: What its user should know.
        counts: Whether its counters go on in a step without gradients.
        waits: Whether its own step waits for the device.
    """

    package: str
    module: str
    name: str
    arguments: dict[str, Any]
    on_cpu: str
    on_cuda: str
    note: str
    counts: bool = False
    waits: bool = False

    def __str__(self) -> str:
        return f"{self.package} {self.name}"

    def make(self, parameters: Any) -> torch.optim.Optimizer:
        """Make the optimizer, ready to train."""
        make = getattr(import_module(self.module), self.name)
        optimizer: torch.optim.Optimizer = make(parameters, **self.arguments)
        resume(optimizer)
        return optimizer


def pause(optimizer: Any) -> None:
    """Put a schedule-free optimizer in the mode in which it evaluates and is saved."""
    if hasattr(optimizer, "eval"):
        optimizer.eval()


def resume(optimizer: Any) -> None:
    """Put a schedule-free optimizer in the mode in which it trains."""
    if hasattr(optimizer, "train"):
        optimizer.train()


# Not in the dev extra: 43 MB, and torchvision.
OPTIONAL = ("bitsandbytes", "timm")

EXACT = "exact"
COUNTERS = "parameters and moments exact; its counters `k` and `weight_sum` go on"
DECAYS = "gradients zeroed; momentum and weight decay still act"
SIGN = "gradients zeroed; takes a full step along its momentum"
AVERAGES = "gradients zeroed; averaging and weight decay still act"
UNSCHEDULED = 'call its `train()` and `eval()`; made for `decay="constant"`'
LION = {"lr": 3e-3, "weight_decay": 0.01}

CASES = [
    Case(
        "prodigyopt",
        "prodigyopt",
        "Prodigy",
        {"lr": 1.0, "weight_decay": 0.01, "d0": 1e-4},
        EXACT,
        DECAYS,
        "lr is 1, in all groups; waits for the device by itself",
        waits=True,
    ),
    Case(
        "schedulefree",
        "schedulefree",
        "AdamWScheduleFree",
        {"lr": 0.02, "weight_decay": 0.01},
        COUNTERS,
        AVERAGES,
        UNSCHEDULED,
        counts=True,
    ),
    Case(
        "schedulefree",
        "schedulefree",
        "SGDScheduleFree",
        {"lr": 0.2, "weight_decay": 0.01},
        COUNTERS,
        AVERAGES,
        UNSCHEDULED,
        counts=True,
    ),
    Case("lion-pytorch", "lion_pytorch", "Lion", LION, EXACT, SIGN, ""),
    Case("timm", "timm.optim", "Lion", LION, EXACT, SIGN, ""),
    Case(
        "bitsandbytes",
        "bitsandbytes.optim",
        "AdamW8bit",
        # Tensors of fewer elements than this have moments of 32 bits.
        {"lr": 0.01, "min_8bit_size": 1},
        EXACT,
        DECAYS,
        "waits for the device by itself, after every parameter",
        waits=True,
    ),
]


def table() -> str:
    """Return the table of docs/optimizers.md."""
    lines = [
        "| package | optimizer | a skipped step on the CPU | on CUDA | |",
        "|---|---|---|---|---|",
    ]
    for case in CASES:
        cells = (f"`{case.package}`", f"`{case.name}`", case.on_cpu, case.on_cuda, case.note)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
