"""A scheduler of torch or transformers as the schedule of a run."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.optim import lr_scheduler

from adaptlr import AdaptiveLR, Phase

STEPS = 40
SCHEDULERS = {
    "step": lambda o: lr_scheduler.StepLR(o, 10),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, [0.1, 0.2], total_steps=STEPS),
    "warm restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 7),
    "sequence": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, 0.1, total_iters=5), lr_scheduler.CosineAnnealingLR(o, 35)],
        milestones=[5],
    ),
    "chain": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 3), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
}


def make_optimizer() -> torch.optim.SGD:
    layers = [{"params": [torch.nn.Parameter(torch.ones(2))], "lr": lr} for lr in (0.1, 0.2)]
    return torch.optim.SGD(layers, momentum=0.9)


def rates(optimizer: torch.optim.Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_step_has_the_rates_of_the_scheduler(name):
    plain = make_optimizer()
    scheduler, expected = SCHEDULERS[name](plain), []
    for step in range(STEPS):
        expected.append(rates(plain))
        plain.step()
        if step < STEPS - 1:
            scheduler.step()
    optimizer = make_optimizer()
    scheduler = SCHEDULERS[name](optimizer)
    before = copy.deepcopy(scheduler.state_dict())
    controller = AdaptiveLR(optimizer, STEPS, decay=scheduler)
    assert scheduler.state_dict() == before
    for step in range(STEPS):
        controller.step(torch.tensor(1.0))
        assert rates(optimizer) == pytest.approx(expected[step], rel=1e-14), step


def test_a_scheduler_of_transformers_follows_our_warm_up_if_one_is_asked_for():
    transformers = pytest.importorskip("transformers")
    optimizer = make_optimizer()
    scheduler = transformers.get_cosine_schedule_with_warmup(optimizer, 0, STEPS)
    controller = AdaptiveLR(optimizer, STEPS, decay=scheduler, warmup=4, lr=1.0, guard=None)
    for _ in range(STEPS):
        controller.step(torch.tensor(1.0))
    lrs = controller.history()["lr"]
    assert lrs[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert lrs[20] == pytest.approx(0.5)


def test_backoff_and_extend_work_upon_it():
    optimizer = make_optimizer()
    scheduler = lr_scheduler.StepLR(optimizer, 25, gamma=0.5)
    controller = AdaptiveLR(optimizer, STEPS, decay=scheduler, snapshot="off")
    for step in range(STEPS):
        controller.step(torch.tensor(1.0 + 0.01 * (step % 3) + (9.0 if step > 20 else 0.0)))
    assert controller.status().phase is not Phase.RUN
    assert controller.lr == pytest.approx(0.2 * 0.5 * controller.status().factor)
    controller.extend(60)
    for _ in range(STEPS, 60):
        controller.step(torch.tensor(1.0))
    assert controller.lr == pytest.approx(0.2 * 0.25 * controller.status().factor)


def plateau(optimizer):
    return lr_scheduler.ReduceLROnPlateau(optimizer)


def stepped(optimizer):
    scheduler = lr_scheduler.StepLR(optimizer, 10)
    optimizer.step()
    scheduler.step()
    return scheduler


def uneven(optimizer):
    return lr_scheduler.LambdaLR(optimizer, [lambda step: 1.0, lambda step: 0.5**step])


@pytest.mark.parametrize(
    ("make", "total_steps", "error", "message"),
    [
        (plateau, STEPS, TypeError, "got ReduceLROnPlateau, which reacts to a metric"),
        (stepped, STEPS, ValueError, "a scheduler that has not been stepped, got 'step 1'"),
        (uneven, STEPS, ValueError, "must treat all parameter groups alike, got LambdaLR"),
        (SCHEDULERS["step"], None, ValueError, "total_steps must be an int for a decay that is"),
    ],
)
def test_what_cannot_be_followed_is_refused(make, total_steps, error, message):
    optimizer = make_optimizer()
    with pytest.raises(error, match=message):
        AdaptiveLR(optimizer, total_steps, decay=make(optimizer))
