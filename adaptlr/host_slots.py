"""Slots that the host fills and puts back, tensor by tensor: rare events, so plain loops."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from adaptlr.contents import MISSING, Contents, copied, has_form, local, put_back


@dataclass
class _Slot:
    weights: dict[Any, torch.Tensor] = field(default_factory=dict)
    state: dict[Any, Any] = field(default_factory=dict)
    groups: list[Any] = field(default_factory=list)


class HostSlots:
    """Copies of everything, or on the device paths of what the kernel does not reach.

    Args:
        contents: What is copied.
        device: Where the copies lie; None: beside the originals.
        skipped: Device whose tensors somebody else copies, weights and buffers among them; None:
            all tensors are copied here.
    """

    def __init__(
        self,
        contents: Contents,
        device: torch.device | None = None,
        skipped: torch.device | None = None,
    ) -> None:
        """Begin with no slot filled."""
        self._contents = contents
        self._device = device
        self._skipped = skipped
        self._slots: dict[int, _Slot] = {}

    @property
    def bytes(self) -> int:
        """Memory that the copies take."""
        return sum(
            copy.nbytes
            for slot in self._slots.values()
            for value in (slot.weights, slot.state, slot.groups)
            for copy in _tensors(value)
        )

    @property
    def holds_anything(self) -> bool:
        """Whether a slot has anything in it."""
        return any(
            slot.weights or any(slot.state.values()) or any(slot.groups)
            for slot in self._slots.values()
        )

    @torch.no_grad()
    def fill(self, slot: int) -> None:
        """Copy everything into a slot."""
        kept = self._slots.setdefault(slot, _Slot())
        if self._skipped is None:
            kept.weights = self._copied(self._contents.weights(), kept.weights)
        kept.state = self._copied(self._contents.optimizer.state, kept.state)
        groups = self._contents.group_values()
        olds = [*kept.groups, *[{}] * len(groups)]
        kept.groups = [self._copied(*pair) for pair in zip(groups, olds, strict=False)]

    @torch.no_grad()
    def cover_new(self) -> None:
        """Copy parameters and state that have appeared since into the slots that lack them."""
        state = self._contents.optimizer.state
        weights = {} if self._skipped is not None else self._contents.weights()
        for slot in self._slots.values():
            slot.state.update(self._copied({p: state[p] for p in state if p not in slot.state}))
            slot.weights.update(
                self._copied({key: weights[key] for key in weights if key not in slot.weights})
            )

    @torch.no_grad()
    def put_back(self, slot: int) -> None:
        """Give everything the values in a slot; nothing happens if it was never filled."""
        kept = self._slots.get(slot)
        if kept is None:
            return
        live = self._contents.weights() if kept.weights else {}
        for key, value in kept.weights.items():
            if key in live and has_form(live[key], value):
                live[key].copy_(value)
        for parameter, saved in kept.state.items():
            put_back(self._contents.optimizer.state[parameter], saved)
        groups = zip(self._contents.optimizer.param_groups, kept.groups, strict=False)
        for group, saved in groups:
            put_back(group, saved)

    def read(self, slot: int) -> dict[str, Any]:
        """Return what is in a slot, copied to the CPU, as checkpoints have it.

        Beside a kernel that reaches everything a slot may never have been filled here.
        """
        groups = self._contents.optimizer.param_groups
        kept = self._slots.get(slot) or _Slot(groups=[{} for _ in groups])
        values = self._contents.numbered(kept.weights, kept.state, kept.groups)
        read: dict[str, Any] = copied(values, None, lambda tensor, _: to_cpu(tensor))
        return read

    @torch.no_grad()
    def write(self, slot: int, values: dict[str, Any]) -> None:
        """Put what `read` has returned into a slot."""
        values = copied(values, self._contents.live(), self._placed)
        parameters = dict(enumerate(self._contents.parameters()))
        weights, state = (
            {parameters.get(key, key): value for key, value in values[name].items()}
            for name in ("weights", "state")
        )
        self._slots[slot] = _Slot(weights, state, values["groups"])

    def _placed(self, tensor: torch.Tensor, live: Any) -> Any:
        """Copy a tensor to where those of a slot lie, unless somebody else does."""
        device = live.device if isinstance(live, torch.Tensor) else tensor.device
        if self._skipped is not None and device == self._skipped:
            return MISSING
        return tensor.to(self._device or device, copy=True)

    def _copied(self, values: Any, olds: Any = None) -> Any:
        return copied(dict(values), olds, self._copy)

    def _copy(self, tensor: torch.Tensor, old: Any) -> Any:
        tensor = local(tensor)
        if self._skipped is not None and tensor.device == self._skipped:
            return MISSING
        if has_form(old, tensor):
            return old.copy_(tensor)
        return tensor.clone() if self._device is None else tensor.to(self._device, copy=True)


def to_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a tensor, wherever it is."""
    return tensor.detach().to("cpu", copy=True)


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value
    return [
        t for item in items if isinstance(item, (torch.Tensor, dict, list)) for t in _tensors(item)
    ]
