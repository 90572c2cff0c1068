"""Switches an optimizer to torch's fused kernels, which read lr on the device, and back."""

from __future__ import annotations

import logging
from typing import Any

import torch

logger = logging.getLogger("adaptlr")

# Exact types: a subclass may have a step of its own that ignores the flag.
FUSED_OPTIMIZERS = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
_FLAGS = ("fused", "foreach")


def why_not_fused(optimizer: torch.optim.Optimizer) -> str | None:
    """Return why ``optimizer`` cannot take the fused path, or None if it can."""
    if type(optimizer) not in FUSED_OPTIMIZERS:
        return f"{type(optimizer).__name__} has no fused kernels that read lr on the device"
    for group in optimizer.param_groups:
        if reason := _group_obstacle(group):
            return reason
    return None


def _group_obstacle(group: dict[str, Any]) -> str | None:
    if group.get("fused") is False:
        return "fused=False was set"
    if not group.get("fused") and group.get("foreach") is not None:
        return f"foreach={group['foreach']} was set"
    if group.get("differentiable"):
        return "differentiable=True was set"
    if group.get("momentum") and group.get("dampening"):
        return "momentum with dampening cannot be skipped exactly in its first step"
    for parameter in group["params"]:
        if parameter.device.type != "cuda" or not parameter.is_floating_point():
            return "a parameter is not a floating-point tensor on a CUDA device"
        if type(parameter.data) is not torch.Tensor:
            return f"a parameter is a {type(parameter.data).__name__}"
    return None


class FusedFlags:
    """Sets ``fused=True`` where the user left it open, and remembers how it was.

    Attributes:
        saved: The flags of every group as the user had them.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        """Switch every group."""
        self._optimizer = optimizer
        self._amp = getattr(optimizer, "_step_supports_amp_scaling", None)
        self.saved: list[dict[str, Any]] = []
        self.switch_new()

    def switch_new(self) -> None:
        """Switch the groups that are not switched yet, and fit their state to the fused kernels."""
        obstacle = why_not_fused(self._optimizer)
        if obstacle:
            raise ValueError(
                f"a parameter group cannot join the fused path: {obstacle}; "
                'attach with device_path="float"'
            )
        new = self._optimizer.param_groups[len(self.saved) :]
        self.saved += [{flag: group.get(flag) for flag in _FLAGS} for group in new]
        if not all(group.get("fused") for group in new):
            logger.info(
                "%s switched to fused=True, so that lr is read on the device; "
                'device_path="float" keeps it as it was',
                type(self._optimizer).__name__,
            )
        for group in new:
            group["fused"] = True
            self._fit_state(group)
        self._optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined]

    def _fit_state(self, group: dict[str, Any]) -> None:
        for parameter in group["params"]:
            if group.get("momentum") and parameter.requires_grad:
                # torch leaves the buffer uninitialised if the first step is skipped; zeros give the
                # same first step.
                state = self._optimizer.state[parameter]
                if state.get("momentum_buffer") is None:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
            step = self._optimizer.state.get(parameter, {}).get("step")
            if isinstance(step, torch.Tensor):
                self._optimizer.state[parameter]["step"] = step.to(parameter.device, torch.float32)

    def restore(self) -> None:
        """Put the user's flags back, and the state where they want it."""
        for group, saved in zip(self._optimizer.param_groups, self.saved, strict=True):
            group.update(saved)
            if saved["fused"] or group.get("capturable"):
                continue
            for parameter in group["params"]:
                step = self._optimizer.state.get(parameter, {}).get("step")
                if isinstance(step, torch.Tensor):
                    self._optimizer.state[parameter]["step"] = step.cpu()
        if self._amp is None:
            self._optimizer.__dict__.pop("_step_supports_amp_scaling", None)
        else:
            self._optimizer._step_supports_amp_scaling = self._amp  # type: ignore[attr-defined]
