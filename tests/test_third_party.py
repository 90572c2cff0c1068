"""Optimizers from elsewhere under adaptlr, on the host path and on the late-float path."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import loss_of, parameters_of, same, skips, train
from third_party import CASES, OPTIONAL, Case, pause, resume, table

from adaptlr import AdaptiveLR

ROOT = Path(__file__).parents[1]
STEPS = 40
POISON = (0, 7, 8, 20)
SYNC = "called a synchronizing CUDA operation"


@pytest.fixture(params=CASES, ids=str)
def case(request) -> Case:
    """Return each optimizer; those outside the dev extra only where they are installed."""
    if request.param.package in OPTIONAL:
        pytest.importorskip(request.param.module)
    return request.param


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request) -> str:
    return request.param


@pytest.fixture
def inputs(batches, device) -> list[torch.Tensor]:
    return [batch.to(device) for batch in batches]


def history_of(controller: AdaptiveLR) -> Any:
    """Return the record of all steps: the host may be ahead of the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return controller.history()


def rates_seen(optimizer: torch.optim.Optimizer) -> list[float]:
    """Return a list that fills with the lr that each step finds. Call once adaptlr is attached."""
    seen: list[float] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(optimizer.param_groups[0]["lr"]))
    return seen


def train_by_hand(
    case: Case,
    model: torch.nn.Module,
    batches: list[torch.Tensor],
    lrs: list[float],
    skip: Callable[[torch.optim.Optimizer], None] | None = None,
) -> torch.optim.Optimizer:
    """Run a bare loop under the rates of a controller; ``skip`` takes its skipped steps."""
    optimizer = case.make(model.parameters())
    for step, (batch, lr) in enumerate(zip(batches, lrs, strict=False)):
        loss_of(model, batch).backward()
        for group in optimizer.param_groups:
            group["lr"] = lr
        if skip is not None and step in POISON:
            skip(optimizer)
        else:
            optimizer.step()
        optimizer.zero_grad()
    return optimizer


def leave_out(optimizer: torch.optim.Optimizer) -> None:
    """Skip a step exactly."""


