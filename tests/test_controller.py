"""The controller on the host: what it does to an optimizer, and what it leaves alone."""

from __future__ import annotations

import copy
import gc
import math
import warnings
import weakref

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict as dcp
from conftest import loss_of, parameters_of, same

import adaptlr
from adaptlr import AdaptiveLR, Flag, Guard, Schedule

torch.sparse.check_sparse_tensor_invariants.disable()  # torch 2.11 warns until that is chosen

STEPS = 40
OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=0.5),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.01),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
}


def train(model, optimizer, batches, steps=STEPS, controller=None, lrs=None, poison=()):
    """A plain loop: with a controller, or fed with the learning rates of one."""
    for step in range(steps):
        loss = loss_of(model, batches[step % len(batches)])
        loss.backward()
        if step in poison:
            loss = loss * float("nan")
        if controller is not None:
            controller.step(loss)
        else:
            for group in optimizer.param_groups:
                group["lr"] = lrs[step]
            if step not in poison:
                optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_without_a_guard_it_equals_the_bare_optimizer_bit_for_bit(name, make_model, batches):
    controlled, bare = make_model(), make_model()
    optimizer = OPTIMIZERS[name](controlled.parameters())
    controller = AdaptiveLR(optimizer, total_steps=STEPS, guard=None)
    train(controlled, optimizer, batches, controller=controller)
    lrs = controller.history()["lr"]
    train(bare, OPTIMIZERS[name](bare.parameters()), batches, lrs=lrs.tolist())
    assert same(parameters_of(controlled), parameters_of(bare))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_skipped_step_leaves_no_trace_in_any_optimizer(name, make_model, batches):
    controlled, bare = make_model(), make_model()
    optimizer = OPTIMIZERS[name](controlled.parameters())
    controller = AdaptiveLR(optimizer, total_steps=STEPS, snapshot="off")
    poison = (0, 7, 8, 20)
    train(controlled, optimizer, batches, controller=controller, poison=poison)
    assert np.flatnonzero(controller.history()["action"]).tolist() == list(poison)
    lrs = controller.history()["lr"].tolist()
    train(bare, OPTIMIZERS[name](bare.parameters()), batches, lrs=lrs, poison=poison)
    assert same(parameters_of(controlled), parameters_of(bare))


def test_the_schedule_is_torch_s_own_sequence(make_model):
    optimizer = torch.optim.SGD(make_model().parameters(), lr=0.1)
    controller = AdaptiveLR(optimizer, total_steps=20, warmup=5, guard=None)
    written = []
    for _ in range(20):
        controller.step(torch.tensor(1.0))
        written.append(optimizer.param_groups[0]["lr"])

    def expected(step: int) -> float:
        if step < 5:
            return 0.1 * (step + 1) / 5
        return 0.1 * 0.5 * (1 + math.cos(math.pi * (step - 5 + 1) / 15))

    assert written == pytest.approx([expected(step) for step in range(20)], rel=1e-15, abs=1e-17)
    assert written[-1] == 0.0


def test_lr_is_set_before_the_first_step_and_read_back(make_model):
    optimizer = torch.optim.SGD(make_model().parameters(), lr=0.1)
    controller = AdaptiveLR(optimizer, total_steps=100, warmup=10)
    assert optimizer.param_groups[0]["lr"] == controller.lr == 0.1 * (1 / 10)
    assert controller.status().step == 0
    controller.step(torch.tensor(1.0))
    assert controller.lr == 0.1 * (1 / 10)
    assert controller.status().step == 1


def test_groups_keep_their_ratios_and_a_float_lr_sets_the_largest(make_model):
    model = make_model()
    groups = [
        {"params": model[0].parameters(), "lr": 0.1},
        {"params": model[2].parameters(), "lr": 0.02},
    ]
    optimizer = torch.optim.SGD(groups)
    controller = AdaptiveLR(optimizer, total_steps=100, lr=1.0, warmup=0)
    controller.step(torch.tensor(1.0))
    first, second = (group["lr"] for group in optimizer.param_groups)
    assert second / first == pytest.approx(0.2, rel=1e-15)
    assert controller.lr == first == controller.history()["lr"][-1]
    controller.set_peak(2.0)
    controller.step(torch.tensor(1.0))
    assert optimizer.param_groups[1]["lr"] / optimizer.param_groups[0]["lr"] == pytest.approx(0.2)
    assert controller.events()[-1].kind == "set_peak"


