"""`find_lr` and `estimate_lr` on a small CNN and real digits, and what they leave behind."""

from __future__ import annotations

import copy
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import adaptlr
from adaptlr.estimate import LREstimate
from adaptlr.one_gradient import UpdateFamily, gradient_sum
from adaptlr.probe import Probe
from adaptlr.ramp import Baseline, Ramp
from adaptlr.range_result import Curve, ramp_result
from adaptlr.start import Start
from adaptlr.trial import Trial

# Peaks with which 300 steps, warm-up and cosine make 95 % of the progress of the best, by a sweep
# in half decades with two seeds. The best are 0.1 and 0.1.
GOOD = {"adamw": (2e-3, 0.3), "sgd": (5e-3, 0.3)}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def digits():
    from benchmarks.quality.digits import digits

    arrays = digits()
    inputs = torch.as_tensor(arrays["inputs"]).float() / 16
    return TensorDataset(inputs, torch.as_tensor(arrays["labels"]).long())


def loader(digits):
    return DataLoader(digits, batch_size=64, shuffle=True, drop_last=True)


def cnn(seed=0):
    """BatchNorm has buffers, dropout draws random numbers."""
    torch.manual_seed(seed)
    layers = [nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.1), nn.Linear(256, 10))


def loss_on(model):
    return lambda batch: cross_entropy(model(batch[0]), batch[1])


def make_optimizer(name, model, lr=1e-3):
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    return torch.optim.AdamW(model.parameters(), lr=lr)


def everything(model, optimizer):
    """Return what must not change: by value, and as objects."""
    state = {f"{id(p)}.{k}": v for p, s in optimizer.state.items() for k, v in s.items()}
    tensors = {**model.state_dict(keep_vars=True), **state}
    tensors |= {f"{n}.grad": p.grad for n, p in model.named_parameters() if p.grad is not None}
    values = {name: torch.as_tensor(value).detach().clone() for name, value in tensors.items()}
    settings = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    rest = {
        "groups": copy.deepcopy(settings),
        "attributes": set(vars(optimizer)),
        "training": [module.training for module in model.modules()],
        "torch": torch.get_rng_state().tolist(),
        "numpy": np.random.get_state()[1].tolist(),  # noqa: NPY002
        "python": random.getstate(),
    }
    return values, rest, {name: id(value) for name, value in tensors.items()}


def assert_same(before, after):
    assert before[0].keys() == after[0].keys()
    for name, value in before[0].items():
        assert torch.equal(value, after[0][name]), name
    assert before[1:] == after[1:]


# -- what it finds ------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw", "sgd"])
@pytest.mark.parametrize("start", [1e-7, 10.0])
def test_it_finds_a_good_rate_whatever_the_one_it_starts_from(digits, name, start):
    model = cnn()
    optimizer = make_optimizer(name, model, start)
    result = adaptlr.find_lr(loss_on(model), optimizer, loader(digits), model=model)
    low, high = GOOD[name]
    assert low <= result.lr <= high
    assert result.interval[0] < result.lr < result.interval[1]
    assert not result.flat
    assert f"lr={result.lr:.2g}" in repr(result)
    assert {replica.stopped for replica in result.replicas} <= {"lost", None}


def test_the_curve_is_the_median_of_the_replicas(digits):
    model = cnn()
    result = adaptlr.find_lr(loss_on(model), make_optimizer("adamw", model), loader(digits))
    curve = result.curve
    assert (np.diff(curve["lr"]) > 0).all()
    assert (curve["low"] <= curve["loss"]).all()
    assert (curve["loss"] <= curve["high"]).all()
    tenth = [replica.losses[10] for replica in result.replicas]
    assert curve["loss"][10] == np.median(tenth)
    assert len(set(tenth)) == 3  # other batches


@pytest.mark.parametrize(
    ("family", "ramp", "expected"),
    [
        (UpdateFamily.ADAM, 0.01, 0.1),
        (UpdateFamily.ADAM, 100.0, 10.0),
        (UpdateFamily.SGD, 0.2, 1.0),  # a ramp without a warm-up does not lower what SGD is told
        (UpdateFamily.SGD, 0.03, 0.3),  # but for what lies above its landmarks, a decade up
        (UpdateFamily.SGD, 0.001, math.sqrt(0.001)),
        (UpdateFamily.SGD, 100.0, 10.0),
        (UpdateFamily.SGD, math.nan, math.nan),  # flat
        (UpdateFamily.ADAM, math.nan, math.nan),
    ],
)
def test_the_rate_is_the_mean_of_ramp_and_estimate(family, ramp, expected):
    estimate = LREstimate(1.0, (0.1, 10.0), family, [1.0], [2.0])
    ramps = [Curve([1e-3, 1e-2], [2.0, 1.0], None, ramp)]
    found = ramp_result(ramps, estimate, steps_per_decade=10.0 ** (7 / 6))
    assert found.lr == pytest.approx(expected, nan_ok=True)
    assert found.flat == math.isnan(expected)


