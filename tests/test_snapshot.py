"""Snapshots on the host: what a rollback restores, bit for bit, and where the copies are kept."""

from __future__ import annotations

import copy
import gc
import logging
import types
import weakref

import numpy as np
import pytest
import torch
from conftest import loss_of, parameters_of, same, train

from adaptlr import AdaptiveLR, Guard, Phase, _extension, placement
from adaptlr.contents import Contents
from adaptlr.device_slots import check_dense, pieces, places
from adaptlr.first_moments import NAMES, first_moments
from adaptlr.placement import place, shown, slot_bytes
from adaptlr.snapshot import Snapshots

START, FIRST, SECOND = 1, 2, 3
OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True, amsgrad=True),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=False),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=2),
}


def force(controller: AdaptiveLR, save: int = 0, restore: int = 0) -> None:
    """Have an order carried out after the coming update, as one of a decision would be."""
    orders = [save | restore << 4]

    def order(*_: object) -> None:
        if orders:
            controller._path.carry_out(orders.pop())

    controller._optimizer.register_step_post_hook(order)


def frozen(optimizer: torch.optim.Optimizer) -> dict:
    """Copy parameters and state."""
    state = copy.deepcopy(optimizer.state_dict())["state"]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {"parameters": [p.detach().clone() for p in parameters], "state": state}


def equal(left: object, right: object) -> bool:
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(equal, left, right))
    return left == right


def addresses(optimizer: torch.optim.Optimizer) -> list[int]:
    tensors = [p for group in optimizer.param_groups for p in group["params"]]
    for state in optimizer.state.values():
        tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
    return [tensor.data_ptr() for tensor in tensors]


def step(controller, model, batch) -> None:
    optimizer = controller._optimizer

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        return loss

    controller.step(closure=closure)


def made(make_model, name="SGD momentum", **options):
    model = make_model()
    optimizer = OPTIMIZERS[name](model.parameters())
    return model, optimizer, AdaptiveLR(optimizer, total_steps=100, **options)


def snapshots_of(controller):
    return controller._attachment.snapshots


# -- what is restored --------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_restore_is_exact_for_weights_and_state(name, make_model, batches):
    model, optimizer, controller = made(make_model, name)
    for index in range(12):
        if index == 5:
            force(controller, save=FIRST)
        step(controller, model, batches[index])
        if index == 5:
            kept, where = frozen(optimizer), addresses(optimizer)
    assert not equal(frozen(optimizer), kept)
    force(controller, restore=FIRST)
    step(controller, model, batches[12])
    assert equal(frozen(optimizer), kept)
    if name != "LBFGS":  # puts new tensors into its state by itself
        assert addresses(optimizer) == where
    step(controller, model, batches[13])  # and training goes on
    assert not equal(frozen(optimizer), kept)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_goes_on_from_a_restore_as_it_did_from_the_save(name, make_model, batches):
    model, optimizer, controller = made(make_model, name, warmup=0, decay="constant")
    for batch in batches[:4]:
        step(controller, model, batch)
    force(controller, save=SECOND)
    step(controller, model, batches[4])
    runs = []
    for _ in range(2):
        for batch in batches[5:9]:
            step(controller, model, batch)
        runs.append(frozen(optimizer))
        force(controller, restore=SECOND)
        step(controller, model, batches[9])
    assert equal(*runs)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_start_is_before_the_first_update_with_the_state_after_it(name, make_model, batches):
    model, optimizer, controller = made(make_model, name)
    start, state = parameters_of(model), frozen(optimizer)["state"]
    step(controller, model, batches[0])
    if name != "Adagrad":  # has its state from the beginning
        state = frozen(optimizer)["state"]
    for batch in batches[1:5]:
        step(controller, model, batch)
    force(controller, restore=START)
    step(controller, model, batches[5])
    assert same(parameters_of(model), start)
    if name == "LBFGS":  # counts from 0, which makes it begin anew
        assert frozen(optimizer)["state"][0]["n_iter"] == 0
    else:
        assert equal(frozen(optimizer)["state"], state)


def test_weights_loaded_after_attaching_are_the_start(make_model, batches):
    model, _, controller = made(make_model)
    model.load_state_dict(make_model(seed=7).state_dict())
    start = parameters_of(model)
    train(controller, model, batches[:4])
    force(controller, restore=START)
    train(controller, model, batches[4:5])
    assert same(parameters_of(model), start)


