"""What does control cost inside a CUDA graph, and what does the graph gain over the usual loop?

Trains one small transformer four ways, in interleaved blocks: captured without any control of lr,
captured with adaptlr, eagerly with adaptlr, and eagerly as usual: a cosine scheduler and
``loss.item()`` in every step. Writes ``graphs_<device>.md``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from adaptlr import AdaptiveLR
from adaptlr.bench.facts import facts_of
from adaptlr.bench.timing import quartiles

RESULTS = Path(__file__).parents[1] / "results"
VOCABULARY, WIDTH, LAYERS, HEADS = 512, 256, 4, 4
BATCH, LENGTH = 32, 64
TOTAL_STEPS = 1_000_000
LR = 1e-4
LIMIT = 0.995

BARE = "CUDA graph, no control of lr"
CONTROLLED = "CUDA graph, adaptlr"
EAGER = "eager loop, adaptlr"
USUAL = "eager loop, CosineAnnealingLR and loss.item()"

Step = Callable[[], object]


class Transformer(nn.Module):
    """A language model of 3.4 million parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, 0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits = self.head(self.layers(self.embedding(tokens[:, :-1])))
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def make(device: torch.device) -> tuple[Transformer, torch.optim.Optimizer, torch.Tensor]:
    torch.manual_seed(0)
    model = Transformer().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True, capturable=True)
    return model, optimizer, torch.randint(VOCABULARY, (BATCH, LENGTH + 1), device=device)


def capture(iterate: Step) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        iterate()
    return graph


def warm_up(iterate: Step) -> None:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            iterate()
    torch.cuda.current_stream().wait_stream(stream)


def replayed(graph: torch.cuda.CUDAGraph, *read: object) -> Step:
    """Return what replays ``graph``, and keeps alive what the graph reads."""

    def step() -> object:
        graph.replay()
        return read

    return step


def bare_graph(device: torch.device) -> Step:
    model, optimizer, tokens = make(device)

    def iterate() -> None:
        optimizer.zero_grad()
        model(tokens).backward()
        optimizer.step()

    warm_up(iterate)
    return replayed(capture(iterate), iterate)


def controlled_graph(device: torch.device) -> tuple[Step, AdaptiveLR]:
    model, optimizer, tokens = make(device)
    controller = AdaptiveLR(optimizer, TOTAL_STEPS, warmup=10)

    def iterate() -> None:
        controller.zero_grad()
        loss = model(tokens)
        loss.backward()
        controller.step(loss)

    with controller.suspended():
        warm_up(iterate)
    return replayed(capture(iterate), iterate), controller


def eager_loop(device: torch.device) -> tuple[Step, AdaptiveLR]:
    model, optimizer, tokens = make(device)
    controller = AdaptiveLR(optimizer, TOTAL_STEPS, warmup=10)

    def step() -> None:
        loss = model(tokens)
        loss.backward()
        controller.step(loss)
        controller.zero_grad()

    return step, controller


def usual_loop(device: torch.device) -> Step:
    model, optimizer, tokens = make(device)
    for group in optimizer.param_groups:
        group["capturable"] = False
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, TOTAL_STEPS)

    def step() -> float:
        loss = model(tokens)
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def time_block(step: Step, steps: int) -> float:
    """Return the milliseconds of one step, by the device's clock."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    step()
    start.record()
    for _ in range(steps):
        step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / steps


def measure(device: torch.device, rounds: int, steps: int) -> dict[str, np.ndarray]:
    controlled, controller = controlled_graph(device)
    eager, eager_controller = eager_loop(device)
    arms = {
        BARE: (bare_graph(device), steps),
        CONTROLLED: (controlled, steps),
        EAGER: (eager, max(steps // 10, 5)),
        USUAL: (usual_loop(device), max(steps // 10, 5)),
    }
    times: dict[str, list[float]] = {name: [] for name in arms}
    for index in range(rounds):
        for name in list(arms)[:: 1 if index % 2 else -1]:
            step, count = arms[name]
            times[name].append(time_block(step, count))
    torch.cuda.synchronize()
    for events in (controller.events(), eager_controller.events()):
        if events:
            raise RuntimeError(f"the guard acted during the measurement: {events[0].reason}")
    return {name: np.array(values) for name, values in times.items()}


def report(times: dict[str, np.ndarray], line: str, rounds: int, parameters: int) -> str:
    throughput = quartiles(times[BARE] / times[CONTROLLED])
    gained = quartiles(times[USUAL] / times[CONTROLLED])
    met = "yes" if throughput.median >= LIMIT else "no"
    measured = f"{throughput.median:.4f} ({throughput.lower:.4f} to {throughput.upper:.4f})"
    model = f"A transformer of {parameters / 1e6:.1f} M parameters, batch {BATCH} x {LENGTH}"
    rows = []
    for name, values in times.items():
        low, median, high = quartiles(values)
        rows.append(f"| {name} | {median:.4f} | {low:.4f} to {high:.4f} |")
    return "\n".join(
        [
            line,
            "",
            f"{model}, fused AdamW, float32. Medians and quartiles of {rounds} interleaved rounds.",
            "",
            "| | ms a step | quartiles |",
            "| --- | --- | --- |",
            *rows,
            "",
            "| target | limit | measured | met |",
            "| --- | --- | --- | --- |",
            f"| throughput with adaptlr, to that without control | at least {LIMIT} | {measured} "
            f"| {met} |",
            "",
            f"The graph with adaptlr is {gained.median:.1f} times as fast as the usual eager loop.",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--steps", type=int, default=100, help="replays in a block")
    parser.add_argument("--output-dir", type=Path, default=RESULTS)
    parser.add_argument("--commit", default="", help="commit of the sources, outside of a clone")
    arguments = parser.parse_args()
    device = torch.device("cuda", torch.cuda.current_device())
    facts = facts_of(device, arguments.commit)
    times = measure(device, arguments.rounds, arguments.steps)
    parameters = sum(p.numel() for p in Transformer().parameters())
    text = report(times, facts.line(), arguments.rounds, parameters)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    (arguments.output_dir / f"graphs_{facts.slug()}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
