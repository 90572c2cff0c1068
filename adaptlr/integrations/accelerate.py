"""Accelerate: `attach` to a prepared optimizer; ``accelerator.backward`` hands over the losses."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch

from adaptlr.controller import AdaptiveLR
from adaptlr.integrations import Replacement, drop_waiting, require

require("accelerate", "1.0")

from accelerate import Accelerator  # noqa: E402
from accelerate.optimizer import AcceleratedOptimizer  # noqa: E402
from accelerate.utils import DistributedType  # noqa: E402


def attach(
    accelerator: Accelerator,
    optimizer: AcceleratedOptimizer,
    total_steps: int | None,
    **options: Any,
) -> AdaptiveLR:
    """Attach a controller to a prepared optimizer; from then on no loss needs to be observed.

    ``accelerator.backward(loss)`` hands over the raw loss, micro-batches are averaged, and a step
    that GradScaler leaves out is not counted. ``accelerator.save_state`` and ``load_state`` carry
    the controller along. Make no scheduler.

    Args:
        accelerator: The one that has prepared ``optimizer``.
        optimizer: What ``accelerator.prepare`` returned.
        total_steps: Optimizer steps of the run. Accelerate knows of no epochs; with accumulation
            that is ``math.ceil(len(loader) / accelerator.gradient_accumulation_steps) * epochs``
            of the prepared loader.
        **options: As for `adaptlr.AdaptiveLR`.

    Returns:
        The controller; its `detach` undoes everything.

    Raises:
        TypeError: if ``optimizer`` was not prepared, or an option is unknown.
        ValueError: if an option is out of range, or DeepSpeed or Megatron-LM owns the optimizer.
        RuntimeError: if the losses of ``accelerator`` go to a controller already.
    """
    if not isinstance(optimizer, AcceleratedOptimizer):
        raise TypeError(
            "optimizer must be what accelerator.prepare(optimizer) returned, "
            f"got {type(optimizer).__name__}"
        )
    if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(
            "accelerator must leave the optimizer to torch, got "
            f"distributed_type={accelerator.distributed_type.value!r}, which is not supported"
        )
    if getattr(accelerator.backward, "observes", False):
        raise RuntimeError(
            "the accelerator hands its losses to a controller already: make further ones with "
            "adaptlr.AdaptiveLR(optimizer, ...), and call observe(loss) for each yourself"
        )
    controller = AdaptiveLR(optimizer, total_steps, **options)
    controller._hooks.add(observed_backward(accelerator, controller.observe))
    if optimizer.scaler is not None:
        controller._hooks.add(_watched_step(optimizer, controller))
    return controller


def observed_backward(
    accelerator: Accelerator, observe: Callable[[torch.Tensor], None]
) -> Replacement:
    """Have ``accelerator.backward`` hand every loss to ``observe`` first."""
    backward = accelerator.backward

    def observed(loss: torch.Tensor, **kwargs: Any) -> None:
        if not isinstance(loss, torch.Tensor):
            raise TypeError(
                f"loss must be a tensor, got {type(loss).__name__}: the model has returned no loss "
                "(does its input contain labels?)"
            )
        observe(loss)
        backward(loss, **kwargs)

    observed.observes = True  # type: ignore[attr-defined]
    return Replacement(accelerator, "backward", observed)


def _watched_step(optimizer: AcceleratedOptimizer, controller: AdaptiveLR) -> Replacement:
    """Have ``optimizer.step`` drop the losses of a step that GradScaler has left out."""
    step = optimizer.step

    def watched(self: AcceleratedOptimizer, closure: Callable[[], Any] | None = None) -> None:
        step(closure)
        if self.gradient_state.sync_gradients and self.step_was_skipped:
            drop_waiting(controller)

    return Replacement(optimizer, "step", MethodType(watched, optimizer))
