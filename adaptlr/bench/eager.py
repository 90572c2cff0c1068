"""The statistics and the schedule in eager torch ops on 0-dim tensors: what a kernel spares.

Sections 1 and 2 of docs/algorithm.md, the cusum and ``best_level`` of section 3, written as one
would without an extension: no branch on a value, hence no wait for the device. The start-up, the
other charts and the guard are left out, so the real thing would cost more.
"""

from __future__ import annotations

import math
from typing import Any

import numpy.typing as npt
import torch

FIELDS = (
    *("samples", "level", "variance", "mean_score", "previous_score", "sign_agreement"),
    *("mean_age", "age_variance", "age_covariance", "cusum", "best_level"),
)
GAIN = 1 / 128
CLIP = 2.5
BETA = 0.9775599834528069  # E[min(Z^2, CLIP^2)] of a normal Z
SLOPE_WINDOW = 2 * GAIN**3 / (2 - GAIN) ** 3


class EagerController:
    """Goes on where a State stands that is past its start-up.

    Attributes:
        lr: Learning rate of the last step; 0-dim float32.
        t_statistic: Of the slope, in the last step; 0-dim float64.
    """

    def __init__(
        self, state: npt.NDArray[Any], config: npt.NDArray[Any], device: torch.device
    ) -> None:
        """Copy ``state`` to ``device``."""

        def scalar(value: Any) -> torch.Tensor:
            return torch.tensor(float(value), dtype=torch.float64, device=device)

        self.fields = torch.stack([scalar(state[name]) for name in FIELDS])
        self.start_level = scalar(state["start_level"])
        self.clock = scalar(state["step"])
        self.peak_factor = scalar(config["peak"] * state["factor"])
        self.warmup_steps = float(config["warmup_steps"])
        self.total_steps = float(config["total_steps"])
        self.lr = torch.zeros((), device=device)
        self.t_statistic = scalar(0.0)

    @torch.no_grad()
    def step(self, loss: torch.Tensor) -> None:
        """Advance by one step."""
        loss = loss.double()
        updated = self._statistics(loss, *self.fields.unbind())
        # A loss that is not finite changes nothing.
        self.fields = torch.where(loss.abs() <= 1e30, updated, self.fields)
        self._write_lr()

    def _statistics(
        self,
        loss: torch.Tensor,
        samples: torch.Tensor,
        level: torch.Tensor,
        variance: torch.Tensor,
        mean_score: torch.Tensor,
        previous_score: torch.Tensor,
        sign_agreement: torch.Tensor,
        mean_age: torch.Tensor,
        age_variance: torch.Tensor,
        age_covariance: torch.Tensor,
        cusum: torch.Tensor,
        best_level: torch.Tensor,
    ) -> torch.Tensor:
        samples = (samples + 1).clamp(max=1e6)
        gain = samples.reciprocal().clamp(min=GAIN)
        floor = self._smallest_scale(level, best_level)
        scale = torch.maximum(variance.sqrt(), floor)  # (4)
        score = ((loss - level) / scale).clamp(-CLIP, CLIP)
        residual = scale * score

        centred = score - mean_score  # (6)
        agreement = ((centred > 0) == (previous_score > 0)).double() * 2 - 1
        sign_gain = (samples + 32).reciprocal().clamp(min=1 / 512)
        sign_agreement = sign_agreement.lerp(agreement, sign_gain)
        mean_score = mean_score.lerp(score, gain)
        correlation = (sign_agreement * (math.pi / 2)).sin().clamp(0, 0.9)
        tau = (1 + correlation) / (1 - correlation)
        cusum = (cusum + score / (tau * BETA).sqrt() - 0.5).clamp(min=0)

        age = mean_age + 1  # (7)
        kept, weight = 1 - gain, gain * age
        age_covariance = torch.addcmul(age_covariance, weight, residual) * kept
        age_variance = torch.addcmul(age_variance, weight, age) * kept
        mean_age = age * kept

        level = torch.addcmul(level, gain, residual)  # (5)
        growth = gain * (score.square() / BETA - 1) + 1
        variance = torch.maximum(variance, floor.square()) * growth

        slope = age_covariance / age_variance  # (8, 9)
        slope_variance = (12 / (samples**3 - samples)).clamp(min=SLOPE_WINDOW)
        residual_variance = torch.maximum(variance - age_covariance * slope, variance * 0.05)
        product = (slope_variance * residual_variance * tau).clamp(min=1e-38)
        self.t_statistic = slope / product.sqrt()
        best_level = torch.minimum(level, best_level.lerp(level, 1 / 2048))
        return torch.stack(
            [
                *(samples, level, variance, mean_score, centred, sign_agreement),
                *(mean_age, age_variance, age_covariance, cusum, best_level),
            ]
        )

    def _smallest_scale(self, level: torch.Tensor, best_level: torch.Tensor) -> torch.Tensor:
        progress = (self.start_level - best_level).clamp(min=0) * 1e-3
        return torch.maximum(progress, level.abs() * 5e-7).clamp(min=1e-30)

    def _write_lr(self) -> None:
        """Equations (1) and (2), for the cosine."""
        clock = self.clock
        share = (clock - (self.warmup_steps - 1)) / (self.total_steps - self.warmup_steps)
        decay = ((share * math.pi).cos() + 1) * 0.5
        warmup = (clock + 1) / max(self.warmup_steps, 1.0)
        multiplier = torch.where(clock < self.warmup_steps, warmup, decay)
        self.lr.copy_(self.peak_factor * multiplier)
        self.clock += 1
