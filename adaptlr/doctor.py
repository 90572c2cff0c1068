"""Looks at this installation: what is there, what each optimizer gets, and whether it computes."""

from __future__ import annotations

import importlib.metadata
import platform
import time
import warnings
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from adaptlr import _extension, reference
from adaptlr.attach import choose_path
from adaptlr.config import Guard, ResolvedConfig
from adaptlr.controller import AdaptiveLR
from adaptlr.host_path import HostPath
from adaptlr.telemetry import Flag

OPTIONAL = ("rich", "typer", "matplotlib", "jinja2", "tensorboard", "wandb", "trackio")
SKIPS = {
    "host": "exact: gradients taken away",
    "fused": "exact, on the device",
    "capturable": "parameters exact; moments decay by one tick",
    "float": "gradients zeroed; momentum and weight decay still act",
    "refused": "none: it takes lr in its first step only, so no controller can steer it",
}
TOLERANCE = 1e-9  # of kernels against the oracle; docs/design.md
STEPS = 300
_FIELDS = ("loss", "level", "scale", "slope", "t_statistic", "cusum", "factor", "target_factor")


class Check(NamedTuple):
    """One finding.

    Attributes:
        name: What was looked at.
        status: ``"ok"``, ``"note"`` (works, and something is not there) or ``"bad"``.
        detail: What was found.
    """

    name: str
    status: Literal["ok", "note", "bad"]
    detail: str


def examine() -> Iterator[Check]:
    """Yield everything, the quick things first."""
    yield from versions()
    yield from cuda()
    for device in devices():
        yield self_test(device)


def devices() -> list[torch.device]:
    """Return the CPU and every CUDA device."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.device("cpu"), *(torch.device("cuda", index) for index in range(count))]


def versions() -> Iterator[Check]:
    """Yield what is installed."""
    from adaptlr import __version__

    yield Check("adaptlr", "ok", f"{__version__}, {_extension.__file__}")
    yield Check("python", "ok", f"{platform.python_version()}, {platform.platform()}")
    yield Check("torch, numpy", "ok", f"{torch.__version__}, {np.__version__}")
    for name in OPTIONAL:
        try:
            yield Check(name, "ok", importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Check(name, "note", "not installed (optional)")


def cuda() -> Iterator[Check]:
    """Yield which kernels each CUDA device gets, or why there are none."""
    built = f"{len(_extension.fatbin):,} bytes by nvcc" if _extension.fatbin else "none by nvcc"
    yield Check("kernels in this build", "ok", f"{built}; sources for NVRTC are there")
    if torch.version.hip:
        yield Check("CUDA", "note", "this torch is for ROCm: the host decides, by loss.item()")
    elif not torch.version.cuda:
        yield Check("CUDA", "note", "this torch is built without it: the host decides")
    elif not torch.cuda.is_available():
        yield Check("CUDA", "note", f"torch has CUDA {torch.version.cuda}, but there is no GPU")
    else:
        for device in devices()[1:]:
            yield _kernels(device)


def _kernels(device: torch.device) -> Check:
    from adaptlr.kernel_image import kernel_image

    name = f"{device}, {torch.cuda.get_device_name(device)}"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            image = kernel_image(device.index)
        except (RuntimeError, ValueError) as error:
            return Check(name, "bad", str(error))
    if image is None:
        why = str(caught[-1].message) if caught else "ADAPTLR_KERNELS=host"
        return Check(name, "note", f"the host decides: {why}")
    return Check(name, "ok", "nvcc's kernels" if image == _extension.fatbin else "NVRTC's kernels")


# -- optimizers --------------------------------------------------------------------------------


def optimizer_paths(device: torch.device) -> dict[str, str]:
    """Return which path each optimizer of torch takes with default flags: a key of `SKIPS`."""
    return {name: _path_of(name, device) for name in sorted(_optimizers())}


def _optimizers() -> Iterator[str]:
    for name, value in vars(torch.optim).items():
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer):
            if value is not torch.optim.Optimizer:
                yield name


def _path_of(name: str, device: torch.device) -> str:
    parameter = torch.nn.Parameter(torch.zeros(2, 2, device=device))
    optimizer = getattr(torch.optim, name)([parameter], lr=0.01)
    config = _config(1)
    try:
        path = choose_path(optimizer, config, 1, "auto")
    except ValueError:
        return "refused"
    return "host" if isinstance(path, HostPath) else path.name


def _config(total_steps: int) -> ResolvedConfig:
    return ResolvedConfig(
        total_steps=total_steps,
        warmup=0.1,
        decay="cosine",
        min_lr_ratio=0.0,
        guard=Guard(),
        peaks=[0.01],
    )


# -- self-test ---------------------------------------------------------------------------------


def trace() -> Any:
    """Return the losses of a run with a broken step and a blow-up, exact in float32."""
    rng = np.random.default_rng(0)
    losses = 2.5 - 0.004 * np.arange(STEPS) + 0.05 * rng.standard_normal(STEPS)
    losses[40] = np.nan
    losses[200:] += 0.2 * 1.2 ** np.minimum(np.arange(STEPS - 200), 30)
    return losses.astype(np.float32).astype(np.float64)


def self_test(device: torch.device) -> Check:
    """Run the control step over a short trace, and compare it with the oracle in NumPy."""
    losses = trace()
    expected, _ = reference.run(reference.default_config(STEPS, 0.01), losses)
    parameter = torch.nn.Parameter(torch.zeros(1, device=device))
    optimizer = torch.optim.SGD([parameter], lr=0.01)
    controller = AdaptiveLR(optimizer, STEPS, snapshot="off")
    began = time.perf_counter()
    for loss in torch.tensor(losses, dtype=torch.float32, device=device):
        controller.step(loss)
    controller.detach()
    seconds = time.perf_counter() - began
    return _compare(f"self-test on {device}", controller.history(), expected, seconds)


def _compare(name: str, records: Any, expected: Any, seconds: float) -> Check:
    if len(records) != len(expected):
        return Check(name, "bad", f"{len(records)} records of {len(expected)} steps")
    for field in ("phase", "flags"):
        if (records[field].astype(int) != expected[field]).any():
            step = int(np.flatnonzero(records[field].astype(int) != expected[field])[0])
            return Check(name, "bad", f"{field} is not the oracle's from step {step} on")
    errors = {field: _error(records[field], expected[field]) for field in _FIELDS}
    worst = max(errors, key=lambda field: errors[field])
    alarms = int(((records["flags"] & (Flag.DIVERGE | Flag.LOST | Flag.ABOVE)) != 0).sum())
    detail = f"{len(records)} steps with {alarms} alarms in {seconds:.2f} s, "
    detail += f"largest error {errors[worst]:.1e} ({worst})"
    return Check(name, "ok" if errors[worst] <= TOLERANCE else "bad", detail)


def _error(values: Any, expected: Any) -> float:
    """Return the largest difference, in units of the field's size."""
    both = np.isfinite(expected)
    if (np.isfinite(values) != both).any():
        return float("inf")
    size = max(float(np.median(np.abs(expected[both]))), 1e-300)
    unit = np.maximum(np.abs(expected[both]), size)
    return float((np.abs(values[both] - expected[both]) / unit).max(initial=0.0))
