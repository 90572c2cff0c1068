"""Values of the reference worked out by hand, and the properties promised by its specification."""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from pathlib import Path

import numpy as np
import pytest
from scipy import integrate, stats
from traces import TRACES

from adaptlr import (
    reference,
    reference_detector,
    reference_guard,
    reference_progress,
    reference_recovery,
)
from adaptlr.reference import (
    Action,
    Config,
    Decay,
    Flag,
    GuardMode,
    Phase,
    Progress,
    Record,
    Signals,
    Slot,
    State,
    control_step,
    default_config,
    run,
    schedule,
)

EPS = float(np.finfo(np.float64).eps)
NAN = math.nan
PEAK = 0.01
# T = 1000 gives W = W' = 100 and hold_steps = 50; the factor doubles in 100 steps.
CONFIG = default_config(1000, PEAK, rewarm_steps=20)
WITH_SNAPSHOTS = dataclasses.replace(CONFIG, snapshot_slots=3)
SOFT = Flag.NO_PROGRESS | Flag.STALL


def noisy(size: int, *, level: float = 1.0, seed: int = 0) -> np.ndarray:
    return level + 0.1 * np.random.default_rng(seed).standard_normal(size)


def without_collapse_charts(config: Config) -> Config:
    """Raise the thresholds of the hard ones beyond reach."""
    return dataclasses.replace(config, sensitivity=1e-12)


def after_alarm(config: Config = CONFIG, steps: int = 300) -> tuple[State, Record]:
    """Return the state and the record of a step in which five outliers in a row give an alarm."""
    losses = np.append(noisy(steps), np.full(5, 9.0))
    losses[steps - 1] = 0.5  # quiet for certain: the cusum is 0
    records, state = run(config, losses)
    return state, Record(*records[-1].item())


def go_on(config: Config, state: State, loss: float, steps: int) -> np.ndarray:
    return run(config, np.full(steps, loss), state=state)[0]


# Schedule.


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"decay": Decay.COSINE}, [0.5, 1, (2 + math.sqrt(2)) / 4, 0.5, (2 - math.sqrt(2)) / 4, 0]),
        ({"decay": Decay.LINEAR}, [0.5, 1, 0.75, 0.5, 0.25, 0]),
        ({"decay": Decay.LINEAR, "min_lr_ratio": 0.2}, [0.5, 1, 0.8, 0.6, 0.4, 0.2]),
        ({"decay": Decay.CONSTANT}, [0.5, 1, 1, 1, 1, 1]),
        ({"decay": Decay.WSD, "decay_share": 0.5}, [0.5, 1, 1, 1, 0.5, 0]),
        # s / (t + 1 - W + s) with s = 2: 2/3, 2/4, 2/5, 2/6.
        (
            {"decay": Decay.INVERSE_SQRT, "timescale": 2.0},
            [0.5, 1, *(math.sqrt(2 / k) for k in (3, 4, 5, 6))],
        ),
        # Two cycles over four steps: half a cycle, its end, and again.
        ({"decay": Decay.COSINE_RESTARTS, "cycles": 2.0}, [0.5, 1, 0.5, 0, 0.5, 0]),
        ({"decay": Decay.TABLE, "table": (9, 9, 0.4, 0.3, 0.2, 0.1)}, [0.5, 1, 0.4, 0.3, 0.2, 0.1]),
    ],
    ids=lambda value: value["decay"].name if isinstance(value, dict) else "",
)
def test_schedule_takes_the_values_of_equation_2(settings, expected):
    config = default_config(6, PEAK, warmup_steps=2, **settings)
    actual = [schedule(config, step) for step in range(6)]
    np.testing.assert_allclose(actual, expected, rtol=4 * EPS, atol=EPS)


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        (Decay.COSINE, 0.5 * (1 + math.cos(0.75 * math.pi))),
        (Decay.LINEAR, 0.25),
        (Decay.CONSTANT, 1.0),
    ],
)
def test_last_multiplier_that_is_not_zero_is_kept_past_the_end(decay, expected):
    config = default_config(6, PEAK, warmup_steps=2, decay=decay)
    assert schedule(config, 6) == schedule(config, 1e6) == pytest.approx(expected, rel=4 * EPS)


def test_run_without_warmup_starts_one_step_below_the_peak():
    config = default_config(4, PEAK, warmup_steps=0, decay=Decay.LINEAR)
    assert [schedule(config, step) for step in range(4)] == [0.75, 0.5, 0.25, 0]


def test_open_ended_run_never_ends():
    config = default_config(0, PEAK, decay=Decay.INVERSE_SQRT, timescale=3.0)
    assert schedule(config, 8) == 0.5  # sqrt(3 / 12)
    records, _ = run(config, noisy(50))
    assert not np.any(records["flags"] & Flag.ENDED)


def test_defaults_are_those_of_section_4():
    short, long, endless = (default_config(total, PEAK) for total in (100, 50_000, 0))
    assert (short.rewarm_steps, short.hold_steps, short.warmup_steps) == (10, 20, 10)
    assert (long.rewarm_steps, long.hold_steps, long.warmup_steps) == (200, 500, 5000)
    # Without an end 1000 steps stand for T.
    assert (endless.rewarm_steps, endless.hold_steps, endless.chart_steps) == (50, 50, 100)
    assert (short.chart_steps, short.block_steps, short.snapshot_steps) == (10, 1, 32)
    assert (long.chart_steps, long.block_steps, long.snapshot_steps) == (5000, 125, 1000)
    middle = default_config(1010, PEAK, warmup_steps=7)
    assert (middle.chart_steps, middle.block_steps) == (101, 3)
    assert short.regrow_growth**50 == pytest.approx(2, rel=100 * EPS)
    assert long.regrow_growth**5000 == pytest.approx(2, rel=10_000 * EPS)


# Statistics.


def test_first_losses_give_plain_moments():
    records, state = run(CONFIG, np.array([1.0, 2.0, 6.0]))
    np.testing.assert_allclose(records["level"], [1, 1.5, 3], rtol=2 * EPS)
    # 0, then (1/4 + 1/4) / 2, then (4 + 1 + 9) / 3
    np.testing.assert_allclose(records["scale"] ** 2, [0, 0.25, 14 / 3], rtol=8 * EPS)
    assert (state.max_loss, state.min_loss, state.observed) == (6, 1, 3)
    assert state.best_level == state.start_level == state.level
    assert state.best_samples == 3


def test_first_slopes_are_least_squares():
    losses = np.array([1.0, 2.0, 6.0, 5.0])
    records, _ = run(CONFIG, losses)
    expected = [0, *(np.polyfit(np.arange(n), losses[:n], 1)[0] for n in (2, 3, 4))]
    np.testing.assert_allclose(records["slope"], expected, rtol=1e-13)  # polyfit solves by SVD


@pytest.mark.parametrize("slope", [-0.01, 0.5])
def test_slope_of_a_straight_line_is_found_exactly_during_start_up(slope):
    records, _ = run(CONFIG, 30 + slope * np.arange(16))
    # Each residual carries the rounding of a level of 30: 16 x 30 eps, over ages of about 5 steps.
    np.testing.assert_allclose(records["slope"][1:], slope, rtol=0, atol=16 * 30 * EPS)


def test_slope_of_a_line_under_noise_is_found_within_four_standard_errors():
    slope, deviation = -1e-4, 0.05
    noise = deviation * np.random.default_rng(1).standard_normal(4000)
    records, _ = run(default_config(4000, PEAK), 9 + slope * np.arange(4000) + noise)
    gain = 1 / 128
    error = deviation * math.sqrt(2 * gain**3 / (2 - gain) ** 3)
    assert abs(records["slope"][-1] - slope) < 4 * error
    assert abs(records["t_statistic"][-1] - slope / error) < 4


def test_clipped_variance_of_a_normal_score_is_beta():
    expected, _ = integrate.quad(
        lambda z: min(z * z, 6.25) * stats.norm.pdf(z), -9, 9, points=(-2.5, 2.5)
    )
    assert reference_detector.BETA == pytest.approx(expected, abs=1e-10)


