"""A checkpoint taken in the middle of an experiment, whose snapshots it does not hold."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from adaptlr import AdaptiveLR, Guard, Phase, _extension
from adaptlr.config import ResolvedConfig


def config():
    row = ResolvedConfig(
        total_steps=1000,
        warmup=100,
        decay="constant",
        min_lr_ratio=0.0,
        guard=Guard(),
        peaks=[0.1],
    ).row.copy()
    row["snapshot_slots"] = 3
    return row


def state_in(phase: Phase, **fields: float) -> np.ndarray:
    state = _extension.initial_state()
    for name, value in {"phase": phase, "step": 300.0, **fields}.items():
        state[name] = value
    return state


LEARNED = {"fine.count": 40.0, "fine.lowest_evidence": 9.0, "fine.lowest_log_lr": np.log(0.03)}
GROWTH = {"ramp_growth": 10 ** (1 / 12), "ramp_lr": 0.5, "ramp_limit": 1.0}


@pytest.mark.parametrize("phase", [Phase.RESCUE, Phase.TEST])
def test_a_ramp_ends_with_the_rate_it_has_found(phase):
    state = _extension.resumed(config(), state_in(phase, **LEARNED, **GROWTH, aside_slot=2.0))
    assert state["phase"] == Phase.REWARM
    assert state["cut_factor"] == pytest.approx(0.3 / 3)  # of the peak, 0.1
    assert state["aside_slot"] == 0


def test_a_trial_ends_with_the_rate_before_it():
    state = _extension.resumed(
        config(), state_in(Phase.TRIAL, cut_factor=0.2, trial_factor=0.8, ceiling=0.8)
    )
    assert (state["phase"], state["cut_factor"]) == (Phase.RUN, 0.8)


def test_a_probe_ends_with_a_cut():
    state = _extension.resumed(config(), state_in(Phase.PROBE, onset_lr=1.0, good_slot=3.0))
    assert (state["phase"], state["cut_factor"], state["good_slot"]) == (Phase.REWARM, 0.5, 0)


def test_a_change_of_the_data_counts_as_lasting():
    state = _extension.resumed(config(), state_in(Phase.SHIFT, good_slot=2.0))
    assert (state["phase"], state["cut_factor"], state["good_slot"]) == (Phase.RUN, 1.0, 0)


def test_a_run_without_an_experiment_goes_on_as_it_was():
    before = state_in(Phase.HOLD, cut_factor=0.3, phase_step=290.0)
    after = _extension.resumed(config(), copy.deepcopy(before))
    changed = [name for name in before.dtype.names if not np.array_equal(before[name], after[name])]
    assert changed == ["origin_step"]  # the weights at hand are what can be gone back to


def test_resuming_in_a_test_says_what_became_of_it():
    def fresh() -> tuple[torch.optim.Optimizer, AdaptiveLR]:
        weights = torch.nn.Parameter(torch.zeros(3))
        weights.grad = torch.ones(3)
        optimizer = torch.optim.SGD([weights], lr=0.1)
        return optimizer, AdaptiveLR(optimizer, total_steps=300)

    rng = np.random.default_rng(0)
    optimizer, controller = fresh()
    for _ in range(120):
        optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
        controller.step(2.0 + 0.1 * rng.standard_normal())
        if controller.status().phase is Phase.TEST:
            break
    assert controller.status().phase is Phase.TEST
    saved = copy.deepcopy(optimizer.state_dict())
    other, resumed = fresh()
    other.load_state_dict(saved)
    event = resumed.events()[0]
    assert event.kind == "resume"
    assert "the test that was under way needs snapshots" in event.reason
    for _ in range(50):
        other.param_groups[0]["params"][0].grad = torch.ones(3)
        resumed.step(2.0 + 0.1 * rng.standard_normal())
    assert resumed.status().step == controller.status().step + 50
