"""Every optimizer of torch.optim, in each of its forms, under adaptlr."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from conftest import loss_of, parameters_of, same, train, train_bare
from optimizers import CASES, DEVICE_CONTROLLED, REFUSED, exists, expected_path, make, table

from adaptlr import Action, AdaptiveLR
from adaptlr.device_flags import CAPTURABLE, FUSED

ROOT = Path(__file__).parents[1]
NAN = float("nan")
ON_DEVICE = [case for case in CASES if expected_path(case) in DEVICE_CONTROLLED]
WITHOUT_FLAG = [case for case in ON_DEVICE if expected_path(case) == CAPTURABLE]
PLAIN = [case for case in CASES if not case.startswith(("SparseAdam", "LBFGS", "Muon"))]


def needs(case: str) -> None:
    if not exists(CASES[case][0]):
        pytest.skip(f"this torch has no {CASES[case][0]}")


def test_the_table_in_the_docs_is_what_the_code_does():
    for name, _ in CASES.values():
        if not exists(name):
            pytest.skip(f"this torch has no {name}")
    assert table() in (ROOT / "docs/optimizers.md").read_text()


@pytest.mark.parametrize("name", REFUSED)
def test_an_optimizer_that_cannot_be_steered_is_refused(name, make_model):
    optimizer = getattr(torch.optim, name)(make_model().parameters())
    with pytest.raises(ValueError, match=f"must not be {name}"):
        AdaptiveLR(optimizer, total_steps=10)


@pytest.mark.parametrize("device_path", DEVICE_CONTROLLED)
def test_a_device_path_needs_a_device(device_path, make_model):
    optimizer = torch.optim.AdamW(make_model().parameters())
    with pytest.raises(ValueError, match="needs parameters on a CUDA device, got cpu"):
        AdaptiveLR(optimizer, total_steps=10, device_path=device_path)


def test_lbfgs_gets_its_rate_before_the_closure_runs(make_model, batches):
    model = make_model()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=2)
    controller = AdaptiveLR(optimizer, total_steps=20, warmup=0, decay="linear", guard=None)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, batches[0])
        loss.backward()
        return loss

    losses = [controller.step(closure=closure).item() for _ in range(20)]
    assert losses[-1] < losses[0]
    assert controller.history()["lr"].tolist() == pytest.approx(
        [0.5 * (1 - (t + 1) / 20) for t in range(20)]
    )


def test_sparse_gradients_pass_through():
    table = torch.nn.Embedding(10, 3, sparse=True)
    optimizer = torch.optim.SparseAdam(table.parameters(), lr=0.1)
    controller = AdaptiveLR(optimizer, total_steps=10)
    before = table.weight.detach().clone()
    for step in range(10):
        loss = table(torch.tensor([step % 3])).pow(2).mean()
        loss = loss * NAN if step == 4 else loss
        loss.backward()
        controller.step(loss)
        controller.zero_grad()
    assert torch.isfinite(table.weight).all()
    assert not torch.equal(table.weight[:3], before[:3])
    assert torch.equal(table.weight[3:], before[3:])


def test_muon_is_steered(batches):
    needs("Muon")
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(6, 6))
    controller = AdaptiveLR(torch.optim.Muon([weight], lr=0.02), total_steps=10)
    for batch in batches[:10]:
        loss = (batch @ weight).pow(2).mean()
        loss.backward()
        controller.step(loss)
        controller.zero_grad()
    assert controller.history()["lr"].max() == pytest.approx(0.02)


# -- on the device ----------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize("case", PLAIN)
def test_the_path_is_that_of_the_table(case, make_model):
    needs(case)
    try:
        optimizer = make(case, make_model(device="cuda").parameters())
    except RuntimeError as error:
        pytest.skip(f"not in this torch: {error}")
    assert repr(expected_path(case)) in repr(AdaptiveLR(optimizer, total_steps=10))


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("case", ON_DEVICE)
def test_nothing_waits_for_the_device_in_200_steps(case, make_model, data):
    model = make_model(device="cuda")
    optimizer = make(case, model.parameters())
    controller = AdaptiveLR(optimizer, total_steps=200)
    poison = torch.full((), NAN, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(200):
            loss = loss_of(model, data[step % len(data)])
            loss = loss * poison if step == 50 else loss
            loss.backward()
            controller.step(loss)
            controller.zero_grad()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    history = controller.history()
    assert len(history) == 200
    assert history["action"][50] & Action.SKIP


@pytest.mark.cuda
@pytest.mark.parametrize("case", WITHOUT_FLAG)
def test_the_capturable_path_equals_a_bare_loop_whose_skips_are_zero_steps(case, make_model, data):
    controlled, bare = make_model(device="cuda"), make_model(device="cuda")
    optimizer = make(case, controlled.parameters())
    controller = AdaptiveLR(optimizer, total_steps=40)
    poison = (0, 7, 20)
    kept = parameters_of(controlled)
    for step in range(40):
        loss = loss_of(controlled, data[step])
        loss = loss * NAN if step in poison else loss
        loss.backward()
        controller.step(loss)
        controller.zero_grad()
        if step in poison:
            assert same(parameters_of(controlled), kept)
        kept = parameters_of(controlled)
    torch.cuda.synchronize()
    lrs = controller.history()["lr"]
    lr = torch.zeros((), device="cuda")
    extra = {"capturable": True} if "capturable" in optimizer.param_groups[0] else {}
    reference = make(case, bare.parameters(), **extra)
    for group in reference.param_groups:
        group["lr"] = lr
    for step in range(40):
        loss_of(bare, data[step]).backward()
        lr.fill_(0.0 if step in poison else float(lrs[step]))
        if step in poison:
            for parameter in bare.parameters():
                parameter.grad.zero_()
        reference.step()
        reference.zero_grad()
    assert same(parameters_of(controlled), parameters_of(bare))


@pytest.mark.cuda
@pytest.mark.parametrize("case", ON_DEVICE)
def test_switching_in_the_middle_of_a_run_keeps_the_state_and_detach_gives_it_back(
    case, make_model, data
):
    controlled, bare = make_model(device="cuda"), make_model(device="cuda")
    first, second = make(case, controlled.parameters()), make(case, bare.parameters())
    flags = {key: first.param_groups[0].get(key) for key in ("fused", "foreach", "capturable")}

    train_bare(first, controlled, data[:5])
    train_bare(second, bare, data[:30])
    controller = AdaptiveLR(first, total_steps=20, warmup=0, decay="constant")
    train(controller, controlled, data[5:25])
    controller.detach()
    assert {key: first.param_groups[0].get(key) for key in flags} == flags
    assert type(first.param_groups[0]["lr"]) is float
    train_bare(first, controlled, data[25:30])
    for ours, theirs in zip(parameters_of(controlled), parameters_of(bare), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(first.state.values(), second.state.values(), strict=True):
        for name, value in theirs.items():
            if isinstance(value, torch.Tensor):
                assert ours[name].device == value.device, name


@pytest.mark.cuda
@pytest.mark.parametrize("case", WITHOUT_FLAG)
def test_resuming_on_the_capturable_path_equals_never_having_stopped(case, make_model, data):
    def fresh():
        model = make_model(device="cuda")
        optimizer = make(case, model.parameters())
        return model, optimizer, AdaptiveLR(optimizer, total_steps=20)

    model, optimizer, controller = fresh()
    train(controller, model, data[:10])
    saved = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    assert type(saved["optimizer"]["param_groups"][0]["lr"]) is float
    assert not saved["optimizer"]["param_groups"][0].get("capturable")
    train(controller, model, data[10:20])
    other, other_optimizer, other_controller = fresh()
    other.load_state_dict(saved["model"])
    other_optimizer.load_state_dict(saved["optimizer"])
    train(other_controller, other, data[10:20])
    assert same(parameters_of(model), parameters_of(other))


@pytest.mark.cuda
def test_the_capturable_path_can_be_asked_for(make_model, data):
    model = make_model(device="cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    controller = AdaptiveLR(optimizer, total_steps=10, device_path="capturable")
    train(controller, model, data[:5])
    assert optimizer.param_groups[0]["capturable"]
    assert not optimizer.param_groups[0]["fused"]
    sgd = torch.optim.SGD(make_model(device="cuda").parameters())
    with pytest.raises(ValueError, match="SGD has no capturable kernels"):
        AdaptiveLR(sgd, total_steps=10, device_path="capturable")


@pytest.mark.cuda
@pytest.mark.parametrize("case", ["LBFGS", "SparseAdam", "Muon"])
def test_special_optimizers_take_late_float_and_keep_nan_out(case, data):
    needs(case)
    torch.manual_seed(0)
    table = torch.nn.Embedding(8, 8, sparse=case == "SparseAdam", device="cuda")
    optimizer = make(case, table.parameters())
    # LBFGS puts new tensors into its state, which snapshots on a device cannot follow.
    controller = AdaptiveLR(optimizer, 12, snapshot="off" if case == "LBFGS" else "auto")
    indices = torch.arange(8, device="cuda")

    for step in range(12):

        def closure(step=step):
            optimizer.zero_grad()
            loss = table(indices).pow(2).mean()
            loss = loss * NAN if step == 6 else loss
            loss.backward()
            return loss

        controller.step(closure=closure)
    assert "float" in repr(controller)
    assert torch.isfinite(table.weight).all()
    assert len(controller.history()) == 12


@pytest.mark.cuda
def test_forms_cover_what_the_paths_can_do():
    assert {expected_path(case) for case in CASES} == {FUSED, CAPTURABLE, "float"}
