"""What a recording says about its run at its head: settings, versions, device."""

from __future__ import annotations

import os
import platform
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from adaptlr.attach import first_device
from adaptlr.config import DECAYS, GuardMode, ResolvedConfig
from adaptlr.lines import FORMAT, Line

if TYPE_CHECKING:
    from adaptlr.attachment import Path

_LEFT_OUT = ("table", "peaks", "snapshot_slots")  # an address, an array, not known before a step


def run_facts(optimizer: torch.optim.Optimizer, config: ResolvedConfig, path: Path) -> Line:
    """Return the header of a recording."""
    from adaptlr import __version__

    return {
        "format": FORMAT,
        "adaptlr": __version__,
        "optimizer": type(optimizer).__name__,
        "device": _name(first_device(optimizer)),
        "device_path": path.name,
        "config": _settings(config),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "host": platform.node(),
        "process": os.getpid(),
        "command": " ".join(sys.argv),
    }


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return str(device)


def _settings(config: ResolvedConfig) -> dict[str, Any]:
    row = config.row
    settings = {name: row[name].item() for name in row.dtype.names if name not in _LEFT_OUT}
    settings["peaks"] = config.peaks
    settings["decay"] = DECAYS[int(row["decay"])]
    settings["guard_mode"] = GuardMode(int(row["guard_mode"])).name.lower()
    return {name: _whole(value) for name, value in settings.items()}


def _whole(value: Any) -> Any:
    """Counts are doubles in the config; a reader expects whole numbers."""
    return int(value) if isinstance(value, float) and value.is_integer() else value
