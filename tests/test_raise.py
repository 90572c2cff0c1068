"""Raises: a run that learns too slowly may get a higher learning rate, and gives it back."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from closed_loop import PEAK, Model, Scenario, jump, steps_from
from test_update import (
    assert_close,
    assert_same,
    moves_of,
    run_loop,
    run_reference,
    to_structured,
)

import adaptlr
from adaptlr import Guard, Search, _extension
from adaptlr.events import Event, make_events
from adaptlr.reference import Phase

# Closed loops. The typed peak stands at 1, and `critical` is the rate that does harm.

STEPS = 300
ALLOWED = {"snapshot_slots": 3, "max_factor": 100.0}
SLOW = Model("slow", critical=100.0, noise=0.02)
ASKED, RAISED = "RUN>RAISE", "RAISE>REWARM"
KEPT = (ASKED, RAISED, "REWARM>HOLD", "HOLD>REGROW", "REGROW>RUN")
NONE = 0.0


def told(rate: float) -> float:
    """Return what the first gradient must tell so that it suggests ``rate`` x the peak."""
    return PEAK * rate / 2.0  # all losses begin at 2


def changed(**fields: object) -> Model:
    return dataclasses.replace(SLOW, **fields)


def after(turn: int, critical: float, harm: float = 1.0) -> Model:
    """Return a model whose critical rate falls at a step."""
    return changed(later_critical=critical, turn=turn, harm=harm)


CASES = {
    # The ramp ends at its lowest level: a third of that rate, or the mean of it and the estimate.
    "estimate": (SLOW, told(100), {}, KEPT, (20, 50)),
    "losses_alone": (SLOW, NONE, {}, KEPT, (10, 33)),
    "limit": (SLOW, told(20), {"max_factor": 3.0}, KEPT, (3, 3)),
    "blocks": (SLOW, told(100), {"block_steps": 3}, KEPT[:3], (20, 100)),
    # Noise hides all progress: only the first gradient can tell, and only from far away.
    "hidden": (changed(critical=1e4, noise=0.05), told(1e4), {}, (ASKED, RAISED), (100, 100)),
    "hidden_alone": (changed(critical=1e4, noise=0.05), NONE, {}, ("RUN>TEST", "TEST>RUN"), (1, 1)),
    # The ramp does harm, and is undone; or it has shown enough before.
    "cliff": (
        changed(critical=3.0, speed=0.004, harm=1.0),
        told(100),
        {},
        (ASKED, "RAISE>RUN"),
        (1, 1),
    ),
    "flat": (changed(critical=1.01, height=0.1, harm=1.0), told(100), {}, (ASKED,), (1, 1)),
    "poisoned": (changed(poisoned=40.0), told(100), {}, (ASKED, f"{RAISED}:NONFINITE"), (5, 40)),
    # A raised rate that does not hold: less of it, or nothing, by an alarm, a chart that only
    # doubts, the end of the budget, or a level that is not lower in time.
    "less": (after(130, 8.0), told(100), {}, (*KEPT[:3], "HOLD>REWARM:DIVERGE"), (2, 20)),
    "spent": (
        after(130, 1.0),
        told(100),
        {"max_restarts": 2},
        (*KEPT[:3], "HOLD>REWARM:DIVERGE", "REWARM>RUN:LOST|ABOVE"),
        (1, 1),
    ),
    "nothing": (after(90, 1.0, harm=0.0), told(100), {}, (*KEPT, "RUN>RUN"), (1, 1)),
    "not_lower": (
        changed(shift=jump(1.0, 104)),
        told(100),
        {},
        (*KEPT, "RUN>RUN"),
        (1, 1),
    ),
    "nan": (
        changed(broken=steps_from(120, 10)),
        told(100),
        {},
        (ASKED, RAISED, "HOLD>REWARM:NONFINITE"),
        (2, 50),
    ),
    # No cause for a raise.
    "good": (Model("good"), told(3), {}, (), (1, 1)),
    "unsure": (SLOW, told(9), {}, (), (1, 1)),
    "off": (SLOW, told(100), {"max_factor": 1.0}, (), (1, 1)),
    "start_alone": (SLOW, told(100), {"snapshot_slots": 1}, (), (1, 1)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_raise_matches_the_reference_and_ends_as_it_should(name):
    model, estimate, settings, moves, (least, most) = CASES[name]
    scenario = Scenario(model, moves, {**ALLOWED, **settings})
    config, signals, actual = run_loop(scenario, STEPS, estimate)
    made = moves_of(actual[0])
    seen = iter(made)
    assert not [move for move in moves if move not in seen], made
    assert bool(moves) == bool(made)
    assert_same(actual, run_reference(config, signals, 1, estimate), loss_unit=1.0)
    assert least <= actual[0]["target_factor"][-1] <= most
    kept = moves[-1:] == KEPT[-1:]
    assert not kept or actual[1]["aside_slot"][-1] == 0  # the raised rate has proved itself
    assert actual[0]["factor"].max() <= max(1, config.max_factor) * 1.6  # a ramp has no decay


@pytest.mark.parametrize("model", [Model("good"), Model("collapses", critical=0.02, harm=1.0)])
def test_a_run_that_is_not_slow_is_the_same_with_a_raise_allowed(model):
    off, on = (
        run_loop(Scenario(model, (), {**ALLOWED, "max_factor": limit}), STEPS, told(1))[2]
        for limit in (1.0, 100.0)
    )
    for ours, theirs in zip(off, on, strict=True):
        for name in set(ours.dtype.names) - {"checksum"}:
            np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def test_undoing_gives_back_the_state_and_the_budget():
    model, estimate, settings, _, _ = CASES["spent"]
    _, _, (records, states) = run_loop(
        Scenario(model, (), {**ALLOWED, **settings}), STEPS, estimate
    )
    asked = int(np.flatnonzero(records["phase"] == Phase.RAISE)[0])
    undone = int(np.flatnonzero(moves_at(records, "REWARM", "RUN"))[0])
    for name in ("samples", "level", "fine.count", "fine.fast_level", "restarted", "estimate"):
        before = states[asked - 1][name] + (name in ("samples", "fine.count"))  # the step's own
        if name not in ("level", "fine.fast_level"):
            assert states[undone][name] == before, name
    assert states[undone]["cut_factor"] == states[undone]["ceiling"] == 1
    assert states[undone]["restarts"] == states[asked - 1]["restarts"] + 1
    assert states[undone]["aside_slot"] == 0
    assert states[undone]["step"] == undone + 1


def moves_at(records: np.ndarray, before: str, after: str) -> np.ndarray:
    return (records["previous_phase"] == Phase[before]) & (records["phase"] == Phase[after])


def events_of(name: str) -> list[Event]:
    model, estimate, settings, _, _ = CASES[name]
    _, _, (records, _) = run_loop(Scenario(model, (), {**ALLOWED, **settings}), STEPS, estimate)
    is_event = (records["previous_phase"] != records["phase"]) | (records["action"] >> 8 != 0)
    return make_events(records[is_event])


PUT_BACK = "weights and optimizer state from the start are put back"


@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [
        (
            "estimate",
            "raise",
            "the loss falls slowly (level 1.941, noise 0.045, slope -0.0022 a step, t-statistic "
            "-9.9), and the first gradient suggests 0.03, 99 times the rate; the present state is "
            f"set aside, {PUT_BACK}, learning rate grows from 0.00029 to see whether a higher one "
            "gets lower",
        ),
        ("losses_alone", "raise", "-9.9), and no slower than at first; the present state is set"),
        ("hidden", "raise", "the loss is where it began (level "),
        (
            "estimate",
            "raised",
            "on the ramp the loss was lowest, 1.618, at lr 0.012, and the first gradient suggests "
            f"0.03; {PUT_BACK}, learning rate set to 48.8 of its schedule (it stood at 1) and "
            "warmed up; the state set aside is kept until the loss is lower than there",
        ),
        (
            "hidden",
            "raised",
            "the ramp has changed nothing yet, and the first gradient suggests 2.9;",
        ),
        (
            "cliff",
            "undone",
            "a higher learning rate got no lower; the state set aside is back, learning rate at 1 "
            "of its schedule as before",
        ),
        ("flat", "undone", "the loss has risen above the first one (level "),
        ("spent", "undone", "the progress made is lost (level "),
        ("nothing", "undone", "the loss is where it began (level "),
        ("not_lower", "undone", "the raised learning rate got no lower; the state set aside is"),
    ],
)
def test_events_tell_why_a_rate_was_raised_and_why_not(name, kind, reason):
    reasons = [event.reason for event in events_of(name) if event.kind == kind]
    assert len(reasons) == 1
    assert reason in reasons[0]


# A whole run.

TYPED = 5e-5


def train(
    guard: Guard, set_at: int | None = None, device: str = "cpu", **options: Any
) -> tuple[adaptlr.AdaptiveLR, float]:
    """Fit a line at a rate far too low; return the controller and the last loss."""
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 1)
    target = torch.randn(8).to(device)
    optimizer = torch.optim.SGD(model.to(device).parameters(), lr=TYPED, momentum=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the rate is far off, and said to be
        controller = adaptlr.AdaptiveLR(optimizer, STEPS, guard=guard, **options)
        for step in range(STEPS):
            inputs = torch.randn(512, 8).to(device)
            loss = (model(inputs).squeeze(1) - inputs @ target).square().mean()
            loss.backward()
            controller.step(loss)
            controller.zero_grad()
            if step == set_at:
                controller.set_peak(1e-3)
    return controller, float(loss.detach())


def test_a_run_at_a_rate_far_too_low_learns_with_a_raise_and_not_without():
    (_, stuck), (controller, low) = train(Guard()), train(Guard(max_factor=100.0))
    kinds = [event.kind for event in controller.events()]
    assert kinds[:3] == ["far_lr", "raise", "raised"]
    assert "undone" not in kinds
    assert low < 0.05 * stuck
    assert TYPED < controller.history()["lr"].max() <= 100 * TYPED


def test_a_peak_that_is_set_takes_the_place_of_a_raised_one():
    raised = next(e.step for e in train(Guard(max_factor=100.0))[0].events() if e.kind == "raised")
    controller, _ = train(Guard(max_factor=100.0), set_at=raised + 5)
    state = controller._path.state()
    assert state["cut_factor"] == 1
    assert controller.history()["lr"][raised + 7 :].max() <= 1e-3


# Checkpoints.


def test_a_ramp_without_its_snapshots_ends_with_what_it_has_shown():
    model, estimate, settings, _, _ = CASES["estimate"]
    scenario = Scenario(model, (), {**ALLOWED, **settings})
    config, _, (records, states) = run_loop(scenario, STEPS, estimate)
    ramp = np.flatnonzero(records["phase"] == Phase.RAISE)
    row, _ = to_structured(config)
    early, late = (
        _extension.resumed(row, states[step : step + 1].reshape(())) for step in (ramp[3], ramp[-1])
    )
    assert (early["cut_factor"], early["phase"]) == (1, Phase.REWARM)
    assert 10 < late["cut_factor"] <= 100
    assert late["aside_slot"] == early["aside_slot"] == 0


# Settings.


@pytest.mark.parametrize("value", [0.5, 1e5, float("nan"), float("inf")])
def test_a_limit_out_of_range_is_refused(value):
    with pytest.raises(ValueError, match=r"^max_factor must be in \[1, 10000\], got "):
        Guard(max_factor=value)


def test_a_guard_that_observes_raises_nothing():
    with pytest.raises(ValueError, match=r"^max_factor must be 1 with mode='observe', which never"):
        Guard(mode="observe", max_factor=10.0)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"lr": "auto", "search": Search()}, "lr='auto', which finds the rate"),
        ({"snapshot": "off"}, "snapshot='off', without which a raise could not be undone"),
    ],
)
def test_a_raise_is_refused_where_it_has_no_place(options, why):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)
    with pytest.raises(ValueError, match=f"^max_factor must be 1 with {why}, got 10.0$"):
        adaptlr.AdaptiveLR(optimizer, 100, guard=Guard(max_factor=10.0), **options)


def test_a_raise_for_which_there_is_no_room_is_not_passed_over(monkeypatch):
    monkeypatch.setattr("adaptlr.snapshot.free_host_bytes", lambda: 1500)
    weight = torch.nn.Parameter(torch.zeros(25))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    guard = Guard(max_factor=10.0)
    controller = adaptlr.AdaptiveLR(optimizer, 100, guard=guard, check_lr=False)
    weight.grad = torch.ones(25)
    with pytest.warns(UserWarning, match=r"Guard\(max_factor=...\) has no effect: a raise takes"):
        controller.step(1.0)


# On a CUDA device.


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["estimate", "losses_alone", "less", "spent", "not_lower"])
def test_the_kernel_raises_as_the_host_does(name):
    from test_cuda import KERNEL_RTOL, Device, stream

    model, estimate, settings, _, _ = CASES[name]
    scenario = Scenario(model, (), {**ALLOWED, **settings})
    config, signals, (records, states) = run_loop(scenario, STEPS, estimate)
    row, _ = to_structured(config)
    device = Device(row, 1024)
    state = _extension.initial_state()
    state["estimate"] = estimate
    device.core.configure(stream(), state=state)
    losses = torch.tensor([each.loss for each in signals], dtype=torch.float64, device="cuda")
    for index in range(STEPS):
        address = losses.data_ptr() + 8 * index
        device.core.step(stream(), address, _extension.FLOAT64, True)
    torch.cuda.synchronize()
    actual = device.core.records()
    for field in records.dtype.names[:-1]:  # the checksum is of the last bits too
        assert_close(actual[field], records[field], field, 1.0, KERNEL_RTOL)
    last = device.state().reshape(1)
    for field in last.dtype.names:
        assert_close(last[field], states[-1:][field], field, 1.0, KERNEL_RTOL)


@pytest.mark.cuda
@pytest.mark.parametrize("device_path", ["fused", "float"])
def test_a_run_on_the_device_is_raised_as_on_the_cpu(device_path):
    host, _ = train(Guard(max_factor=30.0))
    device, low = train(Guard(max_factor=30.0), device="cuda", device_path=device_path)
    device.detach()  # waits for the device
    kinds = [[event.kind for event in each.events()] for each in (host, device)]
    assert kinds[0] == kinds[1]
    factors = [each.history()["target_factor"][-1] for each in (host, device)]
    assert factors[1] == pytest.approx(factors[0], rel=0.3)  # lr as a number is a step late
    assert low < 0.5
