"""What the host does about rollbacks on a device, of which it hears a little late, from records."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

from adaptlr import _extension
from adaptlr.host_slots import HostSlots
from adaptlr.telemetry import SLOT_BITS, restored_slot, saved_slot

if TYPE_CHECKING:
    from adaptlr.capturable_path import CapturablePath
    from adaptlr.fused_path import FusedPath
    from adaptlr.late_float_path import LateFloatPath

    KernelPath: TypeAlias = FusedPath | CapturablePath | LateFloatPath


class RollbackNews:
    """Reads the records that have arrived since it was asked last.

    Args:
        path: Whose records they are.
        host: Slots for what the kernel does not reach.
        report: Called after a rollback with the slot and the steps behind it, None if not known.
    """

    def __init__(
        self, path: KernelPath, host: HostSlots, report: Callable[[int, int | None], None]
    ) -> None:
        """Begin with the records that are still to come."""
        self._path = path
        self._host = host
        self._report = report
        self._begin = self._seen = path.core.written
        path.events = path.core.written_events

    def catch_up(self) -> None:
        """Copy what the kernel does not reach, then report rollbacks."""
        if self._host.holds_anything:
            for row in self._path.core.records(self._seen):
                self._follow(saved_slot(row), restored_slot(row))
                self._seen = int(row["sequence"])
        for row in self._path.core.events(self._path.events):
            self._path.events = int(row["sequence"])
            restore = restored_slot(row)
            if restore:
                self._report(restore, self.filled_at(restore, int(row["step"])))

    def _follow(self, save: int, restore: int) -> None:
        if save:
            self._host.fill(save)
        if restore:
            self._host.put_back(restore)

    def filled_at(self, slot: int, before: float = math.inf) -> int | None:
        """Return the steps taken when a slot was last filled, if records tell.

        Args:
            slot: One of those that the device has filled by itself.
            before: The step that asks.
        """
        rows = self._path.core.records(self._begin)
        saves = (rows["action"] >> _extension.SAVE_SHIFT) & SLOT_BITS
        steps = rows["step"][(saves == slot) & (rows["step"] < before)]
        return int(steps[-1]) + 1 if len(steps) else None
