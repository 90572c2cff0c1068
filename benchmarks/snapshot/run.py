"""What does a snapshot cost: not ordered, ordered on the device, and ordered into host memory?

Times the snapshot kernel by itself, beside ``copy_`` of as many bytes on the same device, and
trains a transformer of 85 M parameters with a snapshot into host memory every 100 steps and
without. Writes ``snapshot_<device>.md``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from adaptlr import AdaptiveLR, _extension
from adaptlr.bench.facts import facts_of
from adaptlr.bench.kernels import trace
from adaptlr.bench.timing import Quartiles, quartiles

RESULTS = Path(__file__).parents[1] / "results"
WIDTH, LAYERS, HEADS = 768, 12, 12
BATCH, LENGTH = 16, 512
EVERY = 100  # steps between snapshots
FIRST = 2
KERNEL = "adaptlr_snapshot"
IDLE_LIMIT, BANDWIDTH_LIMIT, THROUGHPUT_LIMIT = 2.0, 0.8, 0.99


class Transformer(nn.Module):
    """The layers of GPT-2's smallest form: 85 million parameters."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, 0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            return self.layers(batch).float().pow(2).mean()


class Training:
    """One model under adaptlr, with a way to order snapshots."""

    def __init__(self, device: torch.device, snapshot: str) -> None:
        torch.manual_seed(0)
        self.model = Transformer().to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        self.controller = AdaptiveLR(self.optimizer, 10**6, warmup=10, snapshot=snapshot)
        self.batch = torch.randn(BATCH, LENGTH, WIDTH, device=device)
        first = _extension.SAVE_OFFSET
        self.orders = self.controller._path._block[first : first + 8].view(torch.int32)
        self.save = torch.tensor([FIRST, 0], dtype=torch.int32, device=device)
        self.ordered = False
        self.optimizer.register_step_pre_hook(lambda *_: self._order())
        for _ in range(5):
            self.step()

    def _order(self) -> None:
        if self.ordered:
            self.orders.copy_(self.save)
            self.ordered = False

    def step(self) -> None:
        loss = self.model(self.batch)
        loss.backward()
        self.controller.step(loss)
        self.controller.zero_grad()

    def block(self, order: bool) -> float:
        """Return the milliseconds of EVERY steps, with an order in the midst of them or without."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for index in range(EVERY):
            self.ordered = order and index == EVERY // 2
            self.step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def milliseconds(action: Callable[[], object], times: int = 10) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(times):
        action()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / times


def time_kernel(training: Training, rounds: int) -> tuple[Quartiles, Quartiles, Quartiles]:
    """Return microseconds without an order, then GB/s of the kernel and of ``copy_``.

    Bytes are counted once: each is read and written.
    """
    path = training.controller._path
    stream = torch.cuda.current_stream().cuda_stream
    losses = [torch.ones((), device=training.batch.device)] * 50

    def run(_: object = None) -> None:
        path.core.snapshot(stream, path.table)

    training.orders.zero_()
    idle = quartiles(np.array(trace(run, losses).durations[KERNEL]))
    size = training.controller._attachment.snapshots.bytes // _extension.SLOTS
    source = torch.empty(size, dtype=torch.uint8, device=training.batch.device)
    target = torch.empty_like(source)
    training.orders.copy_(training.save)
    ours, plain = [], []
    for _ in range(rounds):
        ours.append(size / milliseconds(run) / 1e6)
        plain.append(size / milliseconds(lambda: target.copy_(source)) / 1e6)
    training.orders.zero_()
    return idle, quartiles(np.array(ours)), quartiles(np.array(plain))


def time_training(training: Training, rounds: int) -> tuple[Quartiles, Quartiles, Quartiles]:
    """Return milliseconds of a step without orders, with them, and the share of throughput kept."""
    without, ordered = [], []
    for index in range(rounds):
        for order in (True, False) if index % 2 else (False, True):
            (ordered if order else without).append(training.block(order) / EVERY)
    bare, saving = np.array(without), np.array(ordered)
    return quartiles(bare), quartiles(saving), quartiles(bare / saving)


def row(name: str, unit: str, values: Quartiles, digits: int) -> str:
    low, median, high = (f"{value:.{digits}f}" for value in values)
    return f"| {name} | {unit} | {median} | {low} to {high} |"


def target(name: str, limit: str, measured: str, met: bool) -> str:
    return f"| {name} | {limit} | {measured} | {'yes' if met else 'no'} |"


def measure(device: torch.device, rounds: int) -> list[str]:
    on_device = Training(device, "device")
    idle, ours, plain = time_kernel(on_device, rounds)
    size = on_device.controller._attachment.snapshots.bytes / _extension.SLOTS / 1e9
    del on_device
    on_host = Training(device, "host")
    bare, saving, kept = time_training(on_host, max(rounds // 4, 3))
    bandwidth = ours.median / plain.median
    return [
        f"AdamW on {size:.2f} GB of weights and state, batch {BATCH} x {LENGTH}, bfloat16 "
        f"autocast. Medians and quartiles of {rounds} rounds.",
        "",
        "| | | median | quartiles |",
        "| --- | --- | --- | --- |",
        row("the kernel without an order", "us", idle, 2),
        row("the kernel, filling a slot on the device", "GB/s", ours, 0),
        row("copy_ of as many bytes", "GB/s", plain, 0),
        row("a training step", "ms", bare, 2),
        row(f"a step, a slot in host memory filled every {EVERY}", "ms", saving, 2),
        "",
        "| target | limit | measured | met |",
        "| --- | --- | --- | --- |",
        target(
            "the kernel without an order",
            f"at most {IDLE_LIMIT} us",
            f"{idle.median:.2f} us",
            idle.median <= IDLE_LIMIT,
        ),
        target(
            "bandwidth, to that of copy_",
            f"at least {BANDWIDTH_LIMIT}",
            f"{bandwidth:.2f}",
            bandwidth >= BANDWIDTH_LIMIT,
        ),
        target(
            "throughput with slots in host memory, to that without orders",
            f"at least {THROUGHPUT_LIMIT}",
            f"{kept.median:.4f} ({kept.lower:.4f} to {kept.upper:.4f})",
            kept.median >= THROUGHPUT_LIMIT,
        ),
        "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--output-dir", type=Path, default=RESULTS)
    parser.add_argument("--commit", default="", help="commit of the sources, outside of a clone")
    arguments = parser.parse_args()
    device = torch.device("cuda", torch.cuda.current_device())
    facts = facts_of(device, arguments.commit)
    text = "\n".join([facts.line(), "", *measure(device, arguments.rounds)])
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    (arguments.output_dir / f"snapshot_{facts.slug()}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
