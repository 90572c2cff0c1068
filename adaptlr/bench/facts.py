"""What a number was measured on."""

from __future__ import annotations

import platform
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import adaptlr


@dataclass(frozen=True)
class Facts:
    """Hardware and versions; the first line of every result."""

    device: str
    gpu: str
    driver: str
    cuda: str
    cpu: str
    threads: int
    torch: str
    python: str
    adaptlr: str
    commit: str

    def line(self) -> str:
        """Return all of it as one line."""
        on_gpu = [self.gpu, f"driver {self.driver}", f"CUDA {self.cuda}"] if self.gpu else []
        host = [self.cpu, f"{self.threads} thread", f"Python {self.python}"]
        versions = [f"torch {self.torch}", f"adaptlr {self.adaptlr}", f"commit {self.commit}"]
        return ", ".join([*on_gpu, *host, *versions])

    def slug(self) -> str:
        """Return a name for files: the GPU's, or ``cpu``."""
        return re.sub(r"[^a-z0-9]+", "-", (self.gpu or "cpu").lower()).strip("-")


def facts_of(device: torch.device, commit: str = "") -> Facts:
    """Collect the facts about ``device``; ``commit`` where git cannot tell it."""
    on_gpu = device.type == "cuda"
    return Facts(
        device=device.type,
        gpu=torch.cuda.get_device_name(device) if on_gpu else "",
        driver=_driver() if on_gpu else "",
        cuda=torch.version.cuda or "" if on_gpu else "",
        cpu=_cpu(),
        threads=1,  # timing.quiet sees to it
        torch=torch.__version__,
        python=platform.python_version(),
        adaptlr=adaptlr.__version__,
        commit=commit or _commit(),
    )


def _output(command: Sequence[str]) -> str:
    """Return the first line that ``command`` prints, or nothing if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.partition("\n")[0].strip()


def _driver() -> str:
    return (
        _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]) or "unknown"
    )


def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1] if match else platform.processor() or platform.machine()


def _commit() -> str:
    """Return the commit of the checkout that this package is part of, if it is part of one."""
    source = Path(__file__)
    git = ["git", "-C", str(source.parent)]
    if not _output([*git, "ls-files", "--", source.name]):
        return "unknown"
    changed = "+" if _output([*git, "status", "--porcelain"]) else ""
    return _output([*git, "rev-parse", "--short", "HEAD"]) + changed
