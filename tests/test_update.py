"""The control step of the extension against the reference: every trace, every field."""

from __future__ import annotations

import dataclasses
import operator

import numpy as np
import numpy.typing as npt
import pytest
from closed_loop import PEAK, SCENARIOS, STEPS, Scenario, Told, drive
from traces import TRACES, Trace

from adaptlr import _extension as extension
from adaptlr import reference, telemetry
from adaptlr.config import Guard, ResolvedConfig
from adaptlr.events import make_events
from adaptlr.reference import (
    Archive,
    Config,
    Decay,
    Flag,
    GuardMode,
    Phase,
    Record,
    Signals,
    Slot,
    State,
    flattened,
)

# Rounding errors of 4 ulp (2.2e-16) a step fade with a memory of 128 steps: 128 x 4 x 2.2e-16 =
# 1.1e-13 of what a field is made of. The rest is room for a difference of two such numbers.
RTOL = 1e-12
WINDOWS = ("fine_differences", "coarse_differences")
STATE_FIELDS = [
    name
    for name in flattened(State())
    if name not in WINDOWS or name in extension.state_dtype.names
]
STATE_EVERY = 50  # steps; records are compared at every step

# Logs, exponentials, sines and roots are right to a few ulp in both; where one feeds the next, as
# a log of an LR its landmark, the LR after a restart and so the next log, a size of up to 35 (of
# ln 1e-15) times 4 ulp is 3e-14 at each of at most 8 restarts: 2.5e-13, still within RTOL.

LOSS_FIELDS = {"loss", "level", "scale", "best_level", "start_level", "max_loss", "min_loss"}
LOSS_FIELDS |= {"slope", "age_covariance"}  # per step, and times steps
LOSS_FIELDS |= {"first_loss", "previous_loss", "difference_trend", "difference_residual", "noise"}
LOSS_FIELDS |= {"cleanest_noise", "fast_level", "slow_level", "highest_level", "lowest_level"}
LOSS_FIELDS |= {"lowest_slow_level", "lowest_noise", "trial_level", "ramp_level", "block_sum"}
LOSS_FIELDS |= {"fine_differences", "coarse_differences"}
EXACT_FIELDS = {"step", "samples", "observed", "best_samples", "outlier_run", "phase", "phase_step"}
EXACT_FIELDS |= {"streak", "last_alarm", "consecutive_skips", "consecutive_overflows", "skips"}
EXACT_FIELDS |= {"cuts", "previous_phase", "flags", "action", "norm_samples", "block_count"}
EXACT_FIELDS |= {"count", "next_difference", "lowest_age"}
EXACT_FIELDS |= {
    "warmup_start",
    "restarts",
    "origin_step",
    "restarted",
    "trials",
    "tested",
    "soft_step",
}
EXACT_FIELDS |= {"aside_slot", "good_slot", "pending_slot", "pending_step"}
# Rates of any size: every digit counts.
RATES = {"lr", "first_lr", "ramp_lr", "ramp_growth", "ramp_start", "ramp_limit", "onset_lr"}
RATES |= {"factor", "cut_factor", "target_factor", "ceiling", "trial_factor", "estimate"}

SETTINGS: list[dict[str, object]] = [
    {},
    {"decay": Decay.LINEAR, "min_lr_ratio": 0.1, "warmup_steps": 0},
    {"decay": Decay.CONSTANT, "backoff_factor": 0.3, "rewarm_steps": 1, "hold_steps": 1},
    {"decay": Decay.WSD, "decay_share": 0.3, "rewarm_steps": 20, "hold_steps": 40},
    {"decay": Decay.INVERSE_SQRT, "timescale": 700.0, "warmup_steps": 50},
    {"decay": Decay.COSINE_RESTARTS, "cycles": 3.5, "regrow_growth": 1.05},
    {"decay": Decay.TABLE, "table": 0.5 + 0.5 * np.sin(np.arange(10_000)) ** 2},
    {"guard_mode": GuardMode.OBSERVE, "max_consecutive_skips": 2},
    {"guard_mode": GuardMode.OFF, "decay": Decay.LINEAR},
    {"snapshot_slots": 3, "chart_steps": 400.0, "max_restarts": 20},  # blocks of 10 steps
    {"snapshot_slots": 3, "chart_steps": 90.0, "sensitivity": 2.0, "snapshot_steps": 50},
    {"snapshot_slots": 1, "decay": Decay.CONSTANT, "sensitivity": 0.5, "block_steps": 7},
    {"snapshot_slots": 3, "decay": Decay.LINEAR, "max_consecutive_skips": 4, "max_restarts": 1},
]


