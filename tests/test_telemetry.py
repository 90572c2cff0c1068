"""The flight record: complete, bounded, honest about what it has lost."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from adaptlr import Action, AdaptiveLR, Flag, Guard, Phase, _extension
from adaptlr.telemetry import action_of


def controller(**arguments) -> AdaptiveLR:
    optimizer = torch.optim.SGD([torch.zeros(2, requires_grad=True)], lr=0.1)
    return AdaptiveLR(
        optimizer, **{"total_steps": 10_000, "warmup": 0, "snapshot": "off", **arguments}
    )


def noise(seed: int = 0):
    rng = np.random.default_rng(seed)
    while True:
        yield 2.0 + 0.1 * float(rng.standard_normal())


def test_every_step_leaves_one_record():
    control = controller()
    losses = [loss for loss, _ in zip(noise(), range(100), strict=False)]
    for loss in losses:
        control.step(loss)
    history = control.history()
    assert history.dtype.names == _extension.record_dtype.names
    assert history["sequence"].tolist() == list(range(1, 101))
    assert history["step"].tolist() == list(range(100))
    assert history["loss"].tolist() == losses
    assert history["level"][-1] == pytest.approx(np.mean(losses), abs=0.05)
    assert history["scale"][-1] == pytest.approx(np.std(losses), rel=0.3)
    assert np.isnan(history["grad_norm"]).all()


def test_history_is_bounded_and_says_what_it_lost():
    control = controller(history_size=50)
    for loss, _ in zip(noise(), range(120), strict=False):
        control.step(loss)
    assert control.history()["step"].tolist() == list(range(70, 120))
    assert control.status().dropped == 70


def test_records_never_push_events_out():
    control = controller(history_size=10)
    for step, (loss, _) in enumerate(zip(noise(), range(3000), strict=False)):
        control.step(math.nan if step == 5 else loss)
    assert [event.step for event in control.events()] == [5]


def test_the_event_ring_keeps_the_newest_1024():
    control = controller(guard=Guard(mode="observe"), history_size=10)
    for _ in range(1500):
        control.step(math.nan)
    events = control.events()
    assert len(events) == 1024
    assert events[-1].step == 1499
    assert control.status().dropped == (1500 - 1024) + (1500 - 10)


def test_status_is_the_newest_record_in_the_reader_s_terms():
    control = controller()
    before = control.status()
    assert (before.step, before.lr, before.phase) == (0, control.lr, Phase.RUN)
    assert math.isnan(before.loss)
    for loss, _ in zip(noise(), range(40), strict=False):
        control.step(loss)
    status, newest = control.status(), control.history()[-1]
    for field in ("loss", "level", "scale", "slope", "t_statistic", "lr", "factor"):
        assert getattr(status, field) == newest[field]
    assert status.variance == status.scale**2
    assert (status.flags, status.action, status.lag, status.dropped) == (Flag(0), Action.NONE, 0, 0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        status.step = 3  # type: ignore[misc]


def test_the_slope_of_a_falling_loss_is_seen():
    control = controller()
    for step, (loss, _) in enumerate(zip(noise(), range(300), strict=False)):
        control.step(loss - 0.01 * step)
    assert control.status().slope == pytest.approx(-0.01, rel=0.2)
    assert control.status().t_statistic < -10


EXPLAINED = {
    "DIVERGE": (
        lambda step: 2.0 + (0.2 * 1.3 ** min(step - 200, 30) if step >= 200 else 0.0),
        "the loss runs away (loss ",
    ),
    "DRIFT": (
        lambda step: 5.0 * math.exp(-step / 50) + (0.0006 * max(step - 600, 0)),
        "the loss drifts upwards (level ",
    ),
}


@pytest.mark.parametrize("name", EXPLAINED)
def test_each_alarm_is_explained_by_the_numbers_that_caused_it(name):
    curve, sentence = EXPLAINED[name]
    control = controller(decay="constant")
    for step, (loss, _) in enumerate(zip(noise(3), range(3000), strict=False)):
        control.step(0.3 * (loss - 2.0) + curve(step))
        if any(event.kind == "cut" for event in control.events()):
            break
    cut = control.events()[-1]
    assert cut.kind == "cut"
    assert sentence in cut.reason
    record = control.history()[-1]
    assert record["flags"] & Flag[name]
    assert f"level {record['level']:.4g}" in cut.reason
    assert action_of(record) is Action.SKIP
    assert record["factor"] < cut.factor == record["target_factor"] < 1.0


def test_enumerations_are_those_of_the_extension():
    control = controller(guard=Guard(max_consecutive_skips=1))
    control.step(math.nan)
    with pytest.raises(RuntimeError):
        control.step(math.nan)
    record = control.history()[-1]
    assert Phase(record["phase"]) is Phase.FAILED
    assert action_of(record) is Action.SKIP
    assert Flag(int(record["flags"])) is Flag.NONFINITE
    assert control.events()[-1].kind == "failed"


def test_a_line_that_has_not_arrived_is_not_shown():
    """On a GPU lines and counts reach the host in any order; every line proves itself."""
    rotations = [4 * place + 1 for place in range(15)]  # turned() in csrc/ring.h

    def checksum(record: np.void) -> int:
        words = np.frombuffer(record.tobytes()[: 8 * 15], dtype=np.uint64).tolist()
        total = 0
        for word, bits in zip(words, rotations, strict=True):
            total ^= (word << bits | word >> (64 - bits)) & (2**64 - 1)
        return total

    control = controller()
    for loss, _ in zip(noise(), range(20), strict=False):
        control.step(loss)
    assert [checksum(record) for record in control.history()] == control.history()[
        "checksum"
    ].tolist()
