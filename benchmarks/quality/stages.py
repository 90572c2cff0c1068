"""The work of one step, in stages: plain calls on the CPU, one CUDA graph each on the device.

These models are so small that an eager step mostly launches kernels; a graph is several times as
fast and lets several runs share a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from adaptlr.cli.demo_training import MAX_GRAD_NORM, trainable
from benchmarks.quality.data import Data

WARM_UP_ITERATIONS = 3  # torch asks for some before a capture

Stage = Callable[[], object]


class Eager:
    """A stage that no graph can hold; it is called between the graphs of the others."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage

    def __call__(self) -> None:
        self.stage()


class Gradients:
    """The stage that every method shares: clipped gradients of the batch at `index`.

    Attributes:
        index: Which examples; the next row is copied in before the stage runs.
        loss: Of that batch, once the stage has run.
        norm: Of its gradient, before clipping.
    """

    loss: Tensor
    norm: Tensor

    def __init__(self, model: nn.Module, data: Data, index: Tensor) -> None:
        self.model = model
        self.parameters = trainable(model)
        self.data = data
        self.index = index.clone()

    def __call__(self) -> None:
        # To None, so that a capture finds them in the memory of its graph.
        self.model.zero_grad(set_to_none=True)
        loss = self.data.loss(self.model, self.index)
        loss.backward()
        self.norm = clip_grad_norm_(self.parameters, MAX_GRAD_NORM)
        self.loss = loss.detach()


def captured(
    stages: Sequence[Stage], model: nn.Module, suspended: AbstractContextManager
) -> list[Stage]:
    """Capture every stage but the eager ones; parameters and buffers are left as they were.

    Optimizer state is not: the iterations before the capture create it, as they must.

    Args:
        stages: Run in this order in every step.
        model: What they train.
        suspended: The context of the iterations before the capture.
    """
    tensors = [*model.parameters(), *model.buffers()]
    before = [tensor.detach().clone() for tensor in tensors]
    with suspended:
        _iterate([stage for stage in stages if not isinstance(stage, Eager)])
    ready = [stage if isinstance(stage, Eager) else _capture(stage).replay for stage in stages]
    # BatchNorm has counted the iterations, whatever the optimizer did in them.
    copy_into(tensors, before)
    return ready


def _iterate(stages: Iterable[Stage]) -> None:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_ITERATIONS):
            for stage in stages:
                stage()
    torch.cuda.current_stream().wait_stream(stream)


def _capture(stage: Stage) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stage()
    return graph


@torch.no_grad()
def copy_into(tensors: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    """Write ``values`` where ``tensors`` are: graphs know them by address."""
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


@torch.no_grad()
def clear_state(optimizer: torch.optim.Optimizer) -> None:
    """Make the optimizer one that has taken no step, in place.

    Zero is how AdamW starts; SGD starts its momentum with the first gradient, which is what zero
    times the momentum plus that gradient comes to.
    """
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                value.zero_()
