"""`Snapshots`: slots with weights and optimizer state, filled and put back as a decision orders.

The slot START holds the parameters as they were before the first update, and the optimizer's state
as the first update left it: as if that step had been taken with lr 0. The decision logic fills the
others.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from adaptlr import _extension
from adaptlr.config import GuardMode, ResolvedConfig
from adaptlr.contents import Contents
from adaptlr.device_slots import DeviceSlots
from adaptlr.host_path import HostPath
from adaptlr.host_slots import HostSlots
from adaptlr.placement import (
    Placement,
    free_device_bytes,
    free_host_bytes,
    place,
    shown,
    slot_bytes,
)
from adaptlr.rollback_news import RollbackNews
from adaptlr.saved_slots import SavedSlots, read_slot, slots_of, unpack_slots, write_slot
from adaptlr.telemetry import SLOT_BITS

if TYPE_CHECKING:
    import numpy.typing as npt

    from adaptlr.attachment import Path

logger = logging.getLogger("adaptlr")

START: int = _extension.START_SLOT
_CHECKED_STEPS = 3  # in which an optimizer shows whether it replaces its state tensors

OnRollback = Callable[[int | None], Any]


class Snapshots:
    """Makes the slots at the first step, keeps them complete, and has orders carried out.

    On the host the copies are made at once, after the update. On the device a kernel makes them
    (csrc/kernels.cu); what it cannot reach, Python numbers and counts on the CPU, is copied here
    when the record has arrived, late by at most ``status().lag`` steps.

    Attributes:
        slots: How many slots there are; 0 before the first step.
        where: ``"device"``, ``"host"``, or None while there are none.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: torch.nn.Module | None,
        config: ResolvedConfig,
        path: Path,
        choice: str,
        on_rollback: OnRollback | None,
    ) -> None:
        """Ask to be called before the first step, if snapshots can ever be ordered."""
        self._optimizer = optimizer
        self._contents = Contents(optimizer, model)
        self._config = config
        self._path = path
        self._choice = choice
        self._on_rollback = on_rollback
        self._host: HostSlots | None = None
        self._device: DeviceSlots | None = None
        self._news: RollbackNews | None = None
        self._loaded: SavedSlots | None = None  # until the slots are made
        # Slot -> steps taken by then, as far as the host knows.
        self._filled: dict[int, int | None] = {}
        self._told = ""
        self._checks = 0
        self.slots = 0
        self.where: str | None = None
        self._placement: Placement
        self.wanted = choice != "off" and config.row["guard_mode"] == GuardMode.ACT
        self._due = False  # to be made before the coming step
        self._ask()
        path.catch_up = self._after_step
        if isinstance(path, HostPath):
            path.carry_out = self.carry_out

    @property
    def bytes(self) -> int:
        """Memory that the slots take."""
        return sum(slots.bytes for slots in (self._host, self._device) if slots is not None)

    def __repr__(self) -> str:
        """Show how many slots there are, where, and what they take."""
        return f"Snapshots(slots={self.slots}, where={self.where!r}, bytes={self.bytes})"

    def _ask(self) -> None:
        """Ask to be called before the coming step, if snapshots can be ordered."""
        if self.wanted:
            self._due = self._path.prepares = True

    # -- before a step --------------------------------------------------------

    def prepare(self, step: int) -> None:
        """Make the slots before the first step; later, take in state that has appeared.

        Args:
            step: Steps taken so far, if this is the first one.
        """
        path = self._path
        path.prepares = False
        if self._due:
            self._due = False
            if not path.is_capturing():
                self.begin(step)
                self._loaded = None
            elif self.slots == 0:
                self._give_up(
                    "the first step is captured in a CUDA graph, where they cannot be made: run "
                    "the warm-up iterations within controller.suspended()"
                )
        elif path.entries >= 0 and path.entries != len(self._optimizer.state):
            self.notice()

    def begin(self, step: int) -> None:
        """Make all slots, and fill them with what is there, or what a checkpoint has brought."""
        self._forget()
        placement = self._placement = self._place()
        if placement.slots == 0:
            return self._give_up(
                f"one slot takes about {shown(placement.slot_bytes)}, more than a quarter of the "
                'memory that is free on the device or the host: free some, or pass snapshot="host"'
            )
        self.slots, self.where = placement.slots, placement.where
        try:
            self._make(placement)
        except ValueError as error:
            return self._give_up(str(error))
        self._filled = {START: step}
        if self._loaded is not None:
            self._take_in(self._loaded)
        self._path.entries = len(self._optimizer.state)
        self._allow(placement.slots)
        self._tell(placement)

    def resumed(self, step: int) -> None:
        """After suspended steps, be ready for a capture, in which nothing can be made.

        An eager first step fills the slots anew: weights may be loaded before it.
        """
        if self._due and not isinstance(self._path, HostPath):
            self.begin(step)
            self._ask()

    def reload(self, step: int) -> None:
        """Forget what the slots hold: the run goes on from a checkpoint.

        A captured graph needs valid slots at once. Weights may be loaded after the optimizer, so an
        eager step fills the slots anew.
        """
        self._ask()
        if self.slots:
            self.resumed(step)

    def notice(self) -> None:
        """Take parameters and state in that have appeared, with their present values."""
        if self._host is None:
            return
        if self._path.is_capturing():
            raise RuntimeError(
                "the optimizer's state appeared during the capture of a CUDA graph, where "
                "snapshots cannot take it in: run the warm-up iterations within "
                'controller.suspended(), or pass snapshot="off"'
            )
        self._path.entries = len(self._optimizer.state)
        self._host.cover_new()
        try:
            self._cover()
        except ValueError as error:
            self._give_up(str(error))

    def _place(self) -> Placement:
        if self._loaded is not None:
            return self._placement  # there was room when they were loaded
        size = slot_bytes(self._contents)
        free = free_device_bytes(next(iter(self._contents.weights().values())).device)
        return place(size, self._choice, free, free_host_bytes())

    def _make(self, placement: Placement) -> None:
        path = self._path
        if isinstance(path, HostPath):
            to_host = placement.where == "host"
            self._host = HostSlots(self._contents, torch.device("cpu") if to_host else None)
        else:
            self._check_devices(path.device)
            self._host = HostSlots(self._contents, skipped=path.device)
            if self._device is None:
                self._device = DeviceSlots(path.core, path.device)
            self._device.lay_out(placement.slots, placement.where)
            self._cover()
            path.table = self._device.table
            path.copied = path.launched  # what an earlier step ordered is not for these slots
            self._news = RollbackNews(path, self._host, self._report)
            self._checks, path.watches = _CHECKED_STEPS, True
        self._host.fill(START)

    def _check_devices(self, device: torch.device) -> None:
        devices = {tensor.device for tensor in self._contents.weights().values()}
        if devices != {device}:
            found = ", ".join(sorted(map(str, devices)))
            raise ValueError(f"they need all parameters and buffers on {device}, got {found}")

    def _cover(self) -> None:
        if self._device is not None:
            self._device.cover(list(self._contents.parts()))

    # -- after a step ---------------------------------------------------------

    def carry_out(self, order: int) -> None:
        """Fill and put back what a decision of the host has ordered, after the update."""
        if self._host is None:
            return
        save, restore = order & SLOT_BITS, order >> 4
        if save:
            self._host.fill(save)
            self._filled[save] = int(self._path.state()["step"])
        if restore in self._filled:
            self._host.put_back(restore)
            self._report(restore, None)

    def catch_up(self) -> None:
        """Do what the host has to do about the steps that the device has reported since."""
        if self._news is not None:
            self._news.catch_up()

    def _after_step(self) -> None:
        """Take in new state, and heed what the device has reported."""
        if len(self._optimizer.state) != self._path.entries:
            self.notice()
        elif self._checks and not self._path.is_capturing():
            self._check_identity()
        self.catch_up()

    def _check_identity(self) -> None:
        """Switch off for an optimizer that puts new tensors into its state."""
        if self._device is None or self._host is None:
            return
        if self._device.has_moved(list(self._contents.state_parts())):
            return self._give_up(
                f"{type(self._optimizer).__name__} replaces the tensors of its state, which a "
                "kernel cannot follow"
            )
        self._checks -= 1
        self._path.watches = self._checks > 0 or self._host.holds_anything  # type: ignore[union-attr]

    def _report(self, slot: int, step: int | None) -> None:
        if self._on_rollback is not None:
            self._on_rollback(self._filled.get(slot) if step is None else step)

    # -- checkpoints ----------------------------------------------------------

    def saved(self) -> SavedSlots | None:
        """Return a copy of all slots that the run could go back to. Waits for the device.

        Returns:
            None where there are no snapshots: before the first step, or for want of memory.
        """
        if self._loaded is not None or self._host is None:
            return self._loaded
        state = self._path.state()
        self.catch_up()
        if self._path.entries != len(self._optimizer.state):
            self.notice()
        slots = {slot: self._read(slot) for slot in sorted(slots_of(state))}
        return SavedSlots(self._path.saved_states(), slots)

    def _read(self, slot: int) -> dict[str, Any]:
        assert self._host is not None
        told = None if self._news is None else self._news.filled_at(slot)
        step = self._filled.get(slot) if told is None else told
        return {"step": step, **read_slot(slot, self._contents, self._host, self._device)}

    def checked(
        self, packed: object, state: npt.NDArray[Any], coming: dict[Any, Any] | None
    ) -> SavedSlots:
        """Read snapshots of a checkpoint; raise if they do not fit. See `unpack_slots`."""
        on_device = not isinstance(self._path, HostPath)
        return unpack_slots(packed, state, self._contents, coming, is_complete=on_device)

    def accept(self, saved: SavedSlots | None) -> str:
        """Keep snapshots that were `checked` for the first step, which takes them in.

        Returns:
            Why not, in words that end a sentence, or nothing.
        """
        self._loaded = None
        if saved is None:
            return "which this checkpoint does not hold"
        if not self.wanted:
            return "which this run does not keep"
        if self.slots == 0:
            self._placement = self._place()
        if self._placement.slots < saved.count:
            return "for which there is no room now"
        self._loaded = saved
        return ""

    def _take_in(self, saved: SavedSlots) -> None:
        """Fill the slots from a checkpoint. Waits for the device."""
        assert self._host is not None
        if self._device is not None:
            torch.cuda.synchronize(self._path.device)  # type: ignore[union-attr]
        for slot, values in saved.slots.items():
            self._filled[slot] = values["step"]
            write_slot(slot, values, self._contents, self._host, self._device)
        self._host.cover_new()
        self._path.set_saved_states(saved.states)

    # -- the end --------------------------------------------------------------

    def release(self) -> None:
        """Free the slots, for good. Waits for the device."""
        self.wanted = self._due = self._path.prepares = False
        self._forget()

    def _forget(self) -> None:
        if self._device is not None:
            self._device.forget()
        if not isinstance(self._path, HostPath):
            self._path.table, self._path.watches = 0, False
        self._host = self._news = None
        self._path.entries = -1
        self._filled = {}
        self.slots, self.where = 0, None

    def _give_up(self, reason: str) -> None:
        """Go on without snapshots, or raise if the user has asked for them."""
        self.release()
        if not self._path.is_capturing():
            self._allow(0)
        message = f"snapshots are off, and with them rollbacks: {reason}"
        if self._choice != "auto" or self._loaded is not None:
            raise ValueError(message)
        warnings.warn(f'{message}; snapshot="off" silences this', stacklevel=2)

    def _allow(self, slots: int) -> None:
        """Tell the decision logic which slots it may order."""
        if slots != self._config.row["snapshot_slots"]:
            self._config.set_snapshot_slots(slots)
            self._path.send_config()

    def _tell(self, placement: Placement) -> None:
        place = "host memory" if placement.where == "host" else "the parameters' memory"
        told = (
            f"snapshots: {placement.slots} slots of about {shown(placement.slot_bytes)} in {place}"
        )
        if told != self._told:
            logger.info("%s", told)
            self._warn_of_no_raise(placement)
        self._told = told

    def _warn_of_no_raise(self, placement: Placement) -> None:
        if placement.slots < _extension.SLOTS and self._config.row["max_factor"] > 1:
            warnings.warn(
                "Guard(max_factor=...) has no effect: a raise takes three snapshots, and there is "
                "room for the start of the run alone",
                stacklevel=2,
            )
