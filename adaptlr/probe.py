"""`Probe`: takes a step with an optimizer that nothing is known about, and undoes it.

What a step does to the weights is as far as their rounding lets it be seen. So the step is made
about half as large as the weights themselves: float32 then keeps 7 digits of it and bfloat16, over
many weights, nearly 3, whatever the scale of the gradients and of lr.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from adaptlr.one_gradient import UpdateFamily, momentum_share
from adaptlr.start import Start
from adaptlr.trial import set_lr

_STEP = (
    0.5  # of the weights; not more: Adafactor cuts rates above 1, a step as large as the weights
)
_NEAR = (0.05, 2.0)  # steps that are as good
_FIRST_LR = 1e-2
_FURTHER = 1e6  # where a step has vanished in rounding
_TRIES = 4


class Probe:
    """Steps on the gradients that are there when it is made.

    Args:
        optimizer: Its state counts as that before the first step.
        start: Where to go back to.
        ratios: The rate of every group as a share of the largest.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, start: Start, ratios: list[float]) -> None:
        """Keep the gradients: going back clears them."""
        self._optimizer = optimizer
        self._start = start
        self._ratios = ratios
        self._gradients = {
            parameter: parameter.grad
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        }
        self._lr = _FIRST_LR

    def family(self) -> UpdateFamily:
        """Find out whether twice the gradient makes twice the step."""
        once, twice = self.fall(None), self.fall(None, 2.0)
        proportional = twice > math.sqrt(2.0) * once
        return UpdateFamily.SGD if proportional else UpdateFamily.ADAM

    def fall(self, family: UpdateFamily | None, scale: float = 1.0) -> float:
        """Return the first-order fall of the loss per unit of lr, as `gradient_sum` does.

        Args:
            family: Whose momentum is to count; None: as if there were none.
            scale: Multiplies the gradients that the optimizer sees.
        """
        for _ in range(_TRIES):
            fall, size = self._step(family, scale)
            if not math.isfinite(size) or _NEAR[0] <= size <= _NEAR[1]:
                break
            self._lr *= _STEP / size if size > 0.0 else _FURTHER
        self._start.rewind()
        return fall

    @torch.no_grad()
    def _step(self, family: UpdateFamily | None, scale: float) -> tuple[float, float]:
        """Step once from the start; return the fall, and the size relative to the weights."""
        self._start.rewind()
        self._optimizer.state.clear()
        weights = {}
        for parameter, gradient in self._gradients.items():
            weights[parameter] = parameter.clone()
            parameter.grad = gradient * scale
        for group in self._optimizer.param_groups:
            group.update({"weight_decay": 0.0} if "weight_decay" in group else {})
        set_lr(self._optimizer, self._lr, self._ratios)
        self._optimizer.step()
        fall = moved = total = 0.0
        for group in self._optimizer.param_groups:
            share = 1.0 if family is None else momentum_share(group, family)
            for parameter in filter(weights.__contains__, group["params"]):
                step = _wide(weights[parameter]) - _wide(parameter)
                gradient = _wide(self._gradients[parameter])
                fall += share * (step * gradient).sum().item() / self._lr
                moved += step.square().sum().item()
                total += _wide(weights[parameter]).square().sum().item()
        return fall, math.sqrt(moved / total) if total > 0.0 else _STEP


def _wide(tensor: Tensor) -> Tensor:
    """Return a tensor of real numbers, dense, in at least float32."""
    dense = tensor.to_dense() if tensor.is_sparse else tensor
    real = torch.view_as_real(dense) if dense.is_complex() else dense
    return real.to(torch.promote_types(real.dtype, torch.float32))
