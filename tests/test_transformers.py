"""The Hugging Face Trainer under adaptlr: real runs of a small BERT, beside plain loops."""

from __future__ import annotations

import math
import os
import warnings

import numpy as np
import pytest
import torch
from conftest import same

from adaptlr import AdaptiveLR, Guard, Phase

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from frameworks import BATCH, STEPS, batches_of, digits, state_of  # noqa: E402

from adaptlr.integrations.transformers import AdaptiveLRCallback, attach  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread", "fresh_accelerate")
PEAK, WARMUP = 1e-2, 4
FORMS = ("attach", "callback")
# What peft and trl still ask transformers for.
old_names = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")


class Sequential(transformers.Trainer):
    """Takes the data in their order, as plain loops do."""

    def _get_train_sampler(self, *args):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def make_bert() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=17,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        num_labels=10,
        initializer_range=0.2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.BertForSequenceClassification(config)


def make_trainer(
    folder,
    form="attach",
    model=None,
    options=None,
    optimizers=(None, None),
    kind=Sequential,
    **args,
):
    """Return a Trainer that logs every step, and its callback; without one if form is None."""
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": BATCH,
        "optim": "adamw_torch_fused",
        "learning_rate": PEAK,
        "lr_scheduler_type": "cosine",
        "warmup_steps": WARMUP,
        "max_steps": STEPS,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        **args,
    }
    callback = AdaptiveLRCallback(**(options or {})) if form == "callback" else None
    trainer = kind(
        model=make_bert() if model is None else model,
        args=transformers.TrainingArguments(**settings),
        train_dataset=digits(STEPS),
        eval_dataset=digits(2),
        optimizers=optimizers,
        callbacks=[callback] if callback else None,
    )
    if form == "attach":
        callback = attach(trainer, **(options or {}))
    return trainer, callback


