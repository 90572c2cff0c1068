"""Bad input gives a clear error at the call that caused it, and nothing is lost."""

from __future__ import annotations

import copy
import math
import re

import pytest
import torch
from conftest import loss_of, parameters_of, same, train

from adaptlr import AdaptiveLR, Guard, Schedule, Search
from adaptlr._extension import state_dtype


def short(case: object) -> str:
    return re.sub(" at 0x[0-9a-f]+", "", str(case))[:40]  # the same in every process


def sgd(model: torch.nn.Module, lr: float = 0.1) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=lr)


CONSTRUCTOR = [
    ({"total_steps": 0}, ValueError, "total_steps must be at least 1, got 0"),
    ({"total_steps": 2.5}, TypeError, "total_steps must be an int, got float"),
    ({"total_steps": None}, ValueError, "total_steps must be an int for decay 'cosine'"),
    (
        {"total_steps": None, "decay": "constant"},
        ValueError,
        "warmup must be an int of steps when total_steps is None, got the share 0.1",
    ),
    ({"warmup": 200}, ValueError, "warmup must be at most total_steps=100, got 200"),
    ({"warmup": -1}, ValueError, "warmup must be at least 0 steps, got -1"),
    ({"warmup": 1.5}, ValueError, "warmup must be a share in [0, 1], or an int of steps, got 1.5"),
    ({"warmup": math.nan}, ValueError, "got nan"),
    ({"warmup": "10%"}, TypeError, "warmup must be an int (steps) or a float (share), got '10%'"),
    ({"lr": math.nan}, ValueError, "lr must be positive and finite, got nan"),
    ({"lr": -1e-3}, ValueError, "lr must be positive and finite, got -0.001"),
    ({"lr": "auto", "guard": None}, ValueError, "guard must be one that acts for lr='auto'"),
    ({"lr": 1e-3, "search": Search()}, ValueError, "search must be None unless lr='auto'"),
    ({"lr": "fast"}, TypeError, "lr must be a float, 'auto' or None, got str"),
    ({"min_lr_ratio": 1.5}, ValueError, "min_lr_ratio must be in [0, 1], got 1.5"),
    ({"decay": "exponential"}, ValueError, "decay must be one of cosine, linear"),
    (
        {"decay": 3},
        TypeError,
        "decay must be a name, a Schedule, a scheduler or a callable, got int",
    ),
    (
        {"decay": lambda step: -1.0},
        ValueError,
        "decay must return finite multipliers of at least 0, got -1.0 at step 0",
    ),
    ({"guard": True}, TypeError, "guard must be a Guard or None, got bool"),
    ({"history_size": 0}, ValueError, "history_size must be an int of at least 1, got 0"),
    ({"device_path": "gpu"}, ValueError, "device_path must be one of"),
    ({"device_path": "fused"}, ValueError, "needs parameters on a CUDA device, got cpu"),
    ({"device_path": "capturable"}, ValueError, "needs parameters on a CUDA device, got cpu"),
    (
        {"snapshot": "disk"},
        ValueError,
        "snapshot must be one of ('auto', 'device', 'host', 'off'",
    ),
    ({"recorder": "missing/run.jsonl"}, OSError, "path must be a file that can be written, got"),
    ({"search": 1}, TypeError, "search must be a Search or None, got int"),
    ({"model": 1}, TypeError, "model must be a torch.nn.Module or None, got int"),
    ({"on_rollback": 1}, TypeError, "on_rollback must be callable or None, got int"),
    ({"process_group": 1}, ValueError, "process_group=1 is not available in this version"),
]


@pytest.mark.parametrize(("arguments", "kind", "message"), CONSTRUCTOR, ids=short)
def test_the_constructor_names_what_is_wrong_and_leaves_the_optimizer(
    make_model, arguments, kind, message
):
    optimizer = sgd(make_model())
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(kind) as error:
        AdaptiveLR(optimizer, **{"total_steps": 100, **arguments})
    assert message in str(error.value)
    assert optimizer.state_dict() == before
    assert not optimizer._optimizer_step_pre_hooks
    AdaptiveLR(optimizer, total_steps=100)  # a failed attempt does not count as attached