def test_a_group_added_later_is_taken_in_with_its_own_peak(make_model):
    model = make_model()
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    controller = AdaptiveLR(optimizer, total_steps=10, warmup=0, decay="linear")
    controller.step(torch.tensor(1.0))
    optimizer.add_param_group({"params": model[2].parameters(), "lr": 0.4})
    controller.step(torch.tensor(1.0))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.8)
    assert optimizer.param_groups[1]["lr"] == pytest.approx(0.4 * 0.8)
    assert controller.status().step == 2


def test_initial_lr_of_an_earlier_scheduler_is_the_peak(make_model):
    optimizer = torch.optim.SGD(make_model().parameters(), lr=0.1)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.01)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.001)
    AdaptiveLR(optimizer, total_steps=10, warmup=0, decay="constant")
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_another_scheduler_gives_one_warning_and_loses(make_model, batches):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)
    controller = AdaptiveLR(optimizer, total_steps=100, warmup=0, decay="constant")
    used = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for batch in batches[:5]:
            loss = loss_of(model, batch)
            loss.backward()
            controller.step(loss)
            used.append(optimizer.param_groups[0]["lr"])
            scheduler.step()
    assert used == [0.1] * 5
    assert [str(w.message) for w in caught if "adaptlr" in str(w.message)] == [
        "a torch LRScheduler writes the optimizer's learning rate as well as adaptlr; "
        "adaptlr's value wins in every step. Remove the other"
    ]
    overwritten = controller.history()["flags"] & adaptlr.Flag.OVERWRITTEN != 0
    assert overwritten.tolist() == [False] + [True] * 4


def test_a_tensor_lr_of_the_user_is_written_in_place(make_model):
    lr = torch.tensor(0.1, dtype=torch.float64)
    optimizer = torch.optim.SGD(make_model().parameters(), lr=lr)
    controller = AdaptiveLR(optimizer, total_steps=10, warmup=0, decay="linear")
    controller.step(torch.tensor(1.0))
    assert optimizer.param_groups[0]["lr"] is lr
    assert lr.item() == pytest.approx(0.09)
    assert not controller.history()["flags"].any()
    lr.fill_(5.0)
    with pytest.warns(UserWarning, match="as well as adaptlr"):
        controller.step(torch.tensor(1.0))
    assert lr.item() == pytest.approx(0.08)


@pytest.mark.parametrize(("reduction", "expected"), [("mean", 2.0), ("sum", 6.0)])
def test_losses_of_one_step_are_reduced(make_model, reduction, expected):
    optimizer = torch.optim.SGD(make_model().parameters(), lr=0.1)
    controller = AdaptiveLR(optimizer, total_steps=10)
    for loss in (1.0, 2.0, 3.0):
        controller.observe(torch.tensor(loss, dtype=torch.bfloat16), reduction=reduction)
    optimizer.step()
    assert controller.status().loss == expected
    controller.observe(7.0, reduction=reduction)
    optimizer.step()
    assert controller.status().loss == 7.0


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "loss",
    [
        torch.tensor(3.0),
        torch.tensor(3.0, dtype=torch.float64),
        torch.tensor(3.0, dtype=torch.bfloat16),
        torch.tensor(3.0, dtype=torch.float16),
        torch.full((1, 1), 3.0),
        torch.arange(5.0)[3],
        torch.arange(5.0, dtype=torch.float64)[3:4].expand(1, 1),
        torch.nn.Parameter(torch.tensor(3.0)),
        torch.tensor(3.0).as_subclass(Subclass),
        torch.sparse_coo_tensor([[0]], [3.0], (1,), check_invariants=False),
        3.0,
    ],
    ids=lambda loss: f"{type(loss).__name__} {getattr(loss, 'dtype', '')}",
)
def test_a_loss_may_have_any_form_with_one_element(make_model, loss):
    controller = AdaptiveLR(torch.optim.SGD(make_model().parameters(), lr=0.1), total_steps=10)
    for _ in range(3):
        controller.step(loss)
    assert controller.history()["loss"].tolist() == [3.0] * 3


