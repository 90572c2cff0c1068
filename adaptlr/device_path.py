"""The control step on a CUDA device: one small kernel before the optimizer's own, no wait."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from adaptlr import _extension
from adaptlr.config import GuardMode, ResolvedConfig
from adaptlr.fused_flags import FusedFlags
from adaptlr.host_path import check_loss
from adaptlr.pending import Pending

DTYPES: dict[torch.dtype, int] = {
    torch.float32: _extension.FLOAT32,
    torch.float64: _extension.FLOAT64,
    torch.float16: _extension.FLOAT16,
    torch.bfloat16: _extension.BFLOAT16,
}
LATE_FLOAT_LAG = 2  # steps that the host may run ahead of the factor it applies


class DevicePath(Pending, ABC):
    """What both ways of deciding on the device share: losses, device memory, the launch."""

    name = ""
    reports_late = True
    after_step: Callable[[], None] | None = None

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        config: ResolvedConfig,
        history_size: int,
        device: torch.device,
        image: bytes,
    ) -> None:
        """Load the kernels and bind the learning rates of ``optimizer``."""
        super().__init__(optimizer)
        self._config = config
        self._device = device
        self._index = device.index
        self._stream = torch._C._cuda_getCurrentRawStream
        self._block = torch.zeros(_extension.BLOCK_BYTES, dtype=torch.uint8, device=device)
        self._device_table: torch.Tensor | None = None
        self.core = _extension.DeviceController(
            self._index,
            image,
            self._block.data_ptr(),
            self._device_config(),
            _extension.initial_state(),
            history_size,
            self._stream(self._index),
        )
        self._first: torch.Tensor | None = None  # alive until the kernel that reads it is launched
        self._reused = False  # the loop reuses its loss buffer: fold before it is overwritten
        self._grad_norm: torch.Tensor | float = -1.0
        self.launched = 0
        self.bind()

    def skip(self) -> None:
        """Nothing to do: the device has skipped by itself."""

    @abstractmethod
    def bind(self) -> None:
        """Take the groups' learning rates over."""

    # -- losses ---------------------------------------------------------------

    def observe(self, loss: torch.Tensor | float) -> None:
        """Keep the address of a step's first loss; fold the others in by one small launch each."""
        if self.count and self.observed_anew():
            self.drop()
        if not isinstance(loss, torch.Tensor):
            raise TypeError(
                f"loss must be the tensor on {self._device} that the model returned, "
                f"got {type(loss).__name__}"
            )
        code = DTYPES.get(loss.dtype)
        if code is None or loss.numel() != 1 or loss.get_device() != self._index:
            check_loss(loss, self._device)
            raise TypeError(f"loss must be float32, float64, float16 or bfloat16, got {loss.dtype}")
        if self.count == 0:
            self._rebind()
        if self.count == 0 and not self._reused:
            self._first = loss
        else:
            self._reused |= self._first is not None and self._first.data_ptr() == loss.data_ptr()
            self.core.fold(self._stream(self._index), loss.data_ptr(), code)
        self.count += 1

    def observe_grad_norm(self, grad_norm: torch.Tensor | float) -> None:
        """Take the gradient norm of the coming step."""
        if isinstance(grad_norm, torch.Tensor):
            check_loss(grad_norm, self._device)
        self._grad_norm = grad_norm

    def drop(self) -> None:
        """Forget what waits."""
        self.dropped()
        self._first = None
        self._grad_norm = -1.0
        self.core.drop_losses(self._stream(self._index))

    # -- the step -------------------------------------------------------------

    def _launch(self, found_inf: torch.Tensor | None, applied_lr: float) -> int:
        first, norm = self._first, self._grad_norm
        address, dtype, value = 0, 0, norm
        if isinstance(norm, torch.Tensor):
            address, dtype, value = norm.data_ptr(), DTYPES[norm.dtype], -1.0
        notices = self.core.step(
            self._stream(self._index),
            0 if first is None else first.data_ptr(),
            0 if first is None else DTYPES[first.dtype],
            self.mean,
            address,
            dtype,
            value,  # type: ignore[arg-type]
            0 if found_inf is None else found_inf.data_ptr(),
            applied_lr,
        )
        self.taken()
        self._first = None
        self._grad_norm = -1.0
        self.launched += 1
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