def test_scale_of_normal_noise_is_unbiased():
    config = default_config(20_000, PEAK)
    records, _ = run(config, noisy(20_000, seed=2))
    # The variance has a memory of 256 steps, so 75 independent values: a relative error of
    # sqrt(2 / 256 / 75) = 1 % for a variance, half of it for the scale.
    assert np.mean(records["scale"][500:]) == pytest.approx(0.1, rel=0.02)


def test_one_wild_loss_moves_the_level_by_at_most_2_percent_of_the_scale():
    losses = noisy(300)
    losses[-1] = 1e20
    records, state = run(CONFIG, losses)
    moved = state.level - records["level"][-2]
    assert moved == pytest.approx(2.5 / 128 * records["scale"][-1], rel=1e-12)
    assert records["flags"][-1] & ~SOFT == Flag.SPIKE
    assert state.factor == 1


def test_score_is_independent_of_unit_and_origin():
    losses = noisy(500)
    plain, _ = run(CONFIG, losses)
    scaled, _ = run(CONFIG, 1024 * losses - 3000)
    # z loses the digits of the level: 3000 / 102 scales, over 128 steps of memory.
    np.testing.assert_allclose(scaled["score"], plain["score"], rtol=0, atol=128 * 30 * EPS)
    np.testing.assert_allclose(scaled["cusum"], plain["cusum"], rtol=0, atol=128 * 30 * EPS)


@pytest.mark.parametrize("loss", [NAN, math.inf, -math.inf, 1.1e30, -1.1e30])
def test_loss_that_is_not_finite_leaves_the_statistics_alone(loss):
    _, state = run(CONFIG, noisy(50))
    before = copy.deepcopy(state)
    _, record = control_step(CONFIG, Signals(loss), state)
    assert record.flags == Flag.NONFINITE
    assert (record.action, record.score, record.level) == (Action.SKIP, 0, before.level)
    changed = {f.name for f in dataclasses.fields(State)} - {
        name for name, value in vars(before).items() if getattr(state, name) == value
    }
    assert changed == {"step", "lr", "skips", "consecutive_skips"}


def test_long_run_factor_follows_the_correlation_of_the_noise():
    noise = np.random.default_rng(3).standard_normal(20_000)
    for i in range(1, len(noise)):
        noise[i] += 0.5 * noise[i - 1]
    _, state = run(default_config(20_000, PEAK, guard_mode=GuardMode.OFF), noise)
    # tau of AR(1) is (1 + 0.5) / (1 - 0.5). The signs have a memory of 1024 steps: r = 1/3 within
    # 0.03, so tau within 2 x 0.047 x pi / 2 / 0.25, a standard error of 0.3.
    assert reference_detector.long_run_factor(state) == pytest.approx(3, abs=0.9)


# Charts.


def test_cusum_adds_scaled_clipped_scores_less_one_half():
    state = State(cusum=1.0, score=2.0)  # sign_agreement 0: tau is 1
    flags = reference_detector.divergence_chart(2.0, state)
    assert state.cusum == pytest.approx(1 + 2 / math.sqrt(reference_detector.BETA) - 0.5, rel=EPS)
    assert flags == 0
    reference_detector.divergence_chart(-2.5, state)
    assert state.cusum == 0


def test_jump_of_ten_scales_is_found_in_five_steps():
    losses = noisy(500)
    losses[-5:] += 1.0
    records, _ = run(CONFIG, losses)
    assert list(records["flags"][-5:] & Flag.DIVERGE) == [0, 0, 0, 0, Flag.DIVERGE]


def test_record_of_an_alarm_shows_the_numbers_before_the_rebase():
    state, record = after_alarm()
    assert record.flags & Flag.DIVERGE
    assert record.cusum > 9  # five clipped scores, 2.5 / sqrt(beta) - 0.5 each
    assert (state.cusum, state.outlier_run, state.age_covariance, state.samples) == (0, 0, 0, 32)
    assert record.level == state.level


def test_rebase_forgets_certainty_and_accepting_takes_the_level_as_normal():
    state = State(
        samples=500, mean_age=99, age_variance=9999, cusum=20, level=3, best_level=1, start_level=2
    )
    reference.rebase(7.0, False, state)
    assert (state.samples, state.mean_age, state.cusum, state.max_loss) == (32, 16, 0, 7)
    assert state.age_variance == 32**2 / 12
    assert (state.best_level, state.start_level) == (1, 2)
    reference.rebase(5.0, True, state)
    assert (state.best_level, state.best_samples, state.start_level) == (3, 32, 3)
    assert state.max_loss == 7


# So many that one of 1000 orders of them all has these at its end: 14 over 10 is 1001.
@pytest.mark.parametrize(("calm", "refused"), [(4, 10), (5, 8), (8, 5), (10, 4), (15, 4)])
def test_losses_beyond_three_times_the_largest_give_the_start_up_alarm(calm, refused):
    losses = np.array([1.0] * calm + [3.1] + [99.0] * (refused - 2) + [1e9])
    records, state = run(without_collapse_charts(CONFIG), losses)
    assert list(records["flags"]) == [0] * (len(losses) - 1) + [Flag.DIVERGE | Flag.WORSE]
    assert (state.samples, state.observed, state.level) == (calm, calm, 1)
    assert state.max_loss == 1e9  # a new range is accepted
    assert state.cuts == 1


def test_start_up_guard_counts_refusals_in_a_row():
    losses = np.array([1.0, 1.0, 1.0, 1.0, 9.0, 9.0, 1.0, 9.0, 9.0, 3.0])
    records, state = run(without_collapse_charts(CONFIG), losses)
    assert not records["flags"].any()
    assert state.observed == 6


def test_fourth_loss_is_never_refused():
    _, state = run(CONFIG, np.array([1.0, 1.0, 1.0, 100.0]))
    assert state.observed == 4


def test_spike_threshold_rises_by_each_spike_and_falls_back():
    losses = noisy(200)
    losses[-2:] = 1.95, 1e6  # a little over 6 scales, then far
    _, state = run(CONFIG, losses[:-2])
    state.spike_threshold = 6.0
    _, record = control_step(CONFIG, Signals(1e6), state)
    assert record.flags & Flag.SPIKE
    assert state.spike_threshold == pytest.approx(6 * math.exp(0.4995), rel=2 * EPS)
    control_step(CONFIG, Signals(1.0), state)
    assert state.spike_threshold == pytest.approx(6 * math.exp(0.4995) * 0.9995, rel=4 * EPS)


# Gradient norm.


def give(norms: list[float], state: State, **signals: bool) -> list[int]:
    """Return the flags of steps with these norms and a loss of 1."""
    return [control_step(CONFIG, Signals(1.0, n, **signals), state)[1].flags for n in norms]


def norm_fields(state: State) -> list[float]:
    return [value for name, value in vars(state).items() if name.startswith("norm_")]


def test_first_norms_give_plain_moments_of_their_logs():
    state = State()
    give([1.0, math.e, math.e**3], state)
    # Logs 0, 1, 3: a mean of 4/3 and a variance of (16 + 1 + 25) / 9 / 3.
    np.testing.assert_allclose(norm_fields(state), [3, 4 / 3, 14 / 9, 6], rtol=8 * EPS)


def test_norms_are_tracked_by_huber_s_proposal_2_after_16():
    state = State()
    give([1.0, math.e**2] * 8, state)  # mean 1, variance 1
    give([math.e**2], state)  # a score of 1, gain 1/17
    beta = reference_detector.BETA
    expected = [17, 1 + 1 / 17, 1 + (1 / beta - 1) / 17, 6]
    np.testing.assert_allclose(norm_fields(state), expected, rtol=32 * EPS)
    state = State(norm_samples=999, norm_level=2.0, norm_variance=0.25, norm_spike_threshold=6.0)
    assert give([math.exp(4.0)], state) == [0]  # a score of 4, clipped to 2.5
    expected = [1000, 2 + 2.5 * 0.5 / 128, 0.25 * (1 + (6.25 / beta - 1) / 128), 6]
    np.testing.assert_allclose(norm_fields(state), expected, rtol=8 * EPS)


def test_norm_of_zero_counts_as_1e_30():
    state = State()
    give([0.0, 1e-40], state)
    assert norm_fields(state) == [2, np.log(1e-30), 0, 6]


