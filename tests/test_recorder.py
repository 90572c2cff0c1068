"""The recorder writes all that happened, loses little when it is killed, and never harms a run."""

from __future__ import annotations

import csv
import gc
import json
import logging
import math
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import loss_of, train

from adaptlr import AdaptiveLR, Event, Recorder, sinks
from adaptlr._extension import HostController
from adaptlr.config import ResolvedConfig
from adaptlr.lines import NUMBERS
from adaptlr.log_file import finished_parts
from adaptlr.recording import read

ROOT = Path(__file__).parents[1]
DIGITS = 5e-9  # nine significant digits


def controller(recorder: Recorder | Path | str, **arguments) -> AdaptiveLR:
    optimizer = torch.optim.SGD([torch.zeros(2, requires_grad=True)], lr=0.1)
    settings = {"total_steps": 10_000, "warmup": 0, "snapshot": "off", **arguments}
    return AdaptiveLR(optimizer, recorder=recorder, **settings)


def refuse_constant(name: str) -> float:
    raise AssertionError(f"{name} is not JSON")


def lines_of(path: Path) -> list[dict]:
    text = path.read_text(encoding="utf-8")
    return [json.loads(line, parse_constant=refuse_constant) for line in text.splitlines()]


def wait_for(condition, seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.02)


# -- what is written ---------------------------------------------------------------------------


def test_the_file_says_what_the_history_says(tmp_path, make_model, batches):
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    control = AdaptiveLR(optimizer, total_steps=64, recorder=tmp_path / "run.jsonl")
    train(control, model, batches[:-1], poison=(5, 6))
    control.step(loss_of(model, batches[0]), grad_norm=math.inf)
    control.set_peak(0.005)
    control.detach()
    history, recording = control.history(), read(tmp_path / "run.jsonl")
    for name in ("step", "phase", "flags", "action"):
        assert recording.records[name].tolist() == history[name].tolist(), name
    for name in (*NUMBERS, "grad_norm"):
        np.testing.assert_allclose(recording.records[name], history[name], rtol=DIGITS)
    told = [(e.step, e.kind, e.reason, e.lr, e.factor) for e in recording.events]
    assert told == [(e.step, e.kind, e.reason, e.lr, e.factor) for e in control.events()]
    assert {"skip", "set_peak"} <= {event.kind for event in recording.events}
    assert recording.closed
    assert (recording.damaged, recording.lost, recording.replaced) == (0, [], 0)


def test_the_header_has_settings_versions_and_device(tmp_path):
    controller(tmp_path / "run.jsonl", total_steps=500).detach()
    (header,) = read(tmp_path / "run.jsonl").headers
    assert header["config"]["total_steps"] == 500
    assert header["config"]["peaks"] == [0.1]
    assert header["config"]["guard_mode"] == "act"
    assert (header["optimizer"], header["device"]) == ("SGD", "cpu")
    assert header["versions"]["torch"] == torch.__version__


def test_every_line_is_valid_json_whatever_the_losses_are(tmp_path):
    control = controller(tmp_path / "run.jsonl", guard=None)
    losses = [1.0, math.nan, math.inf, -math.inf, 1e-300, 1e300, -2.5]
    for loss in losses:
        control.step(loss)
    control.detach()
    records = [line for line in lines_of(tmp_path / "run.jsonl") if "step" in line]
    assert [str(line["loss"]) for line in records] == [
        "1", "NaN", "Infinity", "-Infinity", "1e-300", "1e+300", "-2.5"
    ]  # fmt: skip
    assert np.array_equal(read(tmp_path / "run.jsonl").records["loss"], losses, equal_nan=True)


def test_every_keeps_all_steps_in_which_something_happened(tmp_path):
    control = controller(Recorder(tmp_path / "run.jsonl", every=10))
    for step in range(100):
        control.step(math.nan if step == 33 else 2.0 - 0.001 * step)
    control.detach()
    assert set(range(0, 100, 10)) | {33} <= set(read(tmp_path / "run.jsonl").records["step"])
    assert len(read(tmp_path / "run.jsonl").records) < 20


