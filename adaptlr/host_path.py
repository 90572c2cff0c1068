"""The control step on the host: for the CPU, and for devices that adaptlr has no kernels for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy.typing as npt
import torch

from adaptlr import _extension
from adaptlr.config import ResolvedConfig
from adaptlr.pending import Pending

ZERO_ORDER: int = _extension.ZERO_MOMENT << 4


class HostPath(_extension.HostLoop, Pending):
    """Decides at once, sets lr before the step, and skips by taking the gradients away.

    Taking the gradients away is an exact skip for every optimizer of torch: parameters, moments and
    step counts stay. Some others count steps by themselves, without a look at the gradients.

    The usual step never comes here: `HostLoop` takes one tensor loss a step and float rates, and
    calls ``observe_slowly``, ``step_slowly`` and ``answer`` for all else, a first loss among it.

    Attributes:
        name: How `device_path` calls it.
        core: The controller of the extension, with its flight record.
    """

    name = "float"
    lag = 0
    carry_out: Callable[[int], None]  # set by `Snapshots`
    zero_moments: Callable[[], None]  # set by `FirstMoments`
    _hook: torch.utils.hooks.RemovableHandle
    replayed = False

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        config: ResolvedConfig,
        history_size: int,
        device: torch.device,
    ) -> None:
        """Bind the learning rates of ``optimizer``."""
        core = _extension.HostController(config.row, history_size)
        _extension.HostLoop.__init__(self, core, torch.Tensor)
        Pending.__init__(self, optimizer)
        self._config = config
        self._device = device
        self.bind()

    # -- losses ---------------------------------------------------------------

    def observe_slowly(self, loss: torch.Tensor | float) -> None:
        """Add one loss to what waits: a further one, a float, or one that has to be refused."""
        if self.count and self.observed_anew():
            self.drop()
        value = self._value(loss)
        self.total = self.total + value if self.count else value
        self.count += 1

    def _value(self, loss: object) -> float:
        """Convert a loss; explain what cannot be taken."""
        if isinstance(loss, torch.Tensor):
            check_loss(loss, self._device)
            return float(loss.item())
        if isinstance(loss, bool) or not hasattr(loss, "__float__"):
            raise TypeError(f"loss must be a tensor or a float, got {type(loss).__name__}")
        return float(loss)

    def observe_grad_norm(self, grad_norm: torch.Tensor | float) -> None:
        """Take the gradient norm of the coming step."""
        self.grad_norm = float(full_norm(grad_norm))

    def drop(self) -> None:
        """Forget what waits."""
        self.dropped()
        self.grad_norm = -1.0

    # -- the step -------------------------------------------------------------

    def step(self) -> int:
        """Run the control step and set the learning rates.

        Returns:
            The notices, with SKIP_STEP or ORDERED added where there is something to do; or
            NEW_GROUPS alone, and nothing was done.
        """
        self._forget_order()
        groups = self._optimizer.param_groups
        if len(groups) > len(self.written):
            return _extension.NEW_GROUPS
        loss = self.total / self.count if self.mean else self.total
        skip, notices, lrs, self.order = self.core.step(
            loss, self.grad_norm, -1.0, self._overflow(), self._was_overwritten()
        )
        self.grad_norm = -1.0
        self.taken()
        self._set(lrs)
        ordered = _extension.ORDERED if self.order else 0
        return notices | ordered | (_extension.SKIP_STEP if skip else 0)

    def await_update(self) -> None:
        """Have the order carried out after this update. A hook for all steps would cost in each."""
        if self.order:
            self._hook = self._optimizer.register_step_post_hook(self._after_update)

    def _after_update(self, *_: object) -> None:
        order, self.order = self.order, -1
        if order > 0:
            self.carry_out(order)

    def _forget_order(self) -> None:
        if self.order:
            self.order = 0
            self._hook.remove()

    def skip(self) -> None:
        """Take the gradients away, and zero first moments if that is ordered."""
        if self.order == ZERO_ORDER:
            self.zero_moments()
            self.order = 0
        self.drop_gradients()

    def drop_gradients(self) -> None:
        """Take the gradients away."""
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def stand_aside(self) -> None:
        """Nothing to do: a step that is not ours sees nothing of ours."""

    skip_suspended = drop_gradients

    def resume(self) -> None:
        """Nothing to do after steps that were suspended."""

    def is_capturing(self) -> bool:
        """Whether a CUDA graph is being captured: never with decisions of the host."""
        return False

    def step_in_graph(self) -> int:
        """Never called: see `is_capturing`."""
        raise NotImplementedError

    def preset(self) -> None:
        """Set the scheduled rates before a closure runs: LBFGS reads lr before it calls it."""
        multiplier = self._config.multiplier(int(self.core.state["step"]))
        factor = float(self.core.state["factor"])
        self._set([peak * (factor * multiplier) for peak in self._config.peaks])

    def tell_estimate(self, estimate: torch.Tensor) -> None:
        """Hand over what the first gradient told, before the first step."""
        state = self.core.state
        state["estimate"] = estimate.item()
        self.core.state = state

    def _overflow(self) -> bool:
        """Whether GradScaler, which tells fused optimizers only, found an infinite gradient."""
        found_inf = self._optimizer.__dict__.get("found_inf")
        return found_inf is not None and bool(found_inf)

    # -- learning rates -------------------------------------------------------

    def bind(self) -> None:
        """Take the groups' learning rates over, and set those of the coming step."""
        groups = self._optimizer.param_groups
        has_tensor_lr = any(isinstance(group["lr"], torch.Tensor) for group in groups)
        self.plain = not has_tensor_lr and not hasattr(
            self._optimizer, "_step_supports_amp_scaling"
        )
        self.preset()

    adopt = bind

    def _set(self, lrs: Sequence[float]) -> None:
        """Set every group's rate; in place where the user's lr is a tensor that others may hold."""
        groups = self._optimizer.param_groups
        for group, lr in zip(groups, lrs, strict=True):
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        self.written[:] = [group["lr"] for group in groups]
        self._tensor_lrs = [(lr, float(lr)) for lr in self.written if isinstance(lr, torch.Tensor)]

    def _was_overwritten(self) -> bool:
        """Whether something else has replaced an lr, or changed a tensor lr in place."""
        groups = zip(self._optimizer.param_groups, self.written, strict=True)
        replaced = any(group["lr"] is not lr for group, lr in groups)
        return replaced or any(float(tensor) != lr for tensor, lr in self._tensor_lrs)

    def release(self) -> None:
        """Leave the groups, whose rates are the user's floats, and take our last hook off."""
        self._forget_order()

    def saved_group(self, index: int) -> dict[str, Any]:
        """Return what a checkpoint shows of a group in place of the live values."""
        return {"lr": float(self._optimizer.param_groups[index]["lr"])}

    # -- state ----------------------------------------------------------------

    def state(self) -> npt.NDArray[Any]:
        """Return a copy of the State."""
        return self.core.state

    def saved_states(self) -> npt.NDArray[Any]:
        """Return a copy of the States beside the snapshots."""
        return self.core.saved

    def set_saved_states(self, states: npt.NDArray[Any]) -> None:
        """Set the States beside the snapshots."""
        self.core.saved = states

    def configure(self, state: npt.NDArray[Any] | None = None) -> None:
        """Hand the config, and a State if given, to the extension; set the rates that follow."""
        self.send_config()
        if state is not None:
            self.core.state = state
        self.preset()

    def send_config(self) -> None:
        """Hand the config alone to the extension."""
        self.core.config = self._config.row


