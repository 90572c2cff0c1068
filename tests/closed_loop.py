"""Small models that react to the learning rate, and the loop that a controller drives them in."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable

import numpy as np

from adaptlr.reference import GuardMode, Slot

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
    kick: int = -1  # the step before which the weights are damaged, whatever the LR
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


def drive(model: Model, step_of: Callable[[float], Told], steps: int = STEPS) -> None:
    """Run a loop: the loss of the weights goes in, and what comes out is done to them."""
    draws = np.random.default_rng(5).standard_normal(steps)
    weights = Weights()
    snapshots = {Slot.START: copy.copy(weights)}
    for step in range(steps):
        if step == model.kick:
            weights.damage = model.most_damage
        told = step_of(model.loss(step, weights, float(draws[step])))
        if not told.skip:
            model.update(step, told.lr / PEAK, weights)
        if told.save:
            snapshots[told.save] = copy.copy(weights)
        if told.restore in snapshots:
            weights = copy.copy(snapshots[told.restore])


@dataclasses.dataclass(frozen=True)
class Scenario:
    """A model, the settings of its guard, and what the guard must have done, in this order.

    A move is ``"PHASE>PHASE"``, with the hard alarms that led to it.
    """

    model: Model
    moves: tuple[str, ...]
    settings: dict[str, object] = dataclasses.field(default_factory=lambda: {"snapshot_slots": 3})


def jump(size: float, start: int = 700, end: int = STEPS) -> Callable[[int], float]:
    """Return a shift of the data that lasts for some steps."""
    return lambda step: size * (start <= step < end)


def steps_from(start: int, count: int) -> frozenset[int]:
    """Return so many steps in a row."""
    return frozenset(range(start, start + count))


NO_SLOTS = {"snapshot_slots": 0}
DAMAGED = Model("damaged", critical=0.3)
DEAD = Model("dead", critical=0.02, harm=0.0, speed=0.5)
MILD = Model("mild", critical=0.3, speed=0.1, harm=0.05, most_damage=0.2)
SCENARIOS = [
    Scenario(Model("good_lr", speed=0.01), ()),
    Scenario(DAMAGED, ("RUN>REWARM:DIVERGE", "REWARM>HOLD", "HOLD>REGROW", "REGROW>RUN")),
    # From the very first update on; the best of the ramp is soon behind.
    Scenario(Model("above", critical=0.001, harm=1.0), ("RUN>RESCUE:LOST|ABOVE", "RESCUE>REWARM")),
    # Even the ramp's beginning is too high.
    Scenario(
        Model("far_above", critical=1e-5, harm=1.0),
        ("RUN>RESCUE:LOST|ABOVE", "RESCUE>RESCUE:LOST|ABOVE", "RESCUE>REWARM"),
    ),
    Scenario(
        Model("poisoned", critical=0.001, poisoned=0.002, speed=2.0),
        ("RUN>RESCUE:NONFINITE", "RESCUE>REWARM:NONFINITE"),
    ),
    Scenario(
        Model("slightly_above", critical=0.001, harm=0.03, most_damage=0.25), ("RESCUE>REWARM",)
    ),
    # Dead from the start: the test gets lower, and wins.
    Scenario(DEAD, ("TRIAL>TEST", "TEST>REWARM")),
    # No LR helps: the test is met, and a shift later on is accepted.
    Scenario(Model("flat", height=0.0), ("RUN>TEST", "TEST>RUN")),
    Scenario(
        Model("flat_then_worse", height=0.0, shift=jump(0.12, 240)),
        ("RUN>TEST", "TEST>RUN", "RUN>PROBE:DIVERGE", "PROBE>SHIFT", "SHIFT>PROBE", "PROBE>SHIFT"),
    ),
    Scenario(
        Model("flat_with_nan", height=0.0, broken=steps_from(130, 1)),
        ("RUN>TEST", "TEST>RUN"),
    ),
    Scenario(MILD, ("RUN>TRIAL", "TRIAL>RUN")),
    # The data gets easier during a trial: the level stays down without it, and nothing is cut.
    Scenario(
        Model("easier", speed=0.3, shift=jump(-0.3, 368)),
        ("RUN>TRIAL", "TRIAL>RUN"),
    ),
    # A jump at the start that the LR has not done: it does not come again, and nothing is cut.
    Scenario(Model("kicked_early", height=0.0, kick=8), ("RUN>RESCUE:DIVERGE|WORSE", "RESCUE>RUN")),
    Scenario(
        Model("stall", speed=0.3, broken=steps_from(370, 4)),
        ("RUN>TRIAL", "TRIAL>TEST", "TEST>RUN"),
    ),
    Scenario(
        dataclasses.replace(MILD, name="trial_with_nan", broken=steps_from(103, 9)),
        ("RUN>TRIAL", "TRIAL>REWARM:NONFINITE"),
    ),
    # Late: the snapshot's losses are as ever, twice, so that the LR is cut; or they are not.
    Scenario(
        Model("late", later_critical=0.05),
        ("RUN>PROBE:DIVERGE", "PROBE>RUN", "RUN>PROBE:DIVERGE", "PROBE>REWARM", "REWARM>HOLD"),
    ),
    Scenario(
        Model("shift", shift=jump(0.3)),
        ("RUN>PROBE:LOST", "PROBE>SHIFT", "SHIFT>PROBE", "PROBE>SHIFT"),
    ),
    Scenario(Model("far_shift", shift=jump(3.0)), ("RUN>PROBE:DIVERGE", "PROBE>SHIFT")),
    # The shift passes: the snapshot from before is the better one again.
    Scenario(
        Model("passing", shift=jump(3.0, 700, 710)),
        ("RUN>PROBE:DIVERGE", "PROBE>SHIFT", "SHIFT>PROBE", "PROBE>RUN"),
    ),
    # A jump of the weights that the LR has not done is undone, and nothing is cut.
    Scenario(Model("kicked", kick=700), ("RUN>PROBE:DIVERGE", "PROBE>RUN")),
    # A run in ruins without a good snapshot begins anew, though it is not early any more.
    Scenario(
        Model("ruined", noise=0.1, kick=600, most_damage=0.7, healing=0.0),
        ("RUN>REWARM:LOST",),
        {"snapshot_slots": 3, "snapshot_steps": 900.0},
    ),
    Scenario(Model("nan_late", broken=steps_from(700, 10)), ("RUN>PROBE:NONFINITE",)),
    Scenario(Model("nan_early", broken=steps_from(50, 10)), ("RUN>REWARM:NONFINITE",)),
    Scenario(Model("nan_within", broken=steps_from(50, 8)), ()),
    Scenario(Model("nan", broken=steps_from(700, 10)), ("RUN>FAILED:NONFINITE",), NO_SLOTS),
    Scenario(
        Model("one_after_another", critical=0.3, later_critical=1e-9),
        ("RUN>REWARM:DIVERGE", "RUN>PROBE:DIVERGE", "PROBE>RUN", "RUN>FAILED:DIVERGE"),
        {"snapshot_slots": 3, "max_restarts": 1},
    ),
    Scenario(Model("hopeless", critical=1e-300, harm=1.0), ("RESCUE>FAILED:LOST|ABOVE",)),
    # Far too low, as the losses alone can tell. test_raise.py has more.
    Scenario(
        Model("slow", critical=200.0, noise=0.02),
        ("RUN>RAISE", "RAISE>REWARM", "REWARM>HOLD", "HOLD>REGROW", "REGROW>RUN"),
        {"snapshot_slots": 3, "max_factor": 100.0},
    ),
    Scenario(DAMAGED, ("RUN>REWARM:DIVERGE",), NO_SLOTS),
    Scenario(DAMAGED, ("RUN>REWARM:DIVERGE", "TRIAL>RUN"), {"snapshot_slots": 1}),
    Scenario(DAMAGED, (), {"snapshot_slots": 3, "guard_mode": GuardMode.OBSERVE}),
    *(
        Scenario(model, moves, {"snapshot_slots": 3, "block_steps": 3, "sensitivity": 1.5})
        for model, moves in (
            (DEAD, ("TRIAL>TEST",)),
            (MILD, ()),
            (DAMAGED, ()),
            (Model("above", critical=0.001, harm=1.0), ("RUN>RESCUE:LOST|ABOVE",)),
            (Model("late", later_critical=0.05), ("PROBE>REWARM",)),
        )
    ),
]
