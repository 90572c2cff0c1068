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

from adaptlr import reference, reference_detector
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
    flattened,
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


def test_third_loss_beyond_three_times_the_largest_gives_the_start_up_alarm():
    losses = np.array([1.0, 1.0, 1.0, 1.0, 3.1, 99.0, 1e9])
    records, state = run(CONFIG, losses)
    assert list(records["flags"]) == [0] * 6 + [Flag.DIVERGE | Flag.WORSE]
    assert (state.samples, state.observed, state.level) == (4, 4, 1)
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


def give(norms: list[float], state: State, **signals: bool) -> list[Flag]:
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
    assert give([math.exp(4.0)], state) == [Flag(0)]  # a score of 4, clipped to 2.5
    expected = [1000, 2 + 2.5 * 0.5 / 128, 0.25 * (1 + (6.25 / beta - 1) / 128), 6]
    np.testing.assert_allclose(norm_fields(state), expected, rtol=8 * EPS)


def test_norm_of_zero_counts_as_1e_30():
    state = State()
    give([0.0, 1e-40], state)
    assert norm_fields(state) == [2, np.log(1e-30), 0, 6]


def test_norm_spike_is_flagged_once_16_norms_are_known_and_changes_nothing_else():
    state = State()
    assert give([1.0, 1.1] * 8, state) == [Flag(0)] * 16
    assert give([1e6], dataclasses.replace(copy.deepcopy(state), norm_samples=15)) == [Flag(0)]
    scale = math.sqrt(state.norm_variance)
    for score, expected in ((5.99, Flag(0)), (6.01, Flag.NORM_SPIKE)):
        after = copy.deepcopy(state)
        norm = math.exp(state.norm_level + score * scale)
        decision, record = control_step(CONFIG, Signals(1.0, norm), after)
        assert (record.flags, record.action, record.phase) == (expected, Action.NONE, Phase.RUN)
        assert decision.multiplier == 0.17  # of the warm-up's 17th step
    assert after.norm_spike_threshold == pytest.approx(6 * math.exp(0.4995), rel=2 * EPS)
    give([1.0], after)
    assert after.norm_spike_threshold == pytest.approx(6 * math.exp(0.4995) * 0.9995, rel=4 * EPS)


def test_least_scale_of_the_norm_is_one_percent():
    for excess, expected in ((0.0599, Flag(0)), (0.0601, Flag.NORM_SPIKE)):
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
    assert (record.action, record.target_factor) == (Action.SKIP, 0.5)
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
    assert records["flags"][304] & Flag.DIVERGE
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


# Traces.

PROMISED = {
    "healthy": Flag(0),
    "plateau": Flag(0),
    "spike": Flag.SPIKE,
    "burst": Flag.SPIKE,
    "nan_burst": Flag.NONFINITE,
    "nan_end": Flag.NONFINITE,
    "blow_up": Flag.SPIKE | Flag.DIVERGE | Flag.DRIFT | Flag.WORSE | Flag.ABOVE,
    "late_blow_up": Flag.SPIKE | Flag.DIVERGE | Flag.ABOVE,
    "start_up_blow_up": Flag.DIVERGE | Flag.WORSE | Flag.LOST | Flag.ABOVE,
    "drift": Flag.DRIFT | Flag.LOST,
    "worse": Flag.DIVERGE | Flag.DRIFT | Flag.LOST,
    "negative": Flag(0),
    "near_zero": Flag.SPIKE,
    "ar_noise": Flag(0),
    "constant": Flag(0),  # of a norm that moves by a step of bfloat16, too
    "jump_down": Flag(0),
    "overflow": Flag.NONFINITE | Flag.OVERFLOW,
    "heavy_tail": Flag.SPIKE,
    "end_of_run": Flag.ENDED,
    "norm_spike": Flag.NORM_SPIKE | Flag.NONFINITE | Flag.OVERFLOW,
    "norm_tail": Flag.NORM_SPIKE | Flag.SPIKE | Flag.DIVERGE | Flag.DRIFT | Flag.WORSE | Flag.ABOVE,
}
# Where there is no snapshot the soft charts lead to nothing; those of these losses stand still.
STANDS_STILL = {"blow_up", "norm_tail", "drift", "near_zero", "constant"}


@pytest.mark.parametrize("trace", TRACES, ids=lambda trace: trace.name)
def test_trace_raises_the_flags_that_its_name_promises(trace):
    config = default_config(trace.total_steps, PEAK)
    records, state = run(
        config, trace.losses, grad_norms=trace.grad_norms, overflows=trace.overflows
    )
    flags = Flag(int(np.bitwise_or.reduce(records["flags"])))
    assert flags & ~SOFT == PROMISED[trace.name]
    assert bool(flags & SOFT) == (trace.name in STANDS_STILL)
    assert (state.phase == Phase.FAILED) == (trace.name in ("nan_end", "overflow"))
    assert np.all(np.isfinite(np.hstack(list(flattened(state).values()))))
    assert np.all((records["factor"] > 0) & (records["factor"] <= 1))


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
    assert values == {flag.name: flag.value for flag in Flag}
