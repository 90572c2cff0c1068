"""How long does a first run wait for its kernels where adaptlr was built without nvcc?

Compiles the kernels by NVRTC in new processes, each with caches of its own, and starts each again
with what it has cached. Writes ``nvrtc_<device>.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from adaptlr.bench.facts import facts_of
from adaptlr.bench.timing import quartiles

RESULTS = Path(__file__).parents[1] / "results"
LIMITS = {"cold": 1000.0, "warm": 20.0}
SCRIPT = """
import json, time, torch
from adaptlr import nvrtc
from adaptlr.kernel_image import kernel_image
torch.zeros(1, device="cuda")  # the context is torch's, and the user has it anyway
start = time.perf_counter()
kernel_image(torch.cuda.current_device())
print(json.dumps([1e3 * (time.perf_counter() - start), next(nvrtc.libraries()).version]))
"""


def start(caches: str) -> tuple[float, str]:
    """Return the milliseconds that a new process waits for the kernels, and the NVRTC it took."""
    environment = {
        **os.environ,
        "ADAPTLR_KERNELS": "nvrtc",
        "XDG_CACHE_HOME": f"{caches}/adaptlr",
        "CUDA_CACHE_PATH": f"{caches}/cuda",  # NVRTC and the driver keep one themselves
    }
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT]
    run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    milliseconds, version = json.loads(run.stdout)
    return milliseconds, version


def measure(rounds: int) -> tuple[dict[str, np.ndarray], str]:
    times: dict[str, list[float]] = {"cold": [], "warm": []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as caches:
            for values in times.values():
                milliseconds, version = start(caches)
                values.append(milliseconds)
    return {name: np.array(values) for name, values in times.items()}, version


def report(times: dict[str, np.ndarray], line: str, version: str) -> str:
    rows = []
    for name, values in times.items():
        low, median, high = quartiles(values)
        met = "yes" if median <= LIMITS[name] else "**no**"
        rows.append(
            f"| {name} | {median:.0f} | {low:.0f} to {high:.0f} | {LIMITS[name]:.0f} | {met} |"
        )
    return "\n".join(
        [
            line,
            "",
            f"NVRTC {version}, {os.cpu_count()} processors. Milliseconds of a new process until "
            f"the kernels are loaded; medians and quartiles of {len(times['cold'])} processes.",
            "",
            "| cache | median | quartiles | at most | met |",
            "| --- | --- | --- | --- | --- |",
            *rows,
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output-dir", type=Path, default=RESULTS)
    parser.add_argument("--commit", default="", help="commit of the sources, outside of a clone")
    arguments = parser.parse_args()
    facts = facts_of(torch.device("cuda", torch.cuda.current_device()), arguments.commit)
    times, version = measure(arguments.rounds)
    text = report(times, facts.line(), version)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    (arguments.output_dir / f"nvrtc_{facts.slug()}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
