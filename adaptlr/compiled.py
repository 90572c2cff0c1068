"""torch.compile: what of adaptlr goes into a graph, and what stays between graphs.

The hook stays between: there alone it can take gradients away, hand the optimizer a new Python
float, or make it read a flag. A graph has taken all of these in when it starts. This costs no graph
break, since torch breaks the graph in every optimizer's ``step`` anyway.

`AdaptiveLR.observe`, called in the midst of a training step, does go into the graph, as an operator
that finds its controller by a number.
"""

from __future__ import annotations

import functools
import itertools
import logging
import pkgutil
import types
import weakref
from collections.abc import Callable
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from adaptlr import _extension

if TYPE_CHECKING:
    from adaptlr.attachment import Path
    from adaptlr.controller import AdaptiveLR

logger = logging.getLogger("adaptlr")

_TRACED_MODULES = ("compiled", "controller")

_numbers = itertools.count()
_controllers: weakref.WeakValueDictionary[int, AdaptiveLR] = weakref.WeakValueDictionary()


class Handle(NamedTuple):
    """What a graph holds of a controller."""

    number: int
    token: torch.Tensor


def register(controller: AdaptiveLR) -> Handle:
    """Let graphs find ``controller``. They do not keep it alive."""
    _teach_dynamo()
    number = next(_numbers)
    _controllers[number] = controller
    return Handle(number, torch.zeros(1, device="cpu"))


# -- observing inside a graph -------------------------------------------------

# The token, which holds nothing, is there to be mutated: so no compiler drops the operator or
# changes the order of two. The device's block, where observing may add to a sum, is not declared:
# functionalization passes a copy and copies it back, stale, over the block. No graph reads the sum.
# A token on the CPU and the tag keep the operator out of CUDA graphs (mode "reduce-overhead"),
# whose replays would not call it.
_library = torch.library.Library("adaptlr", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "observe(SymInt number, Tensor(a!) token, Tensor? loss, Tensor? grad_norm, str reduction)"
    " -> ()",
    tags=[torch.Tag.cudagraph_unsafe] if hasattr(torch.Tag, "cudagraph_unsafe") else [],
)


def observe(
    handle: Handle,
    loss: torch.Tensor | float | None,
    grad_norm: torch.Tensor | float | None,
    reduction: str,
) -> None:
    """Put a call of `AdaptiveLR.observe` into the graph that is being traced."""
    torch.ops.adaptlr.observe(
        handle.number, handle.token, _as_tensor(loss), _as_tensor(grad_norm), reduction
    )


def _as_tensor(value: torch.Tensor | float | None) -> torch.Tensor | None:
    if value is None:
        return None
    if isinstance(value, torch.Tensor):
        return value.detach()
    return torch.scalar_tensor(value, dtype=torch.float64, device="cpu")


def _observe_now(
    number: int,
    token: torch.Tensor,
    loss: torch.Tensor | None,
    grad_norm: torch.Tensor | None,
    reduction: Literal["mean", "sum"],
) -> None:
    controller = _controllers[number]
    controller.observe(_kept(loss), grad_norm=_kept(grad_norm), reduction=reduction)


def _kept(value: torch.Tensor | None) -> torch.Tensor | None:
    """Copy what is read as late as the optimizer's step: the graph reuses its memory sooner."""
    return value if value is None or value.is_cpu else value.clone()


def _observe_nothing(*_: object) -> None:
    """Stand in for the operator while a graph is traced."""


_library.impl(  # type: ignore[no-untyped-call]
    "observe", _observe_now, "CompositeExplicitAutograd"
)
torch.library.register_fake("adaptlr::observe", _observe_nothing, lib=_library)


# -- what stays between graphs ------------------------------------------------


def hook_of(path: Path, name: Literal["before_step", "after_step"]) -> Callable[..., Any]:
    """Return a method of ``path`` in a form for which dynamo finds `_break_graph`.

    It looks for the function's identity, and the bound method of a C type has none: every access
    makes a new one. A Python method around the C function is called as quickly.
    """
    return types.MethodType(getattr(type(path), name), path)


def _break_graph(path: Any, optimizer: Any, args: Any, kwargs: Any) -> None:
    """Take the hook's place while dynamo traces: it is to be called for real."""
    torch._dynamo.graph_break()


@functools.cache
def _teach_dynamo() -> None:
    """Tell dynamo, once, to call the hook and to leave alone what the hook calls.

    Not on import, for dynamo takes seconds to load; who has made an optimizer has loaded it.
    `torch.compiler.disable` would be the public way, and add 0.5 to 5 us to eager steps.
    """
    from adaptlr.controller import AdaptiveLR

    try:
        from torch._dynamo.decorators import skip
        from torch._dynamo.eval_frame import skip_code
        from torch._dynamo.trace_rules import add as skip_module
    except ImportError as error:  # private names; dynamo then traces, and breaks, a little more
        logger.debug("dynamo is not told about adaptlr: %s", error)
        return
    device, host = _extension.DeviceLoop, _extension.HostLoop
    for hook in (host.before_step, device.before_step, device.after_step):
        torch.compiler.substitute_in_graph(hook, skip_signature_check=True)(_break_graph)
    for module in pkgutil.iter_modules([str(FilePath(__file__).parent)]):
        if module.name not in _TRACED_MODULES:
            skip_module(f"adaptlr.{module.name}")
    for member in vars(AdaptiveLR).values():
        method = member.fget if isinstance(member, property) else member
        if isinstance(method, types.FunctionType) and method is not AdaptiveLR.observe:
            skip(method)
    skip_code(AdaptiveLR.observe.__code__)  # to be inlined, but no graph of its own