def check_loss(loss: torch.Tensor, device: torch.device) -> None:
    """Raise the error that says why ``loss`` cannot be used."""
    if loss.numel() != 1:
        shape = tuple(loss.shape)
        raise ValueError(
            f"loss must have one element, got shape {shape}; reduce it first, e.g. loss.mean()"
        )
    if loss.is_neg():
        raise ValueError(
            "loss must hold its value in memory, got a view that torch negates when it is read, "
            "as of the imaginary part of a conjugate; hand in loss.resolve_neg()"
        )
    if not loss.dtype.is_floating_point:
        raise TypeError(f"loss must be of a floating-point dtype, got {loss.dtype}")
    if loss.device.type != device.type or (device.index is not None and loss.device != device):
        raise ValueError(
            f"loss must be on {device}, where the parameters are, got {loss.device}; "
            "hand in the loss tensor as the model returned it"
        )


def full_norm(grad_norm: torch.Tensor | float) -> torch.Tensor | float:
    """Complete a norm that `clip_grad_norm_` returns as a DTensor, of sharded parameters.

    Where its placement is partial this is an all-reduce of one number, in which every rank takes
    part as it did in `clip_grad_norm_`; a replicated norm is at hand.
    """
    # Known by its method: importing DTensor takes 0.6 s, most users have none.
    complete = getattr(grad_norm, "full_tensor", None)
    return grad_norm if complete is None else complete()
