"""Question: how long does a page of a very long run take, how large is it, does a browser draw it?

A million losses with noise, three spikes and a broken step go through the control step and are
written as a recorder writes them. Then ``adaptlr report`` is timed, from the start of the process
to its end, and headless Chromium says after how many milliseconds the charts were drawn.
"""

from __future__ import annotations

import argparse
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from adaptlr.config import Guard, ResolvedConfig
from adaptlr.lines import FORMAT, event_line, records_to_json, to_json
from adaptlr.replay import replay

BLOCK = 500  # records a write


def make(path: Path, steps: int) -> None:
    """Write the recording."""
    rng = np.random.default_rng(0)
    losses = 1.2 + 1.3 * (1 + np.arange(steps) / 1e4) ** -0.5 + 0.1 * rng.standard_normal(steps)
    losses[[steps // 5, steps // 2, steps - 7]] = 60.0
    losses[steps // 3] = np.nan
    config = ResolvedConfig(
        total_steps=steps,
        warmup=0.01,
        decay="cosine",
        min_lr_ratio=0.0,
        guard=Guard(),
        peaks=[1e-4],
    )
    result = replay(config, losses)
    with path.open("wb") as file:
        header = {"total_steps": steps, "peak": 1e-4, "decay": "cosine", "warmup_steps": 0}
        file.write(to_json({"format": FORMAT, "config": header}).encode())
        for start in range(0, steps, BLOCK):
            file.write(records_to_json(result.records[start : start + BLOCK], float(start)))
        file.writelines(to_json(event_line(event, 0.0)).encode() for event in result.events)


def report(path: Path) -> tuple[float, float, Path]:
    """Return how long ``adaptlr report`` takes, its processor time, and the page."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    program = "from adaptlr.cli import app; app()"
    subprocess.run([sys.executable, "-c", program, "report", path], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - start, busy, path.with_suffix(".html")


def drawn_after(page: Path, profile: Path) -> str:
    """Return after how many milliseconds a browser has drawn the charts."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        return "no chromium here"
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += ["--disable-background-networking", f"--user-data-dir={profile}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.search(r'data-drawn="(\d+)"', done.stdout)
    return f"{int(found[1]) / 1000:.2f}" if found else "not drawn"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1_000_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "run.jsonl")
        make(path, options.steps)
        seconds, busy, page = report(path)
        drawn = drawn_after(page, Path(folder, "profile"))
        print(
            "| records | recording, MB | `adaptlr report`, s | of it processor time, s "
            "| page, MB | drawn after, s |"
        )
        print("|---|---|---|---|---|---|")
        print(
            f"| {options.steps:,} | {path.stat().st_size / 1e6:.0f} | {seconds:.2f} | {busy:.2f} "
            f"| {page.stat().st_size / 1e6:.2f} | {drawn} |"
        )


if __name__ == "__main__":
    main()
