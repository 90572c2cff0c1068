"""What a snapshot holds: weights, the optimizer's state, and the numbers it keeps beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch

from adaptlr.checkpoint import KEY

# Keys of a group that belong to the user, a scheduler or the controller. Other numbers there may be
# the optimizer's own memory: Prodigy's d, the k of schedule-free optimizers.
_SETTINGS = frozenset(
    (
        *("params", "lr", "initial_lr", "min_lr", "max_lr", "lr_scale", "weight_decay"),
        *("momentum", "dampening", "eps", "alpha", "rho", KEY),
    )
)

Tensor: TypeAlias = torch.Tensor


class _Missing:
    """Stands for what a snapshot does not hold."""


MISSING = _Missing()


class Contents:
    """Finds the live tensors and numbers of an optimizer and, if given, of a model's buffers."""

    def __init__(self, optimizer: torch.optim.Optimizer, model: torch.nn.Module | None) -> None:
        """Look nothing up yet: weights may be loaded, and state appears in the first step."""
        self.optimizer = optimizer
        self._model = model

    def weights(self) -> dict[Any, Tensor]:
        """Return the trainable parameters by themselves, and the buffers by name."""
        weights: dict[Any, Tensor] = {
            parameter: local(parameter)
            for group in self.optimizer.param_groups
            for parameter in group["params"]
            if parameter.requires_grad
        }
        if self._model is not None:
            weights.update((name, local(buffer)) for name, buffer in self._model.named_buffers())
        return weights

    def group_values(self) -> list[dict[str, Any]]:
        """Return the numbers and tensors in every group that are the optimizer's memory.

        A bool is a flag that the user sets. torch's own optimizers keep no memory there.
        """
        if type(self.optimizer).__module__.startswith("torch.optim."):
            return [{} for _ in self.optimizer.param_groups]
        return [
            {
                key: value
                for key, value in group.items()
                if key not in _SETTINGS
                and isinstance(value, (int, float, Tensor))
                and not isinstance(value, bool)
            }
            for group in self.optimizer.param_groups
        ]

    def state_parts(self) -> Iterator[Tensor]:
        """Yield what the tensors in the optimizer's state and groups are made of."""
        for state in self.optimizer.state.values():
            yield from _parts_in(state)
        for values in self.group_values():
            yield from _parts_in(values)

    def parts(self) -> Iterator[Tensor]:
        """Yield what all tensors are made of, weights first."""
        yield from _parts_in(self.weights())
        yield from self.state_parts()


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a DTensor, and any other tensor as it is, without history."""
    to_local = getattr(tensor, "to_local", None)  # importing DTensor takes 0.6 s
    with torch.no_grad():
        part: Tensor = tensor if to_local is None else to_local()
    return part.detach()


def _parts_in(value: Any) -> Iterator[Tensor]:
    """Yield the plain tensors in a value, however deep; a quantised tensor is made of several."""
    if isinstance(value, Tensor):
        value = local(value)
        if not hasattr(value, "__tensor_flatten__"):
            yield value
            return
        names, _ = value.__tensor_flatten__()
        value = [getattr(value, name) for name in names]
    if isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _parts_in(item)


def copied(value: Any, old: Any, copy: Callable[[Tensor, Any], Any]) -> Any:
    """Copy a value of an optimizer's state, nested or not; MISSING for what cannot be copied.

    Args:
        value: A tensor, number, None, or dict, list or tuple of these.
        old: The copy that an earlier call returned, whose memory may be used again.
        copy: Copies a tensor, given its old copy.
    """
    if isinstance(value, Tensor):
        return copy(value, old)
    if value is None or isinstance(value, (int, float)):
        return value
    if isinstance(value, dict):
        olds = old if isinstance(old, dict) else {}
        pairs = ((key, copied(item, olds.get(key), copy)) for key, item in value.items())
        return {key: item for key, item in pairs if item is not MISSING}
    if isinstance(value, (list, tuple)):
        items = [copied(item, None, copy) for item in value]
        return MISSING if any(item is MISSING for item in items) else items
    return MISSING


def put_back(live: dict[Any, Any], saved: dict[Any, Any]) -> None:
    """Give a dict of state the values that `copied` has kept; tensors keep their identity."""
    for key, value in saved.items():
        current = live.get(key)
        if isinstance(value, Tensor) and isinstance(current, Tensor) and has_form(current, value):
            local(current).copy_(value)
        elif isinstance(value, dict) and isinstance(current, dict):
            put_back(current, value)
        else:
            live[key] = copied(value, None, lambda tensor, _: tensor.clone())


def has_form(tensor: Any, other: Tensor) -> bool:
    """Whether a value is a tensor that can take the contents of another."""
    if not isinstance(tensor, Tensor):
        return False
    part = local(tensor)
    return part.shape == other.shape and part.dtype == other.dtype