def test_records_are_on_disk_within_a_second_while_the_run_goes_on(tmp_path):
    control = controller(tmp_path / "run.jsonl")
    control.step(2.0)
    wait_for(lambda: len(read(tmp_path / "run.jsonl").records) == 1, 1.0)
    assert not read(tmp_path / "run.jsonl").closed
    control.detach()


def test_what_the_ring_has_lost_is_written_down(tmp_path):
    control = controller(tmp_path / "run.jsonl", history_size=50)
    for _ in range(400):
        control.step(2.0)
    control.detach()
    recording = read(tmp_path / "run.jsonl")
    lost = sum(int(text.split()[0]) for text in recording.lost)
    assert lost + len(recording.records) == 400
    assert lost >= 300


def host_controller(history_size: int) -> HostController:
    config = ResolvedConfig(
        total_steps=100_000,
        warmup=0,
        decay="constant",
        min_lr_ratio=0.0,
        guard=None,
        peaks=[0.1],
    )
    return HostController(config.row, history_size)


def test_records_are_whole_that_are_read_while_they_are_overwritten():
    core = host_controller(history_size=20)
    seen: list[np.ndarray] = []
    done = threading.Event()

    def read_on() -> None:
        while not done.is_set():
            seen.append(core.records(0))

    reader = threading.Thread(target=read_on)
    reader.start()
    for step in range(30_000):
        core.step(float(step))
    done.set()
    reader.join()
    rows = np.concatenate(seen)
    assert np.array_equal(rows["loss"], rows["step"])
    assert np.array_equal(rows["sequence"], rows["step"] + 1)
    assert len(np.unique(rows["step"])) > 20


# -- a run that ends, resumes, grows -----------------------------------------------------------


