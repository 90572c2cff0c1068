"""The one-gradient estimate against sums written out in NumPy, and against a real first step."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from adaptlr import estimate_lr
from adaptlr.one_gradient import UpdateFamily, estimate, gradient_sum, update_family

ADAM, RMSPROP, SIGN, ADAGRAD, SGD = UpdateFamily
MOMENTUM = {ADAM: 0.0, SGD: 0.9}  # with which a gradient counts once


def parameters(*shapes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = [
        torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes
    ]
    for parameter in made:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(dtype)
    return made


def written_out(made, power):
    return sum((np.abs(p.grad.double().numpy()) ** power).sum() for p in made)


@pytest.mark.parametrize("family", [ADAM, SGD])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_sum_is_that_of_all_gradients(family, dtype):
    made = parameters((7, 3), (5,), (), dtype=dtype)
    optimizer = torch.optim.SGD(made, lr=0.1, momentum=MOMENTUM[family])
    expected = written_out(made, family.power)
    # One rounding to float32 a tensor, and one a term: 1e-6 holds 8 of them.
    assert gradient_sum(optimizer, family).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("family", [ADAM, SGD])
def test_gradients_of_several_dtypes_that_would_overflow_in_half_precision(family):
    made = parameters((9,), dtype=torch.float16) + parameters((4,), dtype=torch.float64)
    made[0].grad.fill_(6e4)
    optimizer = torch.optim.SGD(made, lr=0.1, momentum=MOMENTUM[family])
    assert gradient_sum(optimizer, family).item() == pytest.approx(written_out(made, family.power))


@pytest.mark.parametrize(
    ("factory", "family"),
    [
        (lambda made: torch.optim.AdamW(made, lr=1e-3, weight_decay=0.0, eps=1e-30), ADAM),
        (lambda made: torch.optim.Adamax(made, lr=1e-3, eps=1e-30), ADAM),
        (lambda made: torch.optim.Adagrad(made, lr=1e-3, eps=1e-30), ADAGRAD),
        (lambda made: torch.optim.SGD(made, lr=1e-3, momentum=0.9, nesterov=False), SGD),
    ],
    ids=["AdamW", "Adamax", "Adagrad", "SGD"],
)
def test_it_predicts_what_a_real_first_step_does(factory, family):
    made = parameters((20, 3), (8,), dtype=torch.float64)
    optimizer = factory(made)
    before = [parameter.detach().clone() for parameter in made]
    expected = gradient_sum(optimizer, family).item()
    optimizer.step()
    moved = sum(
        ((old - new.detach()) * new.grad).sum().item()
        for old, new in zip(before, made, strict=True)
    )
    assert moved / 1e-3 == pytest.approx(expected, rel=1e-12)


def test_groups_count_by_the_ratio_of_their_rates():
    made = parameters((6,), (4,))
    groups = [{"params": made[:1], "lr": 0.2}, {"params": made[1:], "lr": 0.05}]
    optimizer = torch.optim.Adam(groups)
    expected = written_out(made[:1], 1) + 0.25 * written_out(made[1:], 1)
    assert gradient_sum(optimizer, ADAM).item() == pytest.approx(expected)
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(group["lr"])
    assert gradient_sum(optimizer, ADAM).item() == pytest.approx(expected)
    torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1e-9)  # warm-up changes no ratio
    assert gradient_sum(optimizer, ADAM).item() == pytest.approx(expected)
    flat = gradient_sum(optimizer, ADAM, lr_ratios=[1.0, 1.0]).item()
    assert flat == pytest.approx(written_out(made, 1))
    with pytest.raises(ValueError, match="lr_ratios must have 2 numbers, got 1"):
        gradient_sum(optimizer, ADAM, lr_ratios=[1.0])


@pytest.mark.parametrize(
    ("settings", "share"),
    [
        ({"momentum": 0.9}, 1.0),
        ({"momentum": 0.0}, 0.1**0.5),
        ({"momentum": 0.9, "dampening": 0.9}, 0.1**0.5),
    ],
)
def test_momentum_counts_by_how_far_it_carries_a_gradient(settings, share):
    made = parameters((6,))
    optimizer = torch.optim.SGD(made, lr=0.1, **settings)
    assert gradient_sum(optimizer, SGD).item() == pytest.approx(share * written_out(made, 2))


@pytest.mark.parametrize(("momentum", "share"), [(0.0, 1.0), (0.9, 10.0)])
def test_the_momentum_of_rmsprop_counts_in_full(momentum, share):
    made = parameters((6,))
    optimizer = torch.optim.RMSprop(made, momentum=momentum)
    assert gradient_sum(optimizer, ADAM).item() == pytest.approx(share * written_out(made, 1))


FIRST_LR = 1e-3


def first_steps(optimizer_of, count):
    """Return the size of each of the first steps on gradients that stay the same, in lr."""
    made = parameters((50,), dtype=torch.float64)
    optimizer = optimizer_of(made)
    sizes = []
    for _ in range(count):
        before = made[0].detach().clone()
        optimizer.step()
        sizes.append((made[0].detach() - before).abs().mean().item() / FIRST_LR)
    return np.array(sizes)


def test_what_the_constants_assume_of_first_steps():
    # The sizes as the families have them, and where they differ in the first steps.
    count = np.arange(1, 201)
    nadam = first_steps(lambda made: torch.optim.NAdam(made, lr=FIRST_LR), 200)
    np.testing.assert_allclose(nadam, 1.0, atol=0.5)
    rmsprop = first_steps(lambda made: torch.optim.RMSprop(made, lr=FIRST_LR), 200)
    np.testing.assert_allclose(rmsprop, 1.0 / np.sqrt(1.0 - 0.99**count), rtol=1e-4)
    adagrad = first_steps(lambda made: torch.optim.Adagrad(made, lr=FIRST_LR), 200)
    np.testing.assert_allclose(adagrad, 1.0 / np.sqrt(count), rtol=1e-4)
    lion = pytest.importorskip("lion_pytorch").Lion
    np.testing.assert_allclose(first_steps(lambda made: lion(made, lr=FIRST_LR), 20), 1.0)


def test_missing_sparse_complex_and_empty_gradients():
    made = parameters((5,), (3,))
    dense = torch.zeros(6, 2)
    dense[1], dense[4] = 2.0, -3.0
    sparse = torch.nn.Parameter(torch.zeros(6, 2))
    sparse.grad = dense.to_sparse(1)
    empty = torch.nn.Parameter(torch.zeros(0))
    empty.grad = torch.zeros(0)
    imaginary = torch.nn.Parameter(torch.zeros(1, dtype=torch.complex64))
    imaginary.grad = torch.tensor([3.0 - 4.0j])
    expected = written_out(made[:1], 1) + 2 * (2.0 + 3.0) + (3.0 + 4.0)
    made[1].grad = None
    optimizer = torch.optim.SGD([*made, sparse, empty, imaginary], lr=0.1)
    assert gradient_sum(optimizer, ADAM).item() == pytest.approx(expected)
    optimizer.zero_grad()
    assert gradient_sum(optimizer, ADAM).item() == 0.0


@pytest.mark.parametrize("family", [ADAM, SGD])
def test_gradients_still_scaled_for_a_fused_step_count_at_their_true_size(family):
    made = parameters((6,))
    expected = written_out(made, family.power)
    made[0].grad *= 1024.0
    seen = []
    optimizer = torch.optim.SGD(made, lr=0.1, momentum=MOMENTUM[family], fused=True)
    optimizer.register_step_pre_hook(lambda *_: seen.append(gradient_sum(optimizer, family)))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(()))  # makes the scale
    scaler.step(optimizer)
    assert seen[0].item() == pytest.approx(expected)


def test_nothing_finite_comes_of_a_nan():
    made = parameters((6,))
    made[0].grad[2] = math.nan
    total = gradient_sum(torch.optim.AdamW(made), ADAM).item()
    assert math.isnan(estimate(1.0, total, ADAM))


class MyAdam(torch.optim.AdamW):
    pass


@pytest.mark.parametrize(
    ("cls", "family"),
    [
        (torch.optim.AdamW, ADAM),
        (torch.optim.NAdam, ADAM),
        (torch.optim.RMSprop, RMSPROP),
        (torch.optim.SparseAdam, ADAM),
        (MyAdam, ADAM),
        (torch.optim.SGD, SGD),
        (torch.optim.Adagrad, ADAGRAD),
        (torch.optim.Adafactor, None),
        (torch.optim.LBFGS, None),
    ],
)
def test_families_of_torch(cls, family):
    assert update_family(cls([torch.nn.Parameter(torch.zeros(2, 2))])) is family


def test_families_of_other_packages():
    lion, prodigy, schedulefree = map(
        pytest.importorskip, ("lion_pytorch", "prodigyopt", "schedulefree")
    )
    made = parameters((2,))
    assert update_family(lion.Lion(made)) is SIGN
    assert update_family(prodigy.Prodigy(made)) is None
    assert update_family(schedulefree.AdamWScheduleFree(made)) is None


def test_the_estimate_is_where_a_step_changes_the_loss_by_the_relative_change():
    for family in UpdateFamily:
        lr = estimate(2.0, 50.0, family)
        assert lr * 50.0 == pytest.approx(family.relative_change * 2.0)


def test_the_noise_is_no_scale_for_losses_that_are_never_negative():
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    batches = torch.tensor([0.1, 1.0, 0.2, 2.0])  # the squared error of one example each
    result = estimate_lr(lambda x: (weight - x).square().sum(), optimizer, batches)
    assert result.lr == pytest.approx(0.025 / 4)  # 0.025 loss / sum(g ** 2), the same for all


@pytest.mark.parametrize("loss", [-4.0, 0.0, 0.05])
def test_the_noise_is_the_scale_where_the_loss_cannot_be(loss):
    assert estimate(loss, 50.0, ADAM, noise=0.02) == pytest.approx(0.13 * 0.6 / 50.0)
    assert estimate(2.0, 50.0, ADAM, noise=0.02) == estimate(2.0, 50.0, ADAM)


@pytest.mark.parametrize(
    ("loss", "total"), [(0.0, 1.0), (math.nan, 1.0), (math.inf, 1.0), (1.0, 0.0), (1.0, math.inf)]
)
def test_there_is_no_estimate_without_a_scale_and_a_gradient(loss, total):
    assert math.isnan(estimate(loss, total, SGD))
