"""Slots that a kernel fills and puts back, and the table that tells it where everything lies."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch

from adaptlr import _extension
from adaptlr.contents import MISSING

_WORD = 8
_FIELDS = 5  # of a Piece in csrc/device_block.h: address, bytes, and its copy in every slot
_ROW = _FIELDS * _WORD
_ALIGNMENT = 256  # of the places in a slot: whole cache lines and sectors
_VECTOR = 16  # a place is as far from an aligned address as its original is

Integers = npt.NDArray[np.int64]


class _Memory(Protocol):
    """What lends a slot its bytes."""

    address: int
    bytes: torch.Tensor  # the memory itself, uint8

    def free(self) -> None: ...


class _DeviceMemory:
    """A part of torch's own device memory."""

    def __init__(self, device: torch.device, size: int) -> None:
        self.bytes = torch.empty(size, dtype=torch.uint8, device=device)
        self.address = self.bytes.data_ptr()

    def free(self) -> None:
        self.bytes = torch.empty(0, dtype=torch.uint8)


class _HostMemory:
    """Pinned memory of the host, which the kernel reaches over the bus."""

    def __init__(self, device: torch.device, size: int) -> None:
        self._memory = _extension.SlotMemory(device.index, size)
        self.bytes = torch.from_numpy(self._memory.bytes)
        self.address = self._memory.address

    def free(self) -> None:
        self.bytes = torch.empty(0, dtype=torch.uint8)
        self._memory.free()


class DeviceSlots:
    """Tells the kernel what to copy and where to. The kernel itself is launched by `DeviceLoop`.

    The table's head lies in device memory, so that a captured graph sees pieces that are added
    later. Tensors that are covered stay alive, whatever the optimizer does with them: a graph may
    write to them.

    Attributes:
        bytes: Memory that the slots take.
        table: Address of the table's head on the device.
    """

    def __init__(
        self,
        core: _extension.DeviceController,
        device: torch.device,
    ) -> None:
        """Begin with nothing covered."""
        self._core = core
        self._device = device
        self._head = torch.zeros(2, dtype=torch.int64, device=device)
        self.table: int = self._head.data_ptr()
        self.bytes = 0
        self.lay_out(0, "device")
        self._empty()

    def lay_out(self, slots: int, where: Literal["device", "host"]) -> None:
        """Set how many slots there will be, and where."""
        self._slots = slots
        self._where = where

    def forget(self) -> None:
        """Free the slots; the head stays for the graphs that hold it. Waits for the device."""
        if not self.bytes:
            return
        self._head.zero_()
        torch.cuda.synchronize(self._device)
        for memory in self._memories:
            memory.free()
        self._empty()

    def _empty(self) -> None:
        self._memories: list[_Memory] = []
        self._rows: Integers = np.zeros((0, _FIELDS), dtype=np.int64)
        self._tables: list[torch.Tensor] = []  # of a graph being replayed, maybe
        self._covered: dict[int, torch.Tensor] = {}
        self._places: dict[int, tuple[list[_Memory], int]] = {}  # memory of every slot, and offset
        self.bytes = 0

    def cover(self, tensors: list[torch.Tensor]) -> None:
        """Take tensors on the device in that are not covered yet, and copy them into every slot.

        Raises:
            ValueError: if the elements of one do not fill a stretch of memory.
        """
        for tensor in tensors:
            check_dense(tensor)
        new = {tensor.data_ptr(): tensor for tensor in self._uncovered(tensors)}
        if not new:
            return
        known = len(self._rows)
        self._append(list(new.values()))
        self._covered.update(new)
        self._publish(known)

    def has_moved(self, tensors: list[torch.Tensor]) -> bool:
        """Whether a tensor is not where a covered one was."""
        return any(True for _ in self._uncovered(tensors))

    def _uncovered(self, tensors: list[torch.Tensor]) -> Iterator[torch.Tensor]:
        for tensor in tensors:
            here = tensor.device == self._device and tensor.nbytes
            if here and tensor.data_ptr() not in self._covered:
                yield tensor

    def _append(self, tensors: list[torch.Tensor]) -> None:
        addresses = np.array([tensor.data_ptr() for tensor in tensors], dtype=np.int64)
        sizes = np.array([tensor.nbytes for tensor in tensors], dtype=np.int64)
        offsets, total = places(addresses, sizes)
        memories = [self._allocate(total) for _ in range(self._slots)]
        self._memories += memories
        self.bytes += total * self._slots
        for address, offset in zip(addresses.tolist(), offsets.tolist(), strict=True):
            self._places[address] = (memories, offset)
        bases = [memory.address for memory in memories]
        self._rows = np.concatenate([self._rows, pieces(addresses, sizes, offsets, bases)])

    def _allocate(self, size: int) -> _Memory:
        return (_HostMemory if self._where == "host" else _DeviceMemory)(self._device, size)

    def read(self, tensor: torch.Tensor, slot: int) -> Any:
        """Copy what a slot holds of a tensor to the CPU; MISSING if it is not covered.

        Nothing may be under way on the device.
        """
        place = self._place(tensor, slot)
        return MISSING if place is None else place.to("cpu", copy=True)

    def write(self, tensor: torch.Tensor, slot: int, value: torch.Tensor) -> None:
        """Set what a slot holds of a tensor, if it is covered.

        Nothing may be under way on the device.
        """
        place = self._place(tensor, slot)
        if place is not None:
            place.copy_(value)

    def _place(self, tensor: torch.Tensor, slot: int) -> torch.Tensor | None:
        """Return the memory of a slot as a tensor of the same form as its original."""
        found = self._places.get(tensor.data_ptr()) if tensor.device == self._device else None
        if found is None or not tensor.nbytes:
            return None
        memories, offset = found
        stretch = memories[slot - 1].bytes[offset : offset + tensor.nbytes]
        return stretch.view(tensor.dtype).as_strided(tensor.shape, tensor.stride())

    def _publish(self, known: int) -> None:
        """Hand the table to the device; fill every slot with the pieces from ``known`` on."""
        table = self._on_device(torch.from_numpy(self._rows))
        stream = torch._C._cuda_getCurrentRawStream(self._device.index)
        self._tables.append(table)
        new = self._head_of(table.data_ptr() + known * _ROW, len(self._rows) - known)
        for slot in range(1, self._slots + 1):
            self._core.snapshot(stream, new.data_ptr(), slot)
        self._head.copy_(self._head_of(table.data_ptr(), len(self._rows)))

    def _head_of(self, address: int, count: int) -> torch.Tensor:
        return self._on_device(torch.tensor([address, count], dtype=torch.int64))

    def _on_device(self, integers: torch.Tensor) -> torch.Tensor:
        """Copy without waiting for the device, which needs pinned memory."""
        return integers.pin_memory().to(self._device, non_blocking=True)


