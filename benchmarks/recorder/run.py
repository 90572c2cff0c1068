"""Runs the three benchmarks of the recorder and writes ``results/recorder_cpu.md``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from adaptlr.bench.facts import facts_of

PARTS = {"overhead": "What recording costs", "kill": "Killed", "render": "A page of a long run"}
RESULT = Path(__file__).parents[1] / "results/recorder_cpu.md"


def main() -> None:
    load = f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    text = f"# The recorder\n\n{facts_of(torch.device('cpu')).line()}, {load}\n"
    for name, title in PARTS.items():
        command = [sys.executable, "-m", f"benchmarks.recorder.{name}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{name} has failed:\n{done.stdout}{done.stderr}")
        text += f"\n## {title}\n\n{done.stdout}"
    RESULT.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
