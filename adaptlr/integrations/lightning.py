"""Lightning: an `AdaptiveLRCallback` among the Trainer's callbacks."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch

from adaptlr.controller import AdaptiveLR
from adaptlr.integrations import drop_waiting, require

require("lightning", "2.2")

from lightning.pytorch import Callback, LightningModule, Trainer  # noqa: E402


class AdaptiveLRCallback(Callback):  # type: ignore[misc]
    """Has adaptlr control the learning rate of a module with one optimizer.

    For automatic and manual optimisation, with accumulation and mixed precision. Checkpoints of the
    Trainer carry the controller along. ``configure_optimizers`` returns the optimizer alone. The
    true learning rate is logged as ``lr``.

    Args:
        total_steps: Optimizer steps of the run. ``None``: as many as the Trainer will take; needed
            in manual optimisation, where the module decides that, and for a Trainer without an end.
        **options: As for `adaptlr.AdaptiveLR`.

    Raises:
        TypeError: if an option is unknown.
    """

    def __init__(self, total_steps: int | None = None, **options: Any) -> None:
        """Check the names of the options; their values are checked when training begins."""
        inspect.signature(AdaptiveLR).bind(None, None, **options)
        self._total_steps = total_steps
        self._options = options
        self._controller: AdaptiveLR | None = None
        self._logged_step = 0

    @property
    def controller(self) -> AdaptiveLR:
        """The controller of the present or last ``fit``.

        Raises:
            RuntimeError: before training has begun.
        """
        if self._controller is None:
            raise RuntimeError("the controller is made when trainer.fit() has begun, not before")
        return self._controller

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach, between the making of the optimizer and the loading of its state."""
        if self._controller is not None:
            self._controller.detach()
        optimizer = _only_optimizer(trainer)
        total_steps = self._total_steps or _total_steps(trainer, pl_module)
        options = {"model": pl_module, **self._options}
        self._controller = AdaptiveLR(optimizer, total_steps, **options)

    def on_before_zero_grad(self, *args: Any) -> None:
        """Forget the losses of a step that GradScaler has left out."""
        drop_waiting(self.controller)

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor
    ) -> None:
        """Observe the loss, without what Lightning has multiplied it by."""
        loss = loss.detach()
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and scaler.is_enabled():
            loss = loss / scaler._scale  # get_scale() would wait for the device
        if pl_module.automatic_optimization and trainer.accumulate_grad_batches > 1:
            loss = loss * trainer.accumulate_grad_batches
        self.controller.observe(loss)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Log the learning rate of the last step."""
        step, interval = trainer.global_step, trainer.log_every_n_steps
        if not interval or step % interval or step == self._logged_step:
            return
        self._logged_step = step
        for logger in trainer.loggers:
            logger.log_metrics({"lr": self.controller.lr}, step)


def _only_optimizer(trainer: Trainer) -> torch.optim.Optimizer:
    if trainer.lr_scheduler_configs:
        name = type(trainer.lr_scheduler_configs[0].scheduler).__name__
        raise ValueError(
            f"configure_optimizers must return the optimizer without a scheduler, got {name}: "
            "pass AdaptiveLRCallback(decay=...) instead"
        )
    count = len(trainer.optimizers)
    if count != 1:
        raise ValueError(
            f"configure_optimizers must return one optimizer, got {count}: make an "
            "adaptlr.AdaptiveLR for each there instead, and call its observe(loss) before its step"
        )
    optimizer: torch.optim.Optimizer = trainer.optimizers[0]
    return optimizer


def _total_steps(trainer: Trainer, module: LightningModule) -> int:
    steps = trainer.estimated_stepping_batches if module.automatic_optimization else None
    if steps is None or not math.isfinite(steps):
        why = "the module steps by itself" if steps is None else "the Trainer has no end"
        raise ValueError(
            f"total_steps must be an int where {why}, got None: pass "
            "AdaptiveLRCallback(total_steps=...)"
        )
    return int(steps)