def test_a_step_can_save_and_restore(make_model, batches):
    model, optimizer, controller = made(make_model, "AdamW")
    train(controller, model, batches[:2])
    force(controller, save=FIRST)
    train(controller, model, batches[2:3])
    first = frozen(optimizer)
    train(controller, model, batches[3:6])
    force(controller, save=SECOND, restore=FIRST)
    aside: list = []
    optimizer.register_step_post_hook(lambda *_: aside.append(frozen(optimizer)))
    optimizer._optimizer_step_post_hooks.move_to_end(
        next(reversed(optimizer._optimizer_step_post_hooks)), last=False
    )
    train(controller, model, batches[6:7])
    assert equal(frozen(optimizer), first)
    force(controller, restore=SECOND)
    train(controller, model, batches[7:8])
    assert equal(frozen(optimizer), aside[0])


def test_buffers_are_restored_where_the_model_is_given(batches):
    def run(given: bool) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.BatchNorm1d(4))
        model.append(torch.nn.Linear(4, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        controller = AdaptiveLR(optimizer, total_steps=50, model=model if given else None)
        train(controller, model, batches[:2])
        force(controller, save=FIRST)
        train(controller, model, batches[2:3])
        kept = model[1].running_mean.clone()
        train(controller, model, batches[3:6])
        force(controller, restore=FIRST)
        train(controller, model, batches[6:7])
        return kept, model[1].running_mean

    assert torch.equal(*run(given=True))
    assert not torch.equal(*run(given=False))


class Prodigious(torch.optim.Optimizer):
    """Keeps numbers in its group and in the state, and makes a tensor late."""

    def __init__(self, params) -> None:
        super().__init__(params, {"lr": 0.1, "d": 1e-6, "k": 0, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] += 1
            group["d"] *= 2
            for index, parameter in enumerate(group["params"]):
                if parameter.grad is None or (index and group["k"] < 3):
                    continue
                state = self.state[parameter]
                state["count"] = state.get("count", 0) + 1
                state.setdefault("sum", torch.zeros_like(parameter)).add_(parameter.grad)
                parameter.sub_(state["sum"], alpha=group["lr"])


def test_numbers_of_the_optimizer_are_restored_and_those_of_the_user_are_not(make_model, batches):
    model = make_model()
    optimizer = Prodigious(model.parameters())
    controller = AdaptiveLR(optimizer, total_steps=50)
    train(controller, model, batches[:4])
    force(controller, save=FIRST)
    train(controller, model, batches[4:5])
    group = optimizer.param_groups[0]
    kept = group["d"], group["k"], [state["count"] for state in optimizer.state.values()]
    train(controller, model, batches[5:8])
    group["weight_decay"] = 0.5
    force(controller, restore=FIRST)
    train(controller, model, batches[8:9])
    now = group["d"], group["k"], [state["count"] for state in optimizer.state.values()]
    assert now == kept
    assert group["weight_decay"] == 0.5
    assert group["lr"] == controller.lr


def test_state_that_appears_late_joins_the_start(make_model, batches):
    model = make_model()
    optimizer = Prodigious(model.parameters())
    controller = AdaptiveLR(optimizer, total_steps=50)
    train(controller, model, batches[:3])
    last = list(model.parameters())[-1]
    appeared = optimizer.state[last]["sum"].clone()
    train(controller, model, batches[3:6])
    force(controller, restore=START)
    train(controller, model, batches[6:7])
    assert torch.equal(optimizer.state[last]["sum"], appeared)


def test_groups_that_are_added_join_every_slot(make_model, batches):
    model, optimizer, controller = made(make_model)
    train(controller, model, batches[:2])
    extra = torch.nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [extra], "lr": 0.1})
    for index in range(3):
        extra.grad = torch.ones(3)
        train(controller, model, batches[index : index + 1])
    assert not torch.equal(extra, torch.ones(3))
    force(controller, restore=START)
    train(controller, model, batches[3:4])
    assert torch.equal(extra, torch.ones(3))


def test_a_slot_that_was_never_filled_is_not_restored(make_model, batches):
    rollbacks: list = []
    model, _, controller = made(make_model, on_rollback=rollbacks.append)
    train(controller, model, batches[:3])
    force(controller, restore=SECOND)
    train(controller, model, batches[3:4])
    bare, _, other = made(make_model)
    train(other, bare, batches[:4])
    assert same(parameters_of(model), parameters_of(bare))
    assert rollbacks == []


def test_an_order_is_carried_out_once(make_model, batches):
    model, optimizer, controller = made(make_model)
    train(controller, model, batches[:2])
    force(controller, restore=START)
    train(controller, model, batches[2:3])
    kept = parameters_of(model)
    loss_of(model, batches[3]).backward()
    optimizer.step()  # not ours
    assert not same(parameters_of(model), kept)


def test_rollbacks_are_told_with_the_steps_behind_the_weights(make_model, batches):
    rollbacks: list = []
    model, _, controller = made(make_model, on_rollback=rollbacks.append)
    train(controller, model, batches[:2])
    force(controller, save=FIRST)
    train(controller, model, batches[2:4])
    for slot in (FIRST, START):
        force(controller, restore=slot)
        train(controller, model, batches[4:5])
    assert rollbacks == [3, 0]


def test_resuming_makes_that_state_the_start(make_model, batches):
    model, optimizer, controller = made(make_model, "AdamW")
    train(controller, model, batches[:3])
    saved = copy.deepcopy((optimizer.state_dict(), model.state_dict()))
    train(controller, model, batches[3:6])
    optimizer.load_state_dict(saved[0])
    model.load_state_dict(saved[1])  # in this order, too
    kept = frozen(optimizer)
    train(controller, model, batches[6:9])
    force(controller, restore=START)
    train(controller, model, batches[9:10])
    assert equal(frozen(optimizer), kept)


# -- how many slots, where, and for whom -------------------------------------------------------


def slots_of(controller) -> int:
    return int(controller._path.core.config["snapshot_slots"])


def test_the_slots_are_made_at_the_first_step_and_told_once(make_model, batches, caplog):
    model, _, controller = made(make_model)
    snapshots = snapshots_of(controller)
    assert (snapshots.slots, snapshots.bytes, slots_of(controller)) == (0, 0, 0)
    with caplog.at_level(logging.INFO, "adaptlr"):
        train(controller, model, batches[:4])
    assert slots_of(controller) == snapshots.slots == 3
    weights = sum(p.nbytes for p in model.parameters())
    assert snapshots.bytes == 2 * weights  # START alone so far, with its momentum
    assert repr(snapshots) == f"Snapshots(slots=3, where='device', bytes={2 * weights})"
    assert [r.message for r in caplog.records] == [
        "snapshots: 3 slots of about 780 bytes in the parameters' memory"
    ]


@pytest.mark.parametrize(
    "options", [{"guard": None}, {"guard": Guard(mode="observe")}, {"snapshot": "off"}]
)
def test_no_slots_where_nothing_can_order_them(options, make_model, batches):
    model, optimizer, controller = made(make_model, **options)
    train(controller, model, batches[:3])
    assert snapshots_of(controller).bytes == slots_of(controller) == 0
    assert not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize(
    ("choice", "free_device", "free_host", "expected"),
    [
        ("auto", 1200, 0, ("device", 3)),
        ("auto", 1199, 1200, ("host", 3)),
        ("auto", 1199, 1199, ("device", 1)),
        ("auto", 399, 400, ("host", 1)),
        ("auto", 399, 399, ("device", 0)),
        ("auto", None, 1200, ("device", 3)),
        ("auto", None, 1199, ("device", 1)),
        ("device", 0, 0, ("device", 3)),
        ("host", 0, 0, ("host", 3)),
        ("off", 10**9, 10**9, ("device", 0)),
    ],
)
def test_slots_take_a_quarter_of_free_memory(choice, free_device, free_host, expected):
    placed = place(100, choice, free_device, free_host)
    assert (placed.where, placed.slots) == expected


def test_a_slot_is_put_at_three_times_the_weights_until_there_is_state(make_model, batches):
    model, optimizer, controller = made(make_model, "SGD momentum")
    weights = sum(p.nbytes for p in model.parameters())
    assert slot_bytes(Contents(optimizer, None)) == 3 * weights
    train(controller, model, batches[:1])
    assert slot_bytes(Contents(optimizer, None)) == 2 * weights


@pytest.mark.parametrize(("room", "slots"), [(4 * 780, 1), (4 * 780 - 1, 0)])
def test_too_little_memory_leaves_the_start_or_nothing(
    room, slots, make_model, batches, monkeypatch
):
    monkeypatch.setattr("adaptlr.snapshot.free_host_bytes", lambda: room)
    model, _, controller = made(make_model)
    if slots:
        train(controller, model, batches[:3])
    else:
        with pytest.warns(UserWarning, match="off, and with them rollbacks: one slot takes about"):
            train(controller, model, batches[:3])
    assert slots_of(controller) == snapshots_of(controller).slots == slots


def test_free_memory_is_found():
    assert 0 < placement.free_host_bytes() < 1 << 50
    assert placement.free_device_bytes(torch.device("cpu")) is None
    assert [shown(size) for size in (999, 1500, 1.03e9)] == ["999 bytes", "1.5 kB", "1.03 GB"]


def test_detaching_frees_the_slots(make_model, batches):
    model, optimizer, controller = made(make_model)
    train(controller, model, batches[:3])
    controller.detach()
    assert snapshots_of(controller).bytes == 0
    assert not optimizer._optimizer_step_post_hooks
    optimizer.step()


def test_slots_do_not_keep_an_optimizer_alive(make_model, batches):
    model, optimizer, controller = made(make_model)
    train(controller, model, batches[:3])
    gone = weakref.ref(optimizer)
    del model, optimizer, controller
    gc.collect()
    assert gone() is None


# -- without snapshots -------------------------------------------------------------------------

MOMENTS = {
    **{name: OPTIMIZERS[name] for name in ("SGD momentum", "AdamW fused", "AdamW")},
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9),
}


