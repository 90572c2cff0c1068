"""Healthy runs are left alone: a short form of benchmarks/reliability/false_alarms."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("scipy")
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks/reliability/false_alarms"))

from families import FAMILIES, Family
from measure import LONG
from simulate import alarm_flags, config_row

CALM = ("Gaussian", "Gaussian, flat", "log-normal 0.3", "log-normal 0.3, flat")
SEED = 1  # other runs than those of the benchmark, which begin with 0
calm_families = pytest.mark.parametrize(
    "family", [family for family in FAMILIES if family.name in CALM], ids=lambda family: family.name
)


@calm_families
def test_no_hard_alarm_in_100_000_steps(family: Family) -> None:
    flags = alarm_flags(family, config_row(LONG, "observe"), family.random(9, SEED))
    assert len(flags) == 0, f"flags {flags}"
