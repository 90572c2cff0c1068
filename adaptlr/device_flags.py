"""Switches an optimizer to kernels of torch's that read lr on the device, and back."""

from __future__ import annotations

import logging
from typing import Any

import torch

logger = logging.getLogger("adaptlr")

# Exact types throughout: a subclass may have a step of its own.
FUSED_OPTIMIZERS = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
CAPTURABLE_OPTIMIZERS = (
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adamax,
    torch.optim.Adadelta,
    torch.optim.RMSprop,
)
FUSED = "fused"
CAPTURABLE = "capturable"
_FLAGS = ("fused", "foreach", "capturable")
# Counts that torch keeps on the host unless its kernels run without it.
_COUNTS = ("step", "mu_product")


def why_not(form: str, optimizer: torch.optim.Optimizer) -> str | None:
    """Return why ``optimizer`` cannot take this form, or None if it can."""
    return why_not_by_flags(form, optimizer) or _why_not_by_parameters(form, optimizer)


def why_not_by_flags(form: str, optimizer: torch.optim.Optimizer) -> str | None:
    """Return why the type and flags of ``optimizer`` rule this form out, or None."""
    possible = FUSED_OPTIMIZERS if form == FUSED else CAPTURABLE_OPTIMIZERS
    if type(optimizer) not in possible:
        return f"{type(optimizer).__name__} has no {form} kernels that read lr on the device"
    obstacle = _fused_obstacle if form == FUSED else _capturable_obstacle
    reasons = (obstacle(group) for group in optimizer.param_groups)
    return next((reason for reason in reasons if reason), None)


def _why_not_by_parameters(form: str, optimizer: torch.optim.Optimizer) -> str | None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter in parameters:
        if parameter.device.type != "cuda" or not parameter.is_floating_point():
            return "a parameter is not a floating-point tensor on a CUDA device"
        if type(parameter.data) is not torch.Tensor:
            return f"a parameter is a {type(parameter.data).__name__}"
    devices = {parameter.device for parameter in parameters}
    if len(devices) > 1:  # torch reads lr beside the parameters, and does not copy it everywhere
        return f"the parameters are on {len(devices)} devices"
    return None


def _fused_obstacle(group: dict[str, Any]) -> str | None:
    if group.get("fused") is False:
        return "fused=False was set"
    if not group.get("fused") and group.get("foreach") is not None:
        return f"foreach={group['foreach']} was set"
    if group.get("differentiable"):
        return "differentiable=True was set"
    if group.get("momentum") and group.get("dampening"):
        return "momentum with dampening cannot be skipped exactly in its first step"
    return None


def _capturable_obstacle(group: dict[str, Any]) -> str | None:
    if group.get("fused"):
        return "fused=True was set"
    if group.get("foreach") is False:
        return "foreach=False was set, and the loop over parameters waits for the device"
    if group.get("differentiable"):
        return "differentiable=True was set"
    return None


class DeviceFlags:
    """Sets the flags of one form where the user left them open, and remembers how they were.

    Attributes:
        saved: The flags of every group as the user had them.
    """

    def __init__(self, form: str, optimizer: torch.optim.Optimizer) -> None:
        """Switch every group to ``form``."""
        self._form = form
        self._optimizer = optimizer
        self._amp = getattr(optimizer, "_step_supports_amp_scaling", None)
        self.saved: list[dict[str, Any]] = []
        self.switch_new()

    def switch_new(self) -> None:
        """Switch the groups that are not switched yet, and fit their state to the new kernels."""
        obstacle = why_not(self._form, self._optimizer)
        if obstacle:
            raise ValueError(
                f"a parameter group cannot join the {self._form} path: {obstacle}; "
                'attach with device_path="float"'
            )
        new = self._optimizer.param_groups[len(self.saved) :]
        self.saved += [{flag: group[flag] for flag in _FLAGS if flag in group} for group in new]
        if not all(group.get(self._form) for group in new):
            logger.info(
                "%s switched to %s=True, so that lr is read on the device; "
                'device_path="float" keeps it as it was',
                type(self._optimizer).__name__,
                self._form,
            )
        for group in new:
            group[self._form] = True
            if CAPTURABLE in group:
                group[CAPTURABLE] = True  # fused kernels need it too, in a CUDA graph
            self._fit_state(group)
        if self._form == FUSED:
            self._optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined]

    def _fit_state(self, group: dict[str, Any]) -> None:
        for parameter in group["params"]:
            if self._form == FUSED and group.get("momentum") and parameter.requires_grad:
                # torch leaves the buffer uninitialised if the first step is skipped; zeros give the
                # same first step.
                state = self._optimizer.state[parameter]
                if state.get("momentum_buffer") is None:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
            self._move_counts(parameter, parameter.device)

    def _move_counts(self, parameter: torch.Tensor, device: torch.device) -> None:
        state = self._optimizer.state.get(parameter, {})
        for name in _COUNTS:
            if isinstance(state.get(name), torch.Tensor):
                state[name] = state[name].to(device, torch.float32)

    def restore(self) -> None:
        """Put the user's flags back, and the state where they want it."""
        for group, saved in zip(self._optimizer.param_groups, self.saved, strict=True):
            group.update(saved)
            if saved.get("fused") or saved.get("capturable"):
                continue
            for parameter in group["params"]:
                self._move_counts(parameter, torch.device("cpu"))
        if self._form != FUSED:
            return
        if self._amp is None:
            self._optimizer.__dict__.pop("_step_supports_amp_scaling", None)
        else:
            self._optimizer._step_supports_amp_scaling = self._amp  # type: ignore[attr-defined]
