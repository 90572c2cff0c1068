"""The one-gradient estimate: where the good learning rates lie, told by the first gradient alone.

To first order, a step at rate lr changes the loss by -lr * sum(g * u), where g is the gradient and
u the optimizer's direction: g itself for SGD, about sign(g) for Adam and Lion. The best rates of
real tasks lie close to where that change is a fixed share of the loss (docs/choosing_lr.md). One
gradient and one sum tell it, without a step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from enum import Enum
from functools import reduce
from typing import Any, TypeAlias

import torch
from torch import Tensor

Rate: TypeAlias = float | Tensor

NOISE_PER_LOSS = 30.0  # what a loss is worth in units of its noise, where it cannot be the scale
NEAR_ZERO = 3.0  # a loss below so many standard deviations of its noise is no scale


class UpdateFamily(Enum):
    """What an optimizer makes of a gradient in its first step, without weight decay."""

    ADAM = "adam"  # a step of about lr in every weight, less once the moments have settled
    RMSPROP = "rmsprop"  # up to 10 lr at first, then as Adam
    SIGN = "sign"  # a step of exactly lr in every weight, always
    ADAGRAD = "adagrad"  # a step of lr in every weight, then less and less
    SGD = "sgd"  # lr * g

    @property
    def relative_change(self) -> float:
        """First-order change of the loss by a step at the best rate, as a share of the loss.

        Measured with AdamW and with SGD of momentum 0.9 on six fine-tuning tasks; the others follow
        from Adam's by how large a step is once the first ones are past. A sign step stays as large
        as Adam's is only at first: Lion's authors take rates 3 to 10 times lower than AdamW's, and
        5 is the middle. RMSprop's first steps are larger for want of Adam's correction of the
        second moment, and so are Adagrad's, which then shrink with the root of the number of steps,
        by 10 over a few hundred: two thirds of what that gives, as on the same tasks.
        """
        return _RELATIVE_CHANGE[self]

    @property
    def power(self) -> int:
        """The power of the gradient that is summed: sum(g * u) is sum(abs(g) ** power)."""
        return 2 if self is UpdateFamily.SGD else 1

    @property
    def misleads_ramps(self) -> bool:
        """Whether the loss on a short ramp says little about the rate at each of its steps.

        With SGD it trails the rate by the momentum. The first steps of RMSprop and Adagrad are
        several times larger than those at the same rate later, so a ramp reads too low.
        """
        return self in (UpdateFamily.SGD, UpdateFamily.RMSPROP, UpdateFamily.ADAGRAD)


_RELATIVE_CHANGE = {
    UpdateFamily.ADAM: 0.13,
    UpdateFamily.RMSPROP: 0.09,
    UpdateFamily.SIGN: 0.026,
    UpdateFamily.ADAGRAD: 0.9,
    UpdateFamily.SGD: 0.025,
}
_MOMENTUM = 0.9  # of the SGD that its relative change was measured with

# By name, since the same optimizers live in many packages. A subclass belongs to the family of what
# it is derived from.
# Left out on purpose: Adafactor, whose lr is a share of the weights; Muon and Shampoo, whose steps
# depend on whole matrices; Prodigy and schedule-free optimizers, whose lr means something else.
_NAMES = {
    UpdateFamily.ADAM: (
        *("Adam", "AdamW", "Adamax", "NAdam", "RAdam", "SparseAdam", "FusedAdam"),
        *("DeepSpeedCPUAdam", "Adam8bit", "AdamW8bit", "PagedAdamW", "PagedAdamW8bit"),
    ),
    UpdateFamily.RMSPROP: ("RMSprop", "RMSprop8bit"),
    UpdateFamily.SIGN: ("Lion", "Lion8bit", "PagedLion", "PagedLion8bit"),
    UpdateFamily.ADAGRAD: ("Adagrad", "FusedAdagrad", "DeepSpeedCPUAdagrad", "Adagrad8bit"),
    UpdateFamily.SGD: ("SGD", "ASGD", "FusedSGD", "SGD8bit"),
}
_FAMILIES = {name: family for family, names in _NAMES.items() for name in names}


def update_family(optimizer: torch.optim.Optimizer) -> UpdateFamily | None:
    """Return the family that an optimizer's class, or one it is derived from, is known to be in.

    Returns:
        The family, or None where there is no constant for such an optimizer.
    """
    names = (cls.__name__ for cls in type(optimizer).__mro__)
    return next((_FAMILIES[name] for name in names if name in _FAMILIES), None)


@torch.no_grad()
def gradient_sum(
    optimizer: torch.optim.Optimizer,
    family: UpdateFamily,
    lr_ratios: Sequence[float] | None = None,
) -> Tensor:
    """Return sum(g * u) over all parameters: the first-order fall of the loss per unit of lr.

    Call it between ``backward`` (and clipping, if there is any) and ``optimizer.step``, or in a
    step pre-hook. A few launches for each group of the optimizer; nothing waits for the device,
    except where gradients are sparse. Gradients that GradScaler leaves for a fused optimizer to
    unscale are taken at their true size.

    Args:
        optimizer: The optimizer whose gradients are summed. A parameter without one counts for 0.
        family: What the optimizer makes of a gradient.
        lr_ratios: The rate of every group as a share of the largest; by default from
            ``initial_lr`` where a scheduler has left one, else from ``lr``.

    Returns:
        Tensor of shape ``()``, float64 (float32 on devices without it), on the device of the
        first gradient; 0 if there is no gradient. Not finite if the gradients are not.

    Raises:
        ValueError: if ``lr_ratios`` does not have a number for each group.
    """
    groups = optimizer.param_groups
    ratios = _lr_ratios(groups) if lr_ratios is None else lr_ratios
    if len(ratios) != len(groups):
        raise ValueError(f"lr_ratios must have {len(groups)} numbers, got {len(ratios)}")
    sums = [
        _power_sum(gradients, family.power) * (ratio * momentum_share(group, family))
        for group, ratio in zip(groups, ratios, strict=True)
        if (gradients := list(_gradients(group)))
    ]
    if not sums:
        return torch.zeros((), device=groups[0]["params"][0].device)
    total = torch.stack([part.to(sums[0].device) for part in sums]).sum()
    grad_scale = getattr(optimizer, "grad_scale", None)  # set by GradScaler during a fused step
    return total if grad_scale is None else total / grad_scale.to(total) ** family.power


def estimate(
    loss: float, gradient_sum: float, family: UpdateFamily, noise: float | None = None
) -> float:
    """Return the learning rate at which a step changes the loss by the family's relative change.

    The result is the largest group's peak, for a run with a warm-up and a decay. On six tasks, with
    constants fitted on the other five each time, it lay within a factor of 5 of the best rate;
    docs/choosing_lr.md tells where it did not.

    The loss itself is the scale, so an estimate is only as good as the loss's zero: adding a
    constant to the loss changes it. Where losses at or below zero show that it has none, 30 times
    the noise takes the place of a loss that is not far above that.

    Args:
        loss: The loss that the gradient is of, averaged as the gradient is.
        gradient_sum: What `gradient_sum` has returned.
        family: The optimizer's family.
        noise: Standard deviation of the loss from batch to batch at fixed weights; None where all
            losses are positive: noisy as they may be, as a squared error of few examples is, such a
            loss is its own scale.

    Returns:
        A positive rate; NaN where there is none: no gradient, a loss of zero, or values that are
        not finite.
    """
    scale = abs(loss)
    if noise is not None and loss < NEAR_ZERO * noise:
        scale = NOISE_PER_LOSS * noise
    if not (0.0 < scale < math.inf and 0.0 < gradient_sum < math.inf):
        return math.nan
    return family.relative_change * scale / gradient_sum


def _lr_ratios(groups: Sequence[dict[str, Any]]) -> list[Rate]:
    rates = [group.get("initial_lr", group["lr"]) for group in groups]
    if any(isinstance(rate, Tensor) for rate in rates):
        if len(rates) == 1:
            return [1.0]
        largest = torch.stack([torch.as_tensor(rate) for rate in rates]).max()
        return [torch.as_tensor(rate) / largest for rate in rates]
    largest = max(rates)
    return [rate / largest if largest > 0.0 else 1.0 for rate in rates]


def momentum_share(group: dict[str, Any], family: UpdateFamily) -> float:
    """Return how much more a gradient counts than in the optimizer that the family is named after.

    That is SGD with a momentum of 0.9, and Adam, whose momentum is an average. In all a gradient
    moves the weights 1 / (1 - momentum) times lr, which is what counts where noise limits the rate;
    where curvature does, momentum makes hardly a difference. For SGD it is the root between the
    two, as on digits: without momentum the best rate is 3 times as high. For RMSprop it is all of
    it, as on digits: with a momentum of 0.9 the best rate is 6 to 10 times lower.
    """
    momentum, dampening = group.get("momentum", 0.0), group.get("dampening", 0.0)
    travel = (1.0 - dampening) / (1.0 - momentum) if momentum else 1.0
    return math.sqrt(travel * (1.0 - _MOMENTUM)) if family is UpdateFamily.SGD else travel


def _gradients(group: dict[str, Any]) -> Iterator[Tensor]:
    for parameter in group["params"]:
        gradient = parameter.grad
        if gradient is None:
            continue
        if gradient.is_sparse:
            gradient = gradient.coalesce().values()
        yield torch.view_as_real(gradient) if gradient.is_complex() else gradient


def _power_sum(gradients: list[Tensor], power: int) -> Tensor:
    """Return sum(abs(g) ** power) over all tensors, which may lie on several devices."""
    dtypes = {gradient.dtype for gradient in gradients}
    dtype = reduce(torch.promote_types, dtypes, torch.float32)  # half precision would overflow
    if all(type(gradient) is Tensor for gradient in gradients):
        norms: Sequence[Tensor] = torch._foreach_norm(gradients, power, dtype=dtype)
    else:  # torch 2.14 takes a dtype here for a dimension where gradients are DTensors
        norms = [torch.linalg.vector_norm(g, power, dtype=dtype) for g in gradients]
    device = norms[0].device
    wide = torch.float32 if device.type == "mps" else torch.float64  # squares leave float32 early
    return (torch.stack([norm.to(device) for norm in norms]).to(wide) ** power).sum()