def test_norm_spike_is_flagged_once_16_norms_are_known_and_changes_nothing_else():
    state = State()
    assert give([1.0, 1.1] * 8, state) == [0] * 16
    assert give([1e6], dataclasses.replace(copy.deepcopy(state), norm_samples=15)) == [0]
    scale = math.sqrt(state.norm_variance)
    for score, expected in ((5.99, 0), (6.01, Flag.NORM_SPIKE)):
        after = copy.deepcopy(state)
        norm = math.exp(state.norm_level + score * scale)
        decision, record = control_step(CONFIG, Signals(1.0, norm), after)
        assert (record.flags, record.action, record.phase) == (expected, Action.NONE, Phase.RUN)
        assert decision.multiplier == 0.17  # of the warm-up's 17th step
    assert after.norm_spike_threshold == pytest.approx(6 * math.exp(0.4995), rel=2 * EPS)
    give([1.0], after)
    assert after.norm_spike_threshold == pytest.approx(6 * math.exp(0.4995) * 0.9995, rel=4 * EPS)


def test_least_scale_of_the_norm_is_one_percent():
    for excess, expected in ((0.0599, 0), (0.0601, Flag.NORM_SPIKE)):
        assert give([1.0] * 100 + [math.exp(excess)], State())[-1] == expected


@pytest.mark.parametrize(
    "signals",
    [
        Signals(1.0),  # no norm
        Signals(1.0, math.inf),
        Signals(1.0, NAN),
        Signals(1.0, 1.1e30),
        Signals(NAN, 1.0),
        Signals(1.0, 1.0, overflow=True),
        Signals(1.0, math.inf, overflow=True),
    ],
    ids=str,
)
def test_norm_that_is_missing_or_of_a_broken_step_leaves_its_statistics_alone(signals):
    state = State()
    give([1.0, 2.0, 3.0] * 10, state)
    before = norm_fields(state)
    _, record = control_step(CONFIG, signals, state)
    assert norm_fields(state) == before
    assert not record.flags & Flag.NORM_SPIKE


def test_failed_run_takes_no_norm():
    state = State(phase=Phase.FAILED)
    give([1.0] * 20, state)
    assert norm_fields(state) == [0, 0, 0, 6]


def test_rebase_leaves_the_norm_alone():
    state, _ = after_alarm()
    state.norm_samples, state.norm_level = 300.0, 1.5
    before = norm_fields(state)
    reference.rebase(7.0, True, state)
    assert norm_fields(state) == before


# Guard.


def test_cut_halves_the_factor_and_limits_its_regrowth():
    state, record = after_alarm()
    # The cusum was last 0 at t = 299, which saw the LR of t = 298. The re-warming ends at t' = 324.
    failed = min(1, schedule(CONFIG, 298) / schedule(CONFIG, 324))
    assert failed == 1  # the schedule falls, so more than the present factor is not blamed
    assert (state.cut_factor, state.ceiling, state.cuts, state.streak) == (0.5, 0.7, 1, 0)
    assert (record.phase, record.previous_phase) == (Phase.REWARM, Phase.RUN)
    assert record.action == Action.SKIP | Slot.ZERO_MOMENT << 8
    assert record.target_factor == 0.5
    assert record.factor == pytest.approx(0.05, rel=2 * EPS)
    assert state.last_alarm == 304


def test_factor_blamed_is_that_of_the_change_point():
    # In warm-up the LR rises: the LR of the change point over the full peak is what failed.
    config = default_config(1000, PEAK, warmup_steps=70, rewarm_steps=20)
    state, _ = after_alarm(config, steps=60)
    # The cusum was last 0 at t = 59, which saw the LR of t = 58; t' = 64 + 20.
    onset = schedule(config, 58)
    assert state.onset_lr == pytest.approx(onset, rel=2 * EPS)
    failed = onset / schedule(config, 84)
    assert state.cut_factor == pytest.approx(0.5 * failed, rel=4 * EPS)
    assert state.ceiling == pytest.approx(0.7 * failed, rel=4 * EPS)


def test_lr_that_the_host_applied_is_the_one_blamed():
    state = State()
    for loss in noisy(300):
        control_step(CONFIG, Signals(loss, applied_lr=PEAK / 4), state)
    for _ in range(5):
        _, record = control_step(CONFIG, Signals(9.0, applied_lr=PEAK / 4), state)
    assert record.lr == PEAK / 4
    failed = 0.25 / schedule(CONFIG, 324)
    assert state.cut_factor == pytest.approx(0.5 * failed, rel=4 * EPS)


def test_alarm_without_any_lr_before_it_accepts_the_level_and_cuts_nothing():
    state = State()
    for loss in [*noisy(300), 9.0, 9.0, 9.0, 9.0, 9.0]:
        decision, record = control_step(CONFIG, Signals(loss, applied_lr=0.0), state)
    assert record.flags & Flag.DIVERGE
    assert (decision.action, state.factor, state.cuts) == (Action.NONE, 1, 0)
    assert state.best_level == state.level
    assert state.phase == Phase.RUN


def test_factor_rewarms_holds_and_regrows_to_the_ceiling():
    state, _ = after_alarm()
    records = go_on(CONFIG, state, 1.0, 150)
    k = np.arange(1, 21)
    np.testing.assert_allclose(records["factor"][:20], 0.5 * (0.1 + 0.9 * k / 20), rtol=4 * EPS)
    assert np.all(records["factor"][20:70] == 0.5)
    regrown = 0.5 * 2 ** (np.arange(1, 49) / 100)  # 2^0.48 < 1.4 < 2^0.49
    np.testing.assert_allclose(records["factor"][70:118], regrown, rtol=200 * EPS)
    assert np.all(records["factor"][118:] == 0.7)
    # A record shows the phase that the next step is in.
    phases, firsts = np.unique(records["phase"], return_index=True)
    assert dict(zip(phases.tolist(), firsts.tolist(), strict=True)) == {
        Phase.REWARM: 0,
        Phase.HOLD: 19,
        Phase.REGROW: 69,
        Phase.RUN: 118,
    }


def test_lr_is_peak_times_factor_times_schedule():
    state, record = after_alarm()
    records = go_on(CONFIG, state, 1.0, 700)
    multipliers = np.array([schedule(CONFIG, step) for step in records["step"]])
    np.testing.assert_array_equal(records["lr"], PEAK * (records["factor"] * multipliers))
    assert record.lr == PEAK * (record.factor * schedule(CONFIG, 304))


def test_alarms_soon_after_another_cut_by_the_square_and_the_cube():
    state, _ = after_alarm()
    state.onset_lr = 1.0  # so that the present factor is blamed
    cuts = []
    for _ in range(3):
        state.cusum, state.onset_lr = 100.0, 1.0
        before = state.cut_factor
        control_step(CONFIG, Signals(1.0), state)
        cuts.append(state.cut_factor / before)
    np.testing.assert_allclose(cuts, [0.25, 0.125, 0.125], rtol=4 * EPS)
    assert state.streak == 3


def test_drift_alone_cuts_by_less_and_accepts_the_level():
    losses = noisy(3000, seed=4) + 0.5 * np.clip((np.arange(3000) - 1000) / 1500, 0, 1)
    records, state = run(default_config(3000, PEAK, decay=Decay.CONSTANT), losses)
    first = records[np.argmax(records["flags"] & Flag.DRIFT > 0)]
    assert first["flags"] == Flag.DRIFT
    assert first["rise"] > 6.5
    assert first["factor"] == pytest.approx(0.07, rel=4 * EPS)  # a tenth of 0.7
    assert state.best_level > 1.2


def test_slow_charts_are_muted_while_an_alarm_echoes():
    trace = next(trace for trace in TRACES if trace.name == "worse")
    config = without_collapse_charts(default_config(trace.total_steps, PEAK))
    records, _ = run(config, trace.losses)
    alarms = np.flatnonzero(np.diff(records["target_factor"], prepend=1.0) < 0)
    slow = np.flatnonzero(records["flags"] & (Flag.DRIFT | Flag.WORSE))
    assert np.any((slow > alarms[0]) & (slow < alarms[0] + 700))
    assert alarms[1] == alarms[0] + 700  # 200 steps of re-warming, 500 of holding


