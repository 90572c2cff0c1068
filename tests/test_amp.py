"""Mixed precision on CUDA: autocast in bfloat16 and float16, and GradScaler's own skips."""

from __future__ import annotations

import pytest
import torch
from conftest import loss_of, parameters_of, same, skips
from optimizers import make

from adaptlr import AdaptiveLR
from adaptlr.telemetry import Flag

pytestmark = pytest.mark.cuda
NAN = float("nan")
CASES = ("SGD", "AdamW", "AdamW foreach=True", "RMSprop", "Adagrad")
STEPS, OVERFLOWS, BAD_LOSSES = 30, (8, 9, 20), (15,)


def scaled_run(make_model, data, case, dtype=torch.float16, micro_batches=1):
    """Train with GradScaler; some gradients overflow, some losses are NaN."""
    model = make_model(device="cuda")
    optimizer = make(case, model.parameters())
    controller = AdaptiveLR(optimizer, total_steps=2 * STEPS)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10, growth_interval=1000)
    kept = []
    for step in range(STEPS):
        for batch in data[step].chunk(micro_batches):
            with torch.autocast("cuda", dtype=dtype):
                loss = loss_of(model, batch)
            loss = loss * NAN if step in BAD_LOSSES else loss
            controller.observe(loss)
            scaler.scale(loss / micro_batches).backward()
        if step in OVERFLOWS:
            next(model.parameters()).grad.fill_(float("inf"))
        before = parameters_of(model)
        scaler.step(optimizer)
        scaler.update()
        controller.zero_grad()
        kept.append(same(parameters_of(model), before))
    torch.cuda.synchronize()
    return controller, scaler, kept


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_an_overflow_is_skipped_and_counted_once(case, make_model, data, micro_batches):
    controller, scaler, kept = scaled_run(make_model, data, case, micro_batches=micro_batches)
    assert [step for step in range(STEPS) if kept[step]] == sorted(OVERFLOWS + BAD_LOSSES)
    assert scaler.get_scale() == 2.0**10 / 2 ** len(OVERFLOWS + BAD_LOSSES)
    history = controller.history()
    assert torch.isfinite(torch.from_numpy(history["level"])).all()
    if case in ("SGD", "AdamW"):  # fused: GradScaler leaves the skip to the kernels
        assert len(history) == STEPS
        assert skips(controller) == len(OVERFLOWS) + len(BAD_LOSSES)
        overflowed = history["step"][(history["flags"] & int(Flag.OVERFLOW)) != 0]
        assert overflowed.tolist() == sorted(OVERFLOWS + BAD_LOSSES)
    else:  # GradScaler skips by itself: the step never comes, and its loss is dropped
        assert len(history) == STEPS - len(OVERFLOWS) - len(BAD_LOSSES)
        assert skips(controller) == 0
    assert history["step"].tolist() == list(range(len(history)))


@pytest.mark.parametrize("case", ["SGD", "AdamW", "RMSprop"])
def test_bfloat16_needs_no_scaler(case, make_model, data):
    model = make_model(device="cuda")
    controller = AdaptiveLR(make(case, model.parameters()), total_steps=2 * STEPS)
    for step in range(STEPS):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = loss_of(model, data[step]).bfloat16()
        loss = loss * NAN if step in BAD_LOSSES else loss
        loss.backward()
        before = parameters_of(model)
        controller.step(loss)
        controller.zero_grad()
        assert same(parameters_of(model), before) == (step in BAD_LOSSES)
    torch.cuda.synchronize()
    assert len(controller.history()) == STEPS
    assert skips(controller) == len(BAD_LOSSES)