def logged(trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def plain_loop(model, accumulation=1, autocast=False) -> AdaptiveLR:
    """Train as the Trainer does by default, in a loop of one's own."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    names = transformers.Trainer.get_decay_parameter_names(None, model)
    groups = [
        [p for n, p in model.named_parameters() if (n in names) == decays and p.requires_grad]
        for decays in (True, False)
    ]
    optimizer = torch.optim.AdamW(
        [{"params": group} for group in groups], lr=PEAK, weight_decay=0, fused=True
    )
    steps = STEPS // accumulation
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, WARMUP, steps)
    controller = AdaptiveLR(optimizer, steps, warmup=WARMUP, decay=schedule)
    for number, batch in enumerate(batches_of(digits(STEPS))):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = model(**batch).loss
        (loss / accumulation).backward()
        controller.observe(loss)
        if (number + 1) % accumulation == 0:
            torch.nn.utils.clip_grad_norm_(trainable, 1.0)
            controller.step()
            controller.zero_grad()
    return controller


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_it_equals_a_plain_loop_bit_for_bit(form, bf16, tmp_path):
    trainer, callback = make_trainer(tmp_path, form, bf16=bf16)
    trainer.train()
    model = make_bert()
    controller = plain_loop(model, autocast=bf16)
    assert same(state_of(trainer.model), state_of(model))
    ours, theirs = callback.controller.history(), controller.history()
    assert ours["lr"].tolist() == theirs["lr"].tolist()
    assert ours["loss"].tolist() == theirs["loss"].tolist()
    warmup = [PEAK * (step + 1) / WARMUP for step in range(WARMUP)]
    assert ours["lr"][:WARMUP].tolist() == pytest.approx(warmup, rel=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_accumulated_losses_and_rates_are_those_of_a_plain_loop_and_of_the_logs(form, tmp_path):
    model = make_bert()
    model.accepts_loss_kwargs = False  # else the Trainer leaves it to the model to divide
    trainer, callback = make_trainer(
        tmp_path, form, model, gradient_accumulation_steps=2, max_steps=STEPS // 2
    )
    trainer.train()
    controller = plain_loop(make_bert(), accumulation=2)
    ours, theirs = callback.controller.history(), controller.history()
    assert len(ours) == STEPS // 2
    assert ours["lr"] == pytest.approx(theirs["lr"], rel=1e-7)
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    assert logged(trainer, "loss") == pytest.approx(ours["loss"], rel=1e-4)
    assert logged(trainer, "learning_rate") == ours["lr"].tolist()


@pytest.mark.parametrize(("form", "save_snapshots"), [("attach", False), ("callback", True)])
def test_a_resumed_run_equals_one_that_never_stopped(form, save_snapshots, tmp_path):
    settings = {
        "options": {"guard": Guard(), "save_snapshots": save_snapshots},
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "eval_steps": 8,
        "save_steps": 8,
        "load_best_model_at_end": True,
    }
    whole, callback = make_trainer(tmp_path / "whole", form, **settings)
    whole.train()
    assert len(logged(whole, "eval_loss")) == STEPS // 8
    resumed, other = make_trainer(tmp_path / "resumed", form, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-8"))
    assert same(state_of(resumed.model), state_of(whole.model))
    expected, actual = callback.controller.history()[8:], other.controller.history()
    for field in ("step", "loss", "lr", "level", "factor"):
        assert actual[field].tolist() == expected[field].tolist(), field
    assert other.controller.events()[0].reason == (
        "resumed at step 8 with its snapshots" if save_snapshots else "resumed at step 8"
    )


class Stop(transformers.TrainerCallback):
    """Ends a training early, as a machine that goes down does."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= 60


def test_a_run_resumed_within_a_search_equals_one_that_never_stopped(tmp_path):
    settings = {
        "options": {"lr": "auto", "save_snapshots": True},
        "max_steps": 300,  # the first 50 of them are a search
        "save_strategy": "steps",
        "save_steps": 30,
        "save_total_limit": 10,
    }
    whole, callback = make_trainer(tmp_path / "whole", **settings)
    whole.add_callback(Stop())
    whole.train()
    resumed, other = make_trainer(tmp_path / "resumed", **settings)
    resumed.add_callback(Stop())
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-30"))
    expected, actual = callback.controller.history(), other.controller.history()
    assert expected["phase"][29] == actual["phase"][0] == Phase.SEARCH
    assert expected["phase"][-1] == Phase.RUN
    assert actual["lr"].tolist() == expected["lr"][30:].tolist()
    assert actual["loss"].tolist() == expected["loss"][30:].tolist()
    assert same(state_of(resumed.model), state_of(whole.model))
    assert "found" in [event.kind for event in other.controller.events()]


@pytest.mark.parametrize("form", FORMS)
def test_label_smoothing_is_in_the_loss_that_is_observed(form, tmp_path):
    trainer, callback = make_trainer(tmp_path, form, label_smoothing_factor=0.3, max_steps=6)
    trainer.train()
    observed = callback.controller.history()["loss"]
    assert logged(trainer, "loss") == pytest.approx(observed, rel=1e-4)
    plain, _ = make_trainer(tmp_path, form, max_steps=6)
    plain.train()
    assert observed[-1] > logged(plain, "loss")[-1] + 0.01


@pytest.mark.parametrize("form", FORMS)
def test_an_optimizer_and_a_scheduler_that_were_given_are_used(form, tmp_path):
    model = make_bert()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, gamma=0.5)
    trainer, callback = make_trainer(
        tmp_path, form, model, optimizers=(optimizer, scheduler), max_steps=6, warmup_steps=0
    )
    for _ in range(2):  # a second training has the same schedule again
        trainer.train()
        assert callback.controller.history()["lr"].tolist() == [0.05] * 3 + [0.025] * 3
    other = torch.optim.SGD(model.parameters(), lr=0.05)
    trainer, callback = make_trainer(
        tmp_path, form, model, optimizers=(other, None), max_steps=6, warmup_steps=0
    )
    trainer.train()
    expected = [0.025 * (1 + math.cos(math.pi * step / 6)) for step in range(6)]
    assert logged(trainer, "learning_rate") == pytest.approx(expected)