def split(optimizer) -> tuple[list[torch.Tensor], dict]:
    """Return the first moments, and a copy of everything else."""
    rest = frozen(optimizer)
    moments = [
        state.pop(name) for state in rest["state"].values() for name in NAMES if name in state
    ]
    return moments, rest


def run_away(controller, model, batches, after: int = 70) -> list:
    """Train until the loss has run away and the guard answers; return what was there before."""
    before = []
    for index in range(after + 20):
        loss_of(model, batches[index % len(batches)]).backward()
        before = split(controller._optimizer)
        controller.step(1.0 + 0.01 * (index % 7) + 0.2 * max(0, index - after))
        controller.zero_grad()
        if controller.status().phase is not Phase.RUN:
            return before
    raise AssertionError("there was no answer")


@pytest.mark.parametrize("name", MOMENTS)
def test_a_cut_without_snapshots_zeroes_the_first_moment_and_nothing_else(
    name, make_model, batches
):
    model = make_model()
    optimizer = MOMENTS[name](model.parameters())
    controller = AdaptiveLR(optimizer, total_steps=200, snapshot="off", warmup=0)
    moments, rest = run_away(controller, model, batches)
    assert moments
    assert all(moment.any() for moment in moments)
    zeroed, same_rest = split(optimizer)
    assert not any(moment.any() for moment in zeroed)
    assert equal(same_rest, rest)
    (cut,) = (event for event in controller.events() if event.kind == "cut")
    assert "step skipped, momentum zeroed, learning rate cut to 0.5 " in cut.reason
    train(controller, model, batches[:1])
    assert all(moment.any() for moment in split(optimizer)[0])


