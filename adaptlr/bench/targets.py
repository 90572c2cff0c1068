"""The limits that adaptlr has set itself, checked against what was measured."""

from __future__ import annotations

from collections.abc import Sequence

from adaptlr.bench.report import Row, Target
from adaptlr.bench.subjects import COSINE, EMPTY

ADDED = "added by adaptlr"
ADDED_BY_TORCH = "of it by torch, for the skip flag"
ADDED_BY_ADAPTLR = "of it by adaptlr itself"
ADDED_BY_SCHEDULER = "added by CosineAnnealingLR in the same place"
KERNEL = "the control kernel, ring record included"

ADDED_LIMIT = 1.5  # us on the CPU
LAUNCH_LIMIT = 1.5  # times an empty kernel
KERNEL_LIMIT = 3.0  # us on the device


def targets_of(rows: Sequence[Row], device: str) -> list[Target]:
    """Return the targets for ``device``; what is about one group is in the first comparison."""
    first = {row.name: row for row in rows if row.section == rows[0].section}
    return _cuda_targets(rows, first) if device == "cuda" else _cpu_targets(first)


def _cpu_targets(first: dict[str, Row]) -> list[Target]:
    added = _host(first[ADDED])
    return [
        Target(
            "added to SGD.step(), 1 group",
            f"at most {ADDED_LIMIT} us (aim: 1.0)",
            f"{added:.2f} us",
            added <= ADDED_LIMIT,
        ),
        _scheduler_target(added, _host(first[COSINE]), "in a loop of its own"),
        _scheduler_target(added, _host(first[ADDED_BY_SCHEDULER]), "in the same place"),
    ]


def _scheduler_target(added: float, scheduler: float, where: str) -> Target:
    return Target(
        f"the same, beside CosineAnnealingLR.step() {where}",
        f"less than its {scheduler:.2f} us",
        f"{added / scheduler:.2f} times that",
        added < scheduler,
    )


def _cuda_targets(rows: Sequence[Row], first: dict[str, Row]) -> list[Target]:
    empty = _host(first[EMPTY])
    kernels = [row.device for row in rows if row.name == KERNEL and row.device is not None]
    slowest = max(kernels, default=float("inf"))
    targets = [
        Target(
            "device time of the control kernel, ring record included",
            f"at most {KERNEL_LIMIT} us",
            f"{slowest:.2f} us (the slowest of {len(kernels)} comparisons)",
            slowest <= KERNEL_LIMIT,
        )
    ]
    for row in rows:
        if row.name in (ADDED, ADDED_BY_ADAPTLR) and ", 1 group, 1 small" in row.section:
            name = f"host time added to {row.section.partition(',')[0]}.step(), 1 group"
            if row.name == ADDED_BY_ADAPTLR:
                name += ", less torch's share"
            targets.append(_launch_target(name, row, empty))
    return targets


def _launch_target(name: str, row: Row, empty: float) -> Target:
    added = _host(row)
    limit = LAUNCH_LIMIT * empty
    return Target(
        name,
        f"at most {LAUNCH_LIMIT} x {empty:.2f} us, an empty launch",
        f"{added:.2f} us, {added / empty:.2f} times",
        added <= limit,
    )


def _host(row: Row) -> float:
    assert row.host is not None
    return row.host.median