@pytest.mark.parametrize("form", FORMS)
def test_options_win_over_the_arguments_of_the_trainer(form, tmp_path):
    options = {"lr": 1e-3, "warmup": 0, "decay": "linear"}
    trainer, callback = make_trainer(tmp_path, form, options=options, max_steps=4)
    trainer.train()
    expected = [0.75e-3, 0.5e-3, 0.25e-3, 0.0]
    assert callback.controller.history()["lr"].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("form", FORMS)
def test_a_run_that_is_shorter_than_its_warm_up_stays_on_it(form, tmp_path):
    trainer, callback = make_trainer(tmp_path, form, max_steps=4, warmup_steps=8)
    trainer.train()
    expected = [PEAK * step / 8 for step in range(4)]
    assert callback.controller.history()["lr"].tolist() == pytest.approx(expected)


class Poisoned(Sequential):
    """Has a loss that is not a number at one step."""

    def compute_loss(self, model, inputs, **kwargs):
        loss = super().compute_loss(model, inputs, **kwargs)
        return loss * math.nan if model.training and self.state.global_step == 5 else loss


@pytest.mark.parametrize("form", FORMS)
def test_a_loss_that_is_not_a_number_does_no_harm(form, tmp_path):
    trainer, callback = make_trainer(tmp_path, form, kind=Poisoned)
    trainer.train()
    assert np.flatnonzero(callback.controller.history()["action"] & 1).tolist() == [5]
    assert all(torch.isfinite(tensor).all() for tensor in state_of(trainer.model))


class Overflowing(Sequential):
    """Trains with GradScaler, on the CPU; the gradients of one step overflow."""

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        if self.state.global_step == 3:
            next(self.model.parameters()).grad.fill_(math.inf)
        return loss


@pytest.mark.parametrize("form", FORMS)
def test_a_step_that_grad_scaler_leaves_out_is_not_counted(form, tmp_path):
    trainer, callback = make_trainer(
        tmp_path,
        form,
        kind=Overflowing,
        gradient_accumulation_steps=2,
        max_steps=8,
        optim="adamw_torch",
    )
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    trainer.train()
    assert trainer.accelerator.scaler.get_scale() == 2.0**3
    history = callback.controller.history()
    assert history["step"].tolist() == list(range(7))
    losses = logged(trainer, "loss")
    assert history["loss"] == pytest.approx(losses[:3] + losses[4:], rel=1e-4)


@old_names
@pytest.mark.parametrize("form", FORMS)
def test_lora_trains_the_adapter_alone(form, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["query", "value"], modules_to_save=["classifier"])
    model = peft.get_peft_model(make_bert(), config)
    trainer, callback = make_trainer(tmp_path, form, model, learning_rate=3e-2)
    trainer.train()
    losses = callback.controller.history()["loss"]
    assert len(losses) == STEPS
    assert losses[-4:].mean() < losses[:4].mean() - 0.02
    assert logged(trainer, "learning_rate") == callback.controller.history()["lr"].tolist()


def make_llama() -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32}
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=17, **sizes, **layers))


@pytest.mark.parametrize("form", FORMS)
def test_losses_that_the_model_divides_by_the_items_of_all_micro_batches(form, tmp_path):
    trainer, callback = make_trainer(
        tmp_path, form, make_llama(), gradient_accumulation_steps=3, max_steps=8
    )
    for number, row in enumerate(trainer.train_dataset):
        row["labels"] = row["input_ids"].clone()
        row["labels"][: number % 60] = -100  # no two micro-batches have as many items
    trainer.train()
    observed = callback.controller.history()["loss"]
    assert logged(trainer, "loss") == pytest.approx(observed, rel=1e-4)
    assert 1.0 < observed[-1] < observed[0] < 4.0  # a mean over tokens, near ln 17 at first


