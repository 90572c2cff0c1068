"""Streams, several controllers at once, and several devices."""

from __future__ import annotations

import queue
import threading

import pytest
import torch
from conftest import loss_of, parameters_of, same, skips, train

from adaptlr import AdaptiveLR

pytestmark = pytest.mark.cuda
NAN = float("nan")
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


def controlled(make_model, device="cuda", optimizer=torch.optim.AdamW, **options):
    model = make_model(device=device)
    made = optimizer(model.parameters(), lr=0.01, **options)
    return model, AdaptiveLR(made, total_steps=40)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.RMSprop])
def test_any_stream_will_do(make_model, data, optimizer):
    usual, first = controlled(make_model, optimizer=optimizer)
    train(first, usual, data[:20], poison=(5,))
    other, second = controlled(make_model, optimizer=optimizer)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        train(second, other, data[:20], poison=(5,))
    torch.cuda.synchronize()
    assert same(parameters_of(usual), parameters_of(other))
    assert first.history()["lr"].tolist() == second.history()["lr"].tolist()


def test_two_controllers_do_not_meet(make_model, data):
    """As in a GAN: two models, two optimizers, steps in turn."""
    generator, first = controlled(make_model)
    critic, second = controlled(make_model, optimizer=torch.optim.RMSprop)
    alone, third = controlled(make_model)
    for step, batch in enumerate(data[:20]):
        train(first, generator, [batch])
        if step % 2:
            train(second, critic, [batch], poison=(0,) if step == 5 else ())
        train(third, alone, [batch])
    torch.cuda.synchronize()
    assert len(first.history()) == 20
    assert len(second.history()) == 10
    assert (skips(first), skips(second)) == (0, 1)
    assert same(parameters_of(generator), parameters_of(alone))


def test_two_optimizers_share_a_model(make_model, data):
    model = make_model(device="cuda")
    controllers = [
        AdaptiveLR(torch.optim.SGD(model[0].parameters(), lr=0.1), total_steps=20),
        AdaptiveLR(torch.optim.AdamW(model[2].parameters(), lr=0.01), total_steps=20),
    ]
    for batch in data[:10]:
        loss = loss_of(model, batch)
        loss.backward()
        for controller in controllers:
            controller.step(loss)
        for controller in controllers:
            controller.zero_grad()
    torch.cuda.synchronize()
    first, second = (controller.history() for controller in controllers)
    assert first["loss"].tolist() == second["loss"].tolist()
    assert first["lr"].tolist() == pytest.approx((second["lr"] * 10).tolist())


def test_batches_may_come_from_other_threads(make_model, batches):
    ready: queue.Queue[torch.Tensor] = queue.Queue(maxsize=2)
    stream = torch.cuda.Stream()

    def load():
        with torch.cuda.stream(stream):
            for batch in batches[:20]:
                copied = batch.pin_memory().to("cuda", non_blocking=True)
                stream.synchronize()
                ready.put(copied)

    model, controller = controlled(make_model)
    thread = threading.Thread(target=load)
    thread.start()
    for _ in range(20):
        train(controller, model, [ready.get()])
    thread.join()
    torch.cuda.synchronize()
    assert len(controller.history()) == 20


@needs_two
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad])
def test_a_controller_works_on_a_device_that_is_not_current(make_model, data, optimizer):
    usual, first = controlled(make_model, "cuda:0", optimizer)
    other, second = controlled(make_model, "cuda:1", optimizer)
    assert torch.cuda.current_device() == 0
    train(first, usual, data[:20], poison=(5,))
    train(second, other, [batch.to("cuda:1") for batch in data[:20]], poison=(5,))
    assert torch.cuda.current_device() == 0
    for device in (0, 1):
        torch.cuda.synchronize(device)
    assert first.history()["lr"].tolist() == second.history()["lr"].tolist()
    moved = [parameter.to("cuda:0") for parameter in parameters_of(other)]
    assert same(parameters_of(usual), moved)


class Split(torch.nn.Module):
    """Two layers, each on a device of its own."""

    def __init__(self, model):
        super().__init__()
        self.first, self.last = model[0].to("cuda:0"), model[2].to("cuda:1")

    def forward(self, batch):
        return self.last(torch.tanh(self.first(batch)).to("cuda:1")).to("cuda:0")


@needs_two
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_parameters_may_lie_on_two_devices(make_model, data, optimizer):
    model = Split(make_model())
    made = optimizer(model.parameters(), lr=0.01)
    controller = AdaptiveLR(made, total_steps=40, snapshot="off")
    assert "'float'" in repr(controller)
    train(controller, model, data[:10])
    kept = parameters_of(model)
    loss = loss_of(model, data[0]) * NAN
    loss.backward()
    controller.step(loss)
    controller.zero_grad()
    train(controller, model, data[11:20])
    for device in (0, 1):
        torch.cuda.synchronize(device)
    assert skips(controller) == 1
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert not same(parameters_of(model), kept)