def places(addresses: Integers, sizes: Integers) -> tuple[Integers, int]:
    """Return where in a slot each tensor lies, and the size of the slot."""
    room = -(-(sizes + _VECTOR) // _ALIGNMENT) * _ALIGNMENT
    ends = np.cumsum(room)
    return ends - room + addresses % _VECTOR, int(ends[-1])


def pieces(addresses: Integers, sizes: Integers, offsets: Integers, bases: list[int]) -> Integers:
    """Cut tensors into the rows of the table: an address, its bytes, its place in every slot."""
    limit = _extension.PIECE_BYTES
    counts = -(-sizes // limit)
    tensor = np.repeat(np.arange(len(sizes)), counts)
    start = (np.arange(len(tensor)) - np.repeat(np.cumsum(counts) - counts, counts)) * limit
    rows = np.zeros((len(tensor), _FIELDS), dtype=np.int64)
    rows[:, 0] = addresses[tensor] + start
    rows[:, 1] = np.minimum(sizes[tensor] - start, limit)
    for slot, base in enumerate(bases):
        rows[:, 2 + slot] = base + offsets[tensor] + start
    return rows


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether `check_dense` has nothing against a tensor."""
    try:
        check_dense(tensor)
    except ValueError:
        return False
    return True


def check_dense(tensor: torch.Tensor) -> None:
    """Raise unless the elements fill a stretch of memory, in any order, each in a place of its own.

    Raises:
        ValueError: if they do not.
    """
    if tensor.layout is not torch.strided:
        raise ValueError(f"a tensor in a snapshot must be dense, got layout {tensor.layout}")
    expected = 1
    sides = (side for side in zip(tensor.stride(), tensor.shape, strict=True) if side[1] > 1)
    for stride, size in sorted(sides):
        if stride != expected:
            raise ValueError(
                "a tensor in a snapshot must fill a stretch of memory, got shape "
                f"{tuple(tensor.shape)} with strides {tuple(tensor.stride())}; make it "
                'contiguous(), or pass snapshot="off"'
            )
        expected *= size
