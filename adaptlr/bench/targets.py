"""The limits that adaptlr has set itself, checked against what was measured."""

from __future__ import annotations

from collections.abc import Sequence

from adaptlr.bench.report import Row, Target
from adaptlr.bench.subjects import CONTROL, COSINE, EAGER, EMPTY, OBSERVE, UNGUARDED, ZEROING

ADDED = "added by adaptlr"
ADDED_BY_TORCH = "of it by torch, for the skip flag"
ADDED_BY_ADAPTLR = "of it by adaptlr itself"
ADDED_BY_LAUNCH = "added by an empty kernel in the same place"
ADDED_BY_SCHEDULER = "added by CosineAnnealingLR in the same place"
KERNEL = "the control kernel, ring record included"

ADDED_LIMIT = 1.5  # us on the CPU
LAUNCH_LIMIT = 1.5  # times an empty kernel
KERNEL_LIMIT = 5.0  # us on the device, all charts included
UNGUARDED_LIMIT = 3.0  # us: schedule, long-run charts and record
SCHEDULER_TIMES = 5.0  # cheaper than a scheduler whose lr lies on the device
EAGER_TIMES = 50.0  # cheaper than eager torch ops
ZEROING_LIMIT = 20.0  # us on the host


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
    kernels = [row.device for row in rows if row.name == KERNEL and row.device is not None]
    slowest, alone = max(kernels, default=float("inf")), first[CONTROL].device or float("inf")
    unguarded = first[UNGUARDED].device or float("inf")
    targets = [
        Target(name, f"at most {limit} us", f"{us:.2f} us", us <= limit)
        for name, us, limit in (
            (KERNEL, alone, KERNEL_LIMIT),
            (f"the same, in the slowest of {len(kernels)} models", slowest, KERNEL_LIMIT),
            ("the same, guard=None", unguarded, UNGUARDED_LIMIT),
        )
    ]
    calls = _host(first[OBSERVE]) + _host(first[CONTROL])
    empty = _host(first[EMPTY])
    targets.append(
        _launch_target("observe and the control step, in loops of their own", calls, empty)
    )
    for section in dict.fromkeys(
        row.section for row in rows if ", 1 group, 1 small" in row.section
    ):
        named = {row.name: _host(row) for row in rows if row.section == section and row.host}
        name = f"added by adaptlr itself to {section.partition(',')[0]}.step(), 1 group"
        targets.append(_launch_target(name, named[ADDED_BY_ADAPTLR], named[ADDED_BY_LAUNCH]))
    added = _host(first[ADDED])
    for name, times in ((f"{COSINE}, tensor lr", SCHEDULER_TIMES), (EAGER, EAGER_TIMES)):
        targets.append(_cheaper_target(name, _host(first[name]), added, times))
    zeroing = _host(first[ZEROING])
    targets.append(
        Target(
            ZEROING,
            f"at most {ZEROING_LIMIT:.0f} us of host time",
            f"{zeroing:.2f} us",
            zeroing <= ZEROING_LIMIT,
        )
    )
    return targets


def _cheaper_target(name: str, us: float, added: float, times: float) -> Target:
    return Target(
        f"added to SGD.step(), 1 group, beside {name}",
        f"{times:.0f} times cheaper than its {us:.2f} us",
        f"{added:.2f} us, {us / added:.1f} times cheaper",
        us >= times * added,
    )


def _launch_target(name: str, added: float, empty: float) -> Target:
    return Target(
        name,
        f"at most {LAUNCH_LIMIT} x {empty:.2f} us, an empty kernel in the same place",
        f"{added:.2f} us, {added / empty:.2f} times",
        added <= LAUNCH_LIMIT * empty,
    )


def _host(row: Row) -> float:
    assert row.host is not None
    return row.host.median
