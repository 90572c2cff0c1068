"""The commands that read: what they show is what was recorded, computed, or installed."""

from __future__ import annotations

import io
import json
import math
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import loss_of, train
from rich.console import Console
from typer.testing import CliRunner

from adaptlr import AdaptiveLR, Guard, Recorder, doctor
from adaptlr.cli import app
from adaptlr.cli.watch_view import curve, make_view
from adaptlr.config import ResolvedConfig
from adaptlr.follow import Follower
from adaptlr.loss_curves import read_losses
from adaptlr.recording import read
from adaptlr.replay import replay


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def recorded(tmp_path, make_model, batches) -> Path:
    """Return the recording of a run at a rate that is far too high, with a broken step."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3.0)
    path = tmp_path / "run.jsonl"
    # A recording holds no gradients, so a replay knows nothing of what the first one told.
    control = AdaptiveLR(optimizer, total_steps=256, recorder=path, check_lr=False)
    train(control, model, batches * 4, poison=(20,))
    control.detach()
    return path


def shown(view, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(view)
    return console.file.getvalue()


# -- watch -------------------------------------------------------------------------------------


def test_watch_follows_a_run_through_parts_until_it_is_closed(tmp_path):
    optimizer = torch.optim.SGD([torch.zeros(2, requires_grad=True)], lr=0.1)
    recorder = Recorder(tmp_path / "run.jsonl", max_bytes=4096)
    control = AdaptiveLR(optimizer, total_steps=900, snapshot="off", recorder=recorder)

    def work():
        for _ in range(3):
            for _ in range(100):
                control.step(2.0)
            time.sleep(0.55)
        control.detach()

    follower = Follower(recorder.path)
    worker = threading.Thread(target=work)
    worker.start()
    seen = set()
    while not follower.recording().closed:
        follower.look()
        seen.add(len(follower.recording().records))
        time.sleep(0.05)
    worker.join()
    follower.close()
    assert follower.recording().records["step"].tolist() == list(range(300))
    assert len(seen) >= 3


def test_watch_shows_where_the_run_stands(recorded):
    result = run("watch", recorded, "--once")
    assert result.exit_code == 0, result.output
    recording = read(recorded)
    assert "256 of 256 steps" in result.stdout
    assert f"{recording.records['level'][-1]:.4g}" in result.stdout
    assert recording.events[-1].kind in result.stdout
    assert "256 of 256 steps" in run("watch", recorded).stdout  # ends with the recording
    found = json.loads(run("watch", recorded, "--once", "--json").stdout)
    assert found["steps"] == 256
    assert found["level"] == recording.records["level"][-1]


def test_watch_tells_silence_from_progress_and_fits_any_width(recorded):
    lines = recorded.read_text().splitlines(keepends=True)
    recorded.write_text("".join(lines[:-1]))  # without its end: killed, or still running
    recording = read(recorded)
    last = float(np.nanmax(recording.records["time"]))
    assert "running" in shown(make_view(recording, 100, last + 1))
    assert "nothing new for 2.0 h" in shown(make_view(recording, 100, last + 7200))
    for width in (30, 60, 200):
        assert max(map(len, shown(make_view(recording, width, last), width).splitlines())) <= width


def test_watch_of_a_run_that_the_guard_has_ended_says_so_to_scripts(tmp_path):
    optimizer = torch.optim.SGD([torch.zeros(2, requires_grad=True)], lr=0.1)
    guard = Guard(max_consecutive_skips=1)
    path = tmp_path / "run.jsonl"
    control = AdaptiveLR(optimizer, 100, guard=guard, snapshot="off", recorder=path)
    control.step(math.nan)
    with pytest.raises(RuntimeError):
        control.step(math.nan)
    control.detach()
    result = run("watch", path, "--once")
    assert result.exit_code == 3
    assert "ended by the guard" in result.stdout


def test_a_curve_is_drawn_from_its_lowest_to_its_highest_value():
    top, bottom = curve(np.array([0.0, 1.0, math.nan, 4.0]), 30, 2)
    assert (top[-4:], bottom[-4:]) == ("   █", "▁▅ █")
    assert top.split()[0] == "4"
    assert curve(np.full(5, math.nan), 30, 2) == []


# -- replay ------------------------------------------------------------------------------------


def test_replaying_a_recording_gives_the_events_that_the_run_had(recorded):
    recording = read(recorded)
    found = json.loads(run("replay", recorded, "--json").stdout)
    assert found["steps"] == 256
    assert {"skip", "test"} <= {event["kind"] for event in found["events"]}
    told = [(event["step"], event["kind"]) for event in found["events"]]
    assert told == [(event.step, event.kind) for event in recording.events]
    assert found["factor"] == pytest.approx(recording.records["factor"][-1], rel=1e-6)


def test_replay_reads_tables_and_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    losses = [2.0, 1.5, math.nan, 1.25]
    (tmp_path / "named.csv").write_text(
        "step,train_loss\n" + "".join(f"{i},{x}\n" for i, x in enumerate(losses))
    )
    (tmp_path / "tabs.tsv").write_text("step\tloss\n0\t2.0\n1\t1.5\n\n2\tnan\n3\t1.25\n")
    (tmp_path / "excel.csv").write_text("\ufeffloss;lr\r\n2.0;1\r\n1.5;1\r\nnan;1\r\n1.25;1\r\n")
    (tmp_path / "bare.txt").write_text("".join(f"{x}\n" for x in losses))
    with SummaryWriter(str(tmp_path / "board")) as writer:
        for step, loss in enumerate(losses):
            writer.add_scalar("train/loss", loss, step)
    for source in ("named.csv", "tabs.tsv", "excel.csv", "bare.txt", "board"):
        curve = read_losses(tmp_path / source)
        assert np.array_equal(curve.losses, losses, equal_nan=True), source


def test_replay_shows_sentences_and_what_they_are_worth(tmp_path):
    losses = np.concatenate([np.linspace(3, 2, 150), 2 + 0.1 * 1.2 ** np.arange(50)])
    losses += 0.02 * np.random.default_rng(0).standard_normal(200)
    np.savetxt(tmp_path / "loss.csv", losses)
    result = run("replay", tmp_path / "loss.csv", "--lr", "2e-5", "--no-snapshots")
    assert result.exit_code == 0, result.output
    assert "the loss runs away" in " ".join(result.stdout.split())
    assert "do not react" in " ".join(result.stdout.split())
    np.savetxt(tmp_path / "calm.csv", losses[:150])
    assert "Nothing would have been done" in run("replay", tmp_path / "calm.csv").stdout


def test_replay_stops_where_the_guard_gives_up_and_keeps_all_events():
    guard = Guard(mode="observe")
    options = {"warmup": 0.1, "decay": "cosine", "min_lr_ratio": 0.0, "peaks": [0.1]}
    config = ResolvedConfig(total_steps=3000, guard=guard, **options)
    assert len(replay(config, np.full(3000, math.nan)).events) == 3000
    config = ResolvedConfig(total_steps=3000, guard=Guard(), **options)
    result = replay(config, np.full(3000, math.nan))
    assert result.ended
    assert len(result.records) == 9


@pytest.mark.parametrize(
    ("text", "options", "code", "message"),
    [
        ("a,b\n1,2\n", [], 1, "must have a column called loss or train_loss or"),
        ("loss\n1\nx\n", [], 1, "must hold numbers, got 'x' in row 2"),
        ("loss\n", [], 1, "holds no losses"),
        ("loss\n2,5\n", [], 1, "must have 1 cells in a row, got 2 in row 1"),
        ("loss\n" + "1" * 200_000, [], 1, "must be a table of text, got something else: field"),
        ("1\n2\n", ["--total-steps", "0"], 2, "total_steps must be at least 1, got 0"),
        ("1\n2\n", ["--lr", "0"], 2, "lr must be above 0 in one group at least, got [0.0]"),
        ("1\n2\n", ["--sensitivity", "9"], 2, "sensitivity must be in [0.5, 2], got 9.0"),
        ("1\n2\n", ["--mode", "both"], 2, "mode must be 'act' or 'observe', got 'both'"),
        (
            "1\n2\n",
            ["--warmup", "abc"],
            2,
            "warmup must be steps (100) or a share (0.1), got 'abc'",
        ),
        ("1\n2\n", ["--decay", "steps"], 2, "decay must be one of cosine, linear"),
        ("1\n2\n", ["--lr", "-1"], 2, "lr of parameter group 0 must be finite and not negative"),
    ],
)
def test_replay_says_what_is_wrong_in_a_line(tmp_path, text, options, code, message):
    (tmp_path / "loss.csv").write_text(text)
    result = run("replay", tmp_path / "loss.csv", *options)
    assert result.exit_code == code
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("option", ["--once", "--json"])
def test_a_command_says_that_the_disk_is_full_in_a_line(option, recorded, monkeypatch, capsys):
    with Path("/dev/full").open("w") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        with pytest.raises(SystemExit) as ended:
            app(["watch", str(recorded), option])
    assert ended.value.code == 1
    assert capsys.readouterr().err == "adaptlr: the output cannot be written: the disk is full\n"


def test_a_recording_without_every_step_is_not_replayed(tmp_path):
    optimizer = torch.optim.SGD([torch.zeros(2, requires_grad=True)], lr=0.1)
    recorder = Recorder(tmp_path / "run.jsonl", every=10)
    control = AdaptiveLR(optimizer, 100, snapshot="off", recorder=recorder)
    for _ in range(50):
        control.step(2.0)
    control.detach()
    result = run("replay", tmp_path / "run.jsonl")
    assert "must have every step" in result.stderr
    assert (
        "name must be None for a recording"
        in run("replay", tmp_path / "run.jsonl", "--name", "loss").stderr
    )
    for command in ("watch", "replay"):
        missing = run(command, tmp_path / "missing.jsonl")
        assert missing.exit_code == 1
        assert "missing.jsonl" in missing.stderr


# -- doctor ------------------------------------------------------------------------------------


def test_doctor_finds_the_extension_in_order():
    result = run("doctor", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    status = {check["name"]: check["status"] for check in found["checks"]}
    assert status["self-test on cpu"] == "ok"
    assert found["paths"]["cpu"]["AdamW"] == "host"
    assert found["paths"]["cpu"]["Rprop"] == "refused"
    assert "self-test on cpu" in run("doctor").stdout


def test_the_self_test_sees_a_wrong_number():
    losses = doctor.trace()
    expected, _ = doctor.reference.run(doctor.reference.default_config(doctor.STEPS, 0.01), losses)
    records = expected.copy()
    assert doctor._compare("", records, expected, 0.0).status == "ok"
    records["level"][150] *= 1 + 1e-6
    assert doctor._compare("", records, expected, 0.0).status == "bad"
    records = expected.copy()
    records["flags"][150] ^= 2
    assert "flags is not the oracle's from step 150" in doctor._compare("", records, expected, 0)[2]


@pytest.mark.cuda
def test_doctor_and_recorder_on_a_gpu(tmp_path, make_model, data):
    found = json.loads(run("doctor", "--json").stdout)
    assert {check["status"] for check in found["checks"]} <= {"ok", "note"}
    assert found["paths"]["cuda:0"]["AdamW"] == "fused"
    model = make_model(device="cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    control = AdaptiveLR(optimizer, total_steps=64, recorder=tmp_path / "run.jsonl")
    for step, batch in enumerate(data):
        loss = loss_of(model, batch) * (math.nan if step == 20 else 1.0)
        loss.backward()
        control.step(loss)
        control.zero_grad()
        time.sleep(0.02)
    control.detach()
    recording = read(tmp_path / "run.jsonl")
    assert recording.records["step"].tolist() == list(range(64))
    assert [event.kind for event in recording.events] == ["skip"]


# -- notebooks ---------------------------------------------------------------------------------


def test_a_notebook_shows_status_and_plot(make_model, batches):
    pytest.importorskip("matplotlib")
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    control = AdaptiveLR(optimizer, total_steps=64)
    with pytest.raises(ValueError, match="a plot needs the record of one step"):
        control.plot()
    train(control, model, batches, poison=(20,))
    figure = control.plot()
    loss, lr, _ = figure.axes
    assert loss.lines[1].get_ydata().tolist() == control.history()["level"].tolist()
    assert lr.get_yscale() == "log"
    assert figure._repr_png_().startswith(b"\x89PNG")
    status = control.status()
    assert f"<td>{status.level:.4g} ± {status.scale:.2g}</td>" in status._repr_html_()


def test_shells_can_complete_commands(monkeypatch):
    monkeypatch.setenv("_ADAPTLR_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "adaptlr re")
    monkeypatch.setenv("COMP_CWORD", "1")
    result = CliRunner().invoke(app, prog_name="adaptlr")
    assert result.output.split() == ["report", "replay"]
