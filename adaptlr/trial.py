"""`Trial`: takes training steps on a user's loss, for `find_lr` and `estimate_lr` alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from adaptlr.config import require
from adaptlr.hooks import unwrap

_OVERFLOWS = 24  # halvings of a scale, from its usual start at 65536 and more

Loss: TypeAlias = nn.Module | Callable[..., Any]


class Trial:
    """A training step in parts: the loss with its gradient, and the optimizer's step.

    Args:
        loss: A callable that returns the loss of a batch; or a model that is called with the batch
            and returns the loss, or something with a ``loss``.
        optimizer: Steps on it.
        batches: What ``loss`` is called with, from the beginning again when it ends; None: it is
            called without arguments.
        model: The model, where ``loss`` is a function.
        scaler: Scales the losses.
        accumulate: Micro-batches in a step; their gradients are averaged.
        max_grad_norm: Gradients are clipped to it; None: they are not.
    """

    def __init__(
        self,
        loss: Loss,
        optimizer: torch.optim.Optimizer,
        batches: Iterable[Any] | None,
        model: nn.Module | None,
        scaler: torch.amp.GradScaler | None,
        accumulate: int,
        max_grad_norm: float | None,
    ) -> None:
        """Check the arguments; nothing is called yet."""
        if not callable(loss):
            raise TypeError(f"loss must be a model or a callable, got {type(loss).__name__}")
        require(
            isinstance(accumulate, int) and accumulate >= 1, "accumulate", "at least 1", accumulate
        )
        self.optimizer = unwrap(optimizer)
        self.model = loss if model is None and isinstance(loss, nn.Module) else model
        self.scaler = scaler
        self._loss = loss
        self._iterable = batches
        self.restart()
        self._accumulate = accumulate
        self._max_grad_norm = max_grad_norm
        self._parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        _refuse(self.optimizer)

    def restart(self) -> None:
        """Take batches from the beginning again, where they can be iterated anew."""
        self._batches = _endless(self._iterable)

    def gradient(self) -> float:
        """Compute the gradient of the next step, clipped and unscaled; return its loss.

        Where it overflows under a scaler, the scale is lowered and the next batch is taken, as in
        training.
        """
        loss = self._backward()
        if self.scaler is not None and self.scaler.is_enabled():
            for _ in range(_OVERFLOWS):
                if not math.isfinite(loss) or self._is_finite():
                    break
                self.skip()
                loss = self._backward()
        if self._max_grad_norm is not None:
            nn.utils.clip_grad_norm_(self._parameters, self._max_grad_norm)
        return loss

    def _backward(self) -> float:
        for parameter in self._parameters:
            parameter.grad = None
        total = 0.0
        for _ in range(self._accumulate):
            loss = self._next_loss()
            total += loss.item()
            share = loss / self._accumulate
            scaled = share if self.scaler is None else self.scaler.scale(share)
            scaled.backward()  # type: ignore[no-untyped-call]
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        return total / self._accumulate

    def _is_finite(self) -> bool:
        gradients = (p.grad for p in self._parameters if p.grad is not None)
        return all(bool(gradient.isfinite().all()) for gradient in gradients)

    def step(self) -> None:
        """Let the optimizer take its step on the gradient."""
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()

    def skip(self) -> None:
        """Drop the gradient."""
        if self.scaler is not None:
            self.scaler.update()
        for parameter in self._parameters:
            parameter.grad = None

    def _next_loss(self) -> Tensor:
        arguments, named = next(self._batches)
        device = self._parameters[0].device
        result = self._loss(*_moved(arguments, device), **_moved(named, device))
        loss = result if isinstance(result, Tensor) else getattr(result, "loss", None)
        if not isinstance(loss, Tensor):
            raise TypeError(
                f"loss must return a tensor or something with a loss, got {type(result).__name__}; "
                "a model gives one if its batches have labels"
            )
        if loss.numel() != 1:
            raise ValueError(
                f"loss must return one element, got shape {tuple(loss.shape)}; reduce it first, "
                "e.g. loss.mean()"
            )
        return loss.reshape(())


def lr_ratios(optimizer: torch.optim.Optimizer) -> list[float]:
    """Return the ratios of the groups' rates, the largest of which is 1."""
    rates = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
    largest = max(rates)
    return [rate / largest if largest > 0.0 else 1.0 for rate in rates]


def set_lr(optimizer: torch.optim.Optimizer, lr: float, ratios: list[float]) -> None:
    """Set the rate of every group, in place where it is a tensor."""
    for group, ratio in zip(optimizer.param_groups, ratios, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr * ratio)
        else:
            group["lr"] = lr * ratio


def _refuse(optimizer: torch.optim.Optimizer) -> None:
    from adaptlr.controller import is_attached

    if is_attached(optimizer):
        raise RuntimeError(
            "optimizer must not have a controller attached; look for a rate first, or call its "
            "detach() before"
        )
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        world_size = distributed.get_world_size()
        if world_size > 1:
            raise RuntimeError(
                f"a rate must be looked for in one process, got a world of {world_size}: ranks see "
                "other losses and would stop at other steps; do it before init_process_group, with "
                "accumulate=world_size for the same batch"
            )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(
            "optimizer must take its step on a gradient, got LBFGS, which searches along a line"
        )
    if isinstance(optimizer, torch.optim.Rprop):
        raise ValueError("optimizer must read lr in every step, got Rprop, which does so once")
    if any("d_coef" in group for group in optimizer.param_groups):
        raise ValueError(
            f"optimizer must have a learning rate of its own, got {type(optimizer).__name__}, "
            "whose lr multiplies the rate that it finds; leave it at 1"
        )


def _endless(batches: Iterable[Any] | None) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Yield positional and named arguments of one call after the other."""
    while batches is None:
        yield (), {}
    while True:
        batch = None
        for batch in batches:
            yield ((), dict(batch)) if isinstance(batch, Mapping) else ((batch,), {})
        if batch is None:
            raise ValueError("batches must have at least one batch left, got none")


def _moved(value: Any, device: torch.device) -> Any:
    """Return a batch on the device of the parameters."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _moved(item, device) for key, item in value.items()}
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(_moved(item, device) for item in value)
    return value