def test_a_killed_process_loses_a_second_at_most():
    command = [sys.executable, "-m", "benchmarks.recorder.kill", "--kills=5", "--seconds=0.7"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| 5 |" in done.stdout


def test_a_resumed_run_goes_on_in_the_same_file(tmp_path, make_model, batches):
    def run(batches, saved=None):
        model = make_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        control = AdaptiveLR(optimizer, total_steps=64, recorder=tmp_path / "run.jsonl")
        if saved is not None:
            optimizer.load_state_dict(saved)
        train(control, model, batches[:10])
        saved = optimizer.state_dict()
        train(control, model, batches[10:], poison=(2,))
        control.detach()
        return saved

    saved = run(batches[:30])
    with (tmp_path / "run.jsonl").open("ab") as file:
        file.write(b'{"step":30,"los')  # as a machine that goes down may leave it
    run(batches[10:40], saved)
    recording = read(tmp_path / "run.jsonl")
    assert recording.records["step"].tolist() == list(range(40))
    assert recording.replaced == 20
    assert recording.damaged == 1
    assert len(recording.headers) == 2
    assert [(e.kind, e.step) for e in recording.events] == [("resume", 10), ("skip", 22)]


def test_parts_are_put_aside_by_size_and_read_as_one(tmp_path):
    recorder = Recorder(tmp_path / "run.jsonl", max_bytes=4096)
    control = controller(recorder)
    for step in range(3):
        for _ in range(100):
            control.step(2.0)
        wait_for(lambda step=step: len(finished_parts(recorder.path)) > step)
    control.detach()
    assert [path.name for path in finished_parts(recorder.path)] == [
        f"run.{number:04d}.jsonl" for number in (1, 2, 3)
    ]
    assert all("format" in lines_of(path)[0] for path in tmp_path.iterdir())
    recording = read(recorder.path)
    assert recording.records["step"].tolist() == list(range(300))
    assert len(recording.headers) == 1
    assert recording.closed


PROGRAM = """
import os, sys, torch, adaptlr
optimizer = torch.optim.SGD([torch.zeros(2, requires_grad=True)], lr=0.1)
guard = adaptlr.Guard(max_consecutive_skips=1)
control = adaptlr.AdaptiveLR(optimizer, 100, snapshot="off", guard=guard, recorder=sys.argv[1])
if os.fork() == 0:
    sys.exit()  # a worker that ends in good order leaves the recording alone
os.wait()
for loss in (2.0, float("nan"), float("nan")):
    control.step(loss)
"""


def test_a_program_that_ends_by_an_exception_has_recorded_why(tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, str(tmp_path / "run.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "TrainingDiverged" in done.stderr
    recording = read(tmp_path / "run.jsonl")
    assert [event.kind for event in recording.events] == ["skip", "failed"]
    assert [line for line in lines_of(recording.path) if "end" in line] == [
        lines_of(recording.path)[-1]
    ]


def test_a_run_that_is_dropped_closes_its_file(tmp_path):
    control = controller(tmp_path / "run.jsonl")
    control.step(2.0)
    del control
    gc.collect()
    assert read(tmp_path / "run.jsonl").closed
    with Recorder(tmp_path / "run.jsonl") as recorder:
        controller(recorder).step(2.0)
    assert len(read(tmp_path / "run.jsonl").headers) == 2


# -- what goes wrong ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"path": "missing/run.jsonl"}, OSError, "path must be a file that can be written, got"),
        ({"path": "."}, OSError, "path must be a file that can be written, got"),
        ({"every": 0}, ValueError, "every must be at least 1, got 0"),
        ({"every": 0.5}, TypeError, "every must be an int, got float"),
        ({"max_bytes": 10}, ValueError, "max_bytes must be at least 4096, got 10"),
        ({"sinks": ["tensorboard"]}, TypeError, "sinks must be callable, got str"),
        ({"on_event": 3}, TypeError, "on_event must be callable or a shell command, got int"),
    ],
)
def test_what_cannot_be_is_refused_at_once(tmp_path, monkeypatch, arguments, error, text):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=text):
        Recorder(**{"path": "run.jsonl", **arguments})


def test_one_recorder_is_for_one_controller(tmp_path):
    recorder = Recorder(tmp_path / "run.jsonl")
    control = controller(recorder)
    with pytest.raises(RuntimeError, match="has a controller already"):
        controller(recorder)
    with pytest.raises(ValueError, match="must be of one recorder only"):
        Recorder(tmp_path / "run.jsonl")
    control.detach()
    with pytest.raises(RuntimeError, match="is closed"):
        controller(recorder)


def test_a_controller_that_cannot_be_made_leaves_its_file_free(tmp_path):
    with pytest.raises(ValueError, match="device_path") as raised:
        controller(tmp_path / "run.jsonl", device_path="fused")
    controller(tmp_path / "run.jsonl").detach()
    assert raised.tb is not None  # with the half-made controller in its frames