def step_without_gradients(optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad(set_to_none=True)
    optimizer.step()


def step_with_zeros(optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()


def tensors_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Return copies of all tensors of the optimizer's state."""
    states = (state.values() for state in optimizer.state.values())
    return [value.clone() for state in states for value in state if torch.is_tensor(value)]


def test_the_table_in_the_docs_is_that_of_the_tests():
    assert table() in (ROOT / "docs/optimizers.md").read_text(encoding="utf-8")


# -- every optimizer, on both devices ----------------------------------------------------------


def test_every_step_finds_the_scheduled_rate_and_the_history_says_so(
    case, device, make_model, inputs
):
    model = make_model(device=device)
    optimizer = case.make(model.parameters())
    controller = AdaptiveLR(optimizer, total_steps=STEPS, warmup=5, decay="linear", snapshot="off")
    assert "device_path='float'" in repr(controller)
    seen = rates_seen(optimizer)
    train(controller, model, inputs[:STEPS], poison=(12,))
    peak = case.arguments["lr"]
    warmup = [peak * (step + 1) / 5 for step in range(5)]
    decay = [peak * (1 - (step + 1) / (STEPS - 5)) for step in range(STEPS - 5)]
    assert all(type(lr) is float for lr in seen)
    assert seen == pytest.approx(warmup + decay, rel=1e-14, abs=1e-16 * peak)
    assert history_of(controller)["lr"].tolist() == seen
    assert skips(controller) == 1


def test_without_a_guard_it_equals_a_bare_loop_under_the_same_rates(
    case, device, make_model, inputs
):
    controlled, bare = make_model(device=device), make_model(device=device)
    optimizer = case.make(controlled.parameters())
    controller = AdaptiveLR(optimizer, total_steps=STEPS, guard=None)
    train(controller, controlled, inputs[:STEPS])
    reference = train_by_hand(case, bare, inputs, history_of(controller)["lr"].tolist())
    assert same(parameters_of(controlled), parameters_of(bare))
    assert same(tensors_of(optimizer), tensors_of(reference))


def test_a_skipped_step_is_what_the_table_says(case, device, make_model, inputs):
    controlled, bare = make_model(device=device), make_model(device=device)
    optimizer = case.make(controlled.parameters())
    controller = AdaptiveLR(optimizer, total_steps=STEPS, snapshot="off")
    train(controller, controlled, inputs[:STEPS], poison=POISON)
    history = history_of(controller)
    assert np.flatnonzero(history["action"]).tolist() == list(POISON)
    assert all(torch.isfinite(parameter).all() for parameter in controlled.parameters())
    skip = step_without_gradients if case.counts else leave_out
    if device == "cuda":
        skip = step_with_zeros
    reference = train_by_hand(case, bare, inputs, history["lr"].tolist(), skip)
    assert same(parameters_of(controlled), parameters_of(bare))
    assert same(tensors_of(optimizer), tensors_of(reference))


def test_resuming_equals_never_having_stopped(case, device, make_model, inputs):
    def fresh():
        model = make_model(device=device)
        optimizer = case.make(model.parameters())
        return model, optimizer, AdaptiveLR(optimizer, total_steps=STEPS, snapshot="off")

    model, optimizer, controller = fresh()
    train(controller, model, inputs[:15], poison=(5,))
    pause(optimizer)
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    resume(optimizer)
    train(controller, model, inputs[15:STEPS])
    other, other_optimizer, other_controller = fresh()
    file.seek(0)
    for part, saved in zip((other, other_optimizer), torch.load(file), strict=True):
        part.load_state_dict(saved)
    assert other_controller.events()[-1].reason == "resumed at step 15"
    assert "adaptlr" not in other_optimizer.param_groups[0]
    resume(other_optimizer)
    train(other_controller, other, inputs[15:STEPS])
    expected, actual = history_of(controller)[15:], history_of(other_controller)
    assert actual["step"].tolist() == expected["step"].tolist()
    assert actual["lr"].tolist() == expected["lr"].tolist()
    assert same(parameters_of(model), parameters_of(other))
    assert same(tensors_of(optimizer), tensors_of(other_optimizer))


def test_training_reduces_the_loss(case, device, make_model, inputs):
    model = make_model(device=device)
    optimizer = case.make(model.parameters())
    controller = AdaptiveLR(
        optimizer, total_steps=5 * len(inputs), decay="constant", snapshot="off"
    )
    train(controller, model, inputs * 5)
    losses = history_of(controller)["loss"]
    assert losses[-len(inputs) :].mean() < 0.7 * losses[: len(inputs)].mean()


# -- what some of them do beside -----------------------------------------------------------------


@pytest.mark.parametrize("case", [case for case in CASES if case.counts], ids=str)
def test_a_skip_on_the_cpu_moves_nothing_of_schedule_free_but_its_counters(
    case, make_model, batches
):
    model = make_model()
    optimizer = case.make(model.parameters())
    controller = AdaptiveLR(optimizer, total_steps=STEPS, decay="constant", warmup=0)
    train(controller, model, batches[:5])
    kept = parameters_of(model), tensors_of(optimizer), dict(optimizer.param_groups[0])
    train(controller, model, batches[5:6], poison=(0,))
    assert skips(controller) == 1
    assert same(parameters_of(model), kept[0])
    assert same(tensors_of(optimizer), kept[1])
    group = optimizer.param_groups[0]
    assert {name for name in group if group[name] != kept[2][name]} == {"k", "weight_sum"}


class SilentLoad(torch.optim.SGD):
    """Loads by itself and calls no hooks, as optimizers of bitsandbytes do."""

    def load_state_dict(self, state_dict):
        groups = [{**group} for group in state_dict["param_groups"]]
        for group, mine in zip(groups, self.param_groups, strict=True):
            group["params"] = mine["params"]
        self.__setstate__({"param_groups": groups})


class InheritedLoad(torch.optim.SGD):
    """Adds something of its own to torch's loading."""

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)


@pytest.fixture(params=[SilentLoad, InheritedLoad])
def attached(request, make_model) -> tuple[Any, AdaptiveLR]:
    optimizer = request.param(make_model().parameters(), lr=0.1)
    return optimizer, AdaptiveLR(optimizer, total_steps=STEPS, snapshot="off")


def test_a_load_that_calls_no_hooks_is_heard_of(attached):
    optimizer, controller = attached
    for _ in range(3):
        controller.step(torch.tensor(1.0))
    saved = optimizer.state_dict()
    controller.step(torch.tensor(1.0))
    optimizer.load_state_dict(saved)
    assert [event.kind for event in controller.events()] == ["resume"]
    assert "adaptlr" not in optimizer.param_groups[0]
    controller.step(torch.tensor(1.0))
    assert controller.status().step == 4


def test_a_load_without_our_state_is_warned_of_once(attached):
    optimizer, _ = attached
    plain = torch.optim.SGD(optimizer.param_groups[0]["params"], lr=0.1).state_dict()
    with pytest.warns(UserWarning, match="holds no adaptlr state") as caught:
        optimizer.load_state_dict(plain)
    assert len(caught) == 1


def test_a_damaged_checkpoint_is_refused_before_anything_is_loaded(attached):
    optimizer, controller = attached
    controller.step(torch.tensor(1.0))
    saved = optimizer.state_dict()
    saved["param_groups"][0].update(adaptlr=torch.zeros(3, dtype=torch.uint8), momentum=0.5)
    with pytest.raises(ValueError, match="must be bytes of float64"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["momentum"] == 0


def test_detach_gives_the_way_of_loading_back(attached):
    optimizer, controller = attached
    wrapped = optimizer.load_state_dict
    controller.detach()
    assert "load_state_dict" not in vars(optimizer)
    plain = optimizer.state_dict()
    optimizer.load_state_dict(plain)
    wrapped(plain)
    assert controller.events() == []


# -- on the device -----------------------------------------------------------------------------


def waits(run: Callable[[], None]) -> int:
    """Count the waits for the device that torch sees; ours is an event's, and the driver's."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum(SYNC in str(warning.message) for warning in caught)


@pytest.mark.cuda
def test_adaptlr_adds_no_wait_that_torch_sees(case, make_model, data):
    controlled, bare = make_model(device="cuda"), make_model(device="cuda")
    optimizer = case.make(controlled.parameters())
    # All rates above 0: at 0, Prodigy leaves its waits out.
    controller = AdaptiveLR(optimizer, total_steps=100)
    nan = torch.full((), float("nan"), device="cuda")

    def run() -> None:
        for step, batch in enumerate(data):
            loss = loss_of(controlled, batch)
            loss = loss * nan if step == 30 else loss
            loss.backward()
            controller.step(loss)
            controller.zero_grad()

    ours = waits(run)
    theirs = waits(lambda: train_by_hand(case, bare, data, [case.arguments["lr"]] * len(data)))
    assert len(history_of(controller)) == len(data)
    assert skips(controller) == 1
    assert ours == theirs
    assert ours == 0 or case.waits