def test_the_clock_counts_skipped_steps_so_that_a_run_never_gets_longer(make_model, batches):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = AdaptiveLR(optimizer, total_steps=10, warmup=0, decay="linear")
    train(model, optimizer, batches, 10, controller, poison=(3, 4))
    assert controller.history()["step"].tolist() == list(range(10))
    assert optimizer.param_groups[0]["lr"] == 0.0


def test_past_the_end_the_last_rate_above_zero_is_kept_and_extend_stretches(make_model):
    optimizer = torch.optim.SGD(make_model().parameters(), lr=1.0)
    controller = AdaptiveLR(optimizer, total_steps=4, warmup=0, decay="linear")
    for _ in range(4):
        controller.step(torch.tensor(1.0))
    with pytest.warns(UserWarning, match="total_steps=4 are over"):
        controller.step(torch.tensor(1.0))
    assert optimizer.param_groups[0]["lr"] == 0.25
    controller.step(torch.tensor(1.0))
    controller.extend(8)
    controller.step(torch.tensor(1.0))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1 - 7 / 8)
    assert [event.kind for event in controller.events()] == ["ended", "extend"]


def test_a_callable_decay_is_tabulated_once_and_follows_warm_up(make_model):
    calls = []

    def decay(step: int) -> float:
        calls.append(step)
        return 1.0 / (1 + step)

    optimizer = torch.optim.SGD(make_model().parameters(), lr=1.0)
    controller = AdaptiveLR(optimizer, total_steps=6, warmup=2, decay=decay)
    assert calls == list(range(6))
    for _ in range(6):
        controller.step(torch.tensor(1.0))
    expected = [1 / 2, 1.0, 1 / 3, 1 / 4, 1 / 5, 1 / 6]
    assert controller.history()["lr"].tolist() == pytest.approx(expected)


def test_an_open_ended_run_needs_no_total_steps(make_model):
    optimizer = torch.optim.SGD(make_model().parameters(), lr=1.0)
    controller = AdaptiveLR(optimizer, None, warmup=4, decay=Schedule("inverse_sqrt"))
    for _ in range(16):
        controller.step(torch.tensor(1.0))
    assert controller.lr == pytest.approx(math.sqrt(4 / 16))


def test_a_blow_up_is_cut_re_warmed_and_explained(make_model, batches):
    optimizer = torch.optim.SGD(make_model().parameters(), lr=0.1)
    controller = AdaptiveLR(optimizer, total_steps=1000, warmup=0, decay="constant", snapshot="off")
    rng = np.random.default_rng(0)
    for step in range(600):
        rise = math.exp((step - 200) / 5) if 200 <= step < 240 else 0.0
        controller.step(2.0 + 0.05 * float(rng.standard_normal()) + 0.05 * min(rise, 100.0))
    cuts = [event for event in controller.events() if event.kind == "cut"]
    assert 205 <= cuts[0].step <= 225
    assert "the loss runs away" in cuts[0].reason
    assert "cut to 0.5 of its schedule" in cuts[0].reason
    kinds = [event.kind for event in controller.events()]
    assert kinds[-3:] == ["hold", "regrow", "run"]
    assert controller.history()["factor"][cuts[0].step + 1] < 0.1


def test_observe_mode_reports_and_never_acts(make_model, batches):
    watched, bare = make_model(), make_model()
    optimizer = torch.optim.SGD(watched.parameters(), lr=0.05)
    controller = AdaptiveLR(optimizer, total_steps=STEPS, guard=Guard(mode="observe"))
    train(watched, optimizer, batches, controller=controller, poison=(5,))
    assert [(event.step, event.kind) for event in controller.events()] == [(5, "alarm")]
    assert controller.events()[0].reason == "the loss is nan; nothing was changed"
    lrs = controller.history()["lr"].tolist()
    train(bare, torch.optim.SGD(bare.parameters(), lr=0.05), batches, lrs=lrs)
    assert same(parameters_of(watched), parameters_of(bare))


