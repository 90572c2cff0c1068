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

    def parameters(self) -> list[Tensor]:
        """Return all parameters, in the order in which torch's own state dicts number them."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def numbered(
        self, weights: dict[Any, Any], state: dict[Any, Any], groups: list[Any]
    ) -> dict[str, Any]:
        """Return what a slot holds with numbers in place of parameters, as checkpoints have it."""
        numbers = {parameter: number for number, parameter in enumerate(self.parameters())}
        return {
            "weights": {numbers.get(key, key): value for key, value in weights.items()},
            "state": {numbers.get(key, key): value for key, value in state.items()},
            "groups": groups,
        }

    def live(self) -> dict[str, Any]:
        """Return the live tensors and numbers as `numbered` has them; see `opened`."""
        values = (self.weights(), dict(self.optimizer.state), self.group_values())
        live: dict[str, Any] = copied(self.numbered(*values), None, lambda value, _: opened(value))
        return live

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


def opened(tensor: Tensor) -> Any:
    """Return the plain tensor in a tensor; a dict of its parts, if it is made of several."""
    tensor = local(tensor)
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor
    names, _ = tensor.__tensor_flatten__()
    return {name: opened(getattr(tensor, name)) for name in names}


def _parts_in(value: Any) -> Iterator[Tensor]:
    """Yield the plain tensors in a value, however deep; a quantised tensor is made of several."""
    if isinstance(value, Tensor):
        value = opened(value)
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _parts_in(item)


def copied(value: Any, old: Any, copy: Callable[[Tensor, Any], Any]) -> Any:
    """Copy a value of an optimizer's state, nested or not; MISSING for what cannot be copied.

    Args:
        value: A tensor, number, None, or dict, list or tuple of these.
        old: The copy that an earlier call returned, whose memory may be used again, or another
            value of the same form.
        copy: Copies a tensor, given what stands in its place in ``old``.
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
        items = [copied(*pair, copy) for pair in zip(value, _like(old, value), strict=True)]
        return MISSING if any(item is MISSING for item in items) else items
    return MISSING


def matched(value: Any, other: Any) -> Iterator[tuple[Tensor, Any]]:
    """Yield every tensor in a value with what stands in its place in another; None: nothing."""
    if isinstance(value, Tensor):
        yield value, other
    elif isinstance(value, dict):
        others = other if isinstance(other, dict) else {}
        for key, item in value.items():
            yield from matched(item, others.get(key))
    elif isinstance(value, (list, tuple)):
        for pair in zip(value, _like(other, value), strict=True):
            yield from matched(*pair)


def merged(value: Any, other: Any) -> Any:
    """Return a value with all that another one has in addition."""
    if not isinstance(value, dict) or not isinstance(other, dict):
        return value
    return {**other, **{key: merged(item, other.get(key)) for key, item in value.items()}}


def _like(other: Any, value: list[Any] | tuple[Any, ...]) -> list[Any] | tuple[Any, ...]:
    """Return a list as long as another one: itself, or of nothing."""
    fits = isinstance(other, (list, tuple)) and len(other) == len(value)
    return other if fits else [None] * len(value)


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