@old_names
def test_sft_trainer_takes_it_as_any_trainer(tmp_path):
    trl = pytest.importorskip("trl")
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.models.WordLevel({str(shade): shade for shade in range(17)}, unk_token="0")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    rows = [{"text": " ".join(str(int(pixel)) for pixel in row["input_ids"])} for row in digits(2)]
    callback = AdaptiveLRCallback()
    trainer = trl.SFTTrainer(
        model=make_llama(),
        args=trl.SFTConfig(
            output_dir=str(tmp_path),
            max_steps=6,
            logging_steps=1,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            report_to="none",
            use_cpu=True,
            bf16=False,
            dataloader_pin_memory=False,
        ),
        train_dataset=pytest.importorskip("datasets").Dataset.from_list(rows),
        processing_class=transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="0", eos_token="16"
        ),
        callbacks=[callback],
    )
    trainer.train()
    history = callback.controller.history()
    assert logged(trainer, "loss") == pytest.approx(history["loss"], rel=1e-3)
    assert logged(trainer, "learning_rate") == history["lr"].tolist()


def gpu_waits(folder, form, steps, precision) -> int:
    """Return how often a whole training waits for the GPU, as far as torch sees it."""
    settings = {"logging_strategy": "no", "logging_nan_inf_filter": False, precision: True}
    trainer, callback = make_trainer(folder, form, use_cpu=False, max_steps=steps, **settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            trainer.train()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    if callback is not None:
        torch.cuda.synchronize()
        assert len(callback.controller.history()) == steps
        assert trainer.lr_scheduler.get_last_lr()[0] == callback.controller.lr
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_step_waits_no_more_often_for_the_gpu_than_without_adaptlr(precision, tmp_path):
    ours, theirs = (
        gpu_waits(tmp_path, form, 2 * STEPS, precision)
        - gpu_waits(tmp_path, form, STEPS, precision)
        for form in ("attach", None)
    )
    assert ours == theirs


# -- what is refused ---------------------------------------------------------------------------


def test_a_callback_that_comes_too_late_says_so(tmp_path):
    trainer, _ = make_trainer(tmp_path)
    trainer.callback_handler.callbacks.pop()
    trainer.add_callback(AdaptiveLRCallback())
    with pytest.raises(RuntimeError, match=r"call adaptlr.integrations.transformers.attach"):
        trainer.train()


def test_it_is_attached_once_and_its_options_are_checked(tmp_path):
    trainer, callback = make_trainer(tmp_path, "callback")
    with pytest.raises(RuntimeError, match="has an AdaptiveLRCallback already"):
        attach(trainer)
    with pytest.raises(RuntimeError, match=r"made when trainer\.train"):
        _ = callback.controller
    with pytest.raises(TypeError, match=r"trainer must be a transformers\.Trainer, got int"):
        attach(3)
    with pytest.raises(TypeError, match="unexpected keyword argument 'sentry'"):
        AdaptiveLRCallback(sentry=None)
    with pytest.raises(TypeError, match="multiple values for argument 'total_steps'"):
        AdaptiveLRCallback(total_steps=3)


@pytest.mark.parametrize("form", FORMS)
def test_a_scheduler_that_reacts_to_a_metric_is_refused(form, tmp_path):
    trainer, _ = make_trainer(
        tmp_path, form, lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="steps"
    )
    with pytest.raises(TypeError, match="got ReduceLROnPlateau, which reacts to a metric"):
        trainer.train()


class Headless(torch.nn.Module):
    """Returns something else than a loss."""

    def __init__(self, result):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(64, 10))
        self.result = result

    def forward(self, input_ids=None, labels=None):
        return self.result(input_ids.float() @ self.weight)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda logits: {"logits": logits}, "did not return a loss"),
        (lambda logits: (logits,), r"loss must have one element, got shape \(16, 10\)"),
    ],
)
def test_a_model_without_a_loss_is_told_of(form, result, message, tmp_path):
    trainer, _ = make_trainer(tmp_path, form, Headless(result))
    with pytest.raises(ValueError, match=message):
        trainer.train()
