"""Small models that react to the learning rate, and the loop that a controller drives them in."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator

import numpy as np

from adaptlr.reference import Slot

PEAK = 3e-4
STEPS = 1000


@dataclasses.dataclass
class Weights:
    """What an update changes; all there is in a snapshot."""

    progress: float = 0.0
    damage: float = 0.0


@dataclasses.dataclass(frozen=True)
class Model:
    """A loss that falls while the LR is below a critical one, and is damaged above it.

    Every update below the critical LR adds ``speed * lr / critical`` to the progress, of which the
    loss is a falling exponential, and heals a share of the damage. An update above it adds to the
    damage, by ``harm`` for every factor of e that it is too high, or, where a model dies, nothing.
    """

    name: str
    critical: float = 10.0  # lr / peak; 10: the peak is a good LR
    later_critical: float | None = None  # from the step `turn` on
    speed: float = 0.3
    height: float = 1.0
    harm: float = 0.3
    most_damage: float = 5.0
    healing: float = 0.1
    noise: float = 0.05
    turn: int = 700
    shift: Callable[[int], float] = lambda step: 0.0  # of the data: no update can change it
    broken: frozenset[int] = frozenset()  # steps with a NaN
    poisoned: float = math.inf  # lr / peak from which an update makes every later loss a NaN

    def loss(self, step: int, weights: Weights, draw: float) -> float:
        """Return the loss of a step."""
        if step in self.broken or math.isnan(weights.damage):
            return math.nan
        height = self.height * math.exp(-weights.progress) + weights.damage
        return 1.0 + height + self.shift(step) + self.noise * draw

    def update(self, step: int, lr: float, weights: Weights) -> None:
        """Change the weights by one update; ``lr`` is a share of the peak."""
        late = self.later_critical is not None and step >= self.turn
        critical = self.later_critical if late else self.critical
        if lr >= self.poisoned:
            weights.damage = math.nan
        elif lr <= critical:
            weights.progress += self.speed * lr / critical
            weights.damage *= 1 - self.healing
        else:
            damage = weights.damage + self.harm * math.log(lr / critical)
            weights.damage = min(damage, self.most_damage)


@dataclasses.dataclass
class Told:
    """What a controller says of a step."""

    lr: float
    skip: bool
    save: Slot
    restore: Slot


def drive(model: Model, step_of: Callable[[float], Told], *, steps: int = STEPS) -> Iterator[Told]:
    """Run a loop: the loss of the weights goes in, and what comes out is done to them."""
    draws = np.random.default_rng(5).standard_normal(steps)
    weights = Weights()
    snapshots = {Slot.START: copy.copy(weights)}
    for step in range(steps):
        told = step_of(model.loss(step, weights, float(draws[step])))
        if not told.skip:
            model.update(step, told.lr / PEAK, weights)
        if told.save:
            snapshots[told.save] = copy.copy(weights)
        if told.restore:
            weights = copy.copy(snapshots[told.restore])
        yield told