def test_with_snapshots_moments_are_put_back_and_not_zeroed(make_model, batches):
    model, optimizer, controller = made(make_model, "AdamW", warmup=0)
    start = parameters_of(model)
    run_away(controller, model, batches, after=20)
    assert same(parameters_of(model), start)
    assert all(moment.any() for moment in split(optimizer)[0])
    assert all("momentum zeroed" not in event.reason for event in controller.events())


def test_only_moving_means_of_gradients_are_first_moments():
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    state = optimizer.state[parameter]
    state["exp_avg"] = torch.ones(2)
    state["momentum_buffer"] = torch.ones(2, dtype=torch.uint8)  # quantised: 0 is no zero
    state["exp_avg_sq"] = torch.ones(2)
    assert [m.data_ptr() for m in first_moments(optimizer)] == [state["exp_avg"].data_ptr()]


# -- the table of the kernel -------------------------------------------------------------------


def test_a_table_cuts_tensors_into_pieces_that_lie_alike_everywhere():
    addresses_ = np.array([4096, 10_003, 1 << 20], dtype=np.int64)
    sizes = np.array([4, 70, 150_000], dtype=np.int64)
    offsets, total = places(addresses_, sizes)
    rows = pieces(addresses_, sizes, offsets, [1 << 30, 2 << 30])
    assert rows[:, 1].sum() == sizes.sum()
    assert rows[:, 1].max() == 65536
    for slot in (2, 3):
        assert ((rows[:, slot] - rows[:, 0]) % 16 == 0).all()
        begins, ends = rows[:, slot], rows[:, slot] + rows[:, 1]
        assert (begins[1:] >= ends[:-1]).all()
        assert ends[-1] - ((slot - 1) << 30) <= total
    assert (rows[:, 4] == 0).all()


