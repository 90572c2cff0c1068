"""Accelerate under adaptlr: real runs of a small network, beside plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import same

from adaptlr import AdaptiveLR

accelerate = pytest.importorskip("accelerate")

from frameworks import (  # noqa: E402
    BATCH,
    STEPS,
    batches_of,
    digits,
    loss_of,
    make_network,
    state_of,
)

from adaptlr.integrations import require  # noqa: E402
from adaptlr.integrations.accelerate import attach  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread", "fresh_accelerate")


def make_optimizer(network: torch.nn.Module, fused: bool = False) -> torch.optim.Optimizer:
    return torch.optim.AdamW(network.parameters(), lr=1e-2, fused=fused)


class Run:
    """A prepared network, optimizer and loader, and the loop that Accelerate's users write."""

    def __init__(self, accumulation=1, scaler=None, fused=False, **settings):
        self.accelerator = accelerate.Accelerator(
            cpu=True, gradient_accumulation_steps=accumulation, **settings
        )
        self.accelerator.scaler = scaler
        network = make_network()
        loader = torch.utils.data.DataLoader(digits(), batch_size=BATCH)
        self.network, self.optimizer, self.loader = self.accelerator.prepare(
            network, make_optimizer(network, fused), loader
        )
        steps = math.ceil(len(self.loader) / accumulation)
        self.controller = attach(self.accelerator, self.optimizer, steps, model=network)

    def train(self, start=0, end=STEPS, overflow=None):
        for number, batch in enumerate(self.loader):
            if not start <= number < end:
                continue
            with self.accelerator.accumulate(self.network), self.accelerator.autocast():
                loss = loss_of(self.network, batch)
                self.accelerator.backward(loss)
                if number == overflow:
                    next(self.network.parameters()).grad.fill_(math.inf)
                self.optimizer.step()
                self.optimizer.zero_grad()


def plain_loop(accumulation=1, autocast=False):
    network = make_network()
    steps = math.ceil(STEPS / accumulation)
    controller = AdaptiveLR(make_optimizer(network), steps, model=network)
    for number, batch in enumerate(batches_of(digits())):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = loss_of(network, batch)
        (loss / accumulation).backward()
        controller.observe(loss)
        if (number + 1) % accumulation == 0 or number == STEPS - 1:
            controller.step()
            controller.zero_grad()
    return controller, network


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("accumulation", [1, 2, 5])
def test_it_equals_a_plain_loop_bit_for_bit(accumulation, precision):
    run = Run(accumulation, mixed_precision=precision)
    run.train()
    controller, network = plain_loop(accumulation, precision == "bf16")
    assert same(state_of(run.network), state_of(network))
    for field in ("lr", "loss", "level", "step"):
        expected = controller.history()[field].tolist()
        assert run.controller.history()[field].tolist() == expected, field


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_run_resumed_from_save_state_equals_one_that_never_stopped(accumulation, tmp_path):
    whole = Run(accumulation)
    whole.train(end=12)
    whole.accelerator.save_state(tmp_path)
    whole.train(start=12)
    resumed = Run(accumulation)
    resumed.accelerator.load_state(tmp_path)
    resumed.train(start=12)
    assert same(state_of(resumed.network), state_of(whole.network))
    expected, actual = whole.controller.history(), resumed.controller.history()
    for field in ("step", "loss", "lr", "level"):
        assert actual[field].tolist() == expected[field][12 // accumulation :].tolist(), field


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_overflow_are_skipped_once(accumulation, fused):
    run = Run(accumulation, torch.amp.GradScaler("cpu", init_scale=2.0**4), fused)
    run.train(overflow=7)
    assert run.accelerator.scaler.get_scale() == 2.0**3
    history, steps = run.controller.history(), STEPS // accumulation
    if fused:  # told through found_inf: the clock goes on
        skipped = [0] * steps
        skipped[7 // accumulation] = 1
        assert (history["action"] & 1).tolist() == skipped
    else:  # left out by GradScaler: nothing of it is left
        assert history["step"].tolist() == list(range(steps - 1))
    assert (history["loss"] < 3.0).all()


def test_detach_gives_backward_and_step_back():
    run = Run(scaler=torch.amp.GradScaler("cpu"))
    assert {"backward"} <= vars(run.accelerator).keys()
    run.controller.detach()
    assert "backward" not in vars(run.accelerator)
    assert "step" not in vars(run.optimizer)
    run.train()
    assert len(run.controller.history()) == 0


def test_what_cannot_be_attached_is_refused():
    run = Run()
    with pytest.raises(RuntimeError, match="hands its losses to a controller already"):
        attach(run.accelerator, run.optimizer, 10)
    run.controller.detach()
    with pytest.raises(TypeError, match=r"accelerator.prepare.* returned, got AdamW"):
        attach(run.accelerator, run.optimizer.optimizer, 10)
    with pytest.raises(TypeError, match="unexpected keyword argument 'sentry'"):
        attach(run.accelerator, run.optimizer, 10, sentry=None)
    assert "backward" not in vars(run.accelerator)
    attach(run.accelerator, run.optimizer, 10)
    with pytest.raises(TypeError, match="loss must be a tensor, got NoneType: the model has ret"):
        run.accelerator.backward(None)


def test_a_version_that_is_missing_or_too_old_is_named():
    message = r"needs numpy>=999, got .*: pip install 'adaptlr\[numpy\]'"
    with pytest.raises(ImportError, match=message):
        require("numpy", "999")
    with pytest.raises(ImportError, match="needs nothing-of-the-kind>=1, which is not installed"):
        require("nothing-of-the-kind", "1")
