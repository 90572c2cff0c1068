"""Optimizers to be stepped: bare, with a controller, and with torch's skip flag alone."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from adaptlr.config import Guard
from adaptlr.controller import AdaptiveLR

# Never reached while measuring. Calls before it are beyond start-up and warm-up: the usual step.
TOTAL_STEPS = 10_000_000
WARMUP_STEPS = 10
SETTLING_STEPS = 20
LR = 1e-6
GUARD = Guard()
OPTIMIZERS = {"SGD": torch.optim.SGD, "AdamW": torch.optim.AdamW}


@dataclass(frozen=True)
class Model:
    """The tensors that an optimizer updates.

    Attributes:
        name: How tables call it.
        tensors: Number of tensors; 0: one for every group.
        side: A tensor has ``side * side`` elements, every other one ``side``: weights and biases.
    """

    name: str
    tensors: int
    side: int


SMALL = Model("1 small tensor a group", 0, 4)


def large(device: torch.device) -> Model:
    """Return the realistic model: the number of its tensors matters, and their size little."""
    return Model("100 tensors", 100, 512 if device.type == "cuda" else 64)


def make_losses(count: int, device: torch.device) -> list[torch.Tensor]:
    """Return a healthy loss with noise that no chart minds; 0-dim float32."""
    noise = torch.rand(count, generator=torch.Generator().manual_seed(0)) * 0.2
    return [loss.to(device) for loss in noise + 2.0]


def make_optimizer(
    name: str, groups: int, model: Model, device: torch.device, **options: Any
) -> torch.optim.Optimizer:
    """Return an optimizer of zero gradients that has taken one step; fused on CUDA."""
    count = model.tensors or groups
    shapes = [(model.side,) if index % 2 else (model.side, model.side) for index in range(count)]
    parameters = [torch.nn.Parameter(torch.zeros(shape, device=device)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    if device.type == "cuda":
        options.setdefault("fused", True)
    split: list[dict[str, Any]] = [{"params": parameters[g::groups]} for g in range(groups)]
    optimizer: torch.optim.Optimizer = OPTIMIZERS[name](split, lr=LR, **options)
    optimizer.step()
    return optimizer


def attach(
    optimizer: torch.optim.Optimizer, losses: Sequence[torch.Tensor], guard: Guard | None = GUARD
) -> AdaptiveLR:
    """Attach a controller, and step it past its start-up and warm-up."""
    controller = AdaptiveLR(
        optimizer, TOTAL_STEPS, warmup=WARMUP_STEPS, guard=guard, snapshot="off"
    )
    for index in range(SETTLING_STEPS):
        controller.step(losses[index % len(losses)])
    return controller


def set_device_lr(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Make every group's lr a tensor on ``device``."""
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(LR, device=device)


def set_skip_flag(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Hand over lr and skip flag as adaptlr does, to see what torch itself does with them."""
    set_device_lr(optimizer, device)
    optimizer.found_inf = torch.zeros((), device=device)  # type: ignore[attr-defined]


def settle(scheduler: torch.optim.lr_scheduler.LRScheduler) -> None:
    """Step ``scheduler`` past its warm-up."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SequentialLR steps its parts in a deprecated way
        for _ in range(SETTLING_STEPS):
            scheduler.step()


def check_undisturbed(controller: AdaptiveLR) -> None:
    """Refuse a measurement in which the guard acted: skipped steps are cheap.

    Raises:
        RuntimeError: if there is an event.
    """
    if events := controller.events():
        raise RuntimeError(f"the guard acted during the measurement: {events[0].reason}")