# Without the copies that dataclasses.astuple makes.
values_of = operator.attrgetter(*(field.name for field in dataclasses.fields(Signals)))


def config_of(trace: Trace, index: int) -> Config:
    settings = SETTINGS[index % len(SETTINGS)]
    return reference.default_config(trace.total_steps, PEAK, **settings)


# Every trace with the defaults has a test of its own; here each has one more setting.
CASES = [
    pytest.param(trace, config_of(trace, index), id=f"{trace.name}-{index % len(SETTINGS)}")
    for i, trace in enumerate(TRACES)
    for index in [1 + i % (len(SETTINGS) - 1)]
]
# The traces with alarms and those with every kind of broken step, with all settings.
CASES += [
    pytest.param(trace, config_of(trace, index), id=f"{trace.name}-{index}-all")
    for trace in TRACES
    if trace.name in ("blow_up", "overflow", "norm_spike")
    for index in range(1, len(SETTINGS) if trace.name == "blow_up" else 9)
]


def to_structured(config: Config) -> tuple[npt.NDArray[np.void], npt.NDArray[np.float64]]:
    """Return the row that the extension takes, and the table that its address keeps pointing to."""
    table = np.ascontiguousarray(config.table, dtype=np.float64)
    row = np.zeros((), dtype=extension.config_dtype)
    for field in dataclasses.fields(config):
        row[field.name] = 0 if field.name in ("peaks", "table") else getattr(config, field.name)
    row["peaks"][: config.group_count] = config.peaks
    row["table"] = table.ctypes.data if table.size else 0
    return row, table


def signals_of(trace: Trace) -> list[Signals]:
    """Return the signals of a trace; every seventh lr is another one than asked for."""
    steps = len(trace.losses)
    norms = np.full(steps, -1.0) if trace.grad_norms is None else trace.grad_norms
    overflows = np.zeros(steps, bool) if trace.overflows is None else trace.overflows
    return [
        Signals(
            loss=float(trace.losses[i]),
            grad_norm=float(norms[i]),
            applied_lr=PEAK / 3 if i % 7 == 6 else -1.0,
            overflow=bool(overflows[i]),
            overwritten=i % 1000 == 999,
        )
        for i in range(steps)
    ]