def test_the_grid_finds_the_rate_whose_short_runs_end_lowest(digits):
    model = cnn()
    optimizer = make_optimizer("adamw", model)
    before = everything(model, optimizer)
    rates = [1e-5, 1e-2, 1e1]
    result = adaptlr.find_lr(
        loss_on(model), optimizer, loader(digits), model=model, method="grid", lrs=rates,
        replicas=1, grid_steps=40,
    )  # fmt: skip
    assert result.lr == 1e-2
    assert result.interval == (1e-5, 1e1)  # the neighbours
    assert result.curve["lr"].tolist() == rates
    assert_same(before, everything(model, optimizer))


def test_a_loss_far_below_zero_is_ramped_like_any_other(digits):
    model = cnn()
    shifted = loss_on(model)
    optimizer = make_optimizer("adamw", model)
    result = adaptlr.find_lr(lambda batch: shifted(batch) - 5.0, optimizer, loader(digits))
    low, high = GOOD["adamw"]
    assert all(low <= replica.lr <= high for replica in result.replicas)
    assert result.curve["loss"].max() < 0.0
    assert result.interval[0] < 1e-2 < result.interval[1]


def test_a_cliff_of_nan_ends_the_ramp(digits):
    model = cnn()
    optimizer = make_optimizer("adamw", model)
    calls = []

    def loss(batch):
        calls.append(optimizer.param_groups[0]["lr"])
        return loss_on(model)(batch) * (math.nan if calls[-1] > 0.02 else 1.0)

    result = adaptlr.find_lr(loss, optimizer, loader(digits), model=model, replicas=2)
    assert [replica.stopped for replica in result.replicas] == ["nonfinite"] * 2
    assert sum(rate > 0.02 for rate in calls) == 2  # not one step further
    assert 2e-3 <= result.lr <= 0.3
    assert np.isfinite(result.curve["loss"]).all()


def test_a_flat_curve_is_called_flat(digits):
    model = cnn()
    unrelated = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([unrelated], lr=0.1)

    def loss(batch):
        return loss_on(model)(batch) + 0.0 * unrelated.sum()

    with pytest.warns(RuntimeWarning, match="did not fall by more than its noise"):
        result = adaptlr.find_lr(loss, optimizer, loader(digits), model=model, replicas=1)
    assert result.flat
    assert math.isnan(result.lr)
    assert "flat" in repr(result)
    assert "flat" in result.plot().get_title()


def test_a_ramp_that_begins_beyond_the_cliff_begins_again_lower(digits):
    model = cnn()
    optimizer = make_optimizer("adamw", model)
    result = adaptlr.find_lr(
        loss_on(model), optimizer, loader(digits), model=model, min_lr=0.5, max_lr=50.0, replicas=1
    )
    assert result.curve["lr"][0] <= 1e-3
    assert 2e-3 <= result.lr <= 0.3


def test_peers_rules_and_the_plot(digits):
    model = cnn()
    result = adaptlr.find_lr(loss_on(model), make_optimizer("adamw", model), loader(digits))
    peers = result.peers()
    assert list(peers) == ["minimum", "steepest", "valley", "slide", "lightning"]
    assert all(1e-5 < rate < 1.0 for rate in peers.values())
    axes = result.plot()
    assert axes.get_xscale() == "log"
    assert f"found: {result.lr:.2g}" in [text.get_text() for text in axes.get_legend().get_texts()]


# -- what it leaves behind ----------------------------------------------------


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_everything_is_put_back_bit_for_bit_in_the_midst_of_training(digits, name):
    model = cnn()
    optimizer = make_optimizer(name, model)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer)
    for batch, _ in zip(loader(digits), range(3), strict=False):
        optimizer.zero_grad()
        loss_on(model)(batch).backward()
        optimizer.step()
        scheduler.step()
    model[5].eval()  # modes differ
    before = everything(model, optimizer)
    adaptlr.find_lr(loss_on(model), optimizer, loader(digits), model=model, replicas=1)
    assert_same(before, everything(model, optimizer))
    adaptlr.estimate_lr(loss_on(model), optimizer, loader(digits), model=model)
    assert_same(before, everything(model, optimizer))