def test_tensors_with_gaps_or_shared_elements_are_refused():
    for tensor in (
        torch.zeros(3, 4),
        torch.zeros(3, 4).t(),
        torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.zeros(1, 4)[:, 1:],
        torch.zeros(()),
    ):
        check_dense(tensor)
    with pytest.raises(ValueError, match="must be dense, got layout torch"):
        check_dense(torch.zeros(3).to_sparse())
    for tensor in (torch.zeros(3, 4)[:, 1:], torch.zeros(1).expand(4)):
        with pytest.raises(ValueError, match="must fill a stretch of memory, got shape"):
            check_dense(tensor)


# -- what the host does about records of a device ----------------------------------------------


class ReportingCore:
    """Reports records, as a device would, some time after they were made."""

    def __init__(self) -> None:
        self.rows = np.zeros(0, dtype=_extension.record_dtype)
        self.told = np.zeros(0, dtype=_extension.record_dtype)

    def report(self, step: int, save: int = 0, restore: int = 0) -> None:
        row = np.zeros(1, dtype=_extension.record_dtype)
        row["step"] = step
        row["action"] = 1 | save << _extension.SAVE_SHIFT | restore << _extension.RESTORE_SHIFT
        row["sequence"] = len(self.rows) + 1
        self.rows = np.concatenate([self.rows, row])
        if restore:
            row["sequence"] = len(self.told) + 1
            self.told = np.concatenate([self.told, row])

    def records(self, since: int) -> np.ndarray:
        return self.rows[self.rows["sequence"] > since]

    def events(self, since: int) -> np.ndarray:
        return self.told[self.told["sequence"] > since]

    @property
    def written(self) -> int:
        return len(self.rows)

    @property
    def written_events(self) -> int:
        return len(self.told)


class NoKernel:
    """Stands for `DeviceSlots`: everything on the device is somebody else's."""

    bytes, table = 0, 1

    def __init__(self, *_: object) -> None:
        pass

    def __getattr__(self, name: str):
        return lambda *_: False


def test_numbers_on_the_host_follow_the_records_of_the_device(make_model, monkeypatch):
    monkeypatch.setattr("adaptlr.snapshot.DeviceSlots", NoKernel)
    model = make_model()
    optimizer = Prodigious(model.parameters())
    config = AdaptiveLR(torch.optim.SGD(model.parameters(), lr=0.1), 10)._attachment.config
    core, rollbacks = ReportingCore(), []
    path = types.SimpleNamespace(
        core=core, is_capturing=lambda: False, send_config=lambda: None, launched=0, events=0
    )
    path.device = torch.device("cpu")
    snapshots = Snapshots(optimizer, None, config, path, "auto", rollbacks.append)
    snapshots.prepare(0)
    group = optimizer.param_groups[0]

    def step_and_report(k: int, **orders: int) -> None:
        group["k"] = k
        core.report(k, **orders)
        path.catch_up()

    step_and_report(5)
    step_and_report(6, save=FIRST)
    step_and_report(7)
    step_and_report(8, restore=FIRST)
    assert group["k"] == 6
    step_and_report(9, save=SECOND, restore=START)
    assert group["k"] == 0
    step_and_report(12, restore=SECOND)
    assert group["k"] == 9
    path.catch_up()
    assert rollbacks == [7, 0, 10]
    assert path.watches


class Quantised(torch.Tensor):
    """A tensor made of two others, as optimizers with 8-bit state have."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        assert function is torch.ops.aten.detach.default
        return args[0]


def test_a_kernel_copies_what_a_quantised_tensor_is_made_of():
    parameter = torch.nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    codes, scale = torch.zeros(4, dtype=torch.uint8), torch.ones(1)
    optimizer.state[parameter]["moments"] = [Quantised(codes, scale), {"deep": torch.ones(2)}]
    parts = list(Contents(optimizer, None).parts())
    assert [part.nbytes for part in parts] == [16, 4, 4, 8]
    assert parts[1].data_ptr() == codes.data_ptr()
