"""Other finders' rules, on curves whose answer is known, and the benchmark that compares them."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from adaptlr import peer_rules
from benchmarks.quality import find_lr_report as report

RATES = 1e-8 * 10.0 ** (np.arange(100) / 12.5)


def curve(middle, cliff):
    """A loss that falls around one rate and rises from another one on."""
    return 0.3 + 2.0 / (1.0 + (RATES / middle) ** 2) + (RATES / cliff) ** 2


def test_the_smoothed_loss_has_no_bias():
    assert peer_rules.smoothed(np.full(5, 3.0)) == pytest.approx(np.full(5, 3.0))
    two = peer_rules.smoothed(np.array([1.0, 2.0]))
    assert two[1] == pytest.approx((0.98 * 1.0 + 2.0) / 1.98)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e6])
def test_a_curve_ends_where_it_diverges(bad):
    losses = np.r_[np.ones(40), bad, np.ones(59)]
    rates, kept = peer_rules.until_diverged(RATES, losses)
    assert len(rates) == len(kept) == 40


def test_every_rule_on_a_smooth_curve():
    picks = peer_rules.suggestions(RATES, curve(middle=1e-4, cliff=3e-2))
    assert list(picks) == list(peer_rules.RULES)
    # The exponential mean lags 50 losses, 4 decades, unless the ramp ends before: all read high.
    assert 1e-4 < picks["steepest"] < 1e-1
    assert 1e-3 < picks["minimum"] < 1e-1
    assert picks["lightning"] < picks["steepest"]  # a slope in the rate is steepest at its low end
    assert all(rate in RATES or name == "minimum" for name, rate in picks.items())


@pytest.mark.parametrize(
    ("values", "last", "length"),
    [([3, 2, 1], 2, 3), ([1, 2, 3], 0, 1), ([5, 9, 4, 8, 3, 3], 4, 3), ([2, 2, 1, 5, 4, 3], 5, 3)],
)
def test_the_longest_fall(values, last, length):
    found = peer_rules._longest_fall(np.array(values, float))
    assert found == (last, length)


def test_the_longest_fall_by_trying_all():
    random = np.random.default_rng(0)
    for _ in range(50):
        values = random.permutation(8).astype(float)
        subsequences = (
            chosen
            for size in range(1, 9)
            for chosen in itertools.combinations(values, size)
            if all(a > b for a, b in itertools.pairwise(chosen))
        )
        assert peer_rules._longest_fall(values)[1] == max(map(len, subsequences))


def test_too_short_a_curve_says_nothing():
    assert all(map(math.isnan, peer_rules.suggestions(RATES[:5], np.ones(5)).values()))


def test_scores_are_those_of_the_sweep():
    best = report.Pick("digits", "adamw", "", report.ALL_TASKS["digits"].adamw.lr)
    assert report.error(best) == pytest.approx(0.0, abs=1e-9)
    assert report.score(best) == pytest.approx(1.0, abs=1e-3)
    assert report.score(best._replace(lr=100.0)) == 0.0
    assert report.score(best._replace(lr=math.nan)) == 0.0


def test_constants_from_the_other_tasks_leave_the_own_one_out():
    tasks = ("digits", "gpt", "minilm_spam")
    best = {task: report.ALL_TASKS[task].adamw.lr for task in tasks}
    off = {"digits": 1.0, "gpt": 4.0, "minilm_spam": 4.0}
    picks = [report.Pick(task, "adamw", "rule", best[task] * off[task]) for task in tasks]
    fitted = {pick.task: pick.lr / best[pick.task] for pick in report.left_out(picks, picks)}
    assert fitted == pytest.approx({"digits": 0.25, "gpt": 2.0, "minilm_spam": 2.0})