def test_a_spent_budget_raises_with_the_story_and_leaves_the_parameters(make_model, batches):
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    guard = Guard(max_consecutive_skips=2)
    controller = AdaptiveLR(optimizer, total_steps=100, guard=guard, snapshot="off")
    train(model, optimizer, batches, 5, controller)
    before = parameters_of(model)
    for _ in range(2):
        controller.step(float("nan"))
    with pytest.raises(adaptlr.TrainingDiverged, match="the loss is nan") as error:
        controller.step(float("nan"))
    assert "step 5: the loss is nan; step skipped" in str(error.value)
    assert "max_consecutive_skips" in str(error.value)
    assert same(before, parameters_of(model))
    with pytest.raises(adaptlr.TrainingDiverged):
        controller.step(1.0)
    with pytest.raises(adaptlr.TrainingDiverged):
        controller.check()
    assert controller.status().phase is adaptlr.Phase.FAILED
    assert same(before, parameters_of(model))


def test_a_gradient_norm_that_is_not_finite_skips_the_step(make_model, batches):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = AdaptiveLR(optimizer, total_steps=100)
    loss = loss_of(model, batches[0])
    loss.backward()
    before = parameters_of(model)
    controller.step(loss, grad_norm=torch.tensor(float("inf")))
    assert same(before, parameters_of(model))
    assert controller.events()[0].reason == "the gradient norm is inf; step skipped"
    assert controller.history()["grad_norm"][0] == math.inf


def test_a_gradient_norm_far_above_its_level_is_flagged_and_nothing_else_is_done(make_model):
    optimizer = torch.optim.SGD(make_model().parameters(), lr=0.1)
    controller = AdaptiveLR(optimizer, total_steps=100, warmup=0, decay="constant", snapshot="off")
    norms = 1.0 + 0.1 * np.random.default_rng(0).standard_normal(40)
    norms[30] = 100.0
    for step, norm in enumerate(norms):
        controller.step(1.0 - 0.01 * step, grad_norm=torch.tensor(norm))
        assert (controller.status().flags == Flag.NORM_SPIKE) == (step == 30)
    history = controller.history()
    assert np.flatnonzero(history["flags"]).tolist() == [30]
    assert history["grad_norm"].tolist() == norms.tolist()
    assert (controller.events(), set(history["lr"]), set(history["action"])) == ([], {0.1}, {0})


@pytest.fixture
def mesh():
    """One process that is a group of its own."""
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:DTensor random operators")  # torch 2.6, of a CPU mesh
def test_a_gradient_norm_may_be_a_dtensor_whatever_its_placement(mesh):
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    weights = torch.nn.Parameter(distribute_tensor(torch.tensor([3.0, 4.0]), mesh, [Shard(0)]))
    optimizer = torch.optim.SGD([weights], lr=0.1)
    controller = AdaptiveLR(optimizer, total_steps=100)
    weights.pow(2).sum().backward()
    norm = torch.nn.utils.clip_grad_norm_([weights], 1.0)
    assert isinstance(norm, DTensor)
    controller.step(1.0, grad_norm=norm)
    for placement in (Replicate(), Partial()):
        given = DTensor.from_local(torch.tensor(7.0), mesh, [placement])
        controller.step(1.0, grad_norm=given)
    assert controller.history()["grad_norm"].tolist() == [10.0, 7.0, 7.0]


# -- closures -----------------------------------------------------------------


