"""`Start`: a training state to try things out from, and to leave exactly as it was found.

Tensors that training changes in place are copied and written back; the optimizer's state, gradients
and settings are set aside as the objects they are, and copies work in their place. So what comes
back is not only equal but the same.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, MutableMapping
from enum import Enum
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class Start:
    """Keeps everything that trying out changes; a context manager that puts it back.

    Inside, the optimizer has no gradients and otherwise works as outside. Takes memory for one more
    copy of the trainable parameters, the buffers and the optimizer's state.

    Args:
        optimizer: Its parameters, their gradients, its state, groups and attributes.
        model: Its buffers, and whether each module is training; parameters that the optimizer does
            not have are kept too, if they are trainable.
        scaler: Its scale and counters.

    Raises:
        TypeError: if the optimizer has something that cannot be copied.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        """Keep all of it."""
        self._optimizer = optimizer
        tensors = list(_trained(optimizer, model))
        self._tensors = [(tensor, tensor.detach().clone()) for tensor in tensors]
        self._gradients = [(tensor, tensor.grad) for tensor in tensors if tensor.is_leaf]
        self._modules = [] if model is None else [(m, m.training) for m in model.modules()]
        self._random = _random_states(tensors)
        self._state = optimizer.state
        owners = [vars(optimizer), *optimizer.param_groups]
        owners += [] if scaler is None else [vars(scaler)]
        self._settings = [(owner, dict(owner)) for owner in owners]
        self._copies()  # whatever cannot be copied shows before anything is changed

    def __enter__(self) -> Start:
        """Begin to work on copies."""
        self.rewind()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Put everything back, after an error too."""
        self._write_back()
        for owner, originals in self._settings:
            _replace(owner, originals)
        self._optimizer.state = self._state
        for tensor, gradient in self._gradients:
            tensor.grad = gradient
        for module, training in self._modules:
            module.training = training
        _set_random_states(self._random)

    def rewind(self) -> None:
        """Go back to the start, except for random numbers: another try draws others."""
        self._write_back()
        state, settings = self._copies()
        for (owner, _), copies in zip(self._settings, settings, strict=True):
            _replace(owner, copies)
        self._optimizer.state = state
        for tensor, _ in self._gradients:
            tensor.grad = None

    @torch.no_grad()
    def _write_back(self) -> None:
        for tensor, kept in self._tensors:
            tensor.copy_(kept)

    def _copies(self) -> tuple[Any, list[dict[str, Any]]]:
        try:
            state = copy.copy(self._state)  # a defaultdict: its keys are the parameters themselves
            for parameter in state:
                state[parameter] = copy.deepcopy(self._state[parameter])
            return state, [_copied(originals) for _, originals in self._settings]
        except (TypeError, RuntimeError) as error:
            raise TypeError(
                f"optimizer must have state that can be copied and put back, got "
                f"{type(self._optimizer).__name__}: {error}"
            ) from error


def _trained(optimizer: torch.optim.Optimizer, model: nn.Module | None) -> Iterator[Tensor]:
    """Yield every tensor that a step may change, once."""
    tensors = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if model is not None:
        tensors += [parameter for parameter in model.parameters() if parameter.requires_grad]
        tensors += model.buffers()
    yield from {id(tensor): tensor for tensor in tensors}.values()


# What an optimizer or scaler points to but must go on sharing: parameters, hooks, the state itself.
_SHARED = ("params", "state", "param_groups")


def _copied(originals: dict[str, Any]) -> dict[str, Any]:
    """Return settings whose tensors and plain containers are copies."""
    return {
        name: value if name in _SHARED or not _is_data(value) else copy.deepcopy(value)
        for name, value in originals.items()
    }


def _is_data(value: Any) -> bool:
    """Whether a value is a tensor or a container of numbers, tensors and the like."""
    if isinstance(value, MutableMapping):
        return all(_is_data(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return all(_is_data(item) for item in value)
    return isinstance(value, (Tensor, int, float, str, Enum, type(None)))


def _replace(owner: dict[str, Any], values: dict[str, Any]) -> None:
    """Give a dict exactly these entries."""
    for name in [name for name in owner if name not in values]:
        del owner[name]
    owner.update(values)


def _random_states(tensors: list[Tensor]) -> dict[Any, Any]:
    devices = {tensor.device for tensor in tensors if tensor.device.type == "cuda"}
    return {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002 (data sets use it, whatever we use)
        **{device: torch.cuda.get_rng_state(device) for device in devices},
    }


def _set_random_states(states: dict[Any, Any]) -> None:
    torch.set_rng_state(states["torch"])
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])  # noqa: NPY002
    for device, state in states.items():
        if isinstance(device, torch.device):
            torch.cuda.set_rng_state(state, device)