@pytest.mark.parametrize("budget", [0, 3])
def test_more_nonfinite_steps_in_a_row_than_the_budget_fail_the_run(budget):
    config = default_config(1000, PEAK, max_consecutive_skips=budget)
    losses = np.concatenate([noisy(30), np.full(budget, NAN), noisy(5), np.full(budget + 1, NAN)])
    records, state = run(config, losses)
    assert list(records["phase"][-2:]) == [Phase.RUN, Phase.FAILED]
    assert state.skips == 2 * budget + 1


def test_failed_run_measures_nothing_and_skips_every_step():
    config = default_config(40, PEAK, max_consecutive_skips=0)
    _, state = run(config, np.append(noisy(30), NAN))
    before = copy.deepcopy(state)
    records = go_on(config, state, 5.0, 20)
    assert np.all(records["action"] == Action.SKIP)
    assert np.all(records["phase"] == Phase.FAILED)
    assert list(records["flags"]) == [0] * 9 + [Flag.ENDED] * 11
    assert (state.level, state.observed, state.step) == (before.level, before.observed, 51)


def test_finite_loss_beside_a_broken_gradient_norm_is_measured_but_not_taken():
    state = State()
    _, record = control_step(CONFIG, Signals(1.0, grad_norm=math.inf), state)
    assert (record.flags, record.action) == (Flag.NONFINITE, Action.SKIP)
    assert (state.observed, state.consecutive_skips) == (1, 1)
    _, record = control_step(CONFIG, Signals(1.0, grad_norm=-1.0), state)
    assert (record.flags, record.action) == (0, Action.NONE)
    assert math.isnan(record.grad_norm)


def test_thirty_third_overflow_in_a_row_fails_the_run():
    state = State()
    for loss in noisy(32):
        _, record = control_step(CONFIG, Signals(loss, grad_norm=math.inf, overflow=True), state)
    assert (record.flags, record.phase) == (Flag.OVERFLOW, Phase.RUN)
    assert (state.consecutive_overflows, state.observed) == (32, 32)
    control_step(CONFIG, Signals(1.0, overflow=True), state)
    assert state.phase == Phase.FAILED


@pytest.mark.parametrize("mode", [GuardMode.OBSERVE, GuardMode.OFF])
def test_other_modes_skip_and_cut_nothing(mode):
    config = dataclasses.replace(CONFIG, guard_mode=mode)
    losses = np.concatenate([noisy(300), np.full(50, 9.0), np.full(50, NAN), noisy(100)])
    records, state = run(config, losses)
    assert not records["action"].any()
    assert np.all(records["factor"] == 1)
    assert (state.phase, state.skips, state.cuts) == (Phase.RUN, 0, 0)
    assert (state.consecutive_skips, state.consecutive_overflows) == (0, 0)
    # Outliers are counted by the collapse charts, which an OFF guard has not; a cusum needs eight.
    assert records["flags"][307 if mode == GuardMode.OFF else 304] & Flag.DIVERGE
    assert (state.last_alarm > 0) == (mode == GuardMode.OBSERVE)


@pytest.mark.parametrize("mode", list(GuardMode))
def test_overflowed_step_is_skipped_in_every_mode(mode):
    config = dataclasses.replace(CONFIG, guard_mode=mode)
    decision, _ = control_step(config, Signals(1.0, overflow=True), State())
    assert decision.action == Action.SKIP


def test_observed_alarm_accepts_the_level():
    state, record = after_alarm(dataclasses.replace(CONFIG, guard_mode=GuardMode.OBSERVE))
    assert record.flags & Flag.DIVERGE
    assert (state.samples, state.best_level, state.cusum) == (32, state.level, 0)


def test_overwritten_lr_is_flagged():
    _, record = control_step(CONFIG, Signals(1.0, overwritten=True), State())
    assert record.flags == Flag.OVERWRITTEN


# Collapse charts. Levels over 8 samples have a variance of 1/15 each, so that the difference of two
# has the error sqrt(2/15), and that of one and a single loss sqrt(16/15).


def progress_of(losses: list[float], lrs: list[float] | None = None) -> Progress:
    """Return what the charts know after these losses; all LRs are 1 unless given."""
    state = State()
    for i, loss in enumerate(losses):
        reference.watch_progress(CONFIG, loss, math.log(lrs[i]) if lrs else 0.0, state)
    return state.fine


def settled(**fields: float) -> Progress:
    """Return the charts of a run with a noise of 0.1 that was at 1 once, from 1.5."""
    known = {"count": 100.0, "noise": 0.1, "cleanest_noise": 0.1, "variance_factor": 1.0}
    levels = {"first_loss": 1.5, "lowest_level": 1.0, "lowest_slow_level": 1.0, "slow_level": 1.0}
    variances = {"lowest_variance": 1 / 15, "lowest_slow_variance": 1 / 63}
    return Progress(**(known | levels | variances | fields))


def test_first_levels_are_plain_means_of_losses_and_of_log_lrs():
    progress = progress_of([3.0, 2.0, 2.0], lrs=[1.0, math.e, math.e**5])
    assert progress.fast_level == progress.slow_level == pytest.approx(7 / 3, rel=4 * EPS)
    assert progress.log_lr == pytest.approx(2, rel=4 * EPS)
    assert (progress.count, progress.first_loss, progress.highest_level) == (3, 3, 3)
    assert (progress.lowest_level, progress.lowest_log_lr) == (
        progress.fast_level,
        progress.log_lr,
    )
    assert progress.lowest_variance == pytest.approx(1 / 5, rel=4 * EPS)
    # The differences are 1 and 0: the larger / 1.5. They disagree in sign, so tau stays at 1.
    noise = 1.0484 / 1.5
    assert progress.noise == pytest.approx(noise, rel=4 * EPS)
    evidence = (2 / 3) / (noise * math.sqrt(6 / 5))
    assert progress.lowest_evidence == pytest.approx(evidence, rel=8 * EPS)


def test_second_loss_is_no_new_lowest():
    assert progress_of([3.0, 2.0]).lowest_level == 3


def test_noise_is_the_median_of_the_differences_from_eight_on():
    steps = np.array([0, 0.1, -0.1, 0.1, -0.1, 0.3, -0.3, 0.3, -0.3])
    assert progress_of(list(5 + np.cumsum(steps[:8]))).noise == pytest.approx(1.0484 * 0.2)
    assert progress_of(list(5 + np.cumsum(steps))).noise == pytest.approx(1.0484 * 0.2)


def test_noise_forgets_differences_after_24():
    far = [5.0, 9.0] * 20
    still = progress_of(far + [5.0] * 13)  # 12 of 24 are 4, the others 0
    assert still.noise == pytest.approx(1.0484 * 2)
    calm = progress_of(far + [5.0] * 30)
    assert calm.noise == pytest.approx(1e-3 * (calm.highest_level - calm.lowest_level))


def test_cleanest_noise_falls_at_once_and_rises_by_a_64th():
    progress = settled(cleanest_noise=0.2)
    reference_progress.track_noise([0.1] * 24, progress)
    assert progress.cleanest_noise == progress.noise == pytest.approx(0.10484)
    reference_progress.track_noise([1.0] * 24, progress)
    assert progress.cleanest_noise == pytest.approx(0.10484 * (1 + 9 / 64))


def test_loss_moves_a_level_by_few_noises_at_most():
    # The last six differences are ten times as large: 1.5-fold upwards, 8-fold downwards.
    newest = [1.0] * 6 + [0.1] * 18
    for loss, moved in ((99.0, 3 * 1.5 * 0.1), (-99.0, -3 * 8 * 0.1)):
        progress = settled(fast_level=1.0)
        reference_progress.track_levels(loss, 0.0, newest, progress)
        assert progress.fast_level == pytest.approx(1 + moved / 8)
        assert progress.slow_level == pytest.approx(1 + moved / 32)


def test_variance_factor_follows_the_agreement_of_differences():
    white = settled(count=1e6, difference_agreement=-1 / 3, difference_residual=1.0)
    reference_progress.track_correlation(-0.1, white)
    assert white.variance_factor == 1
    smooth = settled(count=1e6, difference_agreement=1.0, difference_residual=1.0)
    reference_progress.track_correlation(0.1, smooth)
    assert smooth.variance_factor == pytest.approx(1.8 / 0.2**2)  # a correlation of 0.8, the most
    assert smooth.difference_trend == pytest.approx(0.1 / 8)