@pytest.mark.cuda
def test_everything_is_put_back_on_a_cuda_device(digits):
    model = cnn().cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(1e-3), fused=True)
    for batch, _ in zip(loader(digits), range(3), strict=False):
        optimizer.zero_grad()
        loss_on(model)([part.cuda() for part in batch]).backward()
        optimizer.step()
    before, state = everything(model, optimizer), torch.cuda.get_rng_state()
    result = adaptlr.find_lr(loss_on(model), optimizer, loader(digits), model=model, replicas=1)
    assert math.isfinite(result.lr)
    assert_same(before, everything(model, optimizer))
    assert torch.equal(state, torch.cuda.get_rng_state())


def test_an_error_in_the_loss_puts_everything_back_too(digits):
    model = cnn()
    optimizer = make_optimizer("adamw", model)
    before = everything(model, optimizer)
    left = [20]

    def loss(batch):
        left[0] -= 1
        if not left[0]:
            raise KeyError("no such batch")
        return loss_on(model)(batch)

    with pytest.raises(KeyError, match="no such batch"):
        adaptlr.find_lr(loss, optimizer, loader(digits), model=model)
    assert_same(before, everything(model, optimizer))


@pytest.mark.parametrize(
    "cls", [torch.optim.Adafactor, torch.optim.Adagrad, torch.optim.Adadelta, torch.optim.ASGD]
)
def test_a_step_taken_to_see_what_an_optimizer_does_leaves_no_trace(digits, cls):
    model = cnn()
    optimizer = cls(model.parameters(), lr=0.01)
    before = everything(model, optimizer)
    estimate = adaptlr.estimate_lr(loss_on(model), optimizer, loader(digits), model=model)
    assert math.isfinite(estimate.lr)
    assert_same(before, everything(model, optimizer))


def test_the_scaler_is_put_back_and_overflows_are_survived(digits):
    model = cnn()
    optimizer = make_optimizer("adamw", model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=7)
    scaler.scale(torch.zeros(()))
    before, state = everything(model, optimizer), scaler.state_dict()
    overflowing = 3e35  # times the scale of 2 ** 20 is beyond float32, and 1024 is not

    def loss(batch):
        return loss_on(model)(batch) * overflowing

    estimate = adaptlr.estimate_lr(loss, optimizer, loader(digits), model=model, scaler=scaler)
    assert all(map(math.isfinite, estimate.estimates))
    assert scaler.state_dict() == state
    result = adaptlr.find_lr(
        loss_on(model), optimizer, loader(digits), model=model, scaler=scaler, replicas=1
    )
    assert 2e-3 <= result.lr <= 0.3
    assert scaler.state_dict() == state
    assert_same(before, everything(model, optimizer))


# -- how it is called ---------------------------------------------------------


class LabelModel(nn.Module):
    """Takes keyword arguments and returns its loss, like the models of transformers."""

    def __init__(self):
        super().__init__()
        self.body = cnn()

    def forward(self, *, pixels, labels):
        return SimpleNamespace(loss=cross_entropy(self.body(pixels), labels))


def test_models_that_return_their_loss_and_batches_that_are_dicts(digits):
    model = LabelModel()
    batches = [{"pixels": x, "labels": y} for x, y in loader(digits)]
    optimizer = make_optimizer("adamw", model)
    assert 2e-3 <= adaptlr.find_lr(model, optimizer, batches, replicas=1).lr <= 0.3


def test_a_closure_without_batches_accumulation_and_clipping(digits):
    model = cnn()
    low, high = GOOD["sgd"]
    endless = iter([batch for _ in range(20) for batch in loader(digits)])
    optimizer = make_optimizer("sgd", model)
    result = adaptlr.find_lr(
        lambda: loss_on(model)(next(endless)), optimizer, model=model, replicas=1,
        accumulate=2, max_grad_norm=1.0,
    )  # fmt: skip
    assert low <= result.lr <= high


