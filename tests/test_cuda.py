"""The same promises on a CUDA device: the kernel agrees with the host, and nothing waits."""

from __future__ import annotations

import copy
import dataclasses
import gc
import os
import subprocess
import sys
import warnings
import weakref

import conftest
import numpy as np
import pytest
import torch
from conftest import loss_of, parameters_of, same
from test_update import CASES, assert_close, config_of, signals_of, to_structured
from traces import TRACES

import adaptlr
from adaptlr import AdaptiveLR, Guard, _extension

pytestmark = pytest.mark.cuda
STEPS = 40
KERNEL_RTOL = 1e-9  # the device's cos, sin and exp differ from libm's in the last bits


def image() -> bytes:
    from adaptlr.kernel_image import kernel_image

    found = kernel_image(0)
    assert found is not None
    return found


def stream() -> int:
    return torch._C._cuda_getCurrentRawStream(0)


class Device:
    """A DeviceController with its block, driven by hand."""

    def __init__(self, config, history_size: int) -> None:
        self.block = torch.zeros(_extension.BLOCK_BYTES, dtype=torch.uint8, device="cuda")
        self.core = _extension.DeviceController(
            0,
            image(),
            self.block.data_ptr(),
            config,
            _extension.initial_state(),
            history_size,
            stream(),
        )

    def state(self) -> np.ndarray:
        first = _extension.STATE_OFFSET
        raw = self.block[first : first + _extension.state_dtype.itemsize].cpu().numpy()
        return raw.view(_extension.state_dtype)[0]


def on_device(row: np.ndarray, table: np.ndarray | None) -> tuple[np.ndarray, torch.Tensor | None]:
    if table is None:
        return row, None
    copied = torch.from_numpy(np.ascontiguousarray(table)).cuda()
    row = row.copy()
    row["table"] = copied.data_ptr()
    return row, copied


@pytest.mark.parametrize(("trace", "config"), CASES)
def test_the_kernel_agrees_with_the_host_on_every_field(trace, config):
    row, table = to_structured(config)
    signals = [dataclasses.replace(each, overwritten=False) for each in signals_of(trace)]
    host = _extension.HostController(row, len(signals) + 1)
    device_row, kept = on_device(row, table if table.size else None)
    device = Device(device_row, len(signals) + 1)
    losses = torch.from_numpy(np.array([each.loss for each in signals])).cuda()
    flags = torch.tensor([float(each.overflow) for each in signals], device="cuda")
    norms = torch.from_numpy(np.array([each.grad_norm for each in signals])).cuda()
    for index, each in enumerate(signals):
        host.step(*dataclasses.astuple(each))
        loss, flag = losses.data_ptr() + 8 * index, flags.data_ptr() + 4 * index
        dtype, lr = _extension.FLOAT64, each.applied_lr
        # On the device and as a float, by turns.
        norm = norms.data_ptr() + 8 * index if index % 2 else 0
        value = -1.0 if norm else each.grad_norm
        device.core.step(stream(), loss, dtype, True, norm, dtype, value, flag, lr)
        if index % 500 == 0:
            torch.cuda.synchronize()
    torch.cuda.synchronize()
    expected, actual = host.records(), device.core.records()
    assert len(actual) == len(expected) == len(signals)
    for name in expected.dtype.names[:-1]:  # the checksum is of the last bits too
        assert_close(actual[name], expected[name], name, trace.loss_unit, KERNEL_RTOL)
    state, device_state = host.state.reshape(1), device.state().reshape(1)
    for name in _extension.state_dtype.names:
        assert_close(device_state[name], state[name], name, trace.loss_unit, KERNEL_RTOL)
    np.testing.assert_array_equal(device.core.events()["step"], host.events()["step"])
    del kept


def test_a_captured_step_replays_as_the_eager_one():
    trace = next(trace for trace in TRACES if trace.name == "blow_up")
    row, _ = to_structured(config_of(trace, 0))
    eager, captured = Device(row, 4096), Device(row, 4096)
    loss = torch.zeros((), dtype=torch.float64, device="cuda")
    values = torch.from_numpy(np.ascontiguousarray(trace.losses[:4000])).cuda()
    side = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.stream(side), torch.cuda.graph(graph, stream=side):
        captured.core.step(stream(), loss.data_ptr(), _extension.FLOAT64, True)
    for index in range(len(values)):
        loss.copy_(values[index])
        graph.replay()
        eager.core.step(stream(), loss.data_ptr(), _extension.FLOAT64, True)
    torch.cuda.synchronize()
    np.testing.assert_array_equal(captured.core.records()["lr"], eager.core.records()["lr"])
    assert len(captured.core.records()) == 4000


