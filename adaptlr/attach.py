"""What happens once, when a controller is made: defaults, the choice of path, what is refused."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.optim.lr_scheduler import LRScheduler

from adaptlr.config import Decay, Guard, ResolvedConfig, Search, require
from adaptlr.host_path import HostPath
from adaptlr.one_gradient import update_family

if TYPE_CHECKING:
    from adaptlr.attachment import Path

logger = logging.getLogger("adaptlr")

RAMP_PAYS_FROM = 500  # steps of a run: a ramp takes a tenth of them, and more of shorter ones
DEVICE_PATHS = ("auto", "fused", "capturable", "float")


def refuse_unavailable(**arguments: object) -> None:
    """Raise for the first argument that has a value: its feature does not exist yet."""
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(
                f"{name}={value!r} is not available in this version of adaptlr; leave {name} out"
            )


def initial_peaks(optimizer: torch.optim.Optimizer, lr: float | str | None) -> list[float]:
    """Return every group's peak; ``lr`` sets that of the largest group, and the ratios stay."""
    peaks = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
    if lr is None or lr == "auto":
        return peaks
    if isinstance(lr, bool) or not isinstance(lr, (int, float)):
        raise TypeError(f"lr must be a float, 'auto' or None, got {type(lr).__name__}")
    require(0.0 < lr < float("inf"), "lr", "positive and finite", lr)
    largest = max(peaks)
    if not 0.0 < largest < float("inf"):
        return [lr] * len(peaks)
    return [peak * (lr / largest) for peak in peaks]


class Plan(NamedTuple):
    """The schedule that was asked for, with its defaults."""

    peaks: list[float]
    warmup: int | float
    decay: Decay


def resolve_plan(
    optimizer: torch.optim.Optimizer,
    lr: float | str | None,
    warmup: int | float | None,
    decay: Decay,
    total_steps: int | None,
) -> Plan:
    """Return peaks, warm-up and decay; a scheduler brings its own warm-up, and is tabulated."""
    peaks = initial_peaks(optimizer, lr)
    if not isinstance(decay, LRScheduler):
        return Plan(peaks, 0.1 if warmup is None else warmup, decay)
    from adaptlr.scheduler_decay import SchedulerDecay  # most runs do without it

    table = SchedulerDecay(decay, total_steps)
    if lr is None:
        peaks = [peak * table.highest for peak in peaks]
    return Plan(peaks, 0 if warmup is None else warmup, table)


def resolve_search(
    optimizer: torch.optim.Optimizer,
    lr: float | str | None,
    search: Search | None,
    guard: Guard | None,
    snapshot: str,
) -> Search | None:
    """Return how the lr is searched for, None where it is typed; refuse what cannot work.

    Without snapshots nothing can be undone, and the first gradient decides alone.
    """
    if search is not None and not isinstance(search, Search):
        raise TypeError(f"search must be a Search or None, got {type(search).__name__}")
    if lr != "auto":
        require(search is None, "search", f"None unless lr='auto', with lr={lr!r}", search)
        return None
    if guard is None or guard.mode != "act":
        raise ValueError(
            f"guard must be one that acts for lr='auto', got {guard!r}: a search ramps the "
            "learning rate up and takes it back"
        )
    search = search or Search()
    if snapshot == "off":
        search = Search(steps=0)
    if search.steps == 0 and update_family(optimizer) is None:
        raise ValueError(
            f"lr must be a float for {type(optimizer).__name__} without a ramp, got 'auto': what "
            "its first gradient says of the learning rate is not known. Leave snapshot and "
            "Search(steps=...) at their defaults"
        )
    return search


def estimate_suffices(
    optimizer: torch.optim.Optimizer, search: Search | None, total_steps: int | None
) -> bool:
    """Whether what the first gradient tells is worth more than a ramp and the steps for it.

    That is so in short runs of optimizers that mislead a ramp. See docs/choosing_lr.md.
    """
    is_short = total_steps is not None and total_steps < RAMP_PAYS_FROM
    by_default = search is not None and search.steps is None
    family = update_family(optimizer)
    return is_short and by_default and family is not None and family.misleads_ramps


def refuse_raise(lr: float | str | None, guard: Guard | None, snapshot: str) -> None:
    """Refuse a `Guard` that may raise the rate where it never could."""
    if not isinstance(guard, Guard) or guard.max_factor == 1.0:
        return
    typed, undoable = lr != "auto", snapshot != "off"
    require(typed, "max_factor", "1 with lr='auto', which finds the rate", guard.max_factor)
    accepted = "1 with snapshot='off', without which a raise could not be undone"
    require(undoable, "max_factor", accepted, guard.max_factor)


def first_device(optimizer: torch.optim.Optimizer) -> torch.device:
    """Return the device of the first parameter."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            device: torch.device = parameter.device
            return device
    raise ValueError("optimizer must have at least one parameter, got none")


def choose_path(
    optimizer: torch.optim.Optimizer, config: ResolvedConfig, history_size: int, device_path: str
) -> Path:
    """Choose where decisions are made and how they reach the optimizer; see docs/design.md."""
    require(device_path in DEVICE_PATHS, "device_path", f"one of {DEVICE_PATHS}", device_path)
    if type(optimizer) is torch.optim.Rprop:
        raise ValueError(
            "optimizer must not be Rprop: it reads lr in its first step only and then adapts its "
            "own step sizes, so no controller can steer it"
        )
    device = first_device(optimizer)
    if device.type != "cuda" or torch.version.hip:
        if device_path in ("fused", "capturable"):
            raise ValueError(
                f"device_path={device_path!r} needs parameters on a CUDA device, got {device}"
            )
        if device.type != "cpu":
            logger.info("adaptlr has no kernels for %s: it reads the loss with loss.item()", device)
        return HostPath(optimizer, config, history_size, device)
    return _choose_cuda_path(optimizer, config, history_size, device_path, device)


def _choose_cuda_path(
    optimizer: torch.optim.Optimizer,
    config: ResolvedConfig,
    history_size: int,
    device_path: str,
    device: torch.device,
) -> Path:
    # Imported only where there is a device.
    from adaptlr.capturable_path import CapturablePath
    from adaptlr.device_flags import CAPTURABLE, FUSED, why_not
    from adaptlr.fused_path import FusedPath
    from adaptlr.kernel_image import kernel_image
    from adaptlr.late_float_path import LateFloatPath

    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("attach the controller before the capture of a CUDA graph, not in it")
    image = kernel_image(device.index)
    if image is None:
        return HostPath(optimizer, config, history_size, device)
    for form, path in ((FUSED, FusedPath), (CAPTURABLE, CapturablePath)):
        obstacle = why_not(form, optimizer)
        if device_path == form and obstacle:
            raise ValueError(f"device_path={form!r} is not possible: {obstacle}")
        if device_path in ("auto", form) and not obstacle:
            return path(optimizer, config, history_size, device, image)
    return LateFloatPath(optimizer, config, history_size, device, image)