@pytest.mark.parametrize(
    ("count", "sensitivity", "first_loss", "limit"),
    [
        (6, 1.0, 1.5, math.sqrt(2 / 15)),  # 10 errors
        (128, 1.0, 1.5, math.sqrt(2 / 15)),
        (512, 1.0, 1.5, 1.4 * math.sqrt(2 / 15)),
        (128, 2.0, 1.5, 0.5 * math.sqrt(2 / 15)),
        (128, 1.0, 3.0, 0.6),  # 30 % of the progress
    ],
)
def test_loss_above_its_lowest_is_lost(count, sensitivity, first_loss, limit):
    config = dataclasses.replace(CONFIG, sensitivity=sensitivity)
    variance = 1 / 15 if count > 8 else 2 / 15 - 1 / 11  # that of the first 6 is 1/11
    for share, expected in ((0.999, 0), (1.001, Flag.LOST)):
        fields = {"count": count, "first_loss": first_loss, "lowest_variance": variance}
        progress = settled(fast_level=1 + share * limit, **fields)
        assert reference_progress.lost_charts(config, progress) == expected
    early = dataclasses.replace(progress, count=5, lowest_variance=0.0)
    assert reference_progress.lost_charts(config, early) == 0


def test_slow_level_above_its_lowest_is_lost():
    limit = 8 * 0.1 * math.sqrt(2 / 63)
    for share, expected in ((0.999, 0), (1.001, Flag.LOST)):
        progress = settled(fast_level=1.0, slow_level=1 + share * limit, first_loss=1.1)
        assert reference_progress.lost_charts(CONFIG, progress) == expected


def test_loss_above_the_first_is_flagged_in_units_of_both_noises():
    limit = 8 * math.sqrt(0.4 * 0.1) * math.sqrt(16 / 15)
    for share, expected in ((0.999, 0), (1.001, Flag.ABOVE)):
        progress = settled(noise=0.4, fast_level=1.5 + share * limit)
        assert reference_progress.above_chart(CONFIG, progress) == expected


def test_soft_charts_speak_between_one_and_four_warm_ups():
    assert reference_progress.soft_window(CONFIG, State()) == (102, 150, 400, 100 / 3)
    assert reference_progress.soft_window(CONFIG, State(restarted=1.0)) == (52, 150, 400, 100 / 3)
    blocks = dataclasses.replace(CONFIG, chart_steps=900.0, block_steps=30)
    assert reference_progress.soft_window(blocks, State()) == (32, 45, 120, 20)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"fast_level": 1.45, "lowest_age": 16}, Flag.NO_PROGRESS),
        ({"fast_level": 1.45, "lowest_age": 15}, 0),
        ({"fast_level": 1.45, "lowest_age": 16, "count": 101}, 0),
        ({"fast_level": 1.45, "lowest_age": 16, "count": 401}, 0),
        # 3 x 0.1 x sqrt(16/15) is not below 0.6 x 0.5: progress need not show, so later.
        ({"fast_level": 0.45, "first_loss": 0.5, "lowest_level": 0.45, "count": 149}, 0),
        ({"fast_level": 0.45, "first_loss": 0.5, "lowest_level": 0.45, "count": 150}, 2048),
        # Two errors of 0.1 sqrt(2/15) are 0.073.
        ({"fast_level": 1.08, "lowest_age": 34}, Flag.STALL),
        ({"fast_level": 1.07, "lowest_age": 34}, 0),
        ({"fast_level": 1.08, "lowest_age": 33}, 0),
    ],
)
def test_level_that_stands_still_asks_for_an_experiment(fields, expected):
    progress = settled(**({"count": 102, "lowest_age": 20} | fields))
    window = reference_progress.soft_window(CONFIG, State())
    assert reference_progress.soft_charts(window, progress) == expected


def test_coarse_charts_are_fed_with_means():
    config = dataclasses.replace(CONFIG, block_steps=3)
    state = State()
    for loss in (1.0, 2.0, 6.0, 5.0, 5.0):
        reference.watch_progress(config, loss, 0.0, state)
    assert (state.fine.count, state.coarse.count, state.coarse.first_loss) == (5, 1, 3)
    assert (state.block_sum, state.block_count) == (10, 2)


# Rollbacks and experiments.


def collapsed(config: Config, step: float, **fields: float) -> State:
    """Return a run that has learned, best at 0.08 of the peak."""
    fine = Progress(count=50, lowest_evidence=5.0, lowest_log_lr=math.log(0.08 * config.peak))
    fine.log_lr = math.log(0.02 * config.peak)
    return State(fine=fine, step=step, first_lr=0.01, **fields)


def test_lost_run_restarts_at_a_quarter_of_its_best_lr():
    state = collapsed(WITH_SNAPSHOTS, 60.0)
    orders = reference_recovery.start_over(WITH_SNAPSHOTS, state)
    assert orders[:3] == (True, Slot.NO_SLOT, Slot.START)
    # The re-warming ends within the warm-up, which is left out: m(100).
    assert state.cut_factor == pytest.approx(0.02 / schedule(CONFIG, 100), rel=8 * EPS)
    assert (state.ceiling, state.cuts, state.restarted) == (state.cut_factor, 1, 1)
    assert (state.phase, state.phase_step, state.origin_step) == (Phase.REWARM, 61, 61)
    assert state.fine == Progress()
    state.step += 1
    records, _ = run(WITH_SNAPSHOTS, noisy(20), state=state)
    k = np.arange(1, 20)
    np.testing.assert_allclose(records["lr"][:19], PEAK * 0.02 * (0.1 + 0.9 * k / 20), rtol=1e-14)
    assert records["phase"][-1] == Phase.HOLD


@pytest.mark.parametrize(
    ("step", "fields", "factor"),
    [
        (900.0, {}, 0.02 / 0.2),  # a restart makes up for a fifth of the schedule at most
        (60.0, {"tested": 1.0}, 0.08 / 3 / schedule(CONFIG, 100)),  # the ramp's divisor
        (60.0, {"cut_factor": 0.03}, 0.015),  # the half at least
    ],
)
def test_factor_of_a_restart(step, fields, factor):
    state = collapsed(WITH_SNAPSHOTS, step, **fields)
    reference_recovery.start_over(WITH_SNAPSHOTS, state)
    assert state.cut_factor == pytest.approx(factor, rel=8 * EPS)


@pytest.mark.parametrize("tested", [0.0, 1.0])  # a test that told nothing has shown no LR
def test_rescue_ramps_by_a_decade_in_12_steps_up_to_the_lr_that_failed(tested):
    state = collapsed(WITH_SNAPSHOTS, 9.0, restarts=2.0, tested=tested)
    state.fine.lowest_evidence = 0.0  # nothing was learned
    reference_recovery.start_over(WITH_SNAPSHOTS, state)
    assert (state.phase, state.ramp_start) == (Phase.RESCUE, 0.01 / 50)
    assert state.ramp_limit == pytest.approx(0.02, rel=8 * EPS)
    state.step += 1
    records, _ = run(WITH_SNAPSHOTS, np.full(25, 1.0), state=state)
    k = np.arange(24)  # two decades
    np.testing.assert_allclose(records["lr"][:24], PEAK * 2e-4 * 10 ** (k / 12), rtol=1e-13)
    assert list(records["phase"][-2:]) == [Phase.RESCUE, Phase.REWARM]
    assert records["action"][-1] == Action.SKIP | Slot.START << 8
    # Still nothing learned: a quarter of the mean LR behind the level. The first loss counts with
    # the LR to come, the others with that of the update before them.
    behind = [0, *range(24)]
    mean = np.mean(behind[:8])
    for exponent in behind[8:]:
        mean += (exponent - mean) / 8
    lr = 2e-4 * 10 ** (mean / 12) / 4
    assert state.cut_factor == pytest.approx(lr / schedule(CONFIG, 100), rel=1e-13)