@pytest.mark.parametrize("by_keyword", [False, True])
def test_a_closure_is_observed_and_controlled_before_the_update(make_model, batches, by_keyword):
    with_closure, plain = make_model(), make_model()
    optimizer = torch.optim.AdamW(with_closure.parameters(), lr=0.01)
    controller = AdaptiveLR(optimizer, total_steps=STEPS)
    reference = torch.optim.AdamW(plain.parameters(), lr=0.01)
    expected = AdaptiveLR(reference, total_steps=STEPS)
    train(plain, reference, batches, controller=expected)
    for batch in batches[:STEPS]:

        def closure(batch: torch.Tensor = batch) -> torch.Tensor:
            optimizer.zero_grad()
            loss = loss_of(with_closure, batch)
            loss.backward()
            return loss

        if by_keyword:
            optimizer.step(closure=closure)
        else:
            controller.step(closure=closure)
    assert same(parameters_of(with_closure), parameters_of(plain))
    np.testing.assert_array_equal(controller.history()["lr"], expected.history()["lr"])


def test_lbfgs_decides_once_a_step_and_skips_a_nan_loss(make_model, batches):
    model = make_model()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5)
    controller = AdaptiveLR(optimizer, total_steps=20, warmup=0)
    factor = 1.0

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, batches[0]) * factor
        loss.backward()
        return loss

    for _ in range(5):
        controller.step(closure=closure)
    assert controller.status().step == 5
    losses = controller.history()["loss"]
    assert losses[-1] < losses[0]
    before, factor = parameters_of(model), float("nan")
    controller.step(closure=closure)
    assert same(before, parameters_of(model))
    assert controller.events()[-1].kind == "skip"


# -- checkpoints --------------------------------------------------------------


def noisy(step: int) -> float:
    return 2.0 + 0.3 * math.sin(step * 12.9898) + (4.0 if 60 <= step < 75 else 0.0)


@pytest.mark.parametrize("stop", [1, 10, 66, 90, 140])
def test_resuming_equals_never_having_stopped(make_model, batches, stop):
    def fresh():
        model = make_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        return model, optimizer, AdaptiveLR(optimizer, total_steps=200, warmup=0, snapshot="off")

    def run(model, optimizer, controller, first, last):
        for step in range(first, last):
            loss = loss_of(model, batches[step % len(batches)])
            loss.backward()
            controller.step(noisy(step))
            optimizer.zero_grad()

    model, optimizer, controller = fresh()
    run(model, optimizer, controller, 0, stop)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    run(model, optimizer, controller, stop, 160)
    resumed, its_optimizer, its_controller = fresh()
    resumed.load_state_dict(saved[0])
    its_optimizer.load_state_dict(saved[1])
    run(resumed, its_optimizer, its_controller, stop, 160)
    assert same(parameters_of(model), parameters_of(resumed))
    ours, theirs = controller.history()[stop:], its_controller.history()
    for name in ours.dtype.names:
        if name not in ("sequence", "checksum"):
            np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    assert any(event.kind == "cut" for event in controller.events())


@pytest.mark.parametrize("stop", [1, 66])
def test_a_checkpoint_may_be_loaded_before_the_controller_is_made(make_model, batches, stop):
    model = make_model()
    optimizer = OPTIMIZERS["AdamW"](model.parameters())
    controller = AdaptiveLR(optimizer, total_steps=80)
    train(model, optimizer, batches, stop, controller)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, batches, 10, controller)
    other = make_model(1)
    resumed = OPTIMIZERS["AdamW"](other.parameters())
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    later = AdaptiveLR(resumed, total_steps=80)
    assert "adaptlr" not in resumed.param_groups[0]
    train(other, resumed, batches, 10, later)
    for field in ("step", "loss", "lr", "level", "factor"):
        expected = controller.history()[field][stop:].tolist()
        assert later.history()[field].tolist() == expected, field
    assert same(parameters_of(other), parameters_of(model))


def test_a_checkpoint_carries_the_level_of_the_gradient_norm(make_model):
    first, second = (
        AdaptiveLR(torch.optim.SGD(make_model().parameters(), lr=0.1), total_steps=STEPS)
        for _ in range(2)
    )
    for step in range(20):
        first.step(1.0, grad_norm=1.0 + 0.1 * (step % 3))
    second.load_state_dict(first.state_dict())
    for controller in (first, second):
        controller.step(1.0, grad_norm=5.0)
        assert controller.status().flags == Flag.NORM_SPIKE


