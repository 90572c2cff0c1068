"""Train a small character model on Python's own help pages, the whole step as one CUDA graph.

Needs a CUDA device and nothing to download. Prints how much faster the graph is than the same loop
run eagerly, then the course of the run. docs/cuda_graphs.md explains.
"""

from __future__ import annotations

import time
from pydoc_data import topics

import torch
from torch import nn

import adaptlr

STEPS, WIDTH, LENGTH, BATCH = 3000, 128, 64, 64


class Model(nn.Module):
    def __init__(self, characters: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, WIDTH)
        self.position = nn.Parameter(torch.zeros(LENGTH, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, 0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, characters)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH))

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        hidden = self.layers(
            self.embedding(text[:, :-1]) + self.position, self.mask, is_causal=True
        )
        return nn.functional.cross_entropy(self.head(hidden).flatten(0, 1), text[:, 1:].flatten())


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("a CUDA graph needs a CUDA device, and torch sees none")
    torch.manual_seed(0)
    text = " ".join(topics.topics.values())
    characters = sorted(set(text))
    codes = {character: code for code, character in enumerate(characters)}
    data = torch.tensor([codes[character] for character in text], device="cuda")
    offsets = torch.arange(LENGTH + 1, device="cuda")

    model = Model(len(characters)).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    controller = adaptlr.AdaptiveLR(optimizer, total_steps=STEPS + 100)
    batch = torch.zeros(BATCH, LENGTH + 1, dtype=torch.int64, device="cuda")

    def next_batch() -> None:
        starts = torch.randint(len(data) - LENGTH, (BATCH, 1), device="cuda")
        batch.copy_(data[starts + offsets])

    def train_step() -> None:
        controller.zero_grad()
        loss = model(batch)
        loss.backward()
        controller.step(loss)

    def time_steps(step, count: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            next_batch()
            step()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / count

    eager = time_steps(train_step, 100)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), controller.suspended():
        for _ in range(3):
            train_step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        train_step()

    for _ in range(5):
        captured = time_steps(graph.replay, STEPS // 5)
        controller.check()
        print(controller.status())
    print(f"eager {eager * 1e3:.2f} ms a step, captured {captured * 1e3:.2f} ms")
    for event in controller.events():
        print(f"step {event.step}: {event.reason}")


if __name__ == "__main__":
    main()
