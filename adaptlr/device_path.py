"""The control step on a CUDA device: one small kernel before the optimizer's own, no wait."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from adaptlr import _extension
from adaptlr.config import ResolvedConfig
from adaptlr.host_path import check_loss, full_norm
from adaptlr.pending import Pending

DTYPES: dict[torch.dtype, int] = {
    torch.float32: _extension.FLOAT32,
    torch.float64: _extension.FLOAT64,
    torch.float16: _extension.FLOAT16,
    torch.bfloat16: _extension.BFLOAT16,
}


class DevicePath(_extension.DeviceLoop, Pending, ABC):
    """What both ways of deciding on the device share: losses, device memory, the launch.

    The usual step of the fused path never comes here: `DeviceLoop` takes one loss a step, and calls
    ``observe_slowly``, ``step_slowly`` and ``answer`` for all else.
    """

    name: ClassVar[str]
    poll: Callable[[], None]

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        config: ResolvedConfig,
        history_size: int,
        device: torch.device,
        image: bytes,
    ) -> None:
        """Load the kernels and bind the learning rates of ``optimizer``."""
        self._config = config
        self._device = self.device = device
        self._index = device.index
        self._stream = torch._C._cuda_getCurrentRawStream
        self._block = torch.zeros(_extension.BLOCK_BYTES, dtype=torch.uint8, device=device)
        self._device_table: torch.Tensor | None = None
        core = _extension.DeviceController(
            self._index,
            image,
            self._block.data_ptr(),
            self._device_config(),
            _extension.initial_state(),
            history_size,
            self._stream(self._index),
        )
        _extension.DeviceLoop.__init__(
            self, core, optimizer, self._stream, self._index, tuple(DTYPES), torch.Tensor
        )
        Pending.__init__(self, optimizer)
        self.replayed = False
        flag = self._block[_extension.SKIP_OFFSET : _extension.SKIP_OFFSET + 4]
        self.skip_flag = flag.view(torch.float32)[0]
        self.bind()

    def skip(self) -> None:
        """Nothing to do: the device has skipped by itself."""

    @abstractmethod
    def bind(self) -> None:
        """Take the groups' learning rates over."""

    @abstractmethod
    def step(self) -> int:
        """Launch the control step and return the notices so far."""

    @abstractmethod
    def skip_suspended(self) -> None:
        """Let the coming step, which is not observed, change nothing."""

    @abstractmethod
    def stand_aside(self) -> None:
        """Let a step pass that is not ours."""

    def resume(self) -> None:
        """Set what the coming step reads, after steps that were suspended."""
        self.configure()

    # -- losses ---------------------------------------------------------------

    def observe_slowly(self, loss: torch.Tensor | float) -> None:
        """Keep the address of a step's only loss; where there are several, fold each in at once.

        A graphed or compiled model writes its next loss over the last one. So a loss waits at its
        address only while every step so far had one, or where a graph is being captured, whose
        memory is its own.
        """
        self.poll()
        code = self._check(loss)
        assert isinstance(loss, torch.Tensor)
        if self.replayed:
            self.core.fold(self._stream(self._index), loss.data_ptr(), code)
            return
        if self.count and self.observed_anew():
            self.drop()
        if self.count == 0:
            self._rebind()
        defers = self.last_count > 0 and not self.accumulates
        if self.count == 0 and (defers or self.is_capturing()):
            self.first, self.address, self.dtype = loss, loss.data_ptr(), code
        else:
            self.core.fold(self._stream(self._index), loss.data_ptr(), code)
        self.count += 1

    def is_capturing(self) -> bool:
        """Whether a CUDA graph is being captured on the current stream."""
        return torch.cuda.is_current_stream_capturing()

    def _check(self, loss: object) -> int:
        """Return the code of the loss's dtype; explain what cannot be taken."""
        if not isinstance(loss, torch.Tensor):
            raise TypeError(
                f"loss must be the tensor on {self._device} that the model returned, "
                f"got {type(loss).__name__}"
            )
        check_loss(loss, self._device)
        if loss.dtype not in DTYPES:
            raise TypeError(f"loss must be float32, float64, float16 or bfloat16, got {loss.dtype}")
        return DTYPES[loss.dtype]

    def observe_grad_norm(self, grad_norm: torch.Tensor | float) -> None:
        """Take the gradient norm of the coming step."""
        grad_norm = full_norm(grad_norm)
        if isinstance(grad_norm, torch.Tensor):
            self._check(grad_norm)
        self.grad_norm = grad_norm

    def drop(self) -> None:
        """Forget what waits."""
        self.dropped()
        self.first = self.grad_norm = None
        self.core.drop_losses(self._stream(self._index))

    # -- the step -------------------------------------------------------------

    def _launch(self, found_inf: torch.Tensor | None, applied_lr: float) -> int:
        norm_address, norm_dtype, norm = 0, 0, self.grad_norm
        if isinstance(norm, torch.Tensor):
            norm_address, norm_dtype, norm = norm.data_ptr(), DTYPES[norm.dtype], None
        notices = self.core.step(
            self._stream(self._index),
            0 if self.first is None else self.address,
            self.dtype,
            self.mean,
            norm_address,
            norm_dtype,
            -1.0 if norm is None else float(norm),
            0 if found_inf is None else found_inf.data_ptr(),
            applied_lr,
            self.zeroes,
        )
        self.first = self.grad_norm = None
        self.launched += 1
        self.taken()
        return notices

    def step_in_graph(self) -> int:
        """Launch a control step in a capture that has observed no loss.

        It reads what is observed before each replay, which the host does not see: from now on every
        loss is folded in at once, and how many wait is known on the device only.
        """
        self.replayed, self.plain = True, False
        return self.step()

    def zero_slowly(self, gradients: list[torch.Tensor]) -> None:
        """Zero gradients that are not contiguous, if the step is skipped."""
        addresses, sizes = [], []
        for gradient in gradients:
            values = gradient._values() if gradient.is_sparse else gradient
            if is_one_piece(values) and values.device == self._device:
                addresses.append(values.data_ptr())
                sizes.append(values.nbytes)
            else:
                values.masked_fill_(self.skip_flag.to(values.device) != 0, 0)
        self.core.zero_if_skipped(self._stream(self._index), addresses, sizes)

    @property
    def lag(self) -> int:
        """Steps that were handed to the device and have not been reported yet."""
        return max(self.launched - self.core.written, 0)

    # -- state ----------------------------------------------------------------

    def _device_config(self) -> npt.NDArray[Any]:
        """Return the config with its table, if it has one, in device memory."""
        row = self._config.row.copy()
        if self._config.table is not None:
            self._device_table = torch.from_numpy(self._config.table).to(self._device)
            row["table"] = self._device_table.data_ptr()
        return row

    def state(self) -> npt.NDArray[Any]:
        """Return a copy of the State. Waits for the device."""
        offset, size = _extension.STATE_OFFSET, _extension.state_dtype.itemsize
        raw = self._block[offset : offset + size].cpu().numpy()
        return np.array(raw.view(_extension.state_dtype)[0])

    def saved_states(self) -> npt.NDArray[Any]:
        """Return a copy of the States beside the snapshots. Waits for the device."""
        return self._saved_bytes().cpu().numpy().view(_extension.state_dtype)

    def set_saved_states(self, states: npt.NDArray[Any]) -> None:
        """Set the States beside the snapshots."""
        self._saved_bytes().copy_(torch.from_numpy(states.view(np.uint8)))

    def _saved_bytes(self) -> torch.Tensor:
        size = _extension.SAVED_STATES * _extension.state_dtype.itemsize
        return self._block[_extension.SAVED_OFFSET : _extension.SAVED_OFFSET + size]

    def tell_estimate(self, estimate: torch.Tensor) -> None:
        """Hand over what the first gradient told, before the first step."""
        _, offset = _extension.state_dtype.fields["estimate"][:2]  # type: ignore[index]
        begin = _extension.STATE_OFFSET + int(offset)
        self._block[begin : begin + 8].view(torch.float64)[0].copy_(estimate)

    def tell_moments(self, moments: list[torch.Tensor]) -> None:
        """Set what a cut without snapshots zeroes: dense tensors on the device."""
        rows = [(moment.data_ptr(), moment.nbytes) for moment in moments]
        table = self._integers(rows)
        begin = _extension.MOMENTS_OFFSET
        head = self._integers([table.data_ptr(), len(rows)])
        self._block[begin : begin + 16].view(torch.int64).copy_(head)
        self._moments = (table, moments)  # alive as long as the device may zero them

    def _integers(self, values: list[Any]) -> torch.Tensor:
        """Copy integers to the device without waiting for it, which needs pinned memory."""
        integers = torch.tensor(values, dtype=torch.int64)
        return integers.pin_memory().to(self._device, non_blocking=True)

    def configure(self, state: npt.NDArray[Any] | None = None) -> None:
        """Hand the config, and a State if given, to the device; set the rates that follow."""
        self.core.configure(self._stream(self._index), self._device_config(), state)

    def send_config(self) -> None:
        """Hand the config alone to the device."""
        self.core.configure(self._stream(self._index), self._device_config())

    def _rebind(self) -> None:
        """Take back an lr that was replaced. Never inside a step: DCP sets lr aside there."""


def is_one_piece(tensor: torch.Tensor) -> bool:
    """Whether the elements fill the memory from the first to the last without gaps."""
    channels_last = torch.channels_last if tensor.dim() == 4 else torch.channels_last_3d
    return tensor.is_contiguous() or (
        tensor.dim() in (4, 5) and tensor.is_contiguous(memory_format=channels_last)
    )
