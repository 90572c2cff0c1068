"""One run: a script carried out, eagerly or as a CUDA graph that is replayed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_

from adaptlr import AdaptiveLR, Guard, TrainingDiverged
from adaptlr.telemetry import Slot, restored_slot
from benchmarks.reliability.faults.script import Script

MAX_GRAD_NORM = 1.0
WARM_UP_ITERATIONS = 3  # torch asks for some before a capture

# Of a sweep in half decades without faults: of both tasks, and not at the edge.
PEAKS = {"fused AdamW": 3e-3, "foreach AdamW": 3e-3, "SGD momentum": 0.1, "RMSprop": 3e-3}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "fused AdamW": lambda weights, lr: torch.optim.AdamW(weights, lr=lr, fused=True),
    "foreach AdamW": lambda weights, lr: torch.optim.AdamW(weights, lr=lr, foreach=True),
    "SGD momentum": lambda weights, lr: torch.optim.SGD(weights, lr=lr, momentum=0.9),
    "RMSprop": lambda weights, lr: torch.optim.RMSprop(weights, lr=lr),
}


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        start: Held-out loss of the untrained model.
        end: The same after the last step.
        counts: How often each kind of event came.
        rollbacks: Steps after which weights were put back.
        factor: `Event.factor` of the last step: below 1 where a cut is left.
        events: What `AdaptiveLR.events` says, as lines.
    """

    start: float
    end: float
    counts: dict[str, int]
    rollbacks: int
    factor: float
    events: list[str]


class Run:
    """A model, its optimizer and its controller; an `Actor` for the faults."""

    def __init__(
        self, model: nn.Module, optimizer: str, script: Script, guard: Guard | None, graph: bool
    ) -> None:
        course = script.course
        self.model = model
        self.peak = PEAKS[optimizer]
        self.optimizer = OPTIMIZERS[optimizer](model.parameters(), self.peak)
        self.script = script
        self.inputs, self.labels = course.inputs[0].clone(), course.labels[0].clone()
        self.scales = torch.ones(2, device=course.labels.device)
        self.controller = AdaptiveLR(self.optimizer, len(course.labels), guard=guard, model=model)
        self._step = self._captured() if graph else self.iterate

    def set_peak(self, lr: float) -> None:
        self.controller.set_peak(lr)

    def iterate(self) -> None:
        self.optimizer.zero_grad()
        loss = cross_entropy(self.model(self.inputs), self.labels) * self.scales[0]
        (loss * self.scales[1]).backward()
        norm = clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)
        self.controller.step(loss.detach(), grad_norm=norm)

    def train(self) -> None:
        """Take all steps, or those until the guard ends the run."""
        script = self.script
        scales = torch.stack([script.loss_scale, script.gradient_scale], 1).to(self.labels.device)
        for step in range(len(scales)):
            for action in script.actions.get(step, ()):
                action(self)
            self.inputs.copy_(script.course.inputs[step])
            self.labels.copy_(script.course.labels[step])
            self.scales.copy_(scales[step])
            self._step()
            self.controller.check()

    def _captured(self) -> Callable[[], None]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), self.controller.suspended():
            for _ in range(WARM_UP_ITERATIONS):
                self.iterate()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.iterate()
        return graph.replay


@torch.no_grad()
def evaluate(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    """Return the mean loss; NaN and inf are what they are."""
    return float(cross_entropy(model(inputs), labels))


def train(
    model: nn.Module, optimizer: str, script: Script, guard: Guard | None, graph: bool
) -> Outcome:
    """Carry out ``script`` with ``model``, which lies on the device of the script's course."""
    held_out = script.course.held_out_inputs, script.course.held_out_labels
    start = evaluate(model, *held_out)
    run = Run(model, optimizer, script, guard, graph)
    ended = []
    try:
        run.train()
    except TrainingDiverged as error:
        ended = [str(error)]
    run.controller.detach()  # waits for the device: the records are complete then
    history, events = run.controller.history(), run.controller.events()
    return Outcome(
        start,
        evaluate(model, *held_out),
        dict(Counter(event.kind for event in events)),
        sum(restored_slot(row) != Slot.NONE for row in history),
        float(history["target_factor"][-1]),
        [f"{event.step} {event.kind}: {event.reason}" for event in events] + ended,
    )
