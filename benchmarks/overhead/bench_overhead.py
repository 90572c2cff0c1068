"""What does a step with adaptlr cost, beside what a training loop pays anyway?

Run ``pytest benchmarks/overhead``: one benchmark a row, in host time, on the CPU and on the GPU if
there is one. The difference that adaptlr makes is too small to be read off two rows that were
measured one after the other: ``added_us`` in the extra info of a step was measured in pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle
from time import perf_counter

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from adaptlr.bench.measure import Comparison, list_comparisons
from adaptlr.bench.setup import check_undisturbed, make_losses
from adaptlr.bench.subjects import ATTACHED, BARE, make_anchors, make_arms
from adaptlr.bench.timing import Subject, quartiles, quiet, time_rounds

ROUNDS = 200
CALLS = 16
DEVICES = [torch.device("cpu"), *[torch.device("cuda")] * torch.cuda.is_available()]
LOSSES = {device.type: make_losses(CALLS, device) for device in DEVICES}
ANCHORS = [
    pytest.param(subject, device.type, id=f"{device.type}-{subject.name}")
    for device in DEVICES
    for subject in make_anchors(LOSSES[device.type], CALLS)
]
COMPARISONS = [
    pytest.param(comparison, device.type, id=f"{device.type}-{comparison.title}")
    for device in DEVICES
    for comparison in list_comparisons(device, ROUNDS)
]


class HostClock:
    """Seconds of host time. Stands still while it waits for the device to finish what is queued.

    It is read at both ends of a round, so no round meets the work of another in the launch queue.
    """

    def __init__(self) -> None:
        self.waited = 0.0

    def __call__(self) -> float:
        entered = perf_counter()
        now = entered - self.waited
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self.waited += perf_counter() - entered
        return now


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    with quiet():
        yield


def run(benchmark: BenchmarkFixture, subject: Subject, device: str, rounds: int) -> None:
    losses = cycle(LOSSES[device])  # of one value the guard would make something
    benchmark.pedantic(
        lambda: subject.action(next(losses)),
        rounds=rounds,
        iterations=subject.calls,
        warmup_rounds=3,
    )


@pytest.mark.benchmark(group="parts of adaptlr, and anchors", timer=HostClock())
@pytest.mark.parametrize(("subject", "device"), ANCHORS)
def test_anchor(benchmark: BenchmarkFixture, subject: Subject, device: str) -> None:
    run(benchmark, subject, device, ROUNDS)


@pytest.mark.benchmark(timer=HostClock())
@pytest.mark.parametrize("arm", [BARE, ATTACHED])
@pytest.mark.parametrize(("comparison", "device"), COMPARISONS)
def test_step(benchmark: BenchmarkFixture, comparison: Comparison, device: str, arm: str) -> None:
    arms = make_arms(
        comparison.optimizer,
        comparison.groups,
        comparison.model,
        LOSSES[device],
        comparison.calls,
        flagged=False,
    )
    benchmark.group = f"{device}: {comparison.title}"
    if arm == ATTACHED:
        times = time_rounds(arms.subjects, LOSSES[device], comparison.rounds)
        added = quartiles(times[ATTACHED] - times[BARE])
        benchmark.extra_info["added_us"] = added._asdict()
    subject = next(subject for subject in arms.subjects if subject.name == arm)
    run(benchmark, subject, device, comparison.rounds)
    check_undisturbed(arms.controller)