HOLDER = """
import fcntl, sys
file = open(sys.argv[1], "ab")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_two_processes_do_not_write_to_one_file(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run.jsonl")]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="another process writes to"):
            Recorder(tmp_path / "run.jsonl")
        holder.stdin.close()
    Recorder(tmp_path / "run.jsonl").close()


def test_a_full_disk_costs_lines_and_never_the_run(tmp_path, caplog):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    control = controller(tmp_path / "run.jsonl")
    control.step(2.0)
    wait_for(lambda: len(read(tmp_path / "run.jsonl").records) == 1)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))  # writes beyond it fail
        for _ in range(2):
            for _ in range(100):
                control.step(2.0)
            time.sleep(0.6)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    control.step(2.0)
    control.detach()
    warnings = [entry for entry in caplog.records if "cannot write" in entry.message]
    assert len(warnings) == 1
    recording = read(tmp_path / "run.jsonl")
    assert recording.damaged == 0
    assert recording.records["step"].tolist() == [0, 201]
    assert recording.lost == ["200 lines: they could not be written"]


# -- sinks -------------------------------------------------------------------------------------


def test_a_sink_sees_every_line_and_one_that_raises_is_dropped(tmp_path, caplog):
    seen = []

    def broken(line):
        raise KeyError("nothing here")

    control = controller(Recorder(tmp_path / "run.jsonl", sinks=[broken, seen.append]))
    with caplog.at_level(logging.WARNING, logger="adaptlr"):
        for loss in (2.0, math.nan, 1.9):
            control.step(loss)
        control.detach()
    assert [entry.message.split(":")[0] for entry in caplog.records] == [
        "the recorder's sink broken has raised KeyError"
    ]
    assert [next(iter(line)) for line in seen] == ["format", "step", "step", "step", "event"]
    assert math.isnan(seen[2]["loss"])
    assert len(read(tmp_path / "run.jsonl").records) == 3


def test_events_wake_somebody(tmp_path):
    told: list[Event] = []
    control = controller(Recorder(tmp_path / "a.jsonl", on_event=told.append))
    command = f'(cat; echo "$ADAPTLR_EVENT at $ADAPTLR_STEP") >> {tmp_path / "mail"}'
    other = controller(Recorder(tmp_path / "b.jsonl", on_event=command))
    for loss in (2.0, math.nan, math.nan, 1.9):
        control.step(loss)
        other.step(loss)
    control.detach()
    other.detach()
    assert told == control.events()
    assert (tmp_path / "mail").read_text().splitlines() == [
        "step 1: the loss is nan; step skipped",
        "step 2: the loss is nan; step skipped",
        "skip at 2",
    ]


def test_csv_and_tensorboard_take_the_records(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    kinds = [sinks.CSV(tmp_path / "run.csv"), sinks.TensorBoard(tmp_path / "board")]
    control = controller(Recorder(tmp_path / "run.jsonl", sinks=kinds))
    for loss in (2.0, math.nan, 1.75):
        control.step(loss)
    control.detach()
    with (tmp_path / "run.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["loss"], row["flags"]) for row in rows] == [
        ("0", "2.0", ""),
        ("1", "nan", "NONFINITE"),
        ("2", "1.75", ""),
    ]
    board = EventAccumulator(str(tmp_path / "board")).Reload()
    assert [scalar.value for scalar in board.Scalars("adaptlr/loss")][::2] == [2.0, 1.75]


@pytest.mark.parametrize(
    ("name", "package"),
    [("TensorBoard", "tensorboard"), ("WandB", "wandb"), ("Trackio", "trackio")],
)
def test_a_sink_names_the_package_that_is_missing(tmp_path, monkeypatch, name, package):
    blocked = "torch.utils.tensorboard" if name == "TensorBoard" else package
    monkeypatch.setitem(sys.modules, blocked, None)
    with pytest.raises(ModuleNotFoundError, match=f"{name} needs {package}; pip install"):
        getattr(sinks, name)(str(tmp_path))


@pytest.mark.parametrize("name", ["WandB", "Trackio"])
def test_trackers_take_the_records(tmp_path, monkeypatch, name, caplog):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))  # before trackio is imported
    pytest.importorskip(name.lower())
    control = controller(Recorder(tmp_path / "run.jsonl", sinks=[getattr(sinks, name)()]))
    for loss in (2.0, math.nan, 1.75):
        control.step(loss)
    control.detach()
    assert not [entry for entry in caplog.records if entry.name == "adaptlr"]
    files = [file for file in tmp_path.rglob("*") if file.is_file() and file.suffix != ".jsonl"]
    kept = [file.read_bytes() for file in files]
    assert any(b"adaptlr/loss" in content for content in kept)
    assert any(b"the loss is nan; step skipped" in content for content in kept)
