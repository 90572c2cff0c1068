"""torch.compile: compiled steps do what eager ones do, and break or recompile no more than torch.

A tensor lr is used where the number of compilations counts: a float lr makes torch compile anew
for every value, with or without adaptlr.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch._dynamo
import torch._dynamo.testing
from conftest import loss_of, parameters_of, same
from torch._dynamo.utils import counters

import adaptlr
from adaptlr import AdaptiveLR, Guard, _extension, compiled

# torch warns of its own parts while it compiles. That it cannot trace something is not to happen.
pytestmark = pytest.mark.filterwarnings("ignore:::torch", "error:Graph break due")

STEPS = 10
POISON = (0, 3, 4)
NAN = float("nan")
MODES = (
    "compiled optimizer.step",
    "observe and step",
    "observe, backward, step",
    "controller.step",
)


def tensor_lr() -> torch.Tensor:
    return torch.tensor(0.02)


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=tensor_lr(), momentum=0.9, weight_decay=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=tensor_lr(), foreach=False),
}


class WithoutBreak(torch.optim.Optimizer):
    """As many optimizers outside torch: its step goes into one graph with what surrounds it."""

    def __init__(self, params, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=group["lr"])


@pytest.fixture
def make_model() -> Callable[..., torch.nn.Module]:
    """Return a maker of the smallest model: the time to compile grows with the parameters."""

    def make(seed: int = 0, device: str = "cpu") -> torch.nn.Module:
        torch.manual_seed(seed)
        return torch.nn.Linear(6, 1, device=device)

    return make


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class Run(NamedTuple):
    parameters: list[torch.Tensor]
    controller: AdaptiveLR | None
    graphs: int
    breaks: int


def train(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: list[torch.Tensor],
    mode: str,
    *,
    controller: AdaptiveLR | None = None,
    lrs: list[float] | None = None,
    poison: tuple[int, ...] = (),
    backend: str | None = "aot_eager",
    steps: int = STEPS,
    settled: bool = False,
) -> Run:
    """Train under torch.compile (``backend=None``: without), and count what it compiled.

    ``settled``: refuse to recompile once the optimizer has made its state, for which torch does.
    """
    torch._dynamo.reset()
    counters.clear()
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend or "eager")

    def compile_it(function: Callable) -> Callable:
        return torch.compile(function, backend=counter) if backend else function

    step = optimizer.step
    if mode == "compiled optimizer.step":
        step = compile_it(optimizer.step)

    def forward_and_step(batch: torch.Tensor, factor: torch.Tensor) -> None:
        loss = loss_of(model, batch)
        if controller is not None and mode == "observe, backward, step":
            controller.observe(loss * factor)
        loss.backward()
        loss = loss * factor
        if controller is not None and mode == "controller.step":
            controller.step(loss)
            return
        if controller is not None and mode != "observe, backward, step":
            controller.observe(loss)
        step()

    train_one = forward_and_step
    if mode != "compiled optimizer.step":
        train_one = compile_it(forward_and_step)
    for index in range(steps):
        if lrs is not None:
            optimizer.param_groups[0]["lr"].fill_(lrs[index])
        if controller is not None or index not in poison:
            with torch._dynamo.config.patch(error_on_recompile=settled and index >= 2):
                train_one(batches[index], torch.tensor(NAN if index in poison else 1.0))
        optimizer.zero_grad()
    breaks = sum(counters["graph_break"].values())
    return Run(parameters_of(model), controller, counter.frame_count, breaks)


def controlled(
    make_model,
    make_optimizer,
    batches,
    mode,
    guard=Guard(),  # noqa: B008
    snapshot="auto",
    **options,
) -> Run:
    model = make_model()
    optimizer = make_optimizer(model.parameters())
    controller = AdaptiveLR(optimizer, total_steps=STEPS, guard=guard, snapshot=snapshot)
    return train(model, optimizer, batches, mode, controller=controller, **options)


def bare(make_model, make_optimizer, batches, mode, **options) -> Run:
    model = make_model()
    return train(model, make_optimizer(model.parameters()), batches, mode, **options)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_nothing_breaks_or_recompiles_beyond_the_bare_optimizer(name, mode, make_model, batches):
    lrs = [0.02 - 0.001 * step for step in range(STEPS)]
    without = bare(make_model, OPTIMIZERS[name], batches, mode, lrs=lrs)
    run = controlled(make_model, OPTIMIZERS[name], batches, mode, settled=True)
    assert len(set(run.controller.history()["lr"])) == STEPS
    assert run.graphs == without.graphs
    assert run.breaks <= without.breaks


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_compiled_run_decides_as_an_eager_one_and_skips_exactly(name, mode, make_model, batches):
    eager = controlled(make_model, OPTIMIZERS[name], batches, mode, backend=None, poison=POISON)
    run = controlled(make_model, OPTIMIZERS[name], batches, mode, poison=POISON)
    history, expected = run.controller.history(), eager.controller.history()
    for field in ("step", "lr", "action", "factor"):
        np.testing.assert_array_equal(history[field], expected[field], err_msg=field)
    assert np.flatnonzero(history["action"]).tolist() == list(POISON)
    torch.testing.assert_close(run.parameters, eager.parameters)  # compiled arithmetic may differ
    lrs = history["lr"].tolist()
    without = bare(make_model, OPTIMIZERS[name], batches, mode, lrs=lrs, poison=POISON)
    assert same(run.parameters, without.parameters)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "make_optimizer",
    [lambda p: torch.optim.SGD(p, lr=0.05), lambda p: WithoutBreak(p, 0.05)],
    ids=["SGD", "an optimizer without a break of its own"],
)
def test_a_float_lr_arrives_on_time(make_optimizer, mode, make_model, batches):
    options = {"poison": (0, 3), "steps": 6}
    run = controlled(make_model, make_optimizer, batches, mode, **options)
    eager = controlled(make_model, make_optimizer, batches, mode, backend=None, **options)
    np.testing.assert_array_equal(run.controller.history()["lr"], eager.controller.history()["lr"])
    torch.testing.assert_close(run.parameters, eager.parameters, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_the_end_of_the_run_is_told(mode, make_model, batches):
    with pytest.warns(UserWarning, match="total_steps=10 are over"):
        controlled(make_model, OPTIMIZERS["SGD"], batches, mode, steps=STEPS + 2)


@pytest.mark.parametrize("mode", MODES)
def test_a_diverged_run_raises(mode, make_model, batches):
    with pytest.raises(adaptlr.TrainingDiverged, match="the loss is nan"):
        controlled(
            make_model,
            OPTIMIZERS["SGD"],
            batches,
            mode,
            guard=Guard(max_consecutive_skips=2),
            snapshot="off",
            poison=(2, 3, 4, 5),
        )


def attached(make_model, **options) -> tuple[torch.nn.Module, torch.optim.Optimizer, AdaptiveLR]:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=tensor_lr())
    return model, optimizer, AdaptiveLR(optimizer, total_steps=STEPS, **options)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_micro_batches_are_observed_in_one_graph(reduction, make_model):
    _, optimizer, controller = attached(make_model)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def observe(loss: torch.Tensor) -> None:
        controller.observe(loss, reduction=reduction)
        controller.observe(2 * loss, reduction=reduction, grad_norm=loss + 1)
        controller.observe(3.0, reduction=reduction)

    observe(torch.tensor(2.0))
    optimizer.step()
    assert controller.history()["loss"][0] == (3.0 if reduction == "mean" else 9.0)
    assert controller.history()["grad_norm"][0] == 3.0


def test_errors_are_those_of_eager_calls(make_model):
    *_, controller = attached(make_model)
    observe = torch.compile(lambda loss: controller.observe(loss), backend="aot_eager")
    with pytest.raises(ValueError, match="loss must have one element, got shape \\(3,\\)"):
        observe(torch.ones(3))
    with pytest.raises(TypeError, match="loss must be of a floating-point dtype"):
        observe(torch.ones((), dtype=torch.int64))
    step = torch.compile(lambda: controller.step(), backend="aot_eager")
    with pytest.raises(RuntimeError, match="step needs a loss"):
        step()


def test_a_compiled_step_takes_a_closure(make_model, batches):
    def run(compile_it: Callable) -> tuple[AdaptiveLR, list[torch.Tensor]]:
        model, optimizer, controller = attached(make_model)

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, batches[0])
            loss.backward()
            return loss

        step = compile_it(optimizer.step)
        for _ in range(4):
            step(closure)
        return controller, parameters_of(model)

    eager, expected = run(lambda step: step)
    controller, parameters = run(lambda step: torch.compile(step, backend="aot_eager"))
    np.testing.assert_array_equal(controller.history()["lr"], eager.history()["lr"])
    torch.testing.assert_close(parameters, expected)


def test_a_compiled_step_carries_out_orders_for_snapshots(make_model, batches):
    model, optimizer, controller = attached(make_model)
    start = parameters_of(model)
    orders = []  # of the coming step

    @torch.compiler.disable
    def order(*_: object) -> None:  # behind adaptlr's own hook
        if orders:
            controller._path.order = orders.pop()
            controller._path.await_update()

    optimizer.register_step_pre_hook(order)
    step = torch.compile(lambda loss: controller.step(loss), backend="aot_eager")
    for index, batch in enumerate(batches[:6]):
        if index == 5:
            assert not same(parameters_of(model), start)
            orders.append(_extension.START_SLOT << 4)
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        step(loss)
    assert same(parameters_of(model), start)


def test_two_controllers_share_compiled_code(make_model, batches):
    runs = [attached(make_model) for _ in range(2)]

    @torch.compile(backend="aot_eager")
    def observe(controller: AdaptiveLR, loss: torch.Tensor) -> None:
        controller.observe(loss)

    for loss, (_, optimizer, controller) in enumerate(runs):
        observe(controller, torch.tensor(float(loss)))
        optimizer.step()
    assert [controller.history()["loss"].tolist() for *_, controller in runs] == [[0.0], [1.0]]


def test_inductor_observes_inside_a_graph_with_gradients(make_model):
    _, optimizer, controller = attached(make_model)

    @torch.compile(fullgraph=True)
    def forward(weight: torch.Tensor) -> torch.Tensor:
        loss = (weight * weight).sum()
        controller.observe(loss)
        return loss * 2

    weight = torch.full((4,), 3.0, requires_grad=True)
    for _ in range(3):
        forward(weight).backward()
        optimizer.step()
    assert controller.history()["loss"].tolist() == [36.0] * 3
    assert weight.grad.tolist() == [36.0] * 4  # 3 x 2 x 2 x 3


def test_a_torch_without_dynamos_private_names_is_no_obstacle(monkeypatch):
    monkeypatch.delattr(torch._dynamo.decorators, "skip")
    compiled._teach_dynamo.__wrapped__()


@pytest.mark.cuda
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_the_fused_path_compiles(name, mode, make_model, batches):
    data = [batch.cuda() for batch in batches]

    def make_on_device() -> torch.nn.Module:
        return make_model(device="cuda")

    def make_optimizer(parameters):
        return getattr(torch.optim, name)(parameters, lr=0.02, fused=True)

    def with_device_lr(parameters):
        optimizer = make_optimizer(parameters)
        optimizer.param_groups[0]["lr"] = torch.tensor(0.02, device="cuda")
        return optimizer

    eager = controlled(make_on_device, make_optimizer, data, mode, backend=None, poison=POISON)
    run = controlled(make_on_device, make_optimizer, data, mode, poison=POISON)
    without = bare(make_on_device, with_device_lr, data, mode)
    torch.cuda.synchronize()
    history, expected = run.controller.history(), eager.controller.history()
    assert np.flatnonzero(history["action"]).tolist() == list(POISON)
    np.testing.assert_array_equal(history["action"], expected["action"])
    np.testing.assert_allclose(history["lr"], expected["lr"], rtol=1e-6)
    torch.testing.assert_close(run.parameters, eager.parameters)
    assert run.graphs <= without.graphs
    assert run.breaks <= without.breaks
