"""How many slots there are and where: what memory allows, or what the user has asked for."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from adaptlr import _extension
from adaptlr.contents import Contents

SNAPSHOTS = ("auto", "device", "host", "off")
SHARE = 0.25  # of what is free; the rest is for activations, the data loader, everybody else
STATES = 2  # tensors of state a parameter that are expected before there are any, as Adam has
ALL: int = _extension.SLOTS


@dataclass(frozen=True)
class Placement:
    """Where the slots are to lie.

    Attributes:
        where: ``"device"``, beside the parameters, or ``"host"``.
        slots: How many: all, 1 (the start of the run only), or 0.
        slot_bytes: What one slot takes, as far as that is known.
    """

    where: Literal["device", "host"]
    slots: int
    slot_bytes: int


def slot_bytes(contents: Contents) -> int:
    """Return what a slot takes; state that has yet to appear is put at two tensors a parameter."""
    weights = sum(tensor.nbytes for tensor in contents.weights().values())
    if not contents.optimizer.state:
        return (1 + STATES) * weights
    return weights + sum(part.nbytes for part in contents.state_parts())


def place(size: int, choice: str, free_device: int | None, free_host: int) -> Placement:
    """Choose for slots of ``size`` bytes.

    Args:
        size: Bytes of one slot.
        choice: One of SNAPSHOTS; all but ``"auto"`` is done as told.
        free_device: Free bytes of the device; None if the parameters are on the host.
        free_host: Free bytes of the host.
    """
    if choice == "off":
        return Placement("device", 0, size)
    if choice == "device" or choice == "host":
        return Placement("host" if choice == "host" else "device", ALL, size)
    rooms: list[tuple[Literal["device", "host"], int]] = [("host", free_host)]
    if free_device is None:
        rooms = [("device", free_host)]  # beside the parameters, in the same memory
    else:
        rooms.insert(0, ("device", free_device))
    for slots in (ALL, 1):
        for where, free in rooms:
            if slots * size <= SHARE * free:
                return Placement(where, slots, size)
    return Placement("device", 0, size)


def free_device_bytes(device: torch.device) -> int | None:
    """Return the free memory of a CUDA device; None for devices that share or hide theirs."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return int(free)


def free_host_bytes() -> int:
    """Return the memory that this process can still take without swapping; 0 if nobody tells."""
    return min(_free_of_machine(), _free_of_container())


def _free_of_machine() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    for name in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES"):
        if hasattr(os, "sysconf") and name in os.sysconf_names:
            return os.sysconf(name) * os.sysconf("SC_PAGE_SIZE")
    return 0


def _free_of_container() -> int:
    """Return what the limit of a container leaves; without one, more than any machine has."""
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / f"memory.{name}").read_text() for name in ("max", "current"))
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return int(limit) - int(used) + int(counts["inactive_file"])  # a cache that gives way
    except (OSError, ValueError, KeyError):  # no such files, or the limit is "max"
        return 1 << 62


def shown(size: float) -> str:
    """Return a size in the unit that suits it."""
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
