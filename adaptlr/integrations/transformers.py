"""The Hugging Face Trainer: `attach` to one, or give it an `AdaptiveLRCallback`."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from adaptlr.controller import AdaptiveLR
from adaptlr.integrations import Replacement, drop_waiting, require

require("transformers", "4.48")

from transformers import Trainer, TrainerCallback  # noqa: E402

from adaptlr.integrations.accelerate import observed_backward  # noqa: E402


def attach(trainer: Trainer, **options: Any) -> AdaptiveLRCallback:
    """Have adaptlr control the learning rate of a Trainer, or of a subclass such as SFTTrainer.

    Call it once, between making the Trainer and training. What ``TrainingArguments`` say
    (``learning_rate``, ``lr_scheduler_type``, ``warmup_steps``) holds, and so does a scheduler
    given in ``optimizers=``, unless ``lr``, ``decay`` or ``warmup`` say otherwise.

    Args:
        trainer: A Trainer that does not use DeepSpeed.
        **options: As for `adaptlr.AdaptiveLR`; ``total_steps`` is the Trainer's.

    Returns:
        The callback that does it. Its `controller` is there when training has begun.

    Raises:
        TypeError: if ``trainer`` is no Trainer, or an option is unknown.
        ValueError: if the Trainer uses DeepSpeed.
        RuntimeError: if it has an `AdaptiveLRCallback` already.
    """
    if not isinstance(trainer, Trainer):
        raise TypeError(f"trainer must be a transformers.Trainer, got {type(trainer).__name__}")
    if any(isinstance(one, AdaptiveLRCallback) for one in trainer.callback_handler.callbacks):
        raise RuntimeError("the trainer has an AdaptiveLRCallback already; attach it once")
    callback = AdaptiveLRCallback(**options)
    callback.bind(trainer)
    trainer.add_callback(callback)
    return callback


class AdaptiveLRCallback(TrainerCallback):  # type: ignore[misc]
    """What `attach` does, for a Trainer that is made elsewhere: ``callbacks=[...]`` of that one.

    The Trainer's own way to its scheduler ends here: the scheduler it would have used is the
    schedule that adaptlr follows, and what stands in its slot writes nothing and reports the true
    learning rate to the Trainer's logs. Losses are taken where the Trainer calls backward, divided
    as it has divided them, so that they are those of its logs.

    Args:
        **options: As for `attach`.

    Raises:
        TypeError: if an option is unknown.
    """

    def __init__(self, **options: Any) -> None:
        """Check the names of the options; their values are checked when training begins."""
        inspect.signature(AdaptiveLR).bind(None, None, **options)
        self._options = options
        self._trainer: Trainer | None = None
        self._controller: AdaptiveLR | None = None

    @property
    def controller(self) -> AdaptiveLR:
        """The controller of the present or last training.

        Raises:
            RuntimeError: before training has begun.
        """
        if self._controller is None:
            raise RuntimeError("the controller is made when trainer.train() has begun, not before")
        return self._controller

    def bind(self, trainer: Trainer) -> None:
        """Be the one who makes the scheduler of ``trainer``; `attach` calls this.

        Raises:
            ValueError: if the Trainer uses DeepSpeed.
            RuntimeError: if the callback belongs to another Trainer already.
        """
        if trainer.is_deepspeed_enabled:
            raise ValueError("trainer must not use DeepSpeed, which owns its optimizer")
        if self._trainer is not None:
            raise RuntimeError("the callback belongs to another Trainer already; make a new one")
        self._trainer = trainer
        self._create_scheduler = trainer.create_scheduler
        Replacement(trainer, "create_scheduler", self._take_over)

    def on_init_end(self, *args: Any, **kwargs: Any) -> None:
        """Find the Trainer that has been made."""
        self.bind(_trainer_being_made())

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Refuse a callback that came too late to be told of its Trainer."""
        if self._trainer is None:
            raise RuntimeError(
                "AdaptiveLRCallback must be among the callbacks=[...] that the Trainer is made "
                "with; later, call adaptlr.integrations.transformers.attach(trainer)"
            )

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Forget the losses of a step that GradScaler has left out."""
        drop_waiting(self.controller)

    def _take_over(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> LRScheduler:
        """Make the Trainer's scheduler, and a controller that follows it; fill the slot."""
        trainer = self._trainer
        assert trainer is not None
        scheduler = self._create_scheduler(num_training_steps, optimizer)
        if isinstance(scheduler, ReportingScheduler):  # a second training, with a given scheduler
            scheduler = scheduler.followed
        if self._controller is not None:
            self._controller.detach()
        options = {"decay": scheduler, "model": trainer.model, **self._options}
        warmup = trainer.args.get_warmup_steps(num_training_steps)
        if warmup <= num_training_steps:  # else the whole run lies on the scheduler's own ramp
            options.setdefault("warmup", warmup)
        controller = AdaptiveLR(scheduler.optimizer, num_training_steps, **options)
        observe = partial(controller.observe, reduction="sum")
        controller._hooks.add(observed_backward(trainer.accelerator, observe))
        self._controller = controller
        reporting = ReportingScheduler(scheduler, controller)
        trainer.lr_scheduler = reporting
        return reporting


class ReportingScheduler(LRScheduler):
    """Stands in the Trainer's slot: tells the learning rate of the last step, and writes none."""

    def __init__(self, followed: Any, controller: AdaptiveLR) -> None:
        """Not torch's: that would write the learning rate."""
        self.followed = followed
        self.optimizer = followed.optimizer
        self._controller = controller

    def step(self, epoch: int | None = None) -> None:
        """Do nothing: the controller counts the steps."""

    def get_last_lr(self) -> list[float | torch.Tensor]:
        """Return every group's learning rate as numbers, without waiting for the device."""
        peaks = self._controller._attachment.config.peaks
        lr, highest = self._controller.lr, max(peaks)
        return [lr * (peak / highest) for peak in peaks]

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the controller's state travels with the optimizer's."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing, for the same reason."""


def _trainer_being_made() -> Trainer:
    """Return the Trainer whose constructor calls us.

    Callbacks are handed model, optimizer and state, but not the Trainer; the losses, with label
    smoothing and all, pass through nothing else.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), Trainer):
            return frame.f_locals["self"]
        frame = frame.f_back
    raise RuntimeError("on_init_end must be called by a Trainer; use attach(trainer) instead")
