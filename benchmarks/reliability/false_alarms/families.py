"""The losses of healthy runs: what a guard must leave alone.

None of them reacts to the learning rate, so that whatever a guard does about them is a mistake.
What a model has learned is in its weights, and goes back with them; the data goes on.
Groups say which target a family has: independent noise with light tails, the same with heavy tails
(Student's t with up to 5 degrees of freedom, Weibull, Pareto, and losses near zero), noise that
remembers, and data that really changes.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.signal import lfilter

Series = npt.NDArray[np.float64]
Random = np.random.Generator

FLAT = 2.0
NOISE = 0.1
BURN_IN = 500  # steps, after which an autocorrelated series is stationary: 0.98^500 is 4e-5


class Times(NamedTuple):
    """Which losses are drawn.

    Attributes:
        place: Updates that the weights have behind them; integers, one after the other.
        clock: Batches that the run has behind it; likewise.
        steps: Length of the run.
    """

    place: npt.NDArray[np.int64]
    clock: npt.NDArray[np.int64]
    steps: int

    @property
    def size(self) -> int:
        return len(self.place)


def times(steps: int, step: int = 0, place: int = 0) -> Times:
    """Return all times from ``step`` to the end of the run, with weights at ``place``."""
    offsets = np.arange(steps - step)
    return Times(place + offsets, step + offsets, steps)


class Group(Enum):
    """What a family has in common with others, as far as an alarm goes."""

    LIGHT = "independent, light tails"
    HEAVY = "independent, heavy tails"
    DEPENDENT = "autocorrelated"
    CHANGING = "data that changes"


@dataclass(frozen=True)
class Family:
    """One kind of healthy loss."""

    name: str
    group: Group
    draw: Callable[[Times, Random], Series]

    def random(self, *seed: int) -> Random:
        """Return the generator of one run; every family has its own."""
        return np.random.default_rng([zlib.crc32(self.name.encode()), *seed])


def curve(t: Times) -> Series:
    """A power law from 2.5 towards 1.2, as of a fine-tune."""
    return 1.2 + 1.3 * (1.0 + t.place / 100.0) ** -0.5


def log_normal(t: Times, sigma: float, random: Random) -> Series:
    """Factors with mean 1."""
    return np.exp(sigma * random.standard_normal(t.size) - 0.5 * sigma**2)


def autoregressive(innovations: Series, correlation: float) -> Series:
    """Stationary noise with the variance of the innovations, BURN_IN steps shorter than they."""
    gain = np.sqrt(1.0 - correlation**2)
    return np.asarray(lfilter([gain], [1.0, -correlation], innovations))[BURN_IN:]


def normal_memory(t: Times, correlation: float, random: Random) -> Series:
    return NOISE * autoregressive(random.standard_normal(t.size + BURN_IN), correlation)


def student_memory(t: Times, random: Random) -> Series:
    innovations = random.standard_t(5, t.size + BURN_IN) / np.sqrt(5 / 3)
    return curve(t) + NOISE * autoregressive(innovations, 0.5)


def bad_batches(t: Times, random: Random) -> Series:
    """One batch in 1000 has 3 to 10 times the loss."""
    losses = curve(t) * np.exp(0.15 * random.standard_normal(t.size))
    bad = random.random(t.size) < 1e-3
    losses[bad] *= random.uniform(3.0, 10.0, np.count_nonzero(bad))
    return losses


def bad_bursts(t: Times, random: Random) -> Series:
    """Every 5000 steps three bad batches in a row."""
    losses = curve(t) * np.exp(0.15 * random.standard_normal(t.size))
    for start in np.flatnonzero(random.random(t.size) < 2e-4):
        losses[start : start + 3] *= random.uniform(2.0, 5.0)
    return losses


def epochs(t: Times, random: Random) -> Series:
    """Ten epochs; each begins 15 % lower and then creeps up by 4 %."""
    length = max(t.steps // 10, 1)
    epoch, within = np.divmod(t.place, length)
    level = 2.0 * 0.85**epoch * (1.0 + 0.04 * (within / length) * (epoch > 0))
    return level * np.exp(0.15 * random.standard_normal(t.size))


def five_epochs(t: Times, random: Random) -> Series:
    epoch = t.place // max(t.steps // 5, 1)
    return 2.0 * 0.8**epoch + NOISE * random.standard_normal(t.size)


def periodic(t: Times, random: Random) -> Series:
    """The data has an order, of half the noise and a period of 500 steps."""
    wave = 0.5 * NOISE * np.sin(2.0 * np.pi * t.clock / 500.0)
    return curve(t) + NOISE * random.standard_normal(t.size) + wave


def shifts(t: Times, random: Random) -> Series:
    """Every 10,000 steps the data gets harder or easier, by two standard deviations."""
    shift = 2.0 * NOISE * ((t.clock // 10_000) % 2)
    return curve(t) + NOISE * random.standard_normal(t.size) + shift


def changing_noise(t: Times, random: Random) -> Series:
    """Every 2000 steps the variance is four times what it was, and back again."""
    scale = np.where((t.clock // 2000) % 2, 2.0, 1.0)
    return curve(t) + NOISE * scale * random.standard_normal(t.size)


def stochastic_volatility(t: Times, random: Random) -> Series:
    """The logarithm of the variance is an AR(0.98) process."""
    innovations = 0.2 * random.standard_normal(t.size + BURN_IN)
    volatility = np.asarray(lfilter([1.0], [1.0, -0.98], innovations))[BURN_IN:]
    return curve(t) + NOISE * np.exp(0.5 * volatility) * random.standard_normal(t.size)


def two_tasks(t: Times, random: Random) -> Series:
    task = random.random(t.size) < 0.3
    return curve(t) + 0.3 * task + NOISE * random.standard_normal(t.size)


def mixed_lengths(t: Times, random: Random) -> Series:
    length = 1.0 + 0.3 * random.choice([-1.0, 0.0, 1.0], t.size)
    return curve(t) * length + NOISE * random.standard_normal(t.size)


def moving_average(t: Times, random: Random) -> Series:
    """A loop that hands in the mean of its last eight losses."""
    window = np.full(8, 8.0**-0.5)
    return curve(t) + NOISE * np.convolve(random.standard_normal(t.size + 7), window, "valid")


def through_zero(t: Times, random: Random) -> Series:
    """Falls from 0.7 to -0.8, as in preference optimization."""
    level = 0.7 - 1.5 * (1.0 - np.exp(-t.place / 300.0))
    return level + 0.2 * random.standard_normal(t.size)


def _light(name: str, draw: Callable[[Times, Random], Series]) -> Family:
    return Family(name, Group.LIGHT, draw)


def _heavy(name: str, draw: Callable[[Times, Random], Series]) -> Family:
    return Family(name, Group.HEAVY, draw)


def _dependent(name: str, draw: Callable[[Times, Random], Series]) -> Family:
    return Family(name, Group.DEPENDENT, draw)


FAMILIES = [
    _light("Gaussian", lambda t, r: curve(t) + NOISE * r.standard_normal(t.size)),
    _light("Gaussian, flat", lambda t, r: FLAT + NOISE * r.standard_normal(t.size)),
    _light("log-normal 0.3", lambda t, r: curve(t) * log_normal(t, 0.3, r)),
    _light("log-normal 0.3, flat", lambda t, r: FLAT * log_normal(t, 0.3, r)),
    _light("log-normal 0.8", lambda t, r: curve(t) * log_normal(t, 0.8, r)),
    _light("exponential", lambda t, r: curve(t) * r.exponential(1.0, t.size)),
    _light("exponential, flat", lambda t, r: FLAT + NOISE * (r.exponential(1.0, t.size) - 1.0)),
    _light("Laplace", lambda t, r: curve(t) + NOISE * r.laplace(size=t.size)),
    _light("bad batches", bad_batches),
    _light("bursts of bad batches", bad_bursts),
    _light("ten epochs", epochs),
    _light("five epochs", five_epochs),
    _light("periodic order", periodic),
    _light("noise that doubles", changing_noise),
    _light("two tasks", two_tasks),
    _light("mixed lengths", mixed_lengths),
    _light("through zero", through_zero),
    _heavy("Student t3", lambda t, r: curve(t) + 0.15 * r.standard_t(3, t.size) / np.sqrt(3.0)),
    _heavy("Student t3, flat", lambda t, r: FLAT + NOISE * r.standard_t(3, t.size)),
    _heavy("Student t2", lambda t, r: curve(t) + 0.05 * r.standard_t(2, t.size)),
    _heavy("Weibull 0.6", lambda t, r: curve(t) * r.weibull(0.6, t.size) / 1.5046),
    _heavy("Pareto 2.5", lambda t, r: curve(t) * (1.0 + r.pareto(2.5, t.size)) / 1.667),
    _heavy("negative, t5", lambda t, r: 0.3 * curve(t) - 3.0 + 0.3 * r.standard_t(5, t.size)),
    _heavy(
        "near zero, log-normal 1.2",
        lambda t, r: 0.02 * curve(t) * np.exp(1.2 * r.standard_normal(t.size)),
    ),
    _dependent("AR(0.5), t5", student_memory),
    _dependent("AR(0.8)", lambda t, r: curve(t) + normal_memory(t, 0.8, r)),
    _dependent("AR(0.8), flat", lambda t, r: FLAT + normal_memory(t, 0.8, r)),
    _dependent("AR(0.95), flat", lambda t, r: FLAT + normal_memory(t, 0.95, r)),
    _dependent("moving average of 8", moving_average),
    _dependent("stochastic volatility", stochastic_volatility),
    Family("shifts of 2 sd", Group.CHANGING, shifts),
]
