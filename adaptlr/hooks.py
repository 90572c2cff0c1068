"""How the controller is attached: hooks on the user's own optimizer, which stays what it is.

A proxy or subclass would break DeepSpeed's type check, schedulers' patches and pickling
(docs/design.md); hooks work in plain loops, GradScaler, Trainer, Accelerate, Lightning, DCP and
torch.compile alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch


class Attached(Protocol):
    """What the hooks call."""

    pre_hook: Callable[..., Any]  # decides, before the optimizer's step reads lr and gradients
    post_hook: Callable[..., Any] | None  # sees to snapshots, where there are any

    def save(self, state_dict: dict[str, Any]) -> None:
        """Put the controller's state into the optimizer's."""

    def check(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return what is left to load; raise if the controller could not, before any change."""

    def load(self) -> None:
        """Take the controller's state out of the optimizer's."""


class Removable(Protocol):
    """What goes when a controller is detached."""

    def remove(self) -> None:
        """Undo it."""


class Hooks:
    """Registers the hooks of one controller on one optimizer, and removes them."""

    def __init__(self, optimizer: torch.optim.Optimizer, attached: Attached) -> None:
        """Register all of them. A hook after the step only if it is needed: every hook costs."""
        self._handles: list[Removable] = [
            optimizer.register_step_pre_hook(attached.pre_hook),
            optimizer.register_state_dict_post_hook(lambda _, saved: attached.save(saved)),
            optimizer.register_load_state_dict_pre_hook(lambda _, loaded: attached.check(loaded)),
            optimizer.register_load_state_dict_post_hook(lambda _: attached.load()),
        ]
        if type(optimizer).load_state_dict is not torch.optim.Optimizer.load_state_dict:
            self._handles.append(LoadWatch(optimizer, attached))
        if attached.post_hook is not None:
            self._handles.append(optimizer.register_step_post_hook(attached.post_hook))

    def add(self, handle: Removable) -> None:
        """Take what an integration has put in place into our care."""
        self._handles.append(handle)

    def remove(self) -> None:
        """Take every hook off again."""
        for handle in self._handles:
            handle.remove()


class LoadWatch:
    """Does what the load hooks do, for a class whose own ``load_state_dict`` may not call them.

    That of bitsandbytes does not, and a controller that is not told begins a resumed run anew.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, attached: Attached) -> None:
        """Stand in front of the optimizer's method, as an attribute of this one object."""
        self._attributes = vars(optimizer)
        self._attached: Attached | None = attached
        self._load = optimizer.load_state_dict
        self._told = False
        self._hook = optimizer.register_load_state_dict_post_hook(self._note)
        self._attributes["load_state_dict"] = self.load

    def _note(self, _: torch.optim.Optimizer) -> None:
        self._told = True

    def load(self, state_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Check, load, and tell the controller unless torch's hooks have."""
        if self._attached is None:
            return self._load(state_dict, *args, **kwargs)
        self._told = False
        self._attached.check(state_dict)
        result = self._load(state_dict, *args, **kwargs)
        if not self._told:
            self._attached.load()
        return result

    def remove(self) -> None:
        """Step aside: give the method back, unless someone has wrapped ours since."""
        self._attached = None
        self._hook.remove()
        if self._attributes.get("load_state_dict") == self.load:
            del self._attributes["load_state_dict"]


def replace_closure(
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    wrap: Callable[[Callable[[], Any]], Callable[[], Any]],
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Return the arguments of ``step`` with its closure wrapped, or None if it has none."""
    if kwargs.get("closure") is not None:
        return args, {**kwargs, "closure": wrap(kwargs["closure"])}
    if len(args) > 1 and args[1] is not None:
        return (args[0], wrap(args[1]), *args[2:]), kwargs
    return None


def unwrap(optimizer: object) -> torch.optim.Optimizer:
    """Return the torch optimizer inside the wrappers of Accelerate and Lightning.

    Raises:
        TypeError: if there is none.
    """
    inner = optimizer
    while isinstance(getattr(inner, "optimizer", None), torch.optim.Optimizer):
        inner = inner.optimizer  # type: ignore[attr-defined]
    if not isinstance(inner, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}"
        )
    return inner