def test_a_checkpoint_loads_without_adaptlr(make_model, batches):
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    controller = AdaptiveLR(optimizer, total_steps=STEPS)
    train(model, optimizer, batches, 10, controller)
    saved = optimizer.state_dict()
    assert type(saved["param_groups"][0]["lr"]) is float
    plain = torch.optim.AdamW(make_model().parameters(), lr=0.5)
    plain.load_state_dict(saved)
    plain.step()
    assert plain.param_groups[0]["lr"] == controller.lr


def test_a_checkpoint_survives_torch_save_with_weights_only(make_model, batches, tmp_path):
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    controller = AdaptiveLR(optimizer, total_steps=STEPS)
    train(model, optimizer, batches, 10, controller)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    other = torch.optim.AdamW(make_model().parameters(), lr=0.01)
    resumed = AdaptiveLR(other, total_steps=STEPS)
    other.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    assert resumed.status().step == 10
    assert "adaptlr" not in other.param_groups[0]
    assert resumed.events()[0].reason == "resumed at step 10"


def test_distributed_checkpointing_carries_the_state_unknowingly(make_model, batches):
    def fresh():
        model = make_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        return model, optimizer, AdaptiveLR(optimizer, total_steps=STEPS)

    model, optimizer, controller = fresh()
    train(model, optimizer, batches, 10, controller)
    saved = dcp.get_optimizer_state_dict(model, optimizer)
    resumed, its_optimizer, its_controller = fresh()
    before = parameters_of(resumed)
    dcp.set_optimizer_state_dict(resumed, its_optimizer, saved)
    assert same(before, parameters_of(resumed))  # DCP steps a fresh optimizer to make state appear
    assert its_controller.status().step == 10
    its_controller.step(torch.tensor(1.0))
    controller.step(torch.tensor(1.0))
    assert its_controller.lr == controller.lr


def test_extend_and_set_peak_survive_a_resume_unless_the_constructor_says_otherwise(make_model):
    def fresh(total_steps: int = 10):
        optimizer = torch.optim.SGD(make_model().parameters(), lr=0.1)
        return optimizer, AdaptiveLR(optimizer, total_steps, warmup=0, decay="linear")

    optimizer, controller = fresh()
    controller.extend(100)
    controller.set_peak(1.0)
    controller.step(torch.tensor(1.0))
    saved = optimizer.state_dict()
    resumed_optimizer, resumed = fresh()
    resumed_optimizer.load_state_dict(saved)
    resumed.step(torch.tensor(1.0))
    assert resumed.lr == pytest.approx(1.0 * (1 - 2 / 100))
    longer_optimizer, longer = fresh(total_steps=50)
    longer_optimizer.load_state_dict(saved)
    longer.step(torch.tensor(1.0))
    assert longer.lr == pytest.approx(1.0 * (1 - 2 / 50))


def test_a_plain_checkpoint_is_loaded_with_a_warning(make_model, batches):
    plain = torch.optim.AdamW(make_model().parameters(), lr=0.01)
    optimizer = torch.optim.AdamW(make_model().parameters(), lr=0.01)
    controller = AdaptiveLR(optimizer, total_steps=STEPS)
    controller.step(torch.tensor(1.0))
    with pytest.warns(UserWarning, match="holds no adaptlr state"):
        optimizer.load_state_dict(plain.state_dict())
    controller.step(torch.tensor(1.0))
    assert controller.status().step == 2


def test_the_controller_s_own_state_dict_round_trips(make_model):
    optimizer = torch.optim.SGD(make_model().parameters(), lr=0.1)
    controller = AdaptiveLR(optimizer, total_steps=100)
    for step in range(30):
        controller.step(noisy(step))
    saved = controller.state_dict()
    for step in range(30, 50):
        controller.step(noisy(step))
    expected = controller.history()["lr"][-20:].tolist()
    controller.load_state_dict(saved)
    for step in range(30, 50):
        controller.step(noisy(step))
    assert controller.history()["lr"][-20:].tolist() == expected