class FusedPath(DevicePath):
    """The optimizer's fused kernels read lr and skip flag from device memory: exact, no wait."""

    name = "fused"

    def bind(self) -> None:
        """Make every group's lr a view into the block; switch the groups to the fused kernels."""
        offset = _extension.LR_OFFSET
        lrs = self._block[offset : offset + 4 * _extension.MAX_GROUPS].view(torch.float32)
        self._lrs = list(lrs.unbind())
        skip = self._block[_extension.SKIP_OFFSET : _extension.SKIP_OFFSET + 4]
        self._skip = skip.view(torch.float32)[0]
        self._flags = FusedFlags(self._optimizer)
        self._rebind()

    def adopt(self) -> None:
        """Take in groups that were added."""
        self._flags.switch_new()
        self._rebind()

    def _rebind(self) -> None:
        known = self._lrs[: len(self._flags.saved)]  # an added group still shows its own peak
        for group, lr in zip(self._optimizer.param_groups, known, strict=False):
            if group["lr"] is not lr:
                group["lr"] = lr

    def step(self) -> int:
        """Launch the control step, point the optimizer at the skip flag; return the notices."""
        if len(self._optimizer.param_groups) > len(self._flags.saved):
            return _extension.NEW_GROUPS
        attributes = self._optimizer.__dict__
        self._scaler_flag = attributes.get("found_inf")
        notices = self._launch(self._scaler_flag, -1.0)
        self._optimizer.found_inf = self._skip  # type: ignore[attr-defined]
        return notices

    def after_step(self) -> None:
        """Leave ``found_inf`` as GradScaler had it."""
        attributes = self._optimizer.__dict__
        if attributes.get("found_inf") is not self._skip:
            return
        if self._scaler_flag is None:
            del attributes["found_inf"]
        else:
            attributes["found_inf"] = self._scaler_flag

    def preset(self) -> None:
        """Nothing to do: the optimizer's kernels read the rate when it is there."""

    def release(self) -> None:
        """Give the groups Python floats and the user's own flags back. Waits for the device."""
        for group, lr in zip(self._optimizer.param_groups, self._lrs, strict=False):
            group["lr"] = float(lr)
        self._flags.restore()

    def saved_group(self, index: int) -> dict[str, Any]:
        """Return what a checkpoint shows of a group in place of the live values. Waits."""
        return {"lr": float(self._lrs[index]), **self._flags.saved[index]}


class LateFloatPath(DevicePath):
    """For optimizers that know lr only as a float: schedule on time, factor a little late.

    The host applies the newest factor that the device has reported and runs at most two steps ahead
    of it. A skipped step has its gradients zeroed on the device, which keeps NaN out; momentum
    still moves the parameters.
    """

    name = "float"

    def bind(self) -> None:
        """Set the rates of the coming step."""
        self._clock = int(self.state()["step"])
        self._factor = float(self.state()["factor"])
        self._skips = self._config.row["guard_mode"] == GuardMode.ACT
        self.adopt()

    def adopt(self) -> None:
        """Take in groups that were added."""
        self._written: list[Any] = [group["lr"] for group in self._optimizer.param_groups]
        self.preset()

    def step(self) -> int:
        """Set the rates from the newest factor, launch, zero the gradients if told to."""
        groups = self._optimizer.param_groups
        if len(groups) > len(self._written):
            return _extension.NEW_GROUPS
        self.core.wait(LATE_FLOAT_LAG)
        self._factor = self.core.factor
        overwritten = any(
            group["lr"] is not lr for group, lr in zip(groups, self._written, strict=True)
        )
        lr = self._set_lrs()
        notices = self._launch(None, lr)
        self.core.record_event(self._stream(self._index))
        self._clock += 1
        if self._skips:
            self._zero_if_skipped()
        return notices | (_extension.OVERWRITTEN if overwritten else 0)

    def preset(self) -> None:
        """Set the rates of the coming step."""
        self._set_lrs()

    def _set_lrs(self) -> float:
        multiplier = self._factor * self._config.multiplier(self._clock)
        lrs = [peak * multiplier for peak in self._config.peaks]
        for index, (group, lr) in enumerate(zip(self._optimizer.param_groups, lrs, strict=True)):
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
            self._written[index] = group["lr"]
        return max(lrs)

    def _zero_if_skipped(self) -> None:
        addresses, sizes = [], []
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is None:
                    continue
                values = gradient._values() if gradient.is_sparse else gradient
                addresses.append(values.data_ptr())
                sizes.append(values.numel() * values.element_size())
        self.core.zero_if_skipped(self._stream(self._index), addresses, sizes)

    def configure(self, state: npt.NDArray[Any] | None = None) -> None:
        """Hand the config, and a State if given, to the device; set the rates that follow."""
        super().configure(state)
        if state is not None:
            self._clock, self._factor = int(state["step"]), float(state["factor"])
        self.preset()

    def release(self) -> None:
        """Nothing to do: the rates are Python floats."""

    def saved_group(self, index: int) -> dict[str, Any]:
        """Return what a checkpoint shows of a group in place of the live values."""
        return {"lr": float(self._optimizer.param_groups[index]["lr"])}
