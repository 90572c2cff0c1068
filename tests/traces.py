"""Named loss traces: what the losses of healthy and of broken runs look like."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

STEPS = 10_000

Array = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Trace:
    """The losses of one run and what else its steps bring in."""

    name: str
    losses: Array
    grad_norms: Array | None = None
    overflows: npt.NDArray[np.bool_] | None = None
    total_steps: int = STEPS

    @property
    def loss_unit(self) -> float:
        """The typical size of a loss."""
        finite = self.losses[np.isfinite(self.losses)]
        return float(np.median(np.abs(finite)))


def curve() -> Array:
    """A power law from 2.5 towards 1.2, as of a fine-tune."""
    return 1.2 + 1.3 * (1 + np.arange(STEPS) / 100) ** -0.5


def noise(seed: int, size: float = 0.1) -> Array:
    return size * np.random.default_rng(seed).standard_normal(STEPS)


def autocorrelated_noise(seed: int, correlation: float = 0.8) -> Array:
    values = noise(seed, 0.1 * np.sqrt(1 - correlation**2))
    for i in range(1, STEPS):
        values[i] += correlation * values[i - 1]
    return values


def with_values(losses: Array, values: dict[int, list[float]]) -> Array:
    """Overwrite the losses from each key on."""
    losses = losses.copy()
    for start, replacement in values.items():
        losses[start : start + len(replacement)] = replacement
    return losses


def blow_up(start: int, end: float) -> Array:
    """Doubles every 20 steps from ``start`` until it saturates."""
    age = np.maximum(np.arange(STEPS) - start, 0)
    return np.minimum(curve() * 2.0 ** np.minimum(age / 20, 100), end) + noise(7)


def start_up_blow_up() -> Array:
    losses = curve() + noise(8)
    losses[6:60] = 2.5 * 4.0 ** np.minimum(np.arange(1, 55), 8)
    return losses


def overflow_trace() -> Trace:
    overflows = np.zeros(STEPS, bool)
    for start, length in {0: 12, 2000: 3, 6000: 1, 7000: 32, 8000: 40}.items():
        overflows[start : start + length] = True
    norms = np.exp(noise(16, 0.3))
    norms[overflows] = np.inf
    norms[[100, 3000, 3001, 5000]] = [np.inf, np.nan, np.inf, np.inf]
    norms[4000:4500] = -1.0
    return Trace("overflow", curve() + noise(15), norms, overflows)


def norm_spike_trace() -> Trace:
    """Every kind of norm: spikes, none given, 0, tiny, huge, and those that are not finite."""
    norms = np.exp(noise(17, 0.3))
    norms[[12, 300, 4000, 8000]] *= [50.0, 20.0, 1e6, 30.0]
    norms[[50, 2500, 2501, 2502, 6001]] = [0.0, 0.0, -0.0, 1e-40, 1e29]
    norms[[700, 3000, 3001, 5000, 7500]] = [np.inf, np.nan, np.inf, 2e30, np.inf]
    norms[1000:1500] = norms[5001:6000:2] = -1.0
    losses = with_values(curve() + noise(18), {3001: [np.nan], 8000: [np.inf], 9000: [np.nan] * 4})
    overflows = np.zeros(STEPS, bool)
    overflows[[0, 7500, 9500]] = True
    return Trace("norm_spike", losses, norms, overflows)


def norm_tail_trace() -> Trace:
    """Norms that fall by a half every 3000 steps, with tails so heavy that 6 scales are common."""
    random = np.random.default_rng(19)
    norms = np.exp(-np.arange(STEPS) / 4300 + np.clip(0.3 * random.standard_t(2, STEPS), -60, 60))
    return Trace("norm_tail", blow_up(4000, 12.0), norms)


def collapse(start: int, end: float, seed: int) -> Array:
    """Falls from 4 by half in 100 steps; from ``start`` on at ``end``."""
    losses = 1 + 3 * 0.5 ** (np.arange(STEPS) / 100)
    losses[start:] = end
    return losses + noise(seed)


def stall() -> Array:
    """Falls for 1500 steps, then rises a little and stays there."""
    losses = 1 + 0.6 * 0.5 ** (np.arange(STEPS) / 400)
    losses[1500:] = losses[1500] + 0.05
    return losses + noise(26, 0.2)


def make_traces() -> list[Trace]:
    healthy = curve() + noise(1)
    clock = np.arange(STEPS)
    nan, inf = float("nan"), float("inf")
    bursts = {
        0: [nan],
        40: [nan] * 5,
        3000: [inf],
        3002: [-inf, nan],
        5000: [nan] * 8,
        9000: [2e30],
    }
    random = np.random.default_rng(14)
    return [
        Trace("healthy", healthy),
        Trace("plateau", np.maximum(curve(), 1.5) + noise(2, 0.05)),
        Trace("spike", with_values(healthy, {700: [40.0], 4000: [9.0], 4100: [3.5], 8000: [1e6]})),
        Trace("burst", with_values(healthy, {900: [5.0, 7.0, 6.0], 5000: [3.0, 4.0, 4.0]})),
        Trace("nan_burst", with_values(healthy, bursts)),
        Trace("nan_end", with_values(healthy, {7000: [nan] * (STEPS - 7000)})),
        Trace("blow_up", blow_up(4000, 12.0)),
        Trace("late_blow_up", blow_up(9900, 1e6)),
        Trace("start_up_blow_up", start_up_blow_up()),
        Trace("drift", curve() + 0.6 * np.maximum(clock - 4000, 0) / 6000 + noise(9)),
        Trace("worse", curve() + 2.0 * np.clip((clock - 60) / 200, 0, 1) + noise(10)),
        Trace("negative", -3.0 + curve() + noise(11) - clock / 5000),
        Trace("near_zero", 0.02 * np.exp(1.2 * random.standard_normal(STEPS))),
        Trace("ar_noise", curve() + autocorrelated_noise(12)),
        Trace("constant", np.full(STEPS, 0.7), np.where(clock % 900 == 899, 1.0078125, 1.0)),
        Trace("bfloat16", np.round(128 * (curve() + noise(26))) / 128),  # many equal differences
        Trace("jump_down", curve() - 0.8 * (clock >= 3000) + noise(13)),
        overflow_trace(),
        Trace("heavy_tail", curve() + 0.05 * random.standard_t(2, STEPS)),
        Trace("end_of_run", healthy, total_steps=9000),
        norm_spike_trace(),
        norm_tail_trace(),
        Trace("collapse", collapse(250, 3.4, 22)),
        Trace("collapse_late", collapse(7000, 2.0, 23)),
        Trace("above", 2.5 + 3.0 * (np.arange(STEPS) > 1) + noise(24)),
        Trace("dead", 2.5 + noise(25)),
        Trace("stall", stall()),
    ]


TRACES = make_traces()
