"""Draws docs/decides_*.png: what the controller sees and does, in four short runs.

``python -m benchmarks.quality.decisions_plot docs``; half a minute on one core of a CPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import adaptlr
from adaptlr import Phase
from benchmarks.quality.digits import digits

STEPS, BATCH = 400, 64
WRONG_LABELS = 0.2  # a share of every batch, drawn anew: else the loss goes to 0 and has no noise
ROWS, LETTER = 3, 5  # of labels above a picture; how many steps a letter takes
BROKEN_STEP, SHUFFLED_STEP, CHANGED_STEP = 150, 220, 240
COLORS = {
    Phase.SEARCH: "#8b3fb5",
    Phase.TEST: "#c9741b",
    Phase.PROBE: "#c2366f",
    Phase.REWARM: "#14866d",
    Phase.HOLD: "#14866d",
    Phase.REGROW: "#14866d",
}
Trouble = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]


def single_batches(step: int, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Break one batch, and shuffle the labels of another."""
    if step == BROKEN_STEP:
        return images * torch.nan, labels
    return images, labels.flip(0) if step == SHUFFLED_STEP else labels


def new_data(step: int, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """From one step on every class has another number."""
    return images, (labels + 1) % 10 if step >= CHANGED_STEP else labels


def train(kind: type[torch.optim.Optimizer], lr: float, trouble: Trouble | None, peak=None):
    """Train a small CNN on scikit-learn's digits; return its controller."""
    data = digits()
    images = torch.tensor(data["inputs"][data["train"]]).float() / 16
    labels = torch.tensor(data["labels"][data["train"]]).long()
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten())
    model = nn.Sequential(*layers, nn.Linear(512, 10))
    momentum = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    optimizer = kind(model.parameters(), lr=lr, **momentum)
    controller = adaptlr.AdaptiveLR(optimizer, STEPS, lr=peak)
    for step in range(STEPS):
        chosen = torch.randint(len(images), (BATCH,))
        wrong = torch.rand(BATCH) < WRONG_LABELS
        x, y = images[chosen], torch.where(wrong, torch.randint(10, (BATCH,)), labels[chosen])
        x, y = (x, y) if trouble is None else trouble(step, x, y)
        loss = cross_entropy(model(x), y)
        loss.backward()
        controller.step(loss)
        controller.zero_grad()
    return controller


def draw(controller: adaptlr.AdaptiveLR, file: Path) -> None:
    """Draw one run: what was seen, and what was done."""
    records = controller.history()
    step, scale = records["step"], records["scale"]
    # In the record of an alarm, level is the one of the chart that gave it.
    at_events = np.isin(step, [event.step for event in controller.events()])
    level = np.where(at_events, np.nan, records["level"])
    figure = Figure(figsize=(8.6, 4.6), layout="constrained")
    loss, lr = figure.subplots(2, sharex=True, gridspec_kw={"height_ratios": [2, 1]})
    loss.plot(step, records["loss"], ".", color="0.55", ms=2.5, label="loss of each step")
    loss.fill_between(step, level - scale, level + scale, color="C0", alpha=0.18, linewidth=0)
    loss.plot(step, level, color="C0", label="level ± noise")
    loss.set_ylabel("loss")
    loss.set_ylim(0.4, 3.9)
    loss.legend(frameon=False, loc="upper right", fontsize=9)
    lr.plot(step, np.where(records["lr"] > 0, records["lr"], np.nan), color="0.2")
    lr.set_yscale("log")
    lr.set_ylabel("learning rate")
    lr.set_xlabel("step")
    for axes in (loss, lr):
        shade_phases(axes, records["phase"])
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.01)
    name_events(loss, controller.events())
    figure.savefig(file, dpi=130)


def shade_phases(axes: Axes, phases: np.ndarray) -> None:
    """Shade the stretches in which the guard is busy."""
    for phase, steps in groupby(range(len(phases)), key=lambda index: phases[index]):
        color = COLORS.get(Phase(phase))
        if color is not None:
            inside = list(steps)
            axes.axvspan(inside[0] - 0.5, inside[-1] + 0.5, color=color, alpha=0.12, linewidth=0)


def name_events(axes: Axes, events: list[adaptlr.Event]) -> None:
    """Write the kind of every event at its step, in the lowest row with room, or not at all."""
    transform, ends = axes.get_xaxis_transform(), [-STEPS] * ROWS
    for event in events:
        axes.axvline(event.step, color="0.3", linewidth=0.8, linestyle=(0, (3, 3)))
        row = next((row for row in range(ROWS) if ends[row] < event.step), None)
        if row is not None:
            height = 1.01 + 0.07 * row
            axes.text(event.step, height, event.kind, transform=transform, size=9)
            ends[row] = event.step + LETTER * len(event.kind)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the pictures go")
    folder = parser.parse_args().folder
    torch.set_num_threads(1)
    adam, sgd = torch.optim.AdamW, torch.optim.SGD
    draw(train(adam, 1e-2, single_batches), folder / "decides_batches.png")
    draw(train(sgd, 1.2, None), folder / "decides_rate.png")
    draw(train(adam, 1e-2, new_data), folder / "decides_data.png")
    draw(train(adam, 1e-2, None, peak="auto"), folder / "decides_search.png")


if __name__ == "__main__":
    main()
