"""Lightning under adaptlr: real runs of a small network, beside plain loops."""

from __future__ import annotations

import csv
import math
import warnings
from pathlib import Path

import pytest
import torch
from conftest import same

from adaptlr import AdaptiveLR

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what Lightning itself imports
    lightning = pytest.importorskip("lightning.pytorch")

from frameworks import (
    BATCH,
    STEPS,
    batches_of,
    digits,
    loss_of,
    make_network,
    state_of,
)
from lightning.pytorch.plugins import MixedPrecision

from adaptlr.integrations.lightning import AdaptiveLRCallback

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
]


class Module(lightning.LightningModule):
    """Automatic optimisation of the small network."""

    def __init__(self, overflow: int | None = None) -> None:
        super().__init__()
        self.network = make_network()
        self.overflow = overflow

    def training_step(self, batch, number):
        return loss_of(self.network, batch)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def on_after_backward(self):
        if self.trainer.fit_loop.epoch_loop.batch_idx == self.overflow:
            next(self.parameters()).grad.fill_(math.inf)


class Manual(Module):
    """The same, in the user's own words."""

    def __init__(self, accumulation: int = 1) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.accumulation = accumulation

    def training_step(self, batch, number):
        loss = loss_of(self.network, batch)
        self.manual_backward(loss / self.accumulation)
        if (number + 1) % self.accumulation == 0:
            self.optimizers().step()
            self.optimizers().zero_grad()


def make_trainer(callback, folder, **settings):
    return lightning.Trainer(
        **{
            "callbacks": [callback],
            "default_root_dir": folder,
            "accelerator": "cpu",
            "max_epochs": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **settings,
        }
    )


def fit(module, folder, ckpt_path=None, total_steps=None, options=None, **settings):
    callback = AdaptiveLRCallback(total_steps, **(options or {}))
    trainer = make_trainer(callback, folder, **settings)
    loader = torch.utils.data.DataLoader(digits(), batch_size=BATCH)
    trainer.fit(module, loader, ckpt_path=ckpt_path)
    return callback.controller


def plain_loop(accumulation=1, autocast=False, clip=None):
    network = make_network()
    steps = math.ceil(STEPS / accumulation)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    controller = AdaptiveLR(optimizer, steps, model=network)
    for number, batch in enumerate(batches_of(digits())):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast, cache_enabled=False):
            loss = loss_of(network, batch)
        (loss / accumulation).backward()
        controller.observe(loss)
        if (number + 1) % accumulation == 0 or number == STEPS - 1:
            if clip:
                torch.nn.utils.clip_grad_norm_(network.parameters(), clip)
            controller.step()
            controller.zero_grad()
    return controller, network


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("accumulation", [1, 2, 5])
def test_it_equals_a_plain_loop(accumulation, precision, tmp_path):
    module = Module()
    settings = {"accumulate_grad_batches": accumulation, "gradient_clip_val": 1.0}
    ours = fit(module, tmp_path, precision=precision, **settings).history()
    controller, network = plain_loop(accumulation, precision != "32-true", clip=1.0)
    assert same(state_of(module.network), state_of(network))
    theirs = controller.history()
    assert ours["lr"].tolist() == theirs["lr"].tolist()
    assert ours["step"].tolist() == theirs["step"].tolist()
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=3e-7)  # Lightning divides, we multiply


@pytest.mark.parametrize("accumulation", [1, 2])
def test_manual_optimisation_equals_a_plain_loop(accumulation, tmp_path):
    module = Manual(accumulation)
    ours = fit(module, tmp_path, total_steps=STEPS // accumulation).history()
    controller, network = plain_loop(accumulation)
    assert same(state_of(module.network), state_of(network))
    theirs = controller.history()
    assert ours["lr"].tolist() == theirs["lr"].tolist()
    assert ours["loss"] == pytest.approx(theirs["loss"] / accumulation, rel=1e-7)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_resumed_run_equals_one_that_never_stopped(accumulation, tmp_path):
    loader = torch.utils.data.DataLoader(digits(12), batch_size=BATCH)

    def two_epochs(ckpt_path=None):
        module, callback = Module(), AdaptiveLRCallback()
        saver = lightning.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        trainer = make_trainer(
            callback,
            tmp_path,
            callbacks=[callback, saver],
            enable_checkpointing=True,
            accumulate_grad_batches=accumulation,
            max_epochs=2,
        )
        trainer.fit(module, loader, ckpt_path=ckpt_path)
        return module, callback.controller.history()

    whole, expected = two_epochs()
    resumed, actual = two_epochs(tmp_path / "epoch=0.ckpt")
    assert same(state_of(resumed), state_of(whole))
    assert len(expected) == STEPS // accumulation
    for field in ("step", "loss", "lr", "level"):
        assert actual[field].tolist() == expected[field][12 // accumulation :].tolist(), field


@pytest.mark.parametrize("accumulation", [1, 2])
def test_with_grad_scaler_losses_are_unscaled_and_overflows_leave_no_trace(accumulation, tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    controller = fit(
        Module(overflow=7),
        tmp_path,
        plugins=[MixedPrecision("16-mixed", "cpu", scaler)],
        accumulate_grad_batches=accumulation,
    )
    assert scaler.get_scale() == 2.0**3
    history = controller.history()
    assert history["step"].tolist() == list(range(STEPS // accumulation - 1))
    first = plain_loop(accumulation)[0].history()["loss"][0]
    assert history["loss"][0] == pytest.approx(first, rel=1e-2)  # float16 has 11 bits
    assert (history["loss"] < 1.5 * first).all()


def test_the_rate_is_logged(tmp_path):
    logger = lightning.loggers.CSVLogger(tmp_path)
    controller = fit(Module(), tmp_path, logger=logger, log_every_n_steps=4)
    lines = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    lrs = {int(row["step"]): float(row["lr"]) for row in csv.DictReader(lines)}
    history = controller.history()["lr"]
    assert lrs == {step: history[step - 1] for step in range(4, STEPS + 1, 4)}


# -- what is refused ---------------------------------------------------------------------------


class Scheduled(Module):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 10)]


class Two(Manual):
    def configure_optimizers(self):
        return super().configure_optimizers(), torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("module", "settings", "message"),
    [
        (Scheduled, {}, r"without a scheduler, got StepLR: pass AdaptiveLRCallback\(decay="),
        (Two, {}, "must return one optimizer, got 2: make an adaptlr.AdaptiveLR for each"),
        (Manual, {}, "total_steps must be an int where the module steps by itself, got None"),
        (Module, {"max_epochs": -1}, "must be an int where the Trainer has no end, got None"),
    ],
)
def test_what_cannot_be_controlled_is_refused(module, settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        fit(module(), tmp_path, **settings)


def test_options_are_checked_at_once():
    with pytest.raises(TypeError, match="unexpected keyword argument 'sentry'"):
        AdaptiveLRCallback(sentry=None)
    with pytest.raises(RuntimeError, match=r"made when trainer.fit\(\) has begun"):
        _ = AdaptiveLRCallback().controller
