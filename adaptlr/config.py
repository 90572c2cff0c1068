"""What the user asks for: settings that check themselves, resolved to the numbers of `Config`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from torch.optim.lr_scheduler import LRScheduler

from adaptlr import _extension

MAX_GROUPS = _extension.MAX_GROUPS

DecayName = Literal["cosine", "linear", "constant", "wsd", "inverse_sqrt", "cosine_restarts"]
DECAYS: tuple[str, ...] = (
    "cosine",
    "linear",
    "constant",
    "wsd",
    "inverse_sqrt",
    "cosine_restarts",
    "table",
)
OPEN_ENDED_DECAYS = ("constant", "inverse_sqrt")


class GuardMode(IntEnum):
    """Values of `Config.guard_mode`."""

    OFF = 0
    OBSERVE = 1
    ACT = 2


def require(condition: bool, name: str, accepted: str, value: object) -> None:
    """Raise the ValueError that names the argument, the accepted range and the value received."""
    if not condition:
        raise ValueError(f"{name} must be {accepted}, got {value!r}")


def _require_count(name: str, value: object, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    require(value >= minimum, name, f"at least {minimum}", value)


@dataclass(frozen=True, kw_only=True)
class Guard:
    """How the controller watches the loss and what it does about trouble.

    Args:
        mode: ``"act"`` skips non-finite steps and backs off on alarms; ``"observe"`` reports the
            same events and never touches the run: how a careful team starts.
        backoff_factor: What an alarm multiplies the learning rate by, in (0, 1). A second alarm
            before the run is quiet again counts twice, a third three times.
        max_consecutive_skips: Non-finite steps in a row that are survived, at least 1; one more
            ends the run with `TrainingDiverged`.
        max_restarts: Rollbacks and experiments that a run may have, at least 1; one more alarm ends
            it with `TrainingDiverged`.
        sensitivity: Divides the thresholds of the collapse charts, in [0.5, 2]. Losses with strong
            autocorrelation want less; docs/algorithm.md has the rates of false alarms.
        rewarm_steps: Steps of linear re-warming after a cut or a restart; ``None``: half the
            warm-up (or 5 % of the run, if longer), between 10 and 200.
        hold_steps: Quiet steps before the learning rate regrows; ``None``: 5 % of the run, between
            20 and 500.
        max_factor: How far the learning rate of a run that learns too slowly may be raised above
            the typed one, as a multiple of it, in [1, 10000]; 1: never. 100 is a good value where
            it may be much too low. Needs a guard that acts, a typed rate and snapshots.

    Raises:
        ValueError: if a value is out of its range.
    """

    mode: Literal["act", "observe"] = "act"
    backoff_factor: float = 0.5
    max_consecutive_skips: int = 8
    max_restarts: int = 8
    sensitivity: float = 1.0
    rewarm_steps: int | None = None
    hold_steps: int | None = None
    max_factor: float = 1.0

    def __post_init__(self) -> None:
        """Check every field."""
        require(self.mode in ("act", "observe"), "mode", "'act' or 'observe'", self.mode)
        require(0.0 < self.backoff_factor < 1.0, "backoff_factor", "in (0, 1)", self.backoff_factor)
        _require_count("max_consecutive_skips", self.max_consecutive_skips, 1)
        _require_count("max_restarts", self.max_restarts, 1)
        require(0.5 <= self.sensitivity <= 2.0, "sensitivity", "in [0.5, 2]", self.sensitivity)
        require(1.0 <= self.max_factor <= 1e4, "max_factor", "in [1, 10000]", self.max_factor)
        acts = self.mode == "act" or self.max_factor == 1.0
        require(acts, "max_factor", "1 with mode='observe', which never acts", self.max_factor)
        for name in ("rewarm_steps", "hold_steps"):
            value = getattr(self, name)
            if value is not None:
                _require_count(name, value, 1)


@dataclass(frozen=True, kw_only=True)
class Search:
    """How ``lr="auto"`` looks for the learning rate: docs/algorithm.md, section 8.

    Args:
        steps: Steps that it may take at most, 0 or at least 30; ``None``: a tenth of the run, at
            least 50 and at most 100; a fifth of runs of 200 to 250 steps, and none of shorter ones,
            nor of runs of SGD, RMSprop or Adagrad below 500 steps whose first gradient tells a
            rate. With 0 the first gradient alone decides.

    Raises:
        ValueError: if a value is out of its range.
    """

    steps: int | None = None

    def __post_init__(self) -> None:
        """Check every field."""
        if self.steps is not None:
            _require_count("steps", self.steps, 0)
            require(self.steps == 0 or self.steps >= 30, "steps", "0 or at least 30", self.steps)

    def steps_of(self, total_steps: int | None) -> int:
        """Return the most steps that the search of a run may take; 0: it takes no ramp.

        Args:
            total_steps: Length of the run; None: it has no end.
        """
        if self.steps is not None:
            return self.steps if total_steps is None else min(self.steps, total_steps // 2)
        if total_steps is None:
            return 100
        if total_steps < 200:
            return 0
        return int(min(0.2 * total_steps, max(0.1 * total_steps, 50), 100))


@dataclass(frozen=True)
class Schedule:
    """A decay together with its parameters, for ``AdaptiveLR(decay=...)``.

    Args:
        decay: ``"cosine"``, ``"linear"``, ``"constant"``, ``"wsd"``, ``"inverse_sqrt"`` or
            ``"cosine_restarts"``.
        decay_share: Share of the steps after warm-up in which ``"wsd"`` decays linearly, in (0, 1].
        cycles: Number of cosine cycles of ``"cosine_restarts"``, at least 1.
        timescale: Steps of ``"inverse_sqrt"`` in which the rate falls to 1/sqrt(2); ``None``: the
            warm-up steps, or 10,000 without warm-up.

    Raises:
        ValueError: if a value is out of its range.
    """

    decay: DecayName = "cosine"
    decay_share: float = 0.2
    cycles: int = 1
    timescale: float | None = None

    def __post_init__(self) -> None:
        """Check every field."""
        names = DECAYS[:-1]
        require(self.decay in names, "decay", f"one of {', '.join(names)}", self.decay)
        require(0.0 < self.decay_share <= 1.0, "decay_share", "in (0, 1]", self.decay_share)
        _require_count("cycles", self.cycles, 1)
        if self.timescale is not None:
            finite = math.isfinite(self.timescale) and self.timescale > 0
            require(finite, "timescale", "positive and finite", self.timescale)


Decay = DecayName | Schedule | Callable[[int], float] | LRScheduler


def _clip(value: float, low: int, high: int) -> int:
    return int(min(max(round(value), low), high))


def resolve_warmup(warmup: float, total_steps: int | None) -> int:
    """Turn ``warmup``, steps (int) or share of the run (float), into steps."""
    if isinstance(warmup, bool) or not isinstance(warmup, (int, float)):
        raise TypeError(f"warmup must be an int (steps) or a float (share), got {warmup!r}")
    if isinstance(warmup, int):
        require(warmup >= 0, "warmup", "at least 0 steps", warmup)
        if total_steps is not None:
            require(warmup <= total_steps, "warmup", f"at most total_steps={total_steps}", warmup)
        return warmup
    require(0.0 <= warmup <= 1.0, "warmup", "a share in [0, 1], or an int of steps", warmup)
    if total_steps is None:
        if warmup == 0.0:
            return 0
        raise ValueError(
            f"warmup must be an int of steps when total_steps is None, got the share {warmup!r}"
        )
    return max(round(warmup * total_steps), 1) if warmup > 0.0 else 0


def check_total_steps(total_steps: object) -> None:
    """Raise unless ``total_steps`` is None or an int of at least 1."""
    if total_steps is not None:
        _require_count("total_steps", total_steps, 1)


class ResolvedConfig:
    """The numbers of `Config` (csrc/state.h) for one run, and the table that its field points to.

    Everything that may change while a run goes on (its length, its peaks) changes through the
    methods here, which leave the object as it was when they raise.
    """

    def __init__(
        self,
        *,
        total_steps: int | None,
        warmup: float,
        decay: Decay,
        min_lr_ratio: float,
        guard: Guard | None,
        peaks: Sequence[float],
        search: Search | None = None,
        estimate_suffices: bool = False,
    ) -> None:
        """Resolve and check the arguments of `AdaptiveLR`."""
        if guard is not None and not isinstance(guard, Guard):
            raise TypeError(f"guard must be a Guard or None, got {type(guard).__name__}")
        require(0.0 <= min_lr_ratio <= 1.0, "min_lr_ratio", "in [0, 1]", min_lr_ratio)
        self._warmup = warmup
        self._guard = guard
        self._search = search
        self._function = decay if callable(decay) else None
        schedule = decay if isinstance(decay, Schedule) else Schedule()
        if isinstance(decay, str):
            schedule = Schedule(decay)
        elif not callable(decay) and not isinstance(decay, Schedule):
            raise TypeError(
                f"decay must be a name, a Schedule, a scheduler or a callable, "
                f"got {type(decay).__name__}"
            )
        self._schedule = schedule
        self._table: npt.NDArray[np.float64] | None = None
        self.row = np.zeros((), dtype=_extension.config_dtype)
        self.row["min_lr_ratio"] = min_lr_ratio
        self.row["search_steps"] = -1 if search is None else search.steps_of(total_steps)
        self.row["estimate_suffices"] = estimate_suffices
        self._set_length(total_steps)
        self.set_peaks(peaks)

    @property
    def total_steps(self) -> int | None:
        """Length of the run in steps; None: open-ended."""
        return int(self.row["total_steps"]) or None

    @property
    def warmup_steps(self) -> int:
        """Steps of linear warm-up."""
        return int(self.row["warmup_steps"])

    @property
    def search_steps(self) -> int:
        """Most steps of a search; 0: it takes none; -1: the lr is typed."""
        return int(self.row["search_steps"])

    @property
    def peaks(self) -> list[float]:
        """Peak learning rate of every group."""
        peaks: list[float] = self.row["peaks"][: int(self.row["group_count"])].tolist()
        return peaks

    @property
    def table(self) -> npt.NDArray[np.float64] | None:
        """The tabulated multipliers of a callable decay, one a step; shape ``(total_steps,)``."""
        return self._table

    def multiplier(self, step: int) -> float:
        """Return the schedule's multiplier of the peak at ``step``."""
        return _extension.schedule(self.row, float(step))

    def set_peaks(self, peaks: Sequence[float]) -> None:
        """Set the peak of every group."""
        if len(peaks) > MAX_GROUPS:
            raise ValueError(
                f"optimizer must have at most {MAX_GROUPS} parameter groups, got {len(peaks)}"
            )
        for group, peak in enumerate(peaks):
            valid = math.isfinite(peak) and peak >= 0.0
            require(valid, f"lr of parameter group {group}", "finite and not negative", peak)
        require(max(peaks, default=0.0) > 0.0, "lr", "above 0 in one group at least", list(peaks))
        row = self.row.copy()
        row["peaks"][: len(peaks)] = peaks
        row["group_count"] = len(peaks)
        row["peak"] = max(peaks)
        self.row = row

    def set_snapshot_slots(self, slots: int) -> None:
        """Set which slots may be ordered: 0 none, 1 the start alone, 3 all."""
        row = self.row.copy()
        row["snapshot_slots"] = slots
        self.row = row

    def extend(self, total_steps: int | None) -> None:
        """Stretch the schedule to another length; the warm-up steps stay what they are."""
        check_total_steps(total_steps)
        if total_steps is not None:
            minimum = max(self.warmup_steps, 1)
            require(total_steps >= minimum, "total_steps", f"at least {minimum}", total_steps)
        self._set_length(total_steps, warmup_steps=self.warmup_steps)

    def _set_length(self, total_steps: int | None, warmup_steps: int | None = None) -> None:
        check_total_steps(total_steps)
        if total_steps is None and (
            self._function or self._schedule.decay not in OPEN_ENDED_DECAYS
        ):
            name = "a callable" if self._function else repr(self._schedule.decay)
            raise ValueError(
                f"total_steps must be an int for decay {name}; only "
                f"{' and '.join(OPEN_ENDED_DECAYS)} may run without an end"
            )
        if warmup_steps is None:
            warmup_steps = resolve_warmup(self._warmup, total_steps) + max(self.search_steps, 0)
            warmup_steps = min(warmup_steps, total_steps or warmup_steps)
        row = self.row.copy()
        row["total_steps"] = total_steps or 0
        row["warmup_steps"] = warmup_steps
        self._fill_schedule(row, warmup_steps)
        self._fill_guard(row, total_steps or max(10 * warmup_steps, 1000))
        table = None
        if self._function is not None and total_steps is not None:
            table = _tabulate(self._function, total_steps)
            row["table"] = table.ctypes.data
        row["final_multiplier"] = _extension.final_multiplier(row)
        self.row, self._table = row, table

    def _fill_schedule(self, row: npt.NDArray[Any], warmup_steps: int) -> None:
        schedule = self._schedule
        row["decay"] = DECAYS.index("table" if self._function else schedule.decay)
        row["decay_share"] = schedule.decay_share
        row["cycles"] = schedule.cycles
        row["timescale"] = schedule.timescale or warmup_steps or 10_000

    def _fill_guard(self, row: npt.NDArray[Any], total_steps: int) -> None:
        guard = self._guard or Guard()
        row["guard_mode"] = GuardMode.OFF if self._guard is None else GuardMode[guard.mode.upper()]
        row["backoff_factor"] = guard.backoff_factor
        own_warmup = float(row["warmup_steps"]) - max(self.search_steps, 0)
        chart_steps = max(own_warmup, 0.1 * total_steps)
        row["chart_steps"] = chart_steps
        row["block_steps"] = math.ceil(chart_steps / 40) if chart_steps > 100 else 1
        row["sensitivity"] = guard.sensitivity
        row["max_restarts"] = guard.max_restarts
        row["max_factor"] = guard.max_factor
        row["snapshot_steps"] = _clip(0.02 * total_steps, 32, 1000)
        row["rewarm_steps"] = guard.rewarm_steps or _clip(0.5 * chart_steps, 10, 200)
        row["hold_steps"] = guard.hold_steps or _clip(0.05 * total_steps, 20, 500)
        row["regrow_growth"] = 2.0 ** (1.0 / max(50.0, 0.1 * total_steps))
        row["max_consecutive_skips"] = guard.max_consecutive_skips


def _tabulate(function: Callable[[int], float], total_steps: int) -> npt.NDArray[np.float64]:
    table = np.array([float(function(step)) for step in range(total_steps)], dtype=np.float64)
    bad = np.flatnonzero(~(np.isfinite(table) & (table >= 0.0)))
    if bad.size:
        step = int(bad[0])
        raise ValueError(
            f"decay must return finite multipliers of at least 0, got {table[step]} at step {step}"
        )
    return table
