"""The control step on the host and on the GPU; the module is built from ``csrc/bindings.cpp``.

Rows are NumPy structured arrays of shape ``()`` in one of the dtypes below; ``csrc/state.h``
describes their fields. Addresses and streams are integers: the extension knows nothing of torch.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

_Row = npt.NDArray[Any]

config_dtype: Final[np.dtype[Any]]
state_dtype: Final[np.dtype[Any]]
record_dtype: Final[np.dtype[Any]]

MAX_GROUPS: Final[int]
# Differences between successive losses that the noise is taken from.
DIFFERENCES: Final[int]
# Slots for snapshots, numbered from 1; where their numbers lie in a record's action, in bits.
SLOTS: Final[int]
# States that lie beside the snapshots: of all slots but the first.
SAVED_STATES: Final[int]
START_SLOT: Final[int]
# What an order has in place of a slot to put back where the first moments are to be zeroed.
ZERO_MOMENT: Final[int]
SAVE_SHIFT: Final[int]
RESTORE_SHIFT: Final[int]
# Bits of the notices, beside those of Flag: the guard has ended the run, there is an event, another
# writer was seen.
FAILED_NOTICE: Final[int]
EVENT_NOTICE: Final[int]
OVERWRITTEN: Final[int]
# Bits of what a step on the host answers, above the notices.
SKIP_STEP: Final[int]
ORDERED: Final[int]
NEW_GROUPS: Final[int]

# The block of device memory of a DeviceController: its size, and where its parts lie, in bytes.
BLOCK_BYTES: Final[int]
STATE_OFFSET: Final[int]
SAVED_OFFSET: Final[int]
MOMENTS_OFFSET: Final[int]
LR_OFFSET: Final[int]
SKIP_OFFSET: Final[int]
SAVE_OFFSET: Final[int]
RESTORE_OFFSET: Final[int]
# The longest stretch of memory that one row of the snapshot kernel's table covers.
PIECE_BYTES: Final[int]
# Steps that DeviceController.wait can look back.
MAX_LAG: Final[int]
# Element types of the scalars that kernels read.
FLOAT32: Final[int]
FLOAT64: Final[int]
FLOAT16: Final[int]
BFLOAT16: Final[int]

# The kernels as nvcc has compiled them (empty without nvcc), and as source: file name to text.
fatbin: Final[bytes]
kernel_sources: Final[dict[str, str]]

def initial_state() -> _Row:
    """Return the State before the first step."""

def resumed(config: _Row, state: _Row, /) -> _Row:
    """Return the State to go on with where a run is resumed without its snapshots."""

def schedule(config: _Row, step: float, /) -> float:
    """Return the schedule's multiplier of the peak at ``step``."""

def final_multiplier(config: _Row, /) -> float:
    """Return the multiplier that is kept once ``total_steps`` are over."""

def record_lines(records: _Row, first: str, words_of: Callable[[_Row], str], /) -> bytes:
    """Write records as lines of a recording.

    ``first`` goes behind the numbers of the first one. ``words_of`` is called with one record of
    every kind that says more than numbers, and returns what goes behind those of all of them.
    """

def cuda_available() -> bool:
    """Whether there is a driver and a GPU. Initialises the driver."""

def compute_capability(device: int) -> tuple[int, int]:
    """Return the compute capability, e.g. ``(9, 0)``."""

def driver_version() -> int:
    """Return the CUDA version that the driver supports, e.g. 13000 for 13.0."""

def link_kernels(device: int, relocatable: bytes) -> bytes:
    """Link a relocatable cubin; raises RuntimeError if the driver cannot."""

def load_kernels(device: int, image: bytes) -> None:
    """Load a fatbin, cubin or PTX on a device; raises RuntimeError if the driver refuses it."""

class HostController:
    """The control step on the host, its State and its flight record."""

    config: _Row
    state: _Row
    saved: _Row  # beside the snapshots; shape (SAVED_STATES,)
    def __init__(self, config: _Row, history_size: int) -> None: ...
    def step(
        self,
        loss: float,
        grad_norm: float = -1.0,
        applied_lr: float = -1.0,
        overflow: bool = False,
        overwritten: bool = False,
    ) -> tuple[bool, int, tuple[float, ...], int]:
        """Advance by one step; return whether to skip it, the notices, every group's lr, an order.

        The order is for snapshots: the slot to fill, plus 16 times the slot to put back.
        """

    def records(self, since: int = 0) -> _Row:
        """Copy the records numbered from ``since`` on that are still there, oldest first."""

    def events(self, since: int = 0) -> _Row:
        """Copy the events numbered from ``since`` on that are still there, oldest first."""

    def newest(self) -> _Row:
        """Copy the newest record that has arrived: one row, or none."""

    @property
    def written(self) -> int: ...
    @property
    def notices(self) -> int: ...
    @property
    def written_events(self) -> int: ...
    @property
    def dropped_events(self) -> int: ...