def test_test_of_a_run_without_progress_is_slower_the_later_it_comes():
    state = State(step=200.0, first_lr=0.01)
    state.fine = Progress(count=200, fast_level=2.0, first_loss=2.0, lowest_level=1.9)
    archive = {}
    orders = reference_recovery.begin_test(WITH_SNAPSHOTS, state, archive)
    assert orders[:3] == (True, Slot.FIRST, Slot.START)
    assert archive[Slot.FIRST].fine.count == 200
    assert (state.phase, state.ramp_start, state.restarts) == (Phase.TEST, 2e-4, 1)
    decades = math.log10(schedule(CONFIG, 200) / 2e-4)  # 3.7: 120 steps of 200
    assert state.ramp_growth ** (120 / decades) == pytest.approx(10, rel=1e-13)
    # A level of 1.9 less four errors of 0.1 is the mark.
    archive[Slot.FIRST].fine.variance_factor = 1.0
    archive[Slot.FIRST].fine.noise = 0.3  # where the run stands is not sure enough
    state.fine = Progress(count=60, lowest_evidence=4.1, lowest_noise=0.1, lowest_level=1.81)
    state.fine.lowest_variance, state.fine.variance_factor = 0.01, 4.0
    met = copy.deepcopy(state)
    assert reference_recovery.end_test(WITH_SNAPSHOTS, met, archive).restore == Slot.FIRST
    assert (met.tested, met.phase, met.fine.count) == (1, Phase.RUN, 200)
    assert met.restarts == 0  # nothing had failed
    noise = math.sqrt(0.1 * 0.3)  # the run's has a say
    assert met.ramp_level == pytest.approx(1.81 + 3 * noise * 0.1, rel=1e-15)
    unsure = copy.deepcopy(state)
    unsure.fine.lowest_evidence = 3.9
    reference_recovery.end_test(WITH_SNAPSHOTS, unsure, archive)
    assert unsure.ramp_level == reference_recovery.NEVER
    state.fine.lowest_level = 1.9 - 4 * 0.1 * math.sqrt(2 / 15) - 1e-9
    assert reference_recovery.end_test(WITH_SNAPSHOTS, state, archive).restore == Slot.START
    assert state.phase == Phase.REWARM


def a_test_under_way(ramp, run):
    """The state of a test, with the run that was set aside beside it."""
    state = State(step=50.0, phase=Phase.TEST, aside_slot=Slot.FIRST, first_lr=0.01, ramp_lr=1e-3)
    state.fine = Progress(count=30, lowest_evidence=9.0, lowest_noise=0.1, lowest_variance=0.07)
    aside = State(step=40.0, first_lr=0.01, fine=Progress(count=40, noise=0.1, first_loss=2.0))
    for progress, fields in ((state.fine, ramp), (aside.fine, run)):
        for name, value in fields.items():
            setattr(progress, name, value)
    return state, {Slot.FIRST: aside}


@pytest.mark.parametrize("factors", [(1.0, 20.0), (20.0, 1.0), (1.0, 1.0)])
def test_a_loss_that_wanders_does_not_excuse_the_run_in_a_test(factors):
    ramp = {"lowest_level": 1.8, "lowest_age": 10, "variance_factor": factors[0]}
    run = {"lowest_level": 1.7, "fast_level": 2.1, "variance_factor": factors[1]}
    state, archive = a_test_under_way(ramp, run)
    orders = reference_recovery.end_test(WITH_SNAPSHOTS, state, archive)
    assert (orders.restore, state.phase) == (Slot.START, Phase.REWARM)


@pytest.mark.parametrize(
    ("times_estimate", "lowest", "phase"),
    [
        (2.9, 1.8, Phase.RUN),  # the first gradient vouches for the LR
        (3.1, 1.8, Phase.REWARM),
        (4.9, 1.8, Phase.REWARM),
        (4.9, 1.0, Phase.RUN),  # the run has proven itself
        (5.1, 1.0, Phase.REWARM),  # but not for an LR like this
        (0.0, 1.8, Phase.RUN),  # nothing was told
    ],
)
def test_without_a_winner_the_first_gradient_has_the_casting_vote(times_estimate, lowest, phase):
    ramp = {"lowest_level": 1.8, "lowest_age": 10, "variance_factor": 1.0}
    run = {"lowest_level": lowest, "fast_level": 1.8, "variance_factor": 1.0}
    state, archive = a_test_under_way(ramp, run)
    aside = archive[Slot.FIRST].fine
    aside.lowest_evidence, aside.lowest_noise = 9.0, 0.1
    state.ramp_log_lr = -7.0  # of an earlier ramp
    state.estimate = archive[Slot.FIRST].estimate = 1 / times_estimate if times_estimate else 0.0
    orders = reference_recovery.end_test(WITH_SNAPSHOTS, state, archive)
    assert state.phase == phase
    assert orders.flags == (Flag.FAR_LR if phase == Phase.REWARM else 0)
    if phase == Phase.REWARM:
        wanted = math.sqrt(state.estimate) / reference_recovery.schedule_left(WITH_SNAPSHOTS, state)
        assert state.cut_factor == pytest.approx(min(0.5, wanted), rel=1e-12)
        assert state.ramp_log_lr == 0


def test_an_alarm_in_a_test_does_not_cost_a_run_that_is_better():
    ramp = {"lowest_level": 1.8, "lowest_log_lr": -9.0, "variance_factor": 1.0}
    run = {"lowest_level": 1.0, "fast_level": 1.1, "variance_factor": 1.0}
    state, archive = a_test_under_way(ramp, run)
    orders = reference_recovery.answer_on_ramp(WITH_SNAPSHOTS, state, archive)
    assert (orders.restore, state.phase, state.tested) == (Slot.FIRST, Phase.RUN, 1)


def test_a_test_that_fails_at_once_is_asked_again_from_below_and_keeps_the_run():
    state, archive = a_test_under_way({"count": 5, "lowest_evidence": 0.0}, {})
    state.ramp_start, state.ramp_growth, state.good_slot = 1e-3, 1.1, Slot.SECOND
    orders = reference_recovery.answer_on_ramp(WITH_SNAPSHOTS, state, archive)
    assert (orders.restore, state.phase) == (Slot.START, Phase.TEST)
    assert (state.ramp_start, state.ramp_growth) == (2e-5, pytest.approx(1.1, rel=1e-12))
    assert (state.aside_slot, state.good_slot) == (Slot.FIRST, Slot.SECOND)


def test_a_test_that_fails_without_having_learned_says_nothing_of_the_run():
    state, archive = a_test_under_way({"lowest_evidence": 0.0, "variance_factor": 1.0}, {})
    archive[Slot.FIRST].fine.variance_factor = 1.0
    orders = reference_recovery.answer_on_ramp(WITH_SNAPSHOTS, state, archive)
    assert (orders.restore, state.phase, state.tested) == (Slot.FIRST, Phase.RUN, 1)


def a_rescue(**fields: float) -> State:
    """A rescue at its limit, a tenth of the LR in use, with nothing learned and nothing risen."""
    state = State(step=150.0, phase=Phase.RESCUE, first_lr=0.01, restarts=1.0, ramp_growth=1.2)
    state.ramp_limit = state.ramp_lr = 0.1 * schedule(CONFIG, 150)
    state.fine = Progress(count=30, noise=0.1, cleanest_noise=0.1, lowest_variance=0.07)
    state.fine.variance_factor = 1.0
    for name, value in fields.items():
        setattr(state if hasattr(state, name) else state.fine, name, value)
    return state


def test_a_rescue_that_finds_nothing_goes_on_to_the_lr_in_use():
    state = a_rescue()
    assert reference_recovery.advance_ramp(WITH_SNAPSHOTS, state, {}) == reference_recovery.Orders()
    assert (state.phase, state.ramp_limit) == (Phase.RESCUE, schedule(CONFIG, 150))
    state.ramp_lr = state.ramp_limit
    reference_recovery.advance_ramp(WITH_SNAPSHOTS, state, {})
    assert (state.phase, state.phase_step, state.cut_factor) == (Phase.RUN, 151, 1)


@pytest.mark.parametrize("told", [{"fast_level": 0.2}, {"lowest_evidence": 4.1}, {"restarts": 2.0}])
def test_a_rescue_that_tells_something_ends_at_its_limit(told):
    state = a_rescue(**told)
    orders = reference_recovery.advance_ramp(WITH_SNAPSHOTS, state, {})
    assert (orders.restore, state.phase) == (Slot.START, Phase.REWARM)