def run_reference(
    config: Config, signals: list[Signals], every: int = STATE_EVERY, estimate: float = 0.0
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return the record of every step, and the fields of every 50th state, an array each."""
    state, archive, records, states = State(estimate=estimate), Archive(), [], []
    for i, step_signals in enumerate(signals):
        records.append(reference.control_step(config, step_signals, state, archive)[1])
        if i % every == every - 1:
            states.append({name: np.array(value) for name, value in flattened(state).items()})
    fields = {name: np.array([fields[name] for fields in states]) for name in STATE_FIELDS}
    return np.array(records, dtype=reference.RECORD_DTYPE), fields


def run_extension(config: Config, signals: list[Signals]) -> tuple[np.ndarray, np.ndarray]:
    row, table = to_structured(config)
    controller = extension.HostController(row, history_size=1 << 14)
    states = []
    for i, step_signals in enumerate(signals):
        controller.step(*values_of(step_signals))
        if i % STATE_EVERY == STATE_EVERY - 1:
            states.append(controller.state)
    del table  # alive until here
    return controller.records(), np.stack(states)


def natural_unit(name: str, loss_unit: float) -> float:
    """Return the size below which a difference of the field means nothing."""
    field = name.rpartition(".")[2]
    if field in LOSS_FIELDS:
        return loss_unit
    if field == "variance":
        return loss_unit**2
    return 1e-300 if field in RATES else 1.0


def assert_close(
    actual: np.ndarray, expected: np.ndarray, name: str, loss_unit: float, rtol: float = RTOL
) -> None:
    if name.rpartition(".")[2] in EXACT_FIELDS or np.issubdtype(expected.dtype, np.integer):
        np.testing.assert_array_equal(actual, expected, err_msg=name)
        return
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(actual[~finite], expected[~finite], err_msg=name)
    actual, expected = actual[finite], expected[finite]
    unit = np.maximum(np.abs(expected), natural_unit(name, loss_unit))
    error = np.abs(actual - expected) / unit
    worst = int(np.argmax(error)) if error.size else 0
    assert np.all(error <= rtol), f"{name} is {actual[worst]}, expected {expected[worst]}"


@pytest.mark.parametrize(("trace", "config"), CASES)
def test_every_field_matches_reference(trace: Trace, config: Config) -> None:
    signals = signals_of(trace)
    assert_same(run_extension(config, signals), run_reference(config, signals), trace.loss_unit)


SOFT = Flag.NO_PROGRESS | Flag.STALL
PROMISED = {
    "healthy": 0,
    "plateau": 0,
    "spike": Flag.SPIKE,
    "burst": Flag.SPIKE,
    "nan_burst": Flag.NONFINITE,
    "nan_end": Flag.NONFINITE,
    "blow_up": Flag.SPIKE | Flag.DIVERGE | Flag.WORSE | Flag.ABOVE,
    "late_blow_up": Flag.SPIKE | Flag.DIVERGE | Flag.ABOVE,
    "start_up_blow_up": Flag.DIVERGE | Flag.WORSE | Flag.LOST | Flag.ABOVE,
    "drift": Flag.DRIFT | Flag.LOST,
    "worse": Flag.DIVERGE | Flag.LOST,
    "negative": 0,
    "near_zero": Flag.SPIKE,
    "ar_noise": 0,
    "constant": 0,  # of a norm that moves by a step of bfloat16, too
    "bfloat16": 0,
    "jump_down": 0,
    "overflow": Flag.NONFINITE | Flag.OVERFLOW,
    "heavy_tail": Flag.SPIKE,
    "end_of_run": Flag.ENDED,
    "norm_spike": Flag.NORM_SPIKE | Flag.NONFINITE | Flag.OVERFLOW,
    "norm_tail": Flag.NORM_SPIKE | Flag.SPIKE | Flag.DIVERGE | Flag.WORSE | Flag.ABOVE,
    "collapse": Flag.DIVERGE | Flag.DRIFT,
    "collapse_late": Flag.SPIKE | Flag.DIVERGE | Flag.DRIFT,
    "above": Flag.LOST | Flag.ABOVE | Flag.DRIFT | Flag.WORSE,
    "dead": 0,
    "stall": 0,
}
# Where there is no snapshot the soft charts lead to nothing; those of these losses stand still.
STANDS_STILL = {"blow_up", "norm_tail", "drift", "near_zero", "constant"}
STANDS_STILL |= {"collapse", "collapse_late", "above", "dead", "stall"}


@pytest.mark.parametrize("trace", TRACES, ids=lambda trace: trace.name)
def test_by_default_a_trace_raises_the_flags_that_its_name_promises(trace: Trace) -> None:
    config, signals = config_of(trace, 0), signals_of(trace)
    records, states = run_reference(config, signals)
    assert_same(run_extension(config, signals), (records, states), trace.loss_unit)
    flags = int(np.bitwise_or.reduce(records["flags"])) & ~Flag.OVERWRITTEN
    assert flags & ~SOFT == PROMISED[trace.name]
    assert bool(flags & SOFT) == (trace.name in STANDS_STILL)
    failed = bool(records["phase"][-1] == Phase.FAILED)
    assert failed == (trace.name in ("nan_end", "overflow"))
    assert np.all(np.isfinite(np.hstack([column[-1] for column in states.values()])))
    assert np.all((records["factor"] > 0) & (records["factor"] <= 1))


def assert_same(
    actual: tuple[np.ndarray, np.ndarray],
    expected: tuple[np.ndarray, dict[str, np.ndarray]],
    loss_unit: float,
) -> None:
    """Compare records and states, field by field."""
    (records, states), (expected_records, expected_states) = actual, expected
    for name in Record._fields:
        assert_close(records[name], expected_records[name], name, loss_unit)
    for name in STATE_FIELDS:
        assert_close(states[name], expected_states[name], name, loss_unit)


def test_every_field_of_the_state_has_a_name_in_the_extension() -> None:
    assert set(flattened(State())) == set(extension.state_dtype.names)


# Closed loops.

LOUD = Flag.NONFINITE | Flag.DIVERGE | Flag.DRIFT | Flag.WORSE | Flag.LOST | Flag.ABOVE


def run_loop(
    scenario: Scenario, steps: int = STEPS, estimate: float = 0.0
) -> tuple[Config, list[Signals], tuple[np.ndarray, np.ndarray]]:
    """Let the extension drive a model; return its losses too, with every record and state."""
    config = reference.default_config(steps, PEAK, **scenario.settings)
    row, _table = to_structured(config)
    controller = extension.HostController(row, history_size=1024)
    state = controller.state
    state["estimate"] = estimate
    controller.state = state
    signals, states = [], []

    def step(loss: float) -> Told:
        skip, _, (lr,), order = controller.step(loss)
        signals.append(Signals(loss))
        states.append(controller.state)
        return Told(lr, skip, Slot(order & 15), Slot(order >> 4))

    drive(scenario.model, step, steps)
    return config, signals, (controller.records(), np.stack(states))


def moves_of(records: np.ndarray) -> list[str]:
    """Name every change of the phase, and every rollback within one, with the alarms behind it."""
    moves = []
    for record in records:
        before, after = Phase(record["previous_phase"]), Phase(record["phase"])
        alarms = telemetry.Flag(int(record["flags"]) & LOUD)
        names = "|".join(flag.name for flag in telemetry.Flag if flag & alarms)
        if after != before or record["action"] >> 8:
            moves.append(f"{before.name}>{after.name}" + (f":{names}" if names else ""))
    return moves


@pytest.mark.parametrize(
    "scenario", SCENARIOS, ids=lambda s: "-".join(map(str, (s.model.name, *s.settings.values())))
)
def test_closed_loop_matches_reference_in_every_field(scenario: Scenario) -> None:
    config, signals, actual = run_loop(scenario)
    moves = iter(moves_of(actual[0]))
    missing = [move for move in scenario.moves if move not in moves]
    assert not missing, moves_of(actual[0])
    # Losses are between 1 and 7. The same losses give the same decisions, and so the same losses.
    assert_same(actual, run_reference(config, signals, every=1), loss_unit=1.0)


@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [
        (
            "kicked",
            "back",
            "the loss is back with the snapshot's weights; the run goes on from them",
        ),
        ("far_shift", "shift", "nothing is cut, but that snapshot is kept for a while"),
        ("passing", "probe", "the data may be as it was before it changed; weights and optimizer"),
    ],
)
def test_events_tell_what_a_probe_is_for_and_what_it_has_shown(
    name: str, kind: str, reason: str
) -> None:
    scenario = next(scenario for scenario in SCENARIOS if scenario.model.name == name)
    _, _, (records, _) = run_loop(scenario)
    assert any(event.kind == kind and reason in event.reason for event in make_events(records))


def test_ramps_end_in_each_of_their_ways() -> None:
    """At the limit, at an alarm on the way, and a decade past the best."""
    ends = {}
    for scenario in SCENARIOS[:6]:
        _, _, (records, states) = run_loop(scenario)
        ended = (records["previous_phase"] == Phase.RESCUE) & (records["phase"] == Phase.REWARM)
        for record, state in zip(records[ended], states[ended], strict=True):
            reached = state["ramp_lr"] >= 0.999 * state["ramp_limit"]
            alarm = bool(int(record["flags"]) & (Flag.NONFINITE | Flag.LOST | Flag.ABOVE))
            ends[scenario.model.name] = "alarm" if alarm else "limit" if reached else "best"
    assert ends == {
        "above": "best",
        "far_above": "best",
        "poisoned": "alarm",
        "slightly_above": "limit",
    }


def test_multiplier_and_skip_are_those_of_the_reference() -> None:
    trace = next(trace for trace in TRACES if trace.name == "nan_burst")
    config = reference.default_config(trace.total_steps, PEAK)
    row, _table = to_structured(config)
    controller, state = extension.HostController(row, history_size=64), State()
    archive = Archive()
    for signals in signals_of(trace)[:3100]:
        decision, _ = reference.control_step(config, signals, state, archive)
        skip, _, lrs, _ = controller.step(*values_of(signals))
        assert skip == bool(decision.action)
        assert lrs == pytest.approx([PEAK * decision.multiplier], rel=RTOL, abs=0)


def test_events_and_slots_are_those_of_the_reference() -> None:
    scenario = next(scenario for scenario in SCENARIOS if scenario.model.name == "late")
    config, signals, (records, _) = run_loop(scenario)
    row, _table = to_structured(config)
    controller, state, archive = extension.HostController(row, history_size=64), State(), Archive()
    events, slots = [], []
    for step, step_signals in enumerate(signals):
        controller.step(step_signals.loss)
        decision, _ = reference.control_step(config, step_signals, state, archive)
        slots.append((decision.save, decision.restore))
        if decision.event:
            events.append(step)
    np.testing.assert_array_equal(controller.events()["step"], events)
    actions = records["action"]
    np.testing.assert_array_equal(np.stack([actions >> 4 & 15, actions >> 8], axis=1), slots)
    assert {Slot.START, Slot.FIRST, Slot.SECOND} <= {slot for pair in slots for slot in pair}


@pytest.mark.parametrize("warmup", [0, 30, 1500])
@pytest.mark.parametrize("total_steps", [0, 150, 990, 1010, 2030, 77_777, 1_000_000])
def test_defaults_are_those_of_a_guard(total_steps: int, warmup: int) -> None:
    warmup = min(warmup, total_steps or warmup)
    row = ResolvedConfig(
        total_steps=total_steps or None,
        warmup=warmup,
        decay="constant",
        min_lr_ratio=0.0,
        guard=Guard(),
        peaks=[PEAK],
    ).row
    config = reference.default_config(
        total_steps, PEAK, warmup_steps=warmup, decay=Decay.CONSTANT, timescale=0.0
    )
    for field in dataclasses.fields(config):
        if field.name not in ("peaks", "table", "timescale"):
            assert row[field.name] == getattr(config, field.name), field.name


NORM_FIELDS = {"norm_samples", "norm_level", "norm_variance", "norm_spike_threshold"}


@pytest.mark.parametrize("name", ["healthy", "spike", "blow_up", "drift", "start_up_blow_up"])
def test_gradient_norms_change_nothing_but_their_own_fields(name: str) -> None:
    trace = next(trace for trace in TRACES if trace.name == name)
    norms = np.exp(np.random.default_rng(20).standard_t(2, len(trace.losses)).clip(-60, 60))
    config = reference.default_config(trace.total_steps, PEAK)
    without, states = run_extension(config, signals_of(trace))
    given = dataclasses.replace(trace, grad_norms=norms)
    with_norms, its_states = run_extension(config, signals_of(given))
    for field in set(Record._fields) - {"grad_norm", "flags"}:
        np.testing.assert_array_equal(with_norms[field], without[field], err_msg=field)
    spikes = with_norms["flags"] & reference.Flag.NORM_SPIKE
    assert spikes.any()
    np.testing.assert_array_equal(with_norms["flags"] - spikes, without["flags"])
    for field in set(STATE_FIELDS) - NORM_FIELDS:
        np.testing.assert_array_equal(its_states[field], states[field], err_msg=field)
    assert not any(states[field].any() for field in NORM_FIELDS - {"norm_spike_threshold"})


def norm_spikes(logs: np.ndarray) -> tuple[int, np.void]:
    """Count the flags that norms with these logarithms raise; also return the last State."""
    config = reference.default_config(0, PEAK, decay=Decay.CONSTANT)
    row, _table = to_structured(config)
    controller = extension.HostController(row, history_size=len(logs))
    for norm in np.exp(logs).tolist():
        controller.step(1.0, norm)
    flags = controller.records()["flags"]
    return int(np.count_nonzero(flags & reference.Flag.NORM_SPIKE)), controller.state


def test_lognormal_norms_raise_no_false_alarm_in_a_million_steps() -> None:
    # P(Z > 6) is 1e-9; with a scale that is an estimate, right to 5 %, still below 1e-7.
    count, state = norm_spikes(0.3 * np.random.default_rng(21).standard_normal(1_000_000))
    assert count == 0
    # The level has a memory of 255 values, the variance one of about 255 / 1.3.
    assert state["norm_level"] == pytest.approx(0, abs=4 * 0.3 / np.sqrt(255))
    assert np.sqrt(state["norm_variance"]) == pytest.approx(0.3, rel=4 / np.sqrt(2 * 255 / 1.3))


def test_norms_with_heavy_tails_raise_one_flag_in_1000_steps_at_most() -> None:
    tails = 0.2 * np.random.default_rng(22).standard_t(2, 100_000)
    count, _ = norm_spikes(tails.clip(-60, 60))
    # The threshold balances them at one in 1000; from 6 it has to rise first.
    assert count <= 1.1e-3 * len(tails) + 10
