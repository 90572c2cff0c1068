"""What is timed: the arms of a comparison, and the anchors that a training loop pays anyway."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from adaptlr._extension import FLOAT32, DeviceController, DeviceLoop, HostController
from adaptlr.bench.eager import EagerController
from adaptlr.bench.setup import (
    GUARD,
    SMALL,
    TOTAL_STEPS,
    WARMUP_STEPS,
    Model,
    attach,
    large,
    make_optimizer,
    set_device_lr,
    set_skip_flag,
    settle,
)
from adaptlr.bench.timing import Action, Subject
from adaptlr.controller import AdaptiveLR

BARE = "optimizer.step()"
FLAGGED = "optimizer.step() with torch's skip flag"
LAUNCHING = "the same, and a hook that launches an empty kernel"
ATTACHED = "observe(loss); optimizer.step() with adaptlr"
OBSERVE = "observe(loss) alone"
CONTROL = "control step alone"
UNGUARDED = "control step alone, guard=None"
EMPTY = "empty kernel through the same binding"
COSINE = "CosineAnnealingLR.step()"
SCHEDULED = "CosineAnnealingLR.step(); optimizer.step()"
ZEROING = "zeroing 100 gradients if the step is skipped"
EAGER = "the statistics in eager torch ops"

Losses = Sequence[torch.Tensor]


@dataclass(frozen=True)
class Arms:
    """The same optimizer bare and attached, to be timed in pairs."""

    subjects: list[Subject]
    controller: AdaptiveLR


def make_arms(
    name: str, groups: int, model: Model, losses: Losses, calls: int, flagged: bool
) -> Arms:
    """Return the arms of one comparison.

    ``flagged`` adds two arms without adaptlr: with torch's skip flag, and with an empty kernel too.
    """
    device = losses[0].device
    optimizers = [make_optimizer(name, groups, model, device) for _ in range(4 if flagged else 2)]
    bare, attached = optimizers[0], optimizers[1]
    controller = attach(attached, losses)

    def observed_step(loss: torch.Tensor) -> None:
        controller.observe(loss)
        attached.step()

    subjects = [
        Subject(BARE, lambda _: bare.step(), calls),
        Subject(ATTACHED, observed_step, calls),
    ]
    if flagged:
        with_flag, launching = optimizers[2:]
        for optimizer in (with_flag, launching):
            set_skip_flag(optimizer, device)
        launching.register_step_pre_hook(empty_launch(controller, losses))
        subjects.insert(1, Subject(FLAGGED, lambda _: with_flag.step(), calls))
        subjects.insert(2, Subject(LAUNCHING, lambda _: launching.step(), calls))
    return Arms(subjects, controller)


def empty_launch(controller: AdaptiveLR, losses: Losses) -> Callable[..., None]:
    """Return what launches an empty kernel through the binding of ``controller``."""
    core = controller._path.core
    assert isinstance(core, DeviceController)
    stream = torch._C._cuda_getCurrentRawStream(losses[0].get_device())
    return lambda *_: core.launch_empty(stream)


def make_anchors(losses: Losses, calls: int) -> list[Subject]:
    """Return the parts of adaptlr, and what they are to be compared with."""
    schedulers = [
        scheduler_subject(kind, tensor_lr, losses, calls)
        for kind in (COSINE, "SequentialLR(Linear, Cosine).step()")
        for tensor_lr in (False, True)
    ]
    return [
        scheduled_step(losses, calls),
        *controller_subjects(losses, calls),
        *schedulers,
        plateau_subject(losses, calls),
        Subject("loss.item()", lambda loss: loss.item(), calls),
        eager_subject(losses, calls=3),
    ]


def controller_subjects(losses: Losses, calls: int) -> list[Subject]:
    """Return the parts of what adaptlr does in a step."""
    device = losses[0].device
    controller, unguarded = (
        attach(make_optimizer("SGD", 1, SMALL, device), losses, guard) for guard in (GUARD, None)
    )
    path = controller._path

    def observe(loss: torch.Tensor) -> None:
        controller.observe(loss)
        path.count = 0  # as after a step

    subjects = [Subject(OBSERVE, observe, calls)]
    control = on_device if device.type == "cuda" else on_host
    for name, attached in ((CONTROL, controller), (UNGUARDED, unguarded)):
        subjects.append(Subject(name, control(attached, losses), calls))
    if device.type == "cuda":
        empty = empty_launch(controller, losses)
        subjects += [Subject(EMPTY, empty, calls), zeroing_subject(losses, calls)]
    return subjects


def on_host(controller: AdaptiveLR, _: Losses) -> Action:
    """Return the bare control step of a controller like ``controller``."""
    core = HostController(controller._attachment.config.row, history_size=1000)
    return lambda _: core.step(2.0)


def on_device(controller: AdaptiveLR, losses: Losses) -> Action:
    """Return the bare launch of the control step of ``controller``.

    Raises:
        RuntimeError: if adaptlr has no kernels on this device.
    """
    core = controller._path.core
    if not isinstance(core, DeviceController):
        raise RuntimeError(
            "adaptlr has no kernels for this GPU and decides on the host; measure with --device cpu"
        )
    stream = torch._C._cuda_getCurrentRawStream(losses[0].get_device())
    return lambda loss: core.step(stream, loss.data_ptr(), FLOAT32, True)


def zeroing_subject(losses: Losses, calls: int) -> Subject:
    """Return what prepares the skip of an optimizer that reads no flag."""
    device = losses[0].device
    optimizer = make_optimizer("AdamW", 1, large(device), device, fused=None, foreach=True)
    path = attach(optimizer, losses)._path
    assert isinstance(path, DeviceLoop)
    return Subject(ZEROING, lambda _: path.zero_gradients(), calls)


def scheduled_step(losses: Losses, calls: int) -> Subject:
    """Return a step with a scheduler, which finds caches that the optimizer has filled."""
    device = losses[0].device
    optimizer, stepped = (make_optimizer("SGD", 1, SMALL, device) for _ in range(2))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, TOTAL_STEPS)
    optimizer.step()
    settle(scheduler)

    def step(_: torch.Tensor) -> None:
        scheduler.step()
        stepped.step()  # not the scheduler's own, which it has wrapped

    return Subject(SCHEDULED, step, calls)


def scheduler_subject(kind: str, tensor_lr: bool, losses: Losses, calls: int) -> Subject:
    """Return a torch scheduler over one group; its lr is a float, or a tensor on the device."""
    schedulers = torch.optim.lr_scheduler
    device = losses[0].device
    optimizer = make_optimizer("SGD", 1, SMALL, device)
    if tensor_lr:
        set_device_lr(optimizer, device)
    scheduler: torch.optim.lr_scheduler.LRScheduler
    if kind == COSINE:
        scheduler = schedulers.CosineAnnealingLR(optimizer, TOTAL_STEPS)
    else:
        linear = schedulers.LinearLR(optimizer, total_iters=WARMUP_STEPS)
        cosine = schedulers.CosineAnnealingLR(optimizer, TOTAL_STEPS)
        scheduler = schedulers.SequentialLR(optimizer, [linear, cosine], [WARMUP_STEPS])
    optimizer.step()  # torch warns of a scheduler that is stepped first
    settle(scheduler)
    name = f"{kind}, tensor lr" if tensor_lr else kind
    return Subject(name, lambda _: scheduler.step(), calls)


def plateau_subject(losses: Losses, calls: int) -> Subject:
    """Return torch's plateau rule, which reads the loss on the host."""
    optimizer = make_optimizer("SGD", 1, SMALL, losses[0].device)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=TOTAL_STEPS)
    return Subject("ReduceLROnPlateau.step(loss)", plateau.step, calls)


def eager_subject(losses: Losses, calls: int) -> Subject:
    """Return the same arithmetic without an extension."""
    controller = attach(make_optimizer("SGD", 1, SMALL, losses[0].device), losses)
    config = controller._attachment.config.row
    eager = EagerController(controller._path.state(), config, losses[0].device)
    return Subject(EAGER, eager.step, calls)