@pytest.mark.parametrize("lr", [math.nan, math.inf, 0.0])
def test_a_broken_lr_in_the_groups_is_refused(make_model, lr):
    optimizer = sgd(make_model())
    optimizer.param_groups[0]["lr"] = lr
    with pytest.raises(ValueError, match="lr"):
        AdaptiveLR(optimizer, total_steps=10)


def test_only_optimizers_can_be_attached_to(make_model):
    with pytest.raises(TypeError, match=r"must be a torch.optim.Optimizer, got Sequential"):
        AdaptiveLR(make_model(), total_steps=10)


def test_too_many_groups_are_refused():
    groups = [{"params": [torch.zeros(1, requires_grad=True)]} for _ in range(65)]
    with pytest.raises(ValueError, match="at most 64 parameter groups, got 65"):
        AdaptiveLR(torch.optim.SGD(groups, lr=0.1), total_steps=10)


def test_attaching_twice_is_refused(make_model):
    optimizer = sgd(make_model())
    AdaptiveLR(optimizer, total_steps=10)
    with pytest.raises(RuntimeError, match=r"already has a controller; call its detach\(\)"):
        AdaptiveLR(optimizer, total_steps=10)


SETTINGS = [
    (Guard, {"mode": "watch"}, "mode must be 'act' or 'observe', got 'watch'"),
    (Guard, {"backoff_factor": 1.0}, "backoff_factor must be in (0, 1), got 1.0"),
    (Guard, {"max_consecutive_skips": 0}, "max_consecutive_skips must be at least 1, got 0"),
    (Guard, {"rewarm_steps": 0}, "rewarm_steps must be at least 1, got 0"),
    (Schedule, {"decay": "table"}, "decay must be one of"),
    (Schedule, {"decay_share": 0.0}, "decay_share must be in (0, 1], got 0.0"),
    (Schedule, {"cycles": 0}, "cycles must be at least 1, got 0"),
    (Schedule, {"timescale": -1.0}, "timescale must be positive and finite, got -1.0"),
]


