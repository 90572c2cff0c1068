"""What the user's own functions are told."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import loss_of, train

from adaptlr import AdaptiveLR, Event, Guard


def controlled(make_model, device="cpu", **options):
    model = make_model(device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return model, AdaptiveLR(optimizer, total_steps=64, **options)


def test_every_event_is_told_once_when_it_happens(make_model, batches):
    told: list[Event] = []
    model, controller = controlled(make_model, on_event=told.append, snapshot="off")
    train(controller, model, batches[:10], poison=(3,))
    assert [(event.step, event.kind) for event in told] == [(3, "skip")]
    train(controller, model, batches[10:20], poison=(2, 3))
    assert told == controller.events()


def test_a_run_that_ends_tells_why_before_it_raises(make_model):
    told: list[Event] = []
    guard = Guard(max_consecutive_skips=1)
    _, controller = controlled(make_model, on_event=told.append, guard=guard, snapshot="off")
    controller.step(math.nan)
    with pytest.raises(RuntimeError):
        controller.step(math.nan)
    assert [event.kind for event in told] == ["skip", "failed"]


def test_a_callback_that_cannot_be_called_is_refused(make_model):
    with pytest.raises(TypeError, match="on_event must be callable or None, got str"):
        controlled(make_model, on_event="mail")


@pytest.mark.cuda
def test_a_device_tells_when_the_host_hears_of_it(make_model, data):
    told: list[Event] = []
    model, controller = controlled(make_model, "cuda", on_event=told.append, snapshot="off")
    for step, batch in enumerate(data[:10]):
        loss = loss_of(model, batch) * (math.nan if step == 3 else 1.0)
        loss.backward()
        controller.step(loss)
        controller.zero_grad()
    torch.cuda.synchronize()
    controller.status()
    assert [(event.step, event.kind) for event in told] == [(3, "skip")]
