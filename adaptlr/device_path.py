"""The control step on a CUDA device: one small kernel before the optimizer's own, no wait."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from adaptlr import _extension
from adaptlr.config import ResolvedConfig
from adaptlr.host_path import check_loss
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

    name = ""
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
        self._device = device
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
            self, core, optimizer, self._stream, self._index, tuple(DTYPES)
        )
        Pending.__init__(self, optimizer)
        flag = self._block[_extension.SKIP_OFFSET : _extension.SKIP_OFFSET + 4]
        self.skip_flag = flag.view(torch.float32)[0]
        self.bind()

    def skip(self) -> None:
        """Nothing to do: the device has skipped by itself."""

    @abstractmethod
    def bind(self) -> None:
        """Take the groups' learning rates over."""

    # -- losses ---------------------------------------------------------------

    def observe_slowly(self, loss: torch.Tensor | float) -> None:
        """Keep the address of a step's first loss; fold the others in by one small launch each."""
        self.poll()
        if self.count and self.observed_anew():
            self.drop()
        code = self._check(loss)
        assert isinstance(loss, torch.Tensor)
        if self.count == 0:
            self._rebind()
        if self.count == 0 and not self.reused:
            self.first, self.dtype = loss, code
        else:
            self.reused |= self.first is not None and self.first.data_ptr() == loss.data_ptr()
            self.core.fold(self._stream(self._index), loss.data_ptr(), code)
        self.count += 1

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
            0 if self.first is None else self.first.data_ptr(),
            self.dtype,
            self.mean,
            norm_address,
            norm_dtype,
            -1.0 if norm is None else float(norm),
            0 if found_inf is None else found_inf.data_ptr(),
            applied_lr,
        )
        self.first = self.grad_norm = None
        self.launched += 1
        self.taken()
        return notices

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

    def configure(self, state: npt.NDArray[Any] | None = None) -> None:
        """Hand the config, and a State if given, to the device; set the rates that follow."""
        self.core.configure(self._stream(self._index), self._device_config(), state)

    def _rebind(self) -> None:
        """Take back an lr that was replaced. Never inside a step: DCP sets lr aside there."""
