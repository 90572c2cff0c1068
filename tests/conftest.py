"""Fixtures that every test file may use."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

HAS_CUDA = torch.cuda.is_available()

Loop = Callable[..., Any]

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers take the cores


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("cuda") and not HAS_CUDA:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def make_model() -> Callable[..., torch.nn.Module]:
    """Return a maker of one small model; the same seed makes the same parameters."""

    def make(seed: int = 0, device: str = "cpu") -> torch.nn.Module:
        torch.manual_seed(seed)
        layers = (torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        return torch.nn.Sequential(*layers).to(device)

    return make


@pytest.fixture
def batches() -> list[torch.Tensor]:
    """Return 64 batches of inputs, always the same."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 6, generator=generator) for _ in range(64)]


@pytest.fixture
def data(batches: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the batches on the current CUDA device."""
    return [batch.cuda() for batch in batches]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Keep torch to one thread: more only wait for each other in models as small as these."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def fresh_accelerate(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let every test have its own settings: Accelerate keeps them for the whole process."""
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)  # transformers 4 leaves it set
    yield
    state = pytest.importorskip("accelerate").state
    state.AcceleratorState._reset_state(reset_partial_state=True)
    state.GradientState._reset_state()


def loss_of(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Mean squared error against a fixed function of the inputs."""
    return (model(batch)[:, 0] - batch[:, 0] * batch[:, 1]).pow(2).mean()


def train(controller: Any, model: torch.nn.Module, batches: list[Any], poison: Any = ()) -> None:
    """Run a plain loop under a controller; the losses of the poisoned steps are NaN."""
    for step, batch in enumerate(batches):
        loss = loss_of(model, batch) * (float("nan") if step in poison else 1.0)
        loss.backward()
        controller.step(loss)
        controller.zero_grad()


def train_bare(
    optimizer: torch.optim.Optimizer, model: torch.nn.Module, batches: list[Any]
) -> None:
    """Run a plain loop without adaptlr."""
    for batch in batches:
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()


def skips(controller: Any) -> int:
    """Steps that the records say were skipped."""
    return int((controller.history()["action"] & 1).sum())


def parameters_of(model: torch.nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    """Whether two lists of tensors are equal bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))