@pytest.mark.parametrize(("count", "phase"), [(5, Phase.REWARM), (6, Phase.RESCUE)])
def test_blocks_judge_what_was_learned_once_there_are_enough(count, phase):
    config = dataclasses.replace(WITH_SNAPSHOTS, block_steps=10.0)
    state = collapsed(config, 60.0)
    state.coarse = Progress(count=count, lowest_evidence=1.0)
    reference_recovery.start_over(config, state)
    assert state.phase == phase


@pytest.mark.parametrize(
    ("estimate", "lr"), [(0.0, 0.01), (0.0025, 0.005), (0.1, 0.1 * 10**-0.5), (9.0, 0.01 * 10**0.5)]
)
def test_a_restart_takes_the_mean_of_the_landmark_and_the_estimate(estimate, lr):
    state = State(estimate=estimate)
    assert reference_recovery.agreed(0.01, state) == pytest.approx(lr, rel=8 * EPS)


@pytest.mark.parametrize(("estimate", "phase"), [(0.0, Phase.TRIAL), (0.3, Phase.TRIAL), (0.34, 0)])
def test_a_stall_is_no_cause_for_a_trial_where_the_first_gradient_speaks_for_the_lr(
    estimate, phase
):
    state = State(step=150.0, estimate=estimate, fine=Progress(count=150, lowest_level=1.0))
    reading = reference_progress.Reading(flags=Flag.STALL, gain=9.0)
    reference_recovery.experiment(WITH_SNAPSHOTS, Flag.STALL, reading, state, {})
    assert state.phase == phase


def a_trial() -> State:
    """A trial from a factor of 0.8 since step 150, with a lowest level of 1 and an error of 0.1."""
    noise = 0.1 / math.sqrt(2 / 15)
    fine = Progress(count=150, lowest_level=1.0, noise=noise, variance_factor=1.0)
    state = State(step=150.0, fine=fine, cut_factor=0.8, ceiling=0.8)
    reference_recovery.begin_trial(CONFIG, state)
    assert (state.cut_factor, state.phase) == (0.2, Phase.TRIAL)
    return state


def advance_trial(state: State, step: float, level: float) -> None:
    state.step, state.fine.fast_level = step, level
    orders = reference_recovery.advance_trial(CONFIG, state, {})
    assert orders == reference_recovery.Orders()


def test_trial_without_a_new_lowest_level_is_undone():
    state = a_trial()
    advance_trial(state, 169.0, 0.7501)
    assert state.phase == Phase.TRIAL
    advance_trial(state, 170.0, 0.7501)
    assert (state.phase, state.cut_factor, state.trials, state.cuts) == (Phase.RUN, 0.8, 1, 0)


@pytest.mark.parametrize(("level", "factor"), [(0.9502, 0.2), (0.9498, 0.8)])
def test_trial_is_kept_if_the_level_rises_again_without_it(level: float, factor: float):
    """A level that stays down did not come down by the LR: an epoch may have begun."""
    state = a_trial()
    advance_trial(state, 169.0, 0.7)  # not before it is over: the lowest of many levels is luck
    advance_trial(state, 170.0, 0.7)
    assert (state.phase, state.cut_factor, state.phase_step) == (Phase.TRIAL, 0.8, 170)
    advance_trial(state, 180.0, level)
    assert state.phase == (Phase.RUN if factor == 0.2 else Phase.TRIAL)
    advance_trial(state, 190.0, level)
    kept = factor == 0.2
    assert (state.phase, state.cut_factor, state.ceiling) == (Phase.RUN, factor, factor)
    assert (state.cuts, state.trials) == ((1, 0) if kept else (0, 1))
    assert not state.tested  # a healthy run is not doubted


def falling(size: int) -> np.ndarray:
    """Return losses that fall as long as the soft charts look."""
    return noisy(size, level=0.0, seed=6) + 9 * np.exp(-np.arange(size) / 150)


def test_snapshots_take_turns_and_one_that_has_aged_is_good():
    state, archive = State(), {}
    records, _ = run(WITH_SNAPSHOTS, falling(100), state=state, archive=archive)
    saves = records["action"] >> 4
    assert dict(zip(np.flatnonzero(saves).tolist(), saves[saves > 0].tolist(), strict=True)) == {
        31: Slot.FIRST,
        63: Slot.SECOND,
        95: Slot.FIRST,
    }
    assert (state.good_slot, state.pending_slot) == (Slot.SECOND, Slot.FIRST)
    assert (archive[Slot.SECOND].step, archive[Slot.FIRST].step) == (63, 95)


@pytest.mark.parametrize(("begin", "patience"), [(8, 20), (16, 20), (30, 5), (60, 5), (200, 5)])
@pytest.mark.parametrize("noise", [3e-4, 3e-3])
def test_collapse_into_a_quiet_loss_is_seen_soon(begin: int, patience: int, noise: float):
    """Learned by heart, then dead, and quiet both times: a level creeps, but a run is short."""
    losses = 0.01 + 2.3 * np.exp(-np.arange(begin + patience) * 6.0 / begin)
    losses[begin:] = 2.3
    losses += noise * np.random.default_rng(0).standard_normal(len(losses))
    hard = Flag.LOST | Flag.ABOVE | Flag.DIVERGE
    records, _ = run(dataclasses.replace(CONFIG, guard_mode=GuardMode.OBSERVE), losses)
    alarms = np.flatnonzero(records["flags"] & hard)
    assert begin <= alarms[0] < begin + patience


def probed(shares: list[float], *, lr: float = 0.0, restarts: float = 0.0) -> tuple[State, dict]:
    """Return how a probe ends that begins with an alarm at step 604, and its archive.

    Its losses lie so far on the way from the level of the snapshot to that of the alarm.
    """
    state, archive = State(restarts=restarts), {}
    run(WITH_SNAPSHOTS, falling(600), state=state, archive=archive)
    state.restarts = restarts
    state.cusum, state.streak = 0.0, 2.0
    # The older snapshot is good, but the newer one has aged for 29 steps: the jump came later.
    assert (state.good_slot, state.pending_slot) == (Slot.FIRST, Slot.SECOND)
    records, _ = run(WITH_SNAPSHOTS, np.full(5, 99.0), state=state, archive=archive)
    assert records["flags"][-1] & Flag.DIVERGE  # five outliers in a row
    assert records["phase"][-1] == Phase.PROBE
    assert records["action"][-1] == Action.SKIP | Slot.FIRST << 4 | Slot.SECOND << 8
    assert (state.good_slot, state.restarts) == (Slot.SECOND, restarts + 1)
    archive[Slot.SECOND].lr = lr or archive[Slot.SECOND].lr
    usual, failed = archive[Slot.SECOND].fine, archive[Slot.FIRST].fine
    gap = max(failed.fast_level - usual.fast_level, reference_guard.least_gap(usual))
    losses = usual.fast_level + np.array(shares) * gap
    records, _ = run(WITH_SNAPSHOTS, losses, state=state, archive=archive)
    assert not records["lr"][:-1].any()
    assert np.all(records["action"] & Action.SKIP)
    assert np.all(records["phase"][:-1] == Phase.PROBE)
    return state, archive


def test_first_probe_with_the_losses_of_old_goes_on_from_the_snapshot():
    state, archive = probed([0.0, 0.0, 0.0])  # of one mind: three will do
    assert (state.phase, state.cut_factor, state.cuts, state.restarts) == (Phase.RUN, 1, 0, 1)
    assert (state.aside_slot, state.good_slot) == (Slot.NO_SLOT, Slot.SECOND)
    assert state.fine.count == archive[Slot.SECOND].fine.count + 3  # measured on and on


def test_second_probe_with_the_losses_of_old_cuts_the_lr():
    state, _ = probed([0.49] * 8, restarts=1.0)
    # t' = 612 + 20; the LR of the last quiet step was above m(t'), so the factor failed.
    assert (state.phase, state.cut_factor, state.ceiling) == (Phase.REWARM, 0.5, 0.7)
    assert (state.streak, state.fine) == (0, Progress())


def test_rate_that_has_grown_since_the_snapshot_is_cut_to_what_held_at_least():
    lr = 0.8 * PEAK * schedule(CONFIG, 604)
    state, _ = probed([0.49] * 8, lr=lr)
    assert state.cut_factor == pytest.approx(lr / PEAK / schedule(CONFIG, 632), rel=8 * EPS)
    assert (state.ceiling, state.phase) == (state.cut_factor, Phase.REWARM)