FUSED = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "SGD nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "Adam amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "AdamW capturable": lambda p: torch.optim.AdamW(p, lr=0.01, capturable=True),
}


def train(model, optimizer, data, controller=None, lrs=None, poison=(), steps=STEPS):
    for step in range(steps):
        loss = loss_of(model, data[step % len(data)])
        (loss * float("nan") if step in poison else loss).backward()
        if controller is not None:
            controller.step(loss * float("nan") if step in poison else loss)
        else:
            for group in optimizer.param_groups:
                group["lr"].fill_(lrs[step])
            if step not in poison:
                optimizer.step()
        optimizer.zero_grad()


@pytest.mark.filterwarnings("ignore:This instance was constructed with capturable")
@pytest.mark.parametrize("name", FUSED)
def test_the_fused_path_equals_a_bare_fused_loop_and_skips_without_a_trace(name, make_model, data):
    controlled, bare = make_model(device="cuda"), make_model(device="cuda")
    optimizer = FUSED[name](controlled.parameters())
    controller = AdaptiveLR(optimizer, total_steps=STEPS, snapshot="off")
    assert "fused" in repr(controller)
    poison = (0, 1, 7, 20)
    train(controlled, optimizer, data, controller, poison=poison)
    torch.cuda.synchronize()
    history = controller.history()
    assert np.flatnonzero(history["action"]).tolist() == list(poison)
    reference = FUSED[name](bare.parameters())
    for group in reference.param_groups:
        group["fused"] = True
        group["lr"] = torch.tensor(0.0, device="cuda")
    train(bare, reference, data, lrs=history["lr"].astype(np.float32).tolist(), poison=poison)
    assert same(parameters_of(controlled), parameters_of(bare))


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_nothing_waits_for_the_device(make_model, data):
    model = make_model(device="cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    controller = AdaptiveLR(optimizer, total_steps=200)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(200):
            loss = loss_of(model, data[step % len(data)])
            loss.backward()
            controller.step(loss)
            controller.zero_grad()
            controller.status()
            controller.events()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert controller.status().step == 200
    assert controller.status().lag == 0


def test_the_rate_on_the_device_is_the_schedule_in_float32(make_model, data):
    model, reference = make_model(device="cuda"), make_model()
    groups = [
        {"params": model[0].parameters(), "lr": 0.1},
        {"params": model[2].parameters(), "lr": 0.03},
    ]
    optimizer = torch.optim.SGD(groups)
    controller = AdaptiveLR(optimizer, total_steps=STEPS)
    host = AdaptiveLR(torch.optim.SGD(reference.parameters(), lr=0.1), total_steps=STEPS)
    for _ in range(STEPS):
        controller.step(torch.ones((), device="cuda"))
        host.step(torch.ones(()))
        expected = np.float32(host.lr)
        assert optimizer.param_groups[0]["lr"].item() == pytest.approx(expected, rel=2e-7)
        assert optimizer.param_groups[1]["lr"].item() == pytest.approx(0.3 * expected, rel=2e-7)


def test_lr_is_on_the_device_before_the_first_step(make_model):
    optimizer = torch.optim.SGD(make_model(device="cuda").parameters(), lr=0.1)
    controller = AdaptiveLR(optimizer, total_steps=100, warmup=10)
    lr = optimizer.param_groups[0]["lr"]
    assert lr.device.type == "cuda"
    assert lr.dtype is torch.float32
    assert lr.item() == pytest.approx(controller.lr, rel=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_losses_of_every_dtype_are_read_and_folded(make_model, dtype, shape):
    optimizer = torch.optim.SGD(make_model(device="cuda").parameters(), lr=0.1)
    controller = AdaptiveLR(optimizer, total_steps=100)
    buffer = torch.tensor([9.0, 1.5, 2.5, 5.0], dtype=dtype, device="cuda")
    for index in (1, 2, 3):  # also halves that begin in the middle of a word
        controller.observe(buffer[index].reshape(shape))
    optimizer.step()
    controller.observe(buffer[0].reshape(shape), reduction="sum")
    controller.observe(buffer[1].reshape(shape), reduction="sum")
    optimizer.step()
    torch.cuda.synchronize()
    assert controller.history()["loss"].tolist() == [3.0, 10.5]


def test_a_loss_buffer_that_is_reused_is_folded_from_the_second_step_on(make_model):
    optimizer = torch.optim.SGD(make_model(device="cuda").parameters(), lr=0.1)
    controller = AdaptiveLR(optimizer, total_steps=100)
    buffer = torch.zeros((), device="cuda")
    for _ in range(3):
        for value in (1.0, 2.0, 3.0, 6.0):
            buffer.fill_(value)
            controller.observe(buffer)
        optimizer.step()
    torch.cuda.synchronize()
    assert controller.history()["loss"].tolist()[1:] == [3.0, 3.0]


def test_a_gradient_norm_on_the_device_skips_when_it_is_not_finite(make_model, data):
    model = make_model(device="cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    controller = AdaptiveLR(optimizer, total_steps=100)
    before = parameters_of(model)
    loss = loss_of(model, data[0])
    (loss * float("inf")).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    controller.step(loss, grad_norm=norm)
    torch.cuda.synchronize()
    assert same(before, parameters_of(model))
    assert controller.events()[0].kind == "skip"


class Sharded:
    """What is used of a DTensor."""

    def __init__(self, norm: torch.Tensor) -> None:
        self.norm = norm

    def full_tensor(self) -> torch.Tensor:
        return self.norm


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("wrap", [torch.Tensor.clone, Sharded], ids=["tensor", "DTensor"])
def test_a_gradient_norm_far_above_its_level_is_flagged_without_a_wait(make_model, wrap):
    optimizer = torch.optim.SGD(make_model(device="cuda").parameters(), lr=0.1)
    controller = AdaptiveLR(optimizer, total_steps=100, snapshot="off")
    losses = torch.linspace(2.0, 1.0, 40, device="cuda")
    norms = (1.0 + 0.1 * torch.sin(torch.arange(40.0))).cuda()
    norms[30] = 100.0
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for loss, norm in zip(losses.unbind(), norms.unbind(), strict=True):
            controller.step(loss, grad_norm=wrap(norm))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    history = controller.history()
    assert history["grad_norm"].tolist() == norms.tolist()
    assert np.flatnonzero(history["flags"]).tolist() == [30]
    assert history["flags"][30] == adaptlr.Flag.NORM_SPIKE


@pytest.mark.parametrize("fused", [True, False])
def test_grad_scaler_s_flag_and_ours_are_one(make_model, data, fused):
    model = make_model(device="cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
    controller = AdaptiveLR(optimizer, total_steps=STEPS)
    scaler = torch.amp.GradScaler("cuda", init_scale=16.0)
    overflows, poison = (2, 3), (5,)
    for step in range(10):
        before = parameters_of(model)
        loss = loss_of(model, data[step])
        factor = float("inf") if step in overflows else 1.0
        controller.observe(loss * float("nan") if step in poison else loss)
        (scaler.scale(loss) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        controller.zero_grad()
        if fused or step not in poison:
            assert same(before, parameters_of(model)) == (step in overflows + poison)
        assert "found_inf" not in optimizer.__dict__
    torch.cuda.synchronize()
    assert scaler.get_scale() == 4.0
    flags = controller.history()["flags"]
    overflowed = np.flatnonzero(flags & adaptlr.Flag.OVERFLOW).tolist()
    assert overflowed == (list(overflows) if fused else [])
    assert controller.status().step == (10 if fused else 8)


def test_a_spent_budget_is_told_at_the_next_call(make_model, data):
    model = make_model(device="cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    guard = Guard(max_consecutive_skips=2)
    controller = AdaptiveLR(optimizer, total_steps=100, guard=guard, snapshot="off")
    train(model, optimizer, data, controller, steps=5)
    before = parameters_of(model)
    nan = torch.full((), float("nan"), device="cuda")
    for _ in range(3):
        controller.step(nan)
        torch.cuda.synchronize()
    with pytest.raises(adaptlr.TrainingDiverged, match="the loss is nan"):
        controller.observe(nan)
    assert controller.status().step == 8
    with pytest.raises(adaptlr.TrainingDiverged):
        controller.step(torch.ones((), device="cuda"))
    with pytest.raises(adaptlr.TrainingDiverged):
        controller.check()
    assert same(before, parameters_of(model))


def test_another_writer_on_the_device_is_noticed_once(make_model):
    optimizer = torch.optim.SGD(make_model(device="cuda").parameters(), lr=0.1)
    controller = AdaptiveLR(optimizer, total_steps=100, warmup=0, decay="constant")
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(5):
            controller.step(torch.ones((), device="cuda"))
            torch.cuda.synchronize()
            assert optimizer.param_groups[0]["lr"].item() == pytest.approx(0.1)
            scheduler.step()
    assert sum("as well as adaptlr" in str(warning.message) for warning in caught) == 1


def test_a_replaced_lr_tensor_is_taken_back_at_the_next_loss(make_model):
    optimizer = torch.optim.SGD(make_model(device="cuda").parameters(), lr=0.1)
    controller = AdaptiveLR(optimizer, total_steps=100, warmup=0, decay="constant")
    ours = optimizer.param_groups[0]["lr"]
    optimizer.param_groups[0]["lr"] = 7.0
    controller.step(torch.ones((), device="cuda"))
    assert optimizer.param_groups[0]["lr"] is ours


LATE = {
    "RMSprop loop": lambda p: torch.optim.RMSprop(p, lr=0.01, foreach=False),
    "AdamW loop": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=False),
    "SGD dampening": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, dampening=0.1),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
}


@pytest.mark.parametrize("name", LATE)
def test_late_float_keeps_the_schedule_on_time_and_nan_out(name, make_model, data):
    controlled, bare = make_model(device="cuda"), make_model(device="cuda")
    optimizer = LATE[name](controlled.parameters())
    controller = AdaptiveLR(optimizer, total_steps=STEPS)
    assert type(optimizer.param_groups[0]["lr"]) is float
    used = []
    poison = (7, 20)
    for step in range(STEPS):
        loss = loss_of(controlled, data[step])
        loss = loss * float("nan") if step in poison else loss
        loss.backward()
        controller.step(loss)
        used.append(optimizer.param_groups[0]["lr"])
        controller.zero_grad()
    torch.cuda.synchronize()
    assert used == controller.history()["lr"].tolist()
    assert all(torch.isfinite(p).all() for p in controlled.parameters())
    reference = LATE[name](bare.parameters())
    for step in range(STEPS):
        loss_of(bare, data[step]).backward()
        if step in poison:
            for parameter in bare.parameters():
                parameter.grad.zero_()
        reference.param_groups[0]["lr"] = used[step]
        reference.step()
        reference.zero_grad()
    assert same(parameters_of(controlled), parameters_of(bare))


def test_late_float_applies_a_cut_within_two_steps_and_says_what_was_applied(make_model):
    optimizer = torch.optim.RMSprop(make_model(device="cuda").parameters(), lr=0.1)
    controller = AdaptiveLR(
        optimizer, snapshot="off", total_steps=1000, warmup=0, decay="constant", device_path="float"
    )
    rng = np.random.default_rng(0)
    applied = []
    for step in range(300):
        rise = np.exp(min((step - 200) / 5, 5.0)) if step >= 200 else 0.0
        loss = 2.0 + 0.05 * rng.standard_normal() + 0.05 * rise
        controller.step(torch.tensor(loss, device="cuda"))
        applied.append(optimizer.param_groups[0]["lr"])
    torch.cuda.synchronize()
    history = controller.history()
    assert history["lr"].tolist() == applied
    assert any(event.kind == "cut" for event in controller.events())
    factors = history["factor"].tolist()
    for step in range(3, 300):
        assert applied[step] in [0.1 * factor for factor in factors[step - 2 : step]]


def test_zeroing_reaches_every_byte_and_no_other(make_model):
    row, _ = to_structured(config_of(TRACES[0], 0))
    device = Device(row, 16)
    nan = torch.full((), float("nan"), device="cuda")
    sizes = (1, 15, 16, 17, 1_000_003)
    tensors = [torch.ones(size, dtype=torch.uint8, device="cuda") for size in sizes]
    slices = [tensor[1:-1] if len(tensor) > 2 else tensor[:0] for tensor in tensors] * 100
    arguments = ([s.data_ptr() for s in slices], [s.numel() for s in slices])
    device.core.zero_if_skipped(stream(), *arguments)
    assert all(tensor.all() for tensor in tensors)
    device.core.step(stream(), nan.data_ptr(), _extension.FLOAT32, True)
    device.core.zero_if_skipped(stream(), *arguments)
    torch.cuda.synchronize()
    for tensor in tensors[1:]:
        assert tensor[0] == tensor[-1] == 1
        assert not tensor[1:-1].any()


def test_gradients_that_are_no_one_piece_are_zeroed_within_their_bounds():
    parameter = torch.nn.Parameter(torch.ones(4, 3, device="cuda"))
    optimizer = torch.optim.RMSprop([parameter], lr=0.1)
    controller = AdaptiveLR(optimizer, total_steps=10)
    wide = torch.ones(4, 6, device="cuda")
    parameter.grad = wide[:, ::2]
    controller.step(torch.full((), float("nan"), device="cuda"))
    assert wide[:, ::2].abs().sum() == 0
    assert wide[:, 1::2].sum() == 12
    assert (parameter == 1).all()


@pytest.mark.parametrize("name", ["SGD momentum", "AdamW"])
def test_resuming_on_the_device_equals_never_having_stopped(name, make_model, data):
    def fresh():
        model = make_model(device="cuda")
        optimizer = FUSED[name](model.parameters())
        return model, optimizer, AdaptiveLR(optimizer, total_steps=100)

    model, optimizer, controller = fresh()
    train(model, optimizer, data, controller, steps=20, poison=(3,))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    assert type(saved[1]["param_groups"][0]["lr"]) is float
    assert saved[1]["param_groups"][0]["fused"] is None
    train(model, optimizer, data, controller)
    resumed, its_optimizer, its_controller = fresh()
    resumed.load_state_dict(saved[0])
    its_optimizer.load_state_dict(saved[1])
    train(resumed, its_optimizer, data, its_controller)
    torch.cuda.synchronize()
    assert same(parameters_of(model), parameters_of(resumed))
    np.testing.assert_array_equal(controller.history()["lr"][20:], its_controller.history()["lr"])
    plain = FUSED[name](make_model(device="cuda").parameters())
    plain.load_state_dict(saved[1])
    loss_of(make_model(device="cuda"), data[0]).backward()
    plain.step()


def test_detach_gives_floats_and_the_user_s_flags_back(make_model, data):
    model = make_model(device="cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    controller = AdaptiveLR(optimizer, total_steps=100)
    train(model, optimizer, data, controller, steps=5)
    controller.detach()
    group = optimizer.param_groups[0]
    assert type(group["lr"]) is float
    assert (group["fused"], group["foreach"]) == (None, None)
    assert not hasattr(optimizer, "_step_supports_amp_scaling")
    loss_of(model, data[0]).backward()
    optimizer.step()
    assert len(controller.history()) == 5


def test_an_optimizer_with_state_is_switched_without_losing_it(make_model, data):
    controlled, bare = make_model(device="cuda"), make_model(device="cuda")
    first, second = FUSED["AdamW"](controlled.parameters()), FUSED["AdamW"](bare.parameters())
    conftest.train_bare(first, controlled, data[:5])
    controller = AdaptiveLR(first, total_steps=10, warmup=0, decay="constant")
    conftest.train(controller, controlled, data[5:15])
    conftest.train_bare(second, bare, data[:15])
    for ours, theirs in zip(parameters_of(controlled), parameters_of(bare), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_group_added_later_joins_the_fused_path(make_model, data):
    model = make_model(device="cuda")
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1, momentum=0.9)
    controller = AdaptiveLR(optimizer, total_steps=10, warmup=0, decay="linear")
    controller.step(torch.ones((), device="cuda"))
    optimizer.add_param_group({"params": model[2].parameters(), "lr": 0.4})
    loss = loss_of(model, data[0])
    loss.backward()
    controller.step(loss)
    lrs = [group["lr"].item() for group in optimizer.param_groups]
    assert lrs == pytest.approx([0.08, 0.32])
    assert optimizer.param_groups[1]["fused"]


def test_set_peak_and_extend_reach_the_device(make_model):
    optimizer = torch.optim.SGD(make_model(device="cuda").parameters(), lr=0.1)
    controller = AdaptiveLR(optimizer, total_steps=10, warmup=0, decay=lambda step: 1 / (1 + step))
    controller.step(torch.ones((), device="cuda"))
    controller.set_peak(0.6)
    controller.step(torch.ones((), device="cuda"))
    assert optimizer.param_groups[0]["lr"].item() == pytest.approx(0.3)
    controller.extend(20)
    controller.step(torch.ones((), device="cuda"))
    assert optimizer.param_groups[0]["lr"].item() == pytest.approx(0.2)


def test_what_cannot_be_done_is_said_at_once(make_model):
    optimizer = torch.optim.SGD(make_model(device="cuda").parameters(), lr=0.1)
    controller = AdaptiveLR(optimizer, total_steps=10)
    with pytest.raises(ValueError, match=r"must be on cuda:0, where the parameters are, got cpu"):
        controller.step(torch.tensor(1.0))
    with pytest.raises(TypeError, match="loss must be the tensor on cuda:0"):
        controller.step(1.0)
    with pytest.raises(ValueError, match=r"loss must have one element, got shape \(2,\)"):
        controller.step(torch.ones(2, device="cuda"))
    foreach = torch.optim.AdamW(make_model(device="cuda").parameters(), foreach=True)
    with pytest.raises(ValueError, match="not possible: foreach=True was set"):
        AdaptiveLR(foreach, total_steps=10, device_path="fused")
    other = torch.optim.SGD(make_model(device="cuda").parameters(), lr=0.1)
    scratch = torch.zeros(1, device="cuda")
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        scratch.add_(1)
        with pytest.raises(RuntimeError, match="before the capture"):
            AdaptiveLR(other, total_steps=10)


def test_device_path_float_leaves_the_optimizer_s_flags_alone(make_model):
    optimizer = torch.optim.AdamW(make_model(device="cuda").parameters(), lr=0.1)
    controller = AdaptiveLR(optimizer, total_steps=10, device_path="float")
    assert optimizer.param_groups[0]["fused"] is None
    assert "float" in repr(controller)


SCRIPT = """
import torch, adaptlr
p = torch.nn.Parameter(torch.ones(4, device="cuda"))
optimizer = torch.optim.AdamW([p], lr=0.1)
controller = adaptlr.AdaptiveLR(optimizer, total_steps=10)
for _ in range(10):
    loss = p.pow(2).sum()
    loss.backward()
    controller.step(loss)
    controller.zero_grad()
torch.cuda.synchronize()
print(controller, controller.history()["lr"].tolist())
"""


WHOLE = "from adaptlr import _extension; _extension.driver_version = lambda: 0"


@pytest.mark.parametrize("kernels", ["fatbin", "nvrtc", "nvrtc as a whole", "host"])
def test_every_image_gives_the_same_run(kernels, tmp_path):
    if kernels == "fatbin" and not _extension.fatbin:
        pytest.skip("built without nvcc")
    kernels, _, as_a_whole = kernels.partition(" ")
    script = WHOLE + SCRIPT if as_a_whole else SCRIPT
    environment = {**os.environ, "ADAPTLR_KERNELS": kernels, "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-c", script]
    outputs = []
    for _ in range(2 if kernels == "nvrtc" else 1):
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        outputs.append(run.stdout)
    lrs = [eval(output.split(") ", 1)[1]) for output in outputs]
    reference = adaptlr.AdaptiveLR(
        torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1), total_steps=10, guard=None
    )
    for _ in range(10):
        reference.step(1.0)
    for sequence in lrs:
        np.testing.assert_allclose(sequence, reference.history()["lr"], rtol=1e-12)
    assert ("device_path='fused'" in outputs[0]) == (kernels != "host")
    assert bool(list(tmp_path.rglob("*.cubin"))) == (kernels == "nvrtc")


def test_a_step_without_a_loss_is_not_skipped_for_an_old_one(make_model, data):
    model = make_model(device="cuda")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = AdaptiveLR(optimizer, total_steps=10, warmup=0, decay="constant")
    loss_of(model, data[0]).backward()
    controller.step(torch.full((), float("nan"), device="cuda"))
    before = parameters_of(model)
    optimizer.step()
    assert not same(before, parameters_of(model))
    assert "found_inf" not in optimizer.__dict__


def test_a_controller_on_the_device_keeps_no_optimizer_alive(make_model, data):
    model = make_model(device="cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    controller = AdaptiveLR(optimizer, total_steps=10)
    train(model, optimizer, data, controller, steps=3)
    gone = weakref.ref(optimizer)
    del optimizer, controller
    gc.collect()
    assert gone() is None


def test_the_flight_record_can_be_read_while_the_device_writes_it():
    row, _ = to_structured(config_of(TRACES[0], 0))
    device = Device(row, 64)
    loss = torch.full((), 2.0, dtype=torch.float64, device="cuda")
    torch.cuda.synchronize()
    seen = 0
    for index in range(20_000):
        device.core.step(stream(), loss.data_ptr(), _extension.FLOAT64, True)
        if index % 20 == 0:
            records = device.core.records()
            assert np.array_equal(np.diff(records["sequence"]), np.ones(max(len(records) - 1, 0)))
            assert (records["step"] == records["sequence"] - 1).all()
            seen = max(seen, int(records["sequence"][-1])) if len(records) else seen
    torch.cuda.synchronize()
    assert seen > 1000
    assert device.core.records()["step"].tolist() == list(range(20_000 - 64, 20_000))
