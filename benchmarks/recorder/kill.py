"""Question: what is lost when a training process is killed with SIGKILL at a random moment?

Each round forks a process that trains a small model with a recorder, as fast as it goes or with
pauses, kills it after a random time, and compares the file with what the process had done: it notes
the time of every step in memory that it shares with this one.
"""

from __future__ import annotations

import argparse
import mmap
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from adaptlr import AdaptiveLR, Recorder
from adaptlr.recording import read

MAX_STEPS = 1_000_000


class Loss(NamedTuple):
    """What one kill cost."""

    steps: int
    lost_steps: int
    lost_seconds: float
    damaged: int


def train(path: Path, times: np.ndarray, pause: float) -> None:
    """Train until killed; note when each step was done."""
    torch.manual_seed(0)
    model = torch.nn.Linear(16, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    controller = AdaptiveLR(optimizer, MAX_STEPS, recorder=Recorder(path, max_bytes=1_000_000))
    inputs = torch.randn(32, 16)
    for step in range(MAX_STEPS):
        loss = model(inputs).pow(2).mean() * (float("nan") if step % 1000 == 7 else 1.0)
        loss.backward()
        controller.step(loss)
        controller.zero_grad()
        times[step] = time.monotonic()
        if pause:
            time.sleep(pause)


def kill_once(path: Path, seconds: float, pause: float) -> Loss:
    """Let a process train into ``path`` for so long, kill it, and look at what is there."""
    shared = mmap.mmap(-1, 8 * MAX_STEPS)
    times = np.frombuffer(shared, dtype=np.float64)
    child = os.fork()
    if child == 0:
        train(path, times, pause)
        os._exit(0)
    while times[0] == 0:
        time.sleep(0.001)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    done = int(np.count_nonzero(times))
    recording = read(path)
    steps = recording.records["step"]
    assert steps.tolist() == list(range(len(steps))), "a record is missing in the middle"
    lost = times[done - 1] - times[len(steps)] if len(steps) < done else 0.0
    return Loss(done, done - len(steps), float(lost), recording.damaged)


def warm_up() -> None:
    """Take one step, for what torch imports then; no backward, whose threads forbid to fork."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.zeros(1)
    AdaptiveLR(torch.optim.SGD([parameter], lr=1.0), 1).step(1.0)


def kill_often(kills: int, seconds: float, seed: int) -> list[Loss]:
    """Kill so many processes, each within so many seconds."""
    warm_up()
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        return [
            kill_once(
                Path(folder, f"{i}.jsonl"), chance.uniform(0, seconds), chance.choice((0, 0.002))
            )
            for i in range(kills)
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=3.0, help="in which a kill may fall")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)  # a forked child has one thread
    losses = kill_often(options.kills, options.seconds, options.seed)
    worst = max(loss.lost_seconds for loss in losses)
    print("| kills | steps done | steps lost | most lost, s | lines that cannot be read |")
    print("|---|---|---|---|---|")
    print(
        f"| {len(losses)} | {sum(x.steps for x in losses)} | {sum(x.lost_steps for x in losses)} "
        f"| {worst:.2f} | {sum(x.damaged for x in losses)} |"
    )
    sys.exit(worst > 1.0)


if __name__ == "__main__":
    main()
