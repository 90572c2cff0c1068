"""The quality benchmark on random pictures: its methods, its grid, its report."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from adaptlr.bench.timing import quiet
from benchmarks.quality import free, grid, judge, report
from benchmarks.quality.data import Characters, Labelled
from benchmarks.quality.methods import ALL_METHODS, METHODS
from benchmarks.quality.peers import SkipSixSigma
from benchmarks.quality.peers_report import compared, fixed_rows, peers_report
from benchmarks.quality.search_report import scored, search_report, search_steps
from benchmarks.quality.stages import Gradients
from benchmarks.quality.tasks import ALL_TASKS, SCRATCH_TASKS, TASKS, progress_recovered
from benchmarks.quality.training import CURVE_POINTS, Run, train

CPU = torch.device("cpu")
PLANNED = Run("digits", "adamw", "plain", 1, 3e-3, seed=0, steps=40)


@pytest.fixture(scope="module")
def pictures():
    random = np.random.default_rng(0)
    labels = random.integers(0, 10, 200).astype(np.int16)
    inputs = random.integers(0, 3, (200, 1, 8, 8)) + labels[:, None, None, None]
    examples = np.arange(200, dtype=np.int32)
    arrays = {"inputs": inputs.astype(np.uint8), "labels": labels}
    return Labelled(arrays | {"train": examples[:150], "held_out": examples[150:]}, CPU)


@pytest.fixture(scope="module")
def rows(pictures):
    runs = [
        replace(PLANNED, method=method, optimizer=optimizer)
        for method in METHODS
        for optimizer in grid.OPTIMIZERS
    ]
    with quiet():  # one thread, as in the workers: these models are too small for more
        return [train(run, pictures, CPU, graphs=False) for run in runs]


@pytest.mark.parametrize(
    ("end", "score"), [(1.0, 1.0), (0.5, 1.25), (2.0, 0.5), (3.0, 0.0), (9.0, 0.0), (math.nan, 0.0)]
)
def test_progress_recovered(end, score):
    assert progress_recovered(start=3.0, end=end, best=1.0) == score


def test_a_row_tells_the_whole_run(rows):
    for row in rows:
        assert row["eval_loss"] < row["e0"]
        assert len(row["curve"]) == PLANNED.steps <= CURVE_POINTS
        assert json.loads(json.dumps(row, allow_nan=False))["score"] == row["score"]


def test_a_run_that_is_left_alone_equals_the_plain_one_step_for_step(rows):
    by_key = {(row["method"], row["optimizer"]): row for row in rows}
    for optimizer in grid.OPTIMIZERS:
        ours, plain = by_key["adaptlr", optimizer], by_key["plain", optimizer]
        # The check of step one has nothing to go by in random pictures; it changes nothing.
        assert [event for event in ours["events"] if event[1] != "far_lr"] == []
        assert ours["curve"] == plain["curve"]


def test_the_rule_of_six_sigma_skips_outliers_and_all_after_a_nan(pictures):
    gradients = Gradients(TASKS["digits"].model(10), pictures, pictures.train[:8])
    method = SkipSixSigma("sgd", gradients, 0.1, 1000)
    gradients.norm = torch.tensor(1.0)

    def accepts(loss):
        gradients.loss = torch.tensor(loss)
        return method.accepts(0)

    assert all(accepts(1.0 + 0.01 * (index % 2)) for index in range(64))
    assert not accepts(2.0)
    assert accepts(1.0)
    assert not accepts(math.nan)
    assert not any(accepts(1.0) for _ in range(SkipSixSigma.window))
    assert accepts(1.0)


def test_a_file_of_rows_tells_which_runs_are_done(rows, tmp_path):
    file = tmp_path / "rows.jsonl"
    lines = [{"facts": "a machine", "slug": "machine"}, {"task": "digits", "error": "..."}, *rows]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = {grid.key_of(row) for row in grid.read_rows(file)}
    assert len(done) == len(rows)
    assert PLANNED.key() in done
    assert replace(PLANNED, seed=1).key() not in done


def test_the_first_seed_comes_first_and_covers_every_cell():
    runs = list(
        grid.guard_grid(list(TASKS), grid.OPTIMIZERS, list(METHODS), grid.MULTIPLES, (0, 1), None)
    )
    half = len(runs) // 2
    assert half == 6 * 2 * 5 * 7
    assert {run.seed for run in runs[:half]} == {0}
    assert {replace(run, seed=1) for run in runs[:half]} == set(runs[half:])


def test_rates_that_are_too_low_have_a_report_of_their_own(pictures):
    multiples = (0.01, 0.316, 1)
    runs = list(grid.guard_grid(["digits"], ["sgd"], ["raise", "raise_alone"], multiples, (0,), 40))
    best = TASKS["digits"].best("sgd").lr
    shares = sorted({run.lr / best for run in runs})
    assert shares == pytest.approx([0.01, 0.1**0.5, 1])
    with quiet():
        rows = [train(run, pictures, CPU, graphs=False) for run in runs]
    text = report.guard_report(rows, "a machine", None)
    assert "# Learning rates that are too low" in text
    assert "| optimizer | method | x0.01 | x0.316 | x1 |" in text
    assert ".png" not in text


def test_searches_are_measured_from_rates_that_say_nothing(pictures):
    runs = list(grid.search_grid(["digits"], grid.OPTIMIZERS, ["auto"], (0,), 60))
    assert {run.lr for run in runs} == {*grid.STARTS["adamw"], *grid.STARTS["sgd"]}
    with quiet():
        rows = [train(run, pictures, CPU, graphs=False) for run in runs if run.lr in (1e-2, 1e-1)]
    for row in rows:  # too short for a ramp
        assert row["counts"]["found"] == 1
        assert search_steps(row) == 1
    text = search_report(rows, "a machine", report.table, report.grouped)
    assert "| digits | adamw | 1 |" in text


def test_optimizers_without_a_sweep_are_judged_by_one_beside_them(pictures):
    pytest.importorskip("lion_pytorch")
    chosen = ("rmsprop", "lion")
    runs = [
        *grid.near_grid(["digits_3x_steps"], chosen, 1, 30),
        *grid.search_grid(["digits_3x_steps"], chosen, ["auto"], (0,), 30, 1),
    ]
    assert len(runs) == 2 * (3 + 1)
    with quiet():
        rows = [train(run, pictures, CPU, graphs=False) for run in runs]
    searched, swept = rows[6:], rows[:6]
    assert all(row["score"] is None for row in rows)
    for row in scored(searched, swept):
        losses = [other["eval_loss"] for other in swept if other["optimizer"] == row["optimizer"]]
        assert row["best_loss"] == min(losses)
        expected = progress_recovered(row["e0"], row["eval_loss"], min(losses))
        assert row["score"] == pytest.approx(expected, abs=1e-4)
        assert row["score"] > 0.0
    with pytest.raises(ValueError, match="needs the rows of a sweep"):
        scored(searched, [])
    shown = search_report(scored(searched, swept), "", report.table, report.grouped, swept)
    assert shown.count("**") == 2 * len(chosen)


@pytest.fixture(scope="module")
def searched(pictures):
    run = Run("digits", "adamw", "auto", None, 1e-5, seed=0, steps=200)  # the fewest with a ramp
    with quiet():
        return train(run, pictures, CPU, graphs=False)


def test_the_judge_makes_the_peak_of_a_search_again(searched):
    ramp, gradient, peak = judge.rates_of(searched, judge.Rule())
    found = searched["found"]
    assert gradient == found["estimate"]
    assert peak == pytest.approx(found["peak"], rel=1e-3)
    after = [lr for step, _, lr in searched["curve"] if step >= search_steps(searched)]
    assert max(after) == pytest.approx(found["peak"], rel=0.01)
    assert judge.rates_of(searched, judge.Rule(weight=1.0, shift=1.0))[2] == 10.0 * ramp


def test_the_judge_reads_scores_off_the_sweep_and_shifts_by_the_other_tasks(searched):
    swept = [
        searched | {"task": task, "lr": 10.0**exponent, "score": 0.5 + exponent / 4}
        for task in ("digits", "gpt", "digits_3x_steps")
        for exponent in (-2, 0, 2)
    ]
    rows = [
        searched | {"task": task, "found": {"peak": 1.0, "estimate": lr, "lowest_lr": 3 * lr}}
        for task, lr in (("digits", 1.0), ("gpt", 0.1), ("digits_3x_steps", 10.0))
    ]
    silent = searched | {"found": searched["found"] | {"lowest_lr": 0.0}}
    lines = judge.judgement([*rows, silent], swept, judge.Rule()).splitlines()
    cells = {tuple(line.split(" | ")[:2]): line.strip(" |").split(" | ")[3:] for line in lines[2:6]}
    done = f"{searched['score']:.3f}"
    expected = {
        # Shifted by the error of gpt alone: the variant is the same task.
        "digits": ["-2.00"] * 3 + ["0.500"] * 3 + [done, "1.000"],
        "digits_3x_steps": ["-1.00"] * 3 + ["0.750"] * 3 + [done, "1.000"],
        "gpt": ["-3.00"] * 3 + ["0.250"] * 3 + [done, "0.625"],
    }
    for task, figures in expected.items():
        assert cells[f"| {task}", "adamw"] == figures
    assert "1 searches without a ramp" in " ".join(lines)


def test_a_sweep_is_written_as_the_reports_read_it(rows, tmp_path):
    row = rows[0] | {"task": "gpt", "optimizer": "sgd", "e0": 4.5}
    losses = {0.1: (2.5, 2.7), 10.0: (2.9, None)}
    swept = [row | {"lr": lr, "eval_loss": end} for lr, ends in losses.items() for end in ends]
    report.write_sweep(swept, tmp_path / "sweep.csv")
    lower, broken = fixed_rows(tmp_path / "sweep.csv")
    best = TASKS["gpt"].sgd.loss
    assert (lower["lr"], broken["lr"]) == (0.1, 10.0)
    assert lower["score"] == pytest.approx(progress_recovered(4.5, 2.6, best))
    assert broken["score"] == 0.0


def test_variants_differ_from_their_tasks_in_one_thing_alone():
    for name in ("minilm_debian", "gpt", "digits"):
        task, bare = TASKS[name], replace(TASKS[name], adamw=None, sgd=None, like=name)
        assert ALL_TASKS[f"{name}_3x_steps"] == replace(bare, steps=3 * task.steps)
        assert ALL_TASKS[f"{name}_4x_batch"] == replace(bare, batch=4 * task.batch)


@pytest.mark.parametrize("name", SCRATCH_TASKS)
def test_small_models_learn_from_scratch_by_a_loss_of_their_own(name, pictures):
    text = np.tile(np.arange(20, dtype=np.uint8), 1000)
    data = Characters({"text": text}, CPU) if name == "lstm" else pictures
    with quiet():
        row = train(replace(PLANNED, task=name, lr=1e-2, steps=60), data, CPU, graphs=False)
    assert row["eval_loss"] < row["e0"]


class OneVector(free.OwnOptimizer):
    """torch's SGD where a peer's optimizer would be."""

    def make(self, name):
        return lambda weights, lr: torch.optim.SGD(weights, lr, momentum=0.9)


def test_weights_in_one_vector_train_as_they_do_in_many(rows, pictures, monkeypatch):
    monkeypatch.setitem(ALL_METHODS, "one_vector", OneVector)
    plain = next(row for row in rows if (row["method"], row["optimizer"]) == ("plain", "sgd"))
    with quiet():
        row = train(
            replace(PLANNED, method="one_vector", optimizer="sgd"), pictures, CPU, graphs=False
        )
    for ours, theirs in zip(row["curve"][:-1], plain["curve"][:-1], strict=True):
        assert ours == theirs


@pytest.mark.parametrize(
    ("package", "method"),
    [
        ("prodigyopt", "prodigy"),
        ("schedulefree", "schedulefree"),
        ("dadaptation", "dadaptation"),
        ("dog", "dog"),
        ("dlrs", "dlrs"),
        ("transformers", "greedy_up"),
    ],
)
def test_peers_train_at_the_one_rate_that_they_get(package, method, pictures):
    pytest.importorskip(package)
    runs = {
        (run.method, run.optimizer): run  # of several rates one
        for run in grid.fixed_grid(["digits"], grid.OPTIMIZERS, [method], (0,), 60)
    }
    with quiet():
        rows = [train(run, pictures, CPU, graphs=False) for run in runs.values()]
    shown = compared(rows, next(report.RESULTS.glob("lr_sweep_*.csv")), report.grouped)
    text = peers_report(shown, "", "plot.png", report.table, report.grouped)
    for row in rows:
        assert row["eval_loss"] < row["e0"]
        assert f"| {row['method']} | " in text


def test_the_report_has_a_line_for_every_optimizer_and_method(rows):
    text = report.summary(rows)
    for optimizer in grid.OPTIMIZERS:
        for method in METHODS:
            assert f"| {optimizer} | {method} | 1 |" in text