def test_detach_leaves_a_plain_optimizer(make_model, batches):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = AdaptiveLR(optimizer, total_steps=STEPS, warmup=0)
    train(model, optimizer, batches, 5, controller)
    controller.detach()
    optimizer.param_groups[0]["lr"] = 0.7
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 0.7
    assert set(optimizer.state_dict()["param_groups"][0]) == set(
        torch.optim.SGD(make_model().parameters(), lr=0.1).state_dict()["param_groups"][0]
    )
    assert len(controller.history()) == 5
    AdaptiveLR(optimizer, total_steps=STEPS)


# -- other people's loops -----------------------------------------------------


def test_a_step_without_a_loss_is_nobody_s_and_changes_nothing_of_ours(make_model):
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    controller = AdaptiveLR(optimizer, total_steps=STEPS)
    before = parameters_of(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.param_groups[0]["lr"] = 0.0  # as distributed checkpointing makes state appear
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 0.0
    assert controller.status().step == 0
    assert same(before, parameters_of(model))


def test_forgotten_losses_are_warned_of_once(make_model, batches):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    AdaptiveLR(optimizer, total_steps=STEPS)
    loss_of(model, batches[0]).backward()
    optimizer.step()
    optimizer.step()
    with pytest.warns(UserWarning, match=r"controller\.observe\(loss\)"):
        optimizer.step()
    optimizer.step()


class Scaler(torch.amp.GradScaler):
    """A GradScaler that finds an overflow in the steps it is told to."""

    def __init__(self, overflows: set[int]) -> None:
        super().__init__("cpu", init_scale=8.0)
        self.overflows, self.steps = overflows, 0

    def scale_and_backward(self, loss: torch.Tensor) -> None:
        scaled = self.scale(loss)
        (scaled * float("inf") if self.steps in self.overflows else scaled).backward()
        self.steps += 1


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("observe_first", [False, True])
def test_grad_scaler_overflows_are_counted_once_and_mix_no_losses(
    make_model, batches, fused, observe_first
):
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
    controller = AdaptiveLR(optimizer, total_steps=STEPS)
    scaler = Scaler({2, 3, 9})
    observed = []
    for step in range(12):
        loss = loss_of(model, batches[step])
        if observe_first:
            controller.observe(loss)
            controller.zero_grad()
        else:
            controller.zero_grad()
            controller.observe(loss)
        before = parameters_of(model)
        scaler.scale_and_backward(loss)
        scaler.step(optimizer)
        scaler.update()
        if fused or step not in scaler.overflows:
            observed.append(loss.item())
        assert same(before, parameters_of(model)) == (step in scaler.overflows)
    assert controller.history()["loss"].tolist() == observed
    assert controller.status().step == len(observed)
    overflowed = controller.history()["flags"] & adaptlr.Flag.OVERFLOW != 0
    assert np.flatnonzero(overflowed).tolist() == ([2, 3, 9] if fused else [])
    assert scaler.get_scale() == 1.0


def test_an_optimizer_inside_a_wrapper_is_found(make_model):
    inner = torch.optim.SGD(make_model().parameters(), lr=0.1)

    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

    controller = AdaptiveLR(Wrapper(inner), total_steps=10)
    controller.step(torch.tensor(1.0))
    assert controller.status().step == 1


def test_two_controllers_on_two_optimizers_do_not_meet(make_model):
    first = torch.optim.SGD(make_model().parameters(), lr=0.1)
    second = torch.optim.SGD(make_model(1).parameters(), lr=0.2)
    one, two = AdaptiveLR(first, 10, warmup=0), AdaptiveLR(second, 20, warmup=0)
    one.step(torch.tensor(1.0))
    two.step(torch.tensor(2.0))
    two.step(torch.tensor(3.0))
    assert (one.status().step, one.status().loss) == (1, 1.0)
    assert (two.status().step, two.status().loss) == (2, 3.0)


def test_a_controller_keeps_no_optimizer_alive(make_model):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = AdaptiveLR(optimizer, total_steps=10)
    controller.step(torch.tensor(1.0))
    gone = weakref.ref(optimizer)
    del optimizer, controller
    gc.collect()
    assert gone() is None
