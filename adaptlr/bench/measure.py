"""Runs the whole benchmark on one device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from adaptlr.bench.facts import facts_of
from adaptlr.bench.kernels import TRACED_CALLS, DeviceWork, trace
from adaptlr.bench.report import Report, Row
from adaptlr.bench.setup import OPTIMIZERS, SMALL, Model, check_undisturbed, large, make_losses
from adaptlr.bench.subjects import (
    ATTACHED,
    BARE,
    FLAGGED,
    LAUNCHING,
    SCHEDULED,
    make_anchors,
    make_arms,
)
from adaptlr.bench.targets import (
    ADDED,
    ADDED_BY_ADAPTLR,
    ADDED_BY_LAUNCH,
    ADDED_BY_SCHEDULER,
    ADDED_BY_TORCH,
    KERNEL,
    targets_of,
)
from adaptlr.bench.timing import Subject, Times, quartiles, quiet, time_rounds

DEFAULT_ROUNDS = 400
Progress = Callable[[float], None]


@dataclass(frozen=True)
class Comparison:
    """An optimizer bare and attached, timed in pairs; the anchors beside it, in the same rounds."""

    optimizer: str
    groups: int
    model: Model
    calls: int
    rounds: int
    anchors: bool

    @property
    def title(self) -> str:
        """Name of its table."""
        groups = "1 group" if self.groups == 1 else f"{self.groups} groups"
        return f"{self.optimizer}, {groups}, {self.model.name}"


def measure(
    device: torch.device,
    rounds: int = DEFAULT_ROUNDS,
    progress: Progress = lambda share: None,
    commit: str = "",
) -> Report:
    """Measure what adaptlr adds to a step on ``device``, and the anchors, in one run.

    Host time is what the calls take on one thread; on CUDA nothing is waited for within a block.
    Device time is the kernels' own, as the profiler sees it. The two overlap: do not add them up.

    Args:
        device: A CPU or CUDA device.
        rounds: Rounds of a comparison, at least 10; a tenth where a step takes milliseconds. The
            default takes less than half a minute.
        progress: Called with the share done, in [0, 1].
        commit: Commit of the sources, where git cannot tell it.

    Raises:
        ValueError: if ``rounds`` is less than 10.
        RuntimeError: if adaptlr has no kernels for a CUDA device, or the guard acted meanwhile.
    """
    if rounds < 10:
        raise ValueError(f"rounds must be at least 10, got {rounds}")
    losses = make_losses(100, device)
    comparisons = list_comparisons(device, rounds)
    rows: list[Row] = []
    for index, comparison in enumerate(comparisons):

        def partly(share: float, index: int = index) -> None:
            progress((index + share) / len(comparisons))

        with quiet():
            rows += measure_comparison(comparison, losses, partly)
    return Report(facts_of(device, commit), rounds, rows, targets_of(rows, device.type))


def list_comparisons(device: torch.device, rounds: int) -> list[Comparison]:
    """Return every combination of optimizer, groups and model; the first one has the anchors too.

    Blocks are short (150 us on the CPU), so that most of them see no other process.
    """
    on_gpu = device.type == "cuda"
    few = rounds if on_gpu else max(rounds // 10, 3)  # on the CPU, a large step takes milliseconds
    sizes = ((SMALL, 16 if on_gpu else 10, rounds), (large(device), 16 if on_gpu else 3, few))
    return [
        Comparison(name, groups, model, calls, count, (name, groups, model) == ("SGD", 1, SMALL))
        for model, calls, count in sizes
        for name in OPTIMIZERS
        for groups in (1, 4)
    ]


def measure_comparison(
    comparison: Comparison, losses: Sequence[torch.Tensor], progress: Progress
) -> list[Row]:
    """Return the rows of one comparison."""
    on_gpu = losses[0].is_cuda
    calls, model = comparison.calls, comparison.model
    arms = make_arms(comparison.optimizer, comparison.groups, model, losses, calls, flagged=on_gpu)
    subjects = arms.subjects + (make_anchors(losses, calls) if comparison.anchors else [])
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        progress(done / comparison.rounds)

    times = time_rounds(subjects, losses, comparison.rounds, tick)
    work = {s.name: trace(s.action, losses[:TRACED_CALLS]) for s in subjects} if on_gpu else {}
    check_undisturbed(arms.controller)
    return make_rows(comparison.title, subjects, times, work)


def make_rows(
    section: str,
    subjects: Sequence[Subject],
    times: Mapping[str, Times],
    work: Mapping[str, DeviceWork],
) -> list[Row]:
    """Return the differences first, taken round by round, then every subject."""

    def difference(name: str, more: str, less: str) -> Row:
        host = quartiles(times[more] - times[less])
        if not work:
            return Row(section, name, host)
        kernels = work[more].kernels - work[less].kernels
        return Row(section, name, host, work[more].time - work[less].time, kernels)

    rows = [difference(ADDED, ATTACHED, BARE)]
    if FLAGGED in times:
        rows.append(difference(ADDED_BY_TORCH, FLAGGED, BARE))
        rows.append(difference(ADDED_BY_ADAPTLR, ATTACHED, FLAGGED))
        rows.append(difference(ADDED_BY_LAUNCH, LAUNCHING, FLAGGED))
    if SCHEDULED in times:
        rows.append(difference(ADDED_BY_SCHEDULER, SCHEDULED, BARE))
    for subject in subjects:
        name = subject.name
        device = (work[name].time, work[name].kernels) if work else (None, None)
        rows.append(Row(section, name, quartiles(times[name]), *device))
    if work and (kernel := work[ATTACHED].control_kernel):
        rows.append(Row(section, KERNEL, None, kernel.median, 1.0))
    return rows