class _Loop:
    count: int
    last_count: int
    unobserved: int
    unheeded: int
    mean: bool
    cleared: bool
    observes_first: bool
    accumulates: bool
    plain: bool
    suspended: bool
    prepares: bool
    entries: int

    def observe(self, loss: torch.Tensor | float, /) -> None:
        """Take one loss in; anything unusual goes to observe_slowly."""

    def before_step(self, optimizer: Any, args: Any, kwargs: Any, /) -> Any:
        """Pre-hook: run the control step; anything unusual goes to step_slowly."""

class HostLoop(_Loop):
    """The part of the host path that runs in every step; see adaptlr.host_path.HostPath."""

    total: float
    grad_norm: float
    order: int

    def __init__(self, core: HostController, tensor_type: type[Any], /) -> None: ...
    @property
    def core(self) -> HostController: ...
    @property
    def written(self) -> list[Any]:
        """The lr objects of the last step, one a group."""

class DeviceLoop(_Loop):
    """The part of the device path that runs in every step; see adaptlr.device_path.DevicePath."""

    lrs: list[torch.Tensor]
    skip_flag: torch.Tensor
    first: torch.Tensor | None
    grad_norm: torch.Tensor | float | None
    launched: int
    copied: int
    events: int
    address: int
    table: int
    watches: bool
    dtype: int
    flagged: bool
    zeroes: bool

    def __init__(
        self,
        core: DeviceController,
        optimizer: Any,
        stream_of: Callable[[int], int],
        index: int,
        dtypes: tuple[torch.dtype, ...],
        tensor_type: type,
        /,
    ) -> None: ...
    def after_step(self, optimizer: Any, args: Any, kwargs: Any, /) -> Any:
        """Post-hook: have orders for snapshots carried out."""

    def zero_gradients(self) -> None:
        """Zero all gradients if the step is skipped; those in several pieces go to zero_slowly."""

    @property
    def core(self) -> DeviceController: ...

class DeviceController:
    """The control step on a CUDA device; nothing but ``wait`` waits for it. Not thread-safe."""

    def __init__(
        self,
        device: int,
        image: bytes,
        block: int,
        config: _Row,
        state: _Row,
        history_size: int,
        stream: int,
    ) -> None: ...
    def step(
        self,
        stream: int,
        loss: int,
        loss_dtype: int,
        mean: bool,
        grad_norm: int = 0,
        grad_norm_dtype: int = 0,
        grad_norm_value: float = -1.0,
        overflow: int = 0,
        applied_lr: float = -1.0,
        zero_lr: bool = False,
    ) -> int:
        """Launch one control step; return the notices so far."""

    def launch_empty(self, stream: int, /) -> None:
        """Launch a kernel that does nothing, with the parameters of a control step."""

    def fold(self, stream: int, loss: int, dtype: int) -> None:
        """Add a loss to the pending ones."""

    def drop_losses(self, stream: int) -> None:
        """Forget the pending losses."""

    def configure(self, stream: int, config: _Row | None = None, state: _Row | None = None) -> None:
        """Replace what is given, clear the notices, and set the lr of the coming step."""

    def snapshot(self, stream: int, table: int, fill: int = 0) -> None:
        """Have the slots filled and put back that the last step ordered; or ``fill`` one."""

    def zero_if_skipped(self, stream: int, addresses: Sequence[int], sizes: Sequence[int]) -> None:
        """Zero ranges of device memory, sizes in bytes, if the last control step said skip."""

    def record_event(self, stream: int) -> None:
        """Mark the control step that was launched last, for ``wait``."""

    def wait(self, lag: int) -> None:
        """Wait for the marked step ``lag`` steps before the next one, 1 to MAX_LAG."""

    @property
    def factor(self) -> float: ...
    def records(self, since: int = 0) -> _Row:
        """Copy the records numbered from ``since`` on that are still there, oldest first."""

    def events(self, since: int = 0) -> _Row:
        """Copy the events numbered from ``since`` on that are still there, oldest first."""

    def newest(self) -> _Row:
        """Copy the newest record that has arrived: one row, or none."""

    @property
    def written(self) -> int: ...
    @property
    def notices(self) -> int: ...
    @property
    def written_events(self) -> int: ...
    @property
    def dropped_events(self) -> int: ...

class SlotMemory:
    """Host memory that kernels reach; freed with the object."""

    def __init__(self, device: int, bytes: int) -> None: ...
    @property
    def address(self) -> int: ...
    @property
    def bytes(self) -> npt.NDArray[np.uint8]:
        """The memory itself, not a copy, as the host sees it. Not to be used once it is freed."""

    def free(self) -> None:
        """Free it, after all work on the device."""