def test_a_wild_loss_has_one_vote():
    state, _ = probed([0.0, 1e6, 0.0, 0.0, 0.0])
    assert (state.phase, state.probe_sum) == (Phase.RUN, -1.5)


def test_probe_with_losses_as_high_accepts_them_with_the_weights_of_before():
    state, archive = probed([0.51] * 8)
    assert (state.phase, state.phase_step) == (Phase.SHIFT, 613)
    assert (state.cut_factor, state.cuts, state.restarts, state.step) == (1, 0, 0, 613)
    assert (state.samples, state.observed, state.fine) == (0, 0, Progress())
    assert (state.aside_slot, state.good_slot) == (Slot.NO_SLOT, Slot.SECOND)
    assert archive[Slot.SECOND].step < 600


def shifted(losses: np.ndarray) -> tuple[State, np.ndarray]:
    """Return a run that accepts a shift at step 607 and goes on with these losses."""
    state, archive = probed([1.0, 1.0, 1.0])
    records, _ = run(WITH_SNAPSHOTS, losses, state=state, archive=archive)
    return state, records


def test_shift_that_has_passed_is_followed_by_the_weights_from_before():
    losses = noisy(80, level=9.0)
    losses[16:] = falling(664)[600:]  # as with the snapshot's weights: the data is as before
    state, records = shifted(losses)
    probe = np.flatnonzero(records["phase"] == Phase.PROBE)
    assert probe.tolist() == [15, 16, 17, 18]  # asked after 16 steps
    assert records["action"][15] == Action.SKIP | Slot.FIRST << 4 | Slot.SECOND << 8
    assert (records["phase"][19], state.cuts, state.cut_factor) == (Phase.RUN, 0, 1)
    assert not records["action"][19] >> 8  # the snapshot's weights stay


def test_shift_that_lasts_is_asked_about_ever_more_rarely_and_then_accepted():
    state, records = shifted(noisy(200, level=9.0))
    asked = (records["phase"] == Phase.PROBE) & (records["previous_phase"] == Phase.SHIFT)
    # At 64 steps rewarm_steps and hold_steps, 20 and 50, are not over yet.
    assert np.flatnonzero(asked).tolist() == [15, 23, 31, 47, 63, 95]
    assert np.flatnonzero(records["phase"] == Phase.SHIFT)[-1] == 94
    assert (state.phase, state.cuts, state.restarts) == (Phase.RUN, 0, 0)
    assert state.good_slot


def test_shift_after_which_the_loss_is_down_by_itself_ends_without_a_question():
    losses = falling(700)[600:]
    state, records = shifted(losses)
    assert np.flatnonzero(records["phase"] == Phase.RUN)[0] == 15
    assert not np.any(records["action"] >> 8)
    assert state.cuts == 0


def test_level_that_falls_has_not_drifted_up_whatever_its_best_was():
    """An easy stretch of data leaves a best that harder data cannot reach."""
    easy = 0.01 + 0.01 * np.abs(noisy(100, level=0.0))
    hard = 2.0 * np.exp(-np.arange(1500) / 600) + noisy(1500, level=1.0)
    records, _ = run(
        dataclasses.replace(CONFIG, guard_mode=GuardMode.OFF), np.concatenate([easy, hard])
    )
    flags = records["flags"] & Flag.DRIFT
    assert records["rise"][1200:].min() > 6.5
    assert not flags[1200:].any()


def test_collapse_without_snapshots_is_cut_in_place_and_its_charts_start_anew():
    state = State()
    losses = np.concatenate([falling(80), noisy(40, level=12.0)])
    for loss in losses.tolist():
        _, record = control_step(without_long_charts(state), Signals(loss), state)
        if record.flags & (Flag.LOST | Flag.ABOVE):
            break
    assert (record.phase, state.cuts) == (Phase.REWARM, 1)
    assert record.action == Action.SKIP | Slot.ZERO_MOMENT << 8
    assert state.fine == Progress()
    assert state.best_level == state.level  # accepted: it was no DIVERGE


def without_long_charts(state: State) -> Config:
    """Keep the cusum and the run of outliers at 0."""
    state.cusum = state.outlier_run = 0.0
    return CONFIG


@pytest.mark.parametrize(
    ("flag", "fast_level", "step", "fields", "restore"),
    [
        (Flag.LOST, 2.1, 600.0, {}, Slot.START),  # more than half of the progress is lost
        (Flag.ABOVE, 3.5, 600.0, {}, Slot.START),
        (Flag.LOST, 1.9, 600.0, {}, Slot.ZERO_MOMENT),  # what is left is worth a try
        (Flag.DRIFT, 2.1, 600.0, {}, Slot.ZERO_MOMENT),  # too slow to tell of ruins
        (Flag.LOST, 2.1, 700.0, {}, Slot.ZERO_MOMENT),  # too few steps are left to begin anew
        (Flag.LOST, 2.1, 700.0, {"origin_step": 200.0}, Slot.START),
    ],
)
def test_a_run_in_ruins_begins_anew_where_that_is_worth_it(flag, fast_level, step, fields, restore):
    state = collapsed(WITH_SNAPSHOTS, step, **fields)
    fine = state.fine
    fine.first_loss, fine.lowest_level, fine.fast_level = 3.0, 1.0, fast_level
    state.level, state.start_level, state.onset_lr = 1.5, 2.0, 0.02
    orders = reference_guard.answer_alarm(WITH_SNAPSHOTS, Signals(2.0), flag, state, {})
    assert orders[:3] == (True, Slot.NO_SLOT, restore)
    assert state.phase == Phase.REWARM


def test_alarm_beyond_the_last_restart_fails_the_run():
    config = dataclasses.replace(WITH_SNAPSHOTS, max_restarts=1)
    state = collapsed(config, 60.0, restarts=1.0, good_slot=Slot.SECOND)
    orders = reference_guard.answer_alarm(config, Signals(9.0), Flag.LOST, state, {})
    assert orders[:3] == (True, Slot.NO_SLOT, Slot.SECOND)
    assert state.phase == Phase.FAILED


# Names.


def fields_in_header(struct: str) -> list[str]:
    """Return the fields of a struct of csrc/state.h, in order."""
    header = (Path(__file__).parents[1] / "csrc" / "state.h").read_text()
    match = re.search(rf"struct {struct}(?: : (\w+))? {{(.*?)\n}};", header, re.DOTALL)
    inherited = fields_in_header(match[1]) if match[1] else []
    return inherited + re.findall(r"^  \w+ (\w+)(?:\[\w+\])?;", match[2], re.MULTILINE)


@pytest.mark.parametrize(
    ("struct", "names"),
    [
        ("Config", [field.name for field in dataclasses.fields(Config)]),
        ("Signals", [field.name for field in dataclasses.fields(Signals)]),
        ("Progress", [field.name for field in dataclasses.fields(Progress)]),
        ("State", [field.name for field in dataclasses.fields(State)]),
        ("Record", ["sequence", *Record._fields, "checksum"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_fields_have_one_name(struct, names):
    assert names == fields_in_header(struct)


@pytest.mark.parametrize(
    "enumeration", [Decay, GuardMode, Phase, Action, Slot], ids=lambda e: e.__name__
)
def test_enumerations_have_one_order(enumeration):
    header = (Path(__file__).parents[1] / "csrc" / "state.h").read_text()
    name = enumeration.__name__
    body = re.search(rf"enum (?:class )?{name} : \w+ {{(.*?)}};", header, re.DOTALL)[1]
    body = re.sub("//.*", "", body)
    names = [
        re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).upper() for name in re.findall(r"k(\w+)", body)
    ]
    assert names == [member.name for member in enumeration]


def test_flags_have_one_value():
    header = (Path(__file__).parents[1] / "csrc" / "state.h").read_text()
    body = re.search(r"enum Flag : \w+ {(.*?)};", header, re.DOTALL)[1]
    values = {
        re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).upper(): int(value)
        for name, value in re.findall(r"k(\w+) = (\d+)", body)
    }
    assert values == {name: value for name, value in vars(Flag).items() if name.isupper()}
