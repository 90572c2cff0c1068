"""The faults: each writes into the script of a run, from step ``begin`` on.

What a run must show afterwards beside its final loss is said by `Demand`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import partial

import torch
from torch import nn

from benchmarks.reliability.faults.script import Actor, Script
from benchmarks.reliability.faults.tasks import CLASSES

Write = Callable[[Script, int, torch.Generator], None]
NAN, INF = float("nan"), float("inf")


class Demand(Enum):
    """What the guard must not have done by the end of the run."""

    UNTOUCHED = "no rollback and no cut"
    NO_CUT_LEFT = "no cut left"
    NOTHING = ""


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        name: As the tables have it.
        write: Changes a script from a step on; draws what it needs from the generator.
        demand: What else is asked than a good end.
        lasting: The reference run has it too, for the data stays that way.
        float_lr: Only for optimizers whose lr is a Python float.
    """

    name: str
    write: Write
    demand: Demand = Demand.NOTHING
    lasting: bool = False
    float_lr: bool = False


# -- broken numbers ------------------------------------------------------------------------------


def scaled_loss(value: float, length: int, script: Script, begin: int, _: torch.Generator) -> None:
    script.loss_scale[begin : begin + length] = value


def scaled_gradient(value: float, length: int, script: Script, begin: int, _: object) -> None:
    script.gradient_scale[begin : begin + length] = value


def quiet_start(script: Script, begin: int, _: torch.Generator) -> None:
    """Gradients a thousandth of what they will be: the second moment of AdamW lags behind."""
    script.gradient_scale[: begin // 2] = 1e-3


# -- broken data ---------------------------------------------------------------------------------


def noise_for_inputs(length: int, script: Script, begin: int, random: torch.Generator) -> None:
    inputs = script.course.inputs[begin : begin + length]
    inputs.copy_(10.0 * torch.randn(inputs.shape, generator=random))


def shuffled_labels(length: int, script: Script, begin: int, random: torch.Generator) -> None:
    for labels in script.course.labels[begin : begin + length]:
        labels.copy_(labels[torch.randperm(len(labels), generator=random)])


def noisy_labels(script: Script, begin: int, random: torch.Generator) -> None:
    """Half of all labels are drawn anew, for good."""
    labels = script.course.labels[begin:]
    other = torch.randint(CLASSES, labels.shape, generator=random)
    labels.copy_(torch.where(torch.rand(labels.shape, generator=random) < 0.5, other, labels))


def mirrored_inputs(script: Script, begin: int, _: torch.Generator) -> None:
    """The order of all inputs is reversed, for good and in the evaluation."""
    course = script.course
    course.inputs[begin:] = course.inputs[begin:].flip(-1)
    course.held_out_inputs.copy_(course.held_out_inputs.flip(-1))


def easy_start(script: Script, begin: int, _: torch.Generator) -> None:
    """Only one class until then: solved soon, with hardly a gradient left. The reference has it."""
    course = script.course
    inputs, labels = course.inputs.flatten(0, 1), course.labels.flatten()
    easy = (labels == labels.mode().values).nonzero()[:, 0]
    chosen = easy[torch.arange(begin // 2 * course.labels.shape[1]) % len(easy)]
    course.inputs[: begin // 2] = inputs[chosen].reshape(course.inputs[: begin // 2].shape)
    course.labels[: begin // 2] = labels[chosen].reshape(course.labels[: begin // 2].shape)


# -- a hand on the controls ----------------------------------------------------------------------


def peak_changed(factor: float, length: int, script: Script, begin: int, _: object) -> None:
    script.actions[begin].append(lambda run: run.set_peak(factor * run.peak))
    script.actions[begin + length].append(lambda run: run.set_peak(run.peak))


def lr_overwritten(factor: float, length: int, script: Script, begin: int, _: object) -> None:
    def write(run: Actor) -> None:
        for group in run.optimizer.param_groups:
            group["lr"] = factor * run.peak

    for step in range(begin, begin + length):
        script.actions[step].append(write)


@torch.no_grad()
def _scale_a_layer(factor: float, run: Actor) -> None:
    layers = [module for module in run.model.modules() if isinstance(module, nn.Linear)]
    layers[0].weight.mul_(factor)


def layer_scaled(factor: float, script: Script, begin: int, _: torch.Generator) -> None:
    script.actions[begin].append(partial(_scale_a_layer, factor))


# -- all of them ---------------------------------------------------------------------------------


def none(script: Script, begin: int, _: torch.Generator) -> None:
    pass


def other_batch(script: Script, begin: int, _: torch.Generator) -> None:
    """No fault: a batch is taken twice. Shows how far runs lie apart by chance."""
    script.course.inputs[begin] = script.course.inputs[begin - 1]
    script.course.labels[begin] = script.course.labels[begin - 1]


UNTOUCHED = Demand.UNTOUCHED
FAULTS = (
    Fault("none", none, UNTOUCHED),
    Fault("none, one batch taken twice", other_batch, UNTOUCHED),
    Fault("NaN loss", partial(scaled_loss, NAN, 1), UNTOUCHED),
    Fault("NaN loss, 12 steps", partial(scaled_loss, NAN, 12)),
    Fault("inf loss", partial(scaled_loss, INF, 1), UNTOUCHED),
    Fault("NaN gradients", partial(scaled_gradient, NAN, 1), UNTOUCHED),
    Fault("noise x 10 as inputs, 1 batch", partial(noise_for_inputs, 1), UNTOUCHED),
    Fault("noise x 10 as inputs, 3 batches", partial(noise_for_inputs, 3), UNTOUCHED),
    Fault("shuffled labels, 1 batch", partial(shuffled_labels, 1), UNTOUCHED),
    Fault("shuffled labels, 3 batches", partial(shuffled_labels, 3), UNTOUCHED),
    Fault("shuffled labels, 50 batches", partial(shuffled_labels, 50)),
    Fault("half of the labels noisy, for good", noisy_labels, Demand.NO_CUT_LEFT, lasting=True),
    Fault("inputs mirrored, for good", mirrored_inputs, Demand.NO_CUT_LEFT, lasting=True),
    Fault("peak x 100, 20 steps", partial(peak_changed, 100.0, 20)),
    Fault("lr x 100 written, 20 steps", partial(lr_overwritten, 100.0, 20), float_lr=True),
    Fault("a layer x 10", partial(layer_scaled, 10.0)),
    Fault("gradients x 0.001 at first", quiet_start),
    Fault("one class at first", easy_start, Demand.NO_CUT_LEFT, lasting=True),
)