def test_groups_keep_their_ratios(digits):
    model = cnn()
    groups = [
        {"params": model[:3].parameters(), "lr": 1e-4},
        {"params": model[3:].parameters(), "lr": torch.tensor(1e-3)},
    ]
    optimizer = torch.optim.AdamW(groups, foreach=False)
    seen = set()
    optimizer.register_step_pre_hook(
        lambda *_: seen.add(round(float(groups[1]["lr"]) / groups[0]["lr"], 4))
    )
    groups = optimizer.param_groups
    kept = groups[1]["lr"]
    adaptlr.find_lr(loss_on(model), optimizer, loader(digits), replicas=1)
    assert seen == {10.0}
    assert groups[1]["lr"] is kept
    assert kept.item() == pytest.approx(1e-3)


# -- the estimate -------------------------------------------------------------


def test_the_estimate_is_the_median_over_its_gradients(digits):
    model = cnn()
    optimizer = make_optimizer("adamw", model)
    result = adaptlr.estimate_lr(loss_on(model), optimizer, loader(digits), gradients=5)
    assert result.lr == pytest.approx(np.median(result.estimates))
    assert result.family is UpdateFamily.ADAM
    low, high = GOOD["adamw"]
    assert low <= result.lr <= high
    assert "5 gradients" in repr(result)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_probing_step_sees_what_is_known_about_an_optimizer(digits, name, dtype):
    model = cnn().to(dtype)
    optimizer = make_optimizer(name, model, lr=1e-7)
    inputs, labels = next(iter(loader(digits)))
    trial = Trial(lambda: cross_entropy(model(inputs.to(dtype)), labels), optimizer,
                  None, model, None, 1, None)  # fmt: skip
    with Start(optimizer, model) as start:
        trial.gradient()
        family = {"adamw": UpdateFamily.ADAM, "sgd": UpdateFamily.SGD}[name]
        expected = gradient_sum(optimizer, family).item()
        probe = Probe(optimizer, start, [1.0])
        assert probe.family() is family
        # Adam's eps makes the step of the smallest gradients a little shorter.
        tolerance = 1e-2 if dtype is torch.bfloat16 else 1e-3
        assert probe.fall(family) == pytest.approx(expected, rel=tolerance)


# -- the detector -------------------------------------------------------------


@pytest.mark.parametrize("offset", [-100.0, 0.0, 100.0])
@pytest.mark.parametrize("unit", [1e-3, 1.0, 1e3])
def test_the_detector_does_not_depend_on_unit_or_zero_of_the_loss(unit, offset):
    rates = 1e-6 * 10.0 ** (np.arange(112) / 16)
    noise = np.random.default_rng(0).normal(0.0, 0.02, 120)
    curve = 1.0 - 0.8 / (1.0 + (1e-3 / rates) ** 1.5) + (rates / 0.3) ** 2
    losses = unit * (np.concatenate([np.ones(8), curve]) + noise + offset)
    ramp = Ramp(Baseline((losses[:8]).tolist()))
    for rate, loss in zip(rates, losses[8:], strict=True):
        if not ramp.observe(rate, loss):
            break
    assert ramp.stopped == "lost"
    assert 0.1 < rate < 2.0
    assert 1e-3 < ramp.suggestion(16) < 3e-2


def test_noise_alone_is_flat():
    random = np.random.default_rng(0)
    flat = 0
    for _ in range(400):
        losses = random.standard_t(5, 108)
        ramp = Ramp(Baseline(losses[:8].tolist()))
        for index, loss in enumerate(losses[8:]):
            if not ramp.observe(1e-6 * (1 + index), loss):
                break
        flat += ramp.flat and ramp.stopped is None
    # 985 of 1000 with other seeds; 8 losses do not tell their noise better. Replicas outvote it.
    assert flat >= 386


# -- errors -------------------------------------------------------------------


def called(model, optimizer, function=adaptlr.find_lr, **arguments):
    x = torch.randn(4, 1, 8, 8)
    return function(lambda: model(x).square().mean(), optimizer, model=model, **arguments)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"method": "bayes"}, "method must be 'ramp' or 'grid', got 'bayes'"),
        ({"steps_per_decade": 2}, "steps_per_decade must be from 8 to 100, got 2"),
        ({"replicas": 0}, "replicas must be at least 1, got 0"),
        ({"gradients": 2}, "gradients must be at least 4, got 2"),
        ({"min_lr": -1.0}, "min_lr must be positive and finite, got -1.0"),
        ({"min_lr": 1.0, "max_lr": 2.0}, "max_lr must be at least ten times 1, got 2.0"),
        ({"method": "grid", "lrs": [0.1]}, r"lrs must be two or more positive rates, got \[0.1\]"),
        ({"accumulate": 0}, "accumulate must be at least 1, got 0"),
        ({"batches": []}, "batches must have at least one batch left, got none"),
    ],
)
def test_values_out_of_range(arguments, text):
    model = cnn()
    with pytest.raises(ValueError, match=text):
        called(model, make_optimizer("sgd", model), **arguments)


