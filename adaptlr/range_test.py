"""`find_lr`: tries learning rates out before a run and goes back to where it began."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import nn

from adaptlr.config import require
from adaptlr.estimate import estimate_from
from adaptlr.grid import grid_result, run_grid
from adaptlr.progress_bar import progress_bar
from adaptlr.ramp import Baseline, Ramp
from adaptlr.range_result import Curve, RangeTest, ramp_result
from adaptlr.start import Start
from adaptlr.trial import Loss, Trial, lr_ratios, set_lr

logger = logging.getLogger("adaptlr")

_BELOW, _ABOVE = 1e-2, 1e3  # where a ramp begins and ends, relative to the estimate
_WIDEST = (1e-8, 10.0)  # where it does if there is no estimate
_DOWN = 1e-3  # where it begins again, if it had begun beyond the cliff
_BEGINNINGS = 3


def find_lr(
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Any] | None = None,
    *,
    model: nn.Module | None = None,
    method: Literal["ramp", "grid"] = "ramp",
    min_lr: float | None = None,
    max_lr: float | None = None,
    steps_per_decade: int = 16,
    replicas: int = 3,
    gradients: int = 8,
    lrs: Sequence[float] | None = None,
    grid_steps: int = 100,
    scaler: torch.amp.GradScaler | None = None,
    accumulate: int = 1,
    max_grad_norm: float | None = None,
    progress: bool = True,
) -> RangeTest:
    """Find a learning rate by trying rates out; the training state is put back afterwards.

    First `estimate_lr`'s gradients, whose losses also tell level and noise before any update. Then
    ``"ramp"``: the rate rises exponentially, step by step, until a significant part of the progress
    is lost; that is repeated from the start on other batches. The result is the geometric mean of
    what the ramps and the gradients suggest; with SGD at least what the gradients do, where the
    ramps got that far. ``"grid"``: a short run with warm-up and cosine at each of a few rates;
    slower, with less theory in it.

    Parameters, buffers, gradients, the optimizer's state and settings, the scaler, random numbers
    and training modes are afterwards what they were, bit for bit; ``batches`` has moved on. Waits
    for the device in every step. Takes memory for a second copy of parameters and optimizer state.

    Args:
        loss: Called with a batch, returns its loss, shape ``()``, as in the training loop: autocast
            belongs into it. Or a model: a batch that is a mapping becomes keyword arguments, and
            what it returns may have a ``loss``.
        optimizer: As it will be trained with, without a controller.
        batches: Iterable of batches, begun anew when it ends; None: ``loss`` takes no arguments.
        model: Model whose buffers are to be put back, where ``loss`` is not the model itself.
        method: ``"ramp"`` or ``"grid"``.
        min_lr: Where the ramp begins; by default a hundredth of the estimate.
        max_lr: Where it ends at the latest; by default a thousand times the estimate.
        steps_per_decade: Speed of the ramp, from 8 to 100.
        replicas: Ramps, or runs at each rate of the grid; the median counts.
        gradients: For the estimate, at least 4.
        lrs: Rates of the grid; by default 6 half decades around the estimate.
        grid_steps: Length of its runs, at least 20; the rates found suit runs of about that length.
        scaler: GradScaler, if training has one.
        accumulate: Micro-batches in a step.
        max_grad_norm: Clip gradients to this norm; None: do not.
        progress: Show a progress bar, on a terminal, if rich is installed.

    Returns:
        The rate, its interval, and the curve. If the curve is flat the rate is NaN, and a warning
        says so.

    Raises:
        TypeError: if an argument is of the wrong kind, or the optimizer cannot be put back.
        ValueError: if a value is out of its range, or the loss is not finite before any step.
        RuntimeError: if the optimizer has a controller, or several processes train.

    Example:
        >>> import adaptlr, torch
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> x = torch.randn(512, 4)
        >>> def loss(x):
        ...     return (model(x) - x.sum(dim=1, keepdim=True)).square().mean()
        >>> result = adaptlr.find_lr(loss, optimizer, x.split(32), model=model)
        >>> optimizer.param_groups[0]["lr"] = result.lr
    """
    require(method in ("ramp", "grid"), "method", "'ramp' or 'grid'", method)
    require(8 <= steps_per_decade <= 100, "steps_per_decade", "from 8 to 100", steps_per_decade)
    require(replicas >= 1, "replicas", "at least 1", replicas)
    require(gradients >= 4, "gradients", "at least 4", gradients)
    require(grid_steps >= 20, "grid_steps", "at least 20", grid_steps)
    trial = Trial(loss, optimizer, batches, model, scaler, accumulate, max_grad_norm)
    with Start(trial.optimizer, trial.model, scaler) as start:
        estimate = estimate_from(trial, start, gradients)
        if not all(map(math.isfinite, estimate.losses)):
            raise ValueError(f"loss must be finite before any step, got {estimate.losses}")
        if method == "grid":
            rates = _grid_rates(lrs, estimate.lr)
            with progress_bar("runs", len(rates) * replicas * grid_steps, progress) as advance:
                runs = run_grid(trial, start, rates, replicas, grid_steps, advance)
            return grid_result(runs, estimate)
        bounds = _bounds(min_lr, max_lr, estimate.lr)
        total = replicas * round(math.log10(bounds[1] / bounds[0]) * steps_per_decade)
        with progress_bar("range test", total, progress) as advance:
            baseline = Baseline(estimate.losses)
            ramps = [
                _run_ramp(trial, start, baseline, bounds, steps_per_decade, advance)
                for _ in range(replicas)
            ]
    return _told(ramp_result(ramps, estimate, steps_per_decade))


def _run_ramp(
    trial: Trial,
    start: Start,
    baseline: Baseline,
    bounds: tuple[float, float],
    steps_per_decade: int,
    advance: Callable[[], object],
) -> Curve:
    """Run one ramp; where it began beyond the cliff, again from lower rates."""
    low, high = bounds
    for _ in range(_BEGINNINGS):
        ramp, lrs, losses = Ramp(baseline), [low], []
        start.rewind()
        ratios = lr_ratios(trial.optimizer)
        while lrs[-1] <= high:
            losses.append(trial.gradient())
            if not ramp.observe(lrs[-1], losses[-1]):
                break
            set_lr(trial.optimizer, lrs[-1], ratios)
            trial.step()
            advance()
            lrs.append(low * 10.0 ** (len(losses) / steps_per_decade))
        if not (ramp.flat and ramp.stopped):
            break
        low *= _DOWN
    return Curve(lrs[: len(losses)], losses, ramp.stopped, ramp.suggestion(steps_per_decade))


def _bounds(min_lr: float | None, max_lr: float | None, estimate: float) -> tuple[float, float]:
    usable = math.isfinite(estimate)
    lowest, highest = (estimate * _BELOW, estimate * _ABOVE) if usable else _WIDEST
    low = lowest if min_lr is None else min_lr
    high = max(highest, 10.0 * low) if max_lr is None else max_lr
    require(0.0 < low < math.inf, "min_lr", "positive and finite", min_lr)
    require(10.0 * low <= high < math.inf, "max_lr", f"at least ten times {low:.2g}", max_lr)
    return low, high


def _grid_rates(lrs: Sequence[float] | None, estimate: float) -> list[float]:
    if lrs is None:
        if not math.isfinite(estimate):
            raise ValueError("lrs must be given: the gradients suggest no rate to begin from")
        return [estimate * 10.0 ** (step / 2) for step in range(-3, 3)]
    rates = sorted(map(float, lrs))
    ok = len(rates) >= 2 and all(0.0 < rate < math.inf for rate in rates)
    require(ok, "lrs", "two or more positive rates", lrs)
    return rates


def _told(result: RangeTest) -> RangeTest:
    if result.flat:
        low, high = result.curve["lr"][[0, -1]]
        warnings.warn(
            f"the loss did not fall by more than its noise at any rate between {low:.2g} and "
            f"{high:.2g}: check that the loss depends on the parameters of the optimizer, or give "
            "min_lr and max_lr, or more accumulate",
            RuntimeWarning,
            stacklevel=3,
        )
    return result