@pytest.mark.parametrize(("kind", "arguments", "message"), SETTINGS, ids=short)
def test_settings_check_themselves(kind, arguments, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 (checked below)
        kind(**arguments)
    assert message in str(error.value)


LOSSES = [
    (
        torch.ones(32),
        ValueError,
        "loss must have one element, got shape (32,); reduce it first, e.g. loss.mean()",
    ),
    (
        torch.ones((), dtype=torch.int64),
        TypeError,
        "loss must be of a floating-point dtype, got torch.int64",
    ),
    (
        torch.ones((), device="meta"),
        ValueError,
        "loss must be on cpu, where the parameters are, got meta",
    ),
    ("2.0", TypeError, "loss must be a tensor or a float, got str"),
]
NEGATED = torch.tensor(3 + 4j).conj().imag


@pytest.mark.parametrize("steps_before", [0, 1])
@pytest.mark.parametrize(("loss", "kind", "message"), LOSSES, ids=short)
def test_a_bad_loss_is_refused_and_the_step_goes_on_with_a_good_one(
    make_model, batches, loss, kind, message, steps_before
):
    model = make_model()
    optimizer = sgd(model)
    controller = AdaptiveLR(optimizer, total_steps=10)
    train(controller, model, batches[:steps_before])
    good = loss_of(model, batches[0])
    good.backward()
    before = parameters_of(model)
    with pytest.raises(kind) as error:
        controller.step(loss)
    assert message in str(error.value)
    assert same(before, parameters_of(model))
    assert len(controller.history()) == steps_before
    controller.step(good)
    assert controller.status().loss == pytest.approx(good.item())


def test_a_loop_whose_losses_are_negated_when_read_is_told_at_the_first(make_model):
    controller = AdaptiveLR(sgd(make_model()), total_steps=10)
    with pytest.raises(ValueError, match=r"hand in loss\.resolve_neg\(\)"):
        controller.step(NEGATED)
    controller.step(NEGATED.resolve_neg())
    assert controller.status().loss == -4.0


def test_calls_in_the_wrong_way_say_the_right_one(make_model):
    optimizer = sgd(make_model())
    controller = AdaptiveLR(optimizer, total_steps=10)
    with pytest.raises(RuntimeError, match=r"pass step\(loss\), call observe\(loss\) before"):
        controller.step()
    with pytest.raises(TypeError, match="pass it as closure="):
        controller.step(lambda: torch.tensor(1.0))
    with pytest.raises(ValueError, match="reduction must be 'mean' or 'sum', got 'max'"):
        controller.observe(torch.tensor(1.0), reduction="max")
    controller.observe(torch.tensor(1.0))
    with pytest.raises(ValueError, match="reduction must be the same for all losses of a step"):
        controller.observe(torch.tensor(1.0), reduction="sum")
    with pytest.raises(ValueError, match="lr must be positive and finite, got inf"):
        controller.set_peak(math.inf)
    with pytest.raises(ValueError, match="total_steps must be at least"):
        controller.extend(0)
    controller.step()
    assert controller.status().step == 1


def damaged(saved: dict, change) -> dict:
    saved = copy.deepcopy(saved)
    saved["param_groups"][0]["adaptlr"] = change(saved["param_groups"][0]["adaptlr"])
    return saved


def with_entry(index: int, value: float):
    """Return what changes one of the numbers whose bytes the tensor holds."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(torch.float64)[index] = value
        return tensor

    return change


def with_state(name: str, value: float):
    """Return what changes a field of the State, which lies behind a header and two peaks."""
    return with_entry(7 + state_dtype.fields[name][1] // 8, value)


CHECKPOINTS = {
    "version": (with_entry(0, 1.0), "version must be 4, got 1"),
    "groups": (with_entry(2, 3.0), "must be of 1 parameter groups, as the optimizer has, got 3"),
    "cut short": (lambda tensor: tensor[:160], "must hold"),
    "cut in a number": (lambda tensor: tensor[:161], "must be bytes of float64, got 161"),
    "cast": (lambda tensor: tensor.half(), "must be bytes of float64"),
    "empty": (lambda tensor: tensor[:0], "version must be 4, got nothing"),
    "nan": (with_state("cuts", math.nan), "cuts must be finite, got nan"),
    "step": (with_state("step", 2.5), "step must be a count, got 2.5"),
    "factor": (with_state("factor", -1.0), "factor must be at least 0, got -1"),
    "phase": (with_state("phase", 12.0), "phase must be a count of at most 11, got 12"),
    "index": (with_state("fine.next_difference", 24.0), "must be a count of at most 23, got 24"),
    "slot": (with_state("good_slot", 4.0), "good_slot must be a count of at most 3, got 4"),
    "peak": (with_entry(6, -1.0), "must be finite and not negative, got -1.0"),
    "length": (with_entry(4, -5.0), "total_steps must be at least 1, got -5"),
    "length nan": (with_entry(3, math.nan), "must begin with counts, got"),
    "peak nan": (with_entry(5, math.nan), "peaks must be finite, got"),
    "not a tensor": (lambda tensor: "soon", "must be a tensor"),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_corrupt_checkpoint_is_refused_whole(make_model, batches, name):
    change, message = CHECKPOINTS[name]
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    controller = AdaptiveLR(optimizer, total_steps=10)
    for batch in batches[:3]:
        loss = loss_of(model, batch)
        loss.backward()
        controller.step(loss)
    saved = copy.deepcopy(optimizer.state_dict())
    loss_of(model, batches[3]).backward()
    controller.step(loss)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises((ValueError, TypeError)) as error:
        optimizer.load_state_dict(damaged(saved, change))
    assert message in str(error.value)
    after = optimizer.state_dict()
    assert torch.equal(before["param_groups"][0]["adaptlr"], after["param_groups"][0]["adaptlr"])
    assert torch.equal(before["state"][0]["momentum_buffer"], after["state"][0]["momentum_buffer"])
    own = controller.state_dict()
    with pytest.raises((ValueError, TypeError)):
        controller.load_state_dict({"adaptlr": change(own["adaptlr"])})
    assert controller.status().step == 4


def test_a_missing_entry_is_a_key_error(make_model):
    controller = AdaptiveLR(sgd(make_model()), total_steps=10)
    with pytest.raises(KeyError, match="must have the entry 'adaptlr'"):
        controller.load_state_dict({})


def test_several_processes_need_guard_none(make_model, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    optimizer = sgd(make_model())
    with pytest.raises(RuntimeError, match="guard must be None where several processes train"):
        AdaptiveLR(optimizer, total_steps=10)
    AdaptiveLR(optimizer, total_steps=10, guard=None)
