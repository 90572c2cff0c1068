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


class FusedPath(DevicePath):
    """The optimizer's fused kernels read lr and skip flag from device memory: exact, no wait."""

    name = "fused"

    def bind(self) -> None:
        """Make every group's lr a view into the block; switch the groups to the fused kernels."""
        offset = _extension.LR_OFFSET
        views = self._block[offset : offset + 4 * _extension.MAX_GROUPS].view(torch.float32)
        self._views = list(views.unbind())
        flag = self._block[_extension.SKIP_OFFSET : _extension.SKIP_OFFSET + 4]
        self.skip_flag = flag.view(torch.float32)[0]
        self._flags = FusedFlags(self._optimizer)
        self._bind_known()

    def adopt(self) -> None:
        """Take in groups that were added."""
        self._flags.switch_new()
        self._bind_known()

    def _bind_known(self) -> None:
        self.lrs = self._views[: len(self._flags.saved)]
        self.plain = True
        self._rebind()

    def _rebind(self) -> None:
        for group, lr in zip(self._optimizer.param_groups, self.lrs, strict=False):
            if group["lr"] is not lr:  # an added group still shows its own peak
                group["lr"] = lr

    def step(self) -> int:
        """Launch the control step and point the optimizer at the skip flag.

        The optimizer keeps pointing there: setting and deleting ``found_inf`` in every step would
        cost a hook. GradScaler replaces it before a step and deletes it after.

        Returns:
            The notices so far; or NEW_GROUPS alone, and nothing was done.
        """
        if len(self._optimizer.param_groups) > len(self.lrs):
            return _extension.NEW_GROUPS
        attributes = self._optimizer.__dict__
        flag = attributes.get("found_inf")
        notices = self._launch(None if flag is self.skip_flag else flag, -1.0)
        attributes["found_inf"] = self.skip_flag
        return notices

    def stand_aside(self) -> None:
        """Let a step pass that is not ours: the flag is that of the last one."""
        if self._optimizer.__dict__.get("found_inf") is self.skip_flag:
            del self._optimizer.__dict__["found_inf"]

    def preset(self) -> None:
        """Nothing to do: the optimizer's kernels read the rate when it is there."""

    def release(self) -> None:
        """Give the groups Python floats and the user's own flags back. Waits for the device."""
        for group, lr in zip(self._optimizer.param_groups, self.lrs, strict=False):
            group["lr"] = float(lr)
        self._flags.restore()
        self.stand_aside()

    def saved_group(self, index: int) -> dict[str, Any]:
        """Return what a checkpoint shows of a group in place of the live values. Waits."""
        return {"lr": float(self.lrs[index]), **self._flags.saved[index]}


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

    def stand_aside(self) -> None:
        """Nothing to do: a step that is not ours sees nothing of ours."""

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