@pytest.mark.parametrize("function", [adaptlr.find_lr, adaptlr.estimate_lr])
@pytest.mark.parametrize("cls", [torch.optim.LBFGS, torch.optim.Rprop])
def test_optimizers_without_a_rate_to_find_are_refused(function, cls):
    model = cnn()
    with pytest.raises(ValueError, match=cls.__name__):
        called(model, cls(model.parameters()), function)


def test_prodigy_is_refused():
    model = cnn()
    prodigy = pytest.importorskip("prodigyopt").Prodigy(model.parameters())
    with pytest.raises(ValueError, match="Prodigy, whose lr multiplies the rate"):
        called(model, prodigy)


def test_an_attached_controller_is_refused():
    model = cnn()
    optimizer = make_optimizer("sgd", model)
    controller = adaptlr.AdaptiveLR(optimizer, 100)
    with pytest.raises(RuntimeError, match="must not have a controller attached"):
        called(model, optimizer)
    controller.detach()
    assert math.isfinite(called(model, optimizer, adaptlr.estimate_lr).lr)


def test_several_processes_are_refused(monkeypatch):
    model = cnn()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="in one process, got a world of 2"):
        called(model, make_optimizer("sgd", model))


def test_state_that_cannot_be_copied_is_refused_before_anything_changes():
    model = cnn()
    optimizer = make_optimizer("sgd", model)
    optimizer.state[model[0].weight] = {"lock": (item for item in ())}
    with pytest.raises(TypeError, match="state that can be copied and put back, got SGD"):
        called(model, optimizer)


@pytest.mark.parametrize(
    ("result", "error", "text"),
    [
        (lambda x: "loss", TypeError, "must return a tensor or something with a loss, got str"),
        (lambda x: x.flatten(), ValueError, r"must return one element, got shape \(256,\)"),
        (lambda x: x.mean() * math.nan, ValueError, "must be finite before any step"),
    ],
)
def test_losses_that_are_none(result, error, text):
    model = cnn()
    x = torch.randn(4, 1, 8, 8)[..., :4, :4].repeat(4, 1, 1, 1).requires_grad_()
    with pytest.raises(error, match=text):
        adaptlr.find_lr(lambda: result(x), make_optimizer("sgd", model), model=model)


def test_something_that_cannot_be_called():
    model = cnn()
    with pytest.raises(TypeError, match="loss must be a model or a callable, got Tensor"):
        adaptlr.find_lr(torch.zeros(()), make_optimizer("sgd", model))


# -- the usual range ----------------------------------------------------------


def test_the_usual_range_by_optimizer_size_and_share():
    backbone, head = nn.Linear(100, 1000), nn.Linear(10, 2)
    model = nn.Sequential(backbone, head)
    full = adaptlr.prior_lr(model, torch.optim.AdamW(model.parameters()))
    adapter = adaptlr.prior_lr(model, torch.optim.AdamW(head.parameters()))
    sgd = adaptlr.prior_lr(model, torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9))
    with torch.device("meta"):
        seven_billion = nn.Linear(70_000, 100_000, bias=False)
    large = adaptlr.prior_lr(seven_billion, torch.optim.AdamW(seven_billion.parameters()))
    assert (full.low, full.typical, full.high) == (3e-5, 3e-4, 1e-3)
    assert (adapter.low, adapter.typical, adapter.high) == (3e-4, 1e-3, 5e-3)
    assert (sgd.low, sgd.typical, sgd.high) == (1e-3, 1e-2, 1e-1)
    assert (large.low, large.typical, large.high) == (5e-6, 2e-5, 5e-5)
    assert repr(large) == ("LRRange(5e-06 to 5e-05, typically 2e-05: AdamW on all 7e+03 M weights)")
    with pytest.raises(ValueError, match="kind of Adam, Lion or SGD, got Adagrad"):
        adaptlr.prior_lr(model, torch.optim.Adagrad(model.parameters()))
