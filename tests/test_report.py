"""The report shows what was recorded, in a real browser; spikes survive, and it stays light."""

from __future__ import annotations

import html
import math
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import train
from typer.testing import CliRunner

from adaptlr import AdaptiveLR
from adaptlr.cli import app
from adaptlr.recording import read
from adaptlr.report import make_page
from adaptlr.report.decimate import choose

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)


@pytest.fixture
def recorded(tmp_path, make_model, batches):
    """Return a maker of recordings of a small run with two broken steps."""

    def make(name: str = "run.jsonl", lr: float = 0.01):
        model = make_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
        control = AdaptiveLR(optimizer, total_steps=64, recorder=tmp_path / name)
        train(control, model, batches, poison=(20, 21))
        control.detach()
        return tmp_path / name

    return make


def table(losses) -> np.ndarray:
    records = np.zeros(len(losses), [("step", "i8"), ("loss", "f8")])
    records["step"], records["loss"] = np.arange(len(losses)), losses
    return records


# -- which records are drawn -------------------------------------------------------------------


def test_every_spike_survives_the_choice():
    losses = np.random.default_rng(0).standard_normal(100_000)
    spikes = [7, 5_003, 99_998]
    losses[spikes] = [90.0, -90.0, 80.0]
    chosen = choose(table(losses), 1000)
    assert set(spikes) <= set(chosen)
    assert {0, 99_999} <= set(chosen)
    assert len(chosen) <= 1010
    assert np.all(np.diff(chosen) > 0)


def test_what_is_not_finite_is_no_extreme_and_steps_of_events_stay():
    losses = np.full(10_000, math.nan)
    losses[::7] = np.arange(len(losses[::7]))
    chosen = choose(table(losses), 100, [5000])
    assert {4999, 5000, 5001} <= set(chosen)
    assert np.isfinite(losses[chosen]).sum() >= 90


def test_a_short_run_is_drawn_as_it_is():
    assert choose(table([3.0, math.nan, 1.0]), 100).tolist() == [0, 1, 2]
    assert choose(table([]), 100).tolist() == []


# -- the page ----------------------------------------------------------------------------------


def in_browser(page: str, script: str, tmp_path, width: int = 1280, dark: bool = False) -> str:
    """Return the page as a browser leaves it after ``script``; fail on any error in it."""
    if CHROMIUM is None:
        pytest.skip("no chromium is installed")
    errors = "addEventListener('error', (e) => { document.title = 'ERROR ' + e.message; });"
    page = page.replace("<head>", f"<head><script>{errors}</script>", 1)
    file = tmp_path / "page.html"
    file.write_text(page.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += ["--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}"]
    command += [f"--window-size={width},900", "--virtual-time-budget=2000"]
    command += [f"--blink-settings=preferredColorScheme={0 if dark else 1}", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert "<title>ERROR" not in done.stdout, re.findall("<title>ERROR.*?</title>", done.stdout)
    return html.unescape(done.stdout)


USE = """
const over = document.querySelector("#loss .u-over"), box = over.getBoundingClientRect();
const at = { clientX: box.left + box.width * 20 / 63, clientY: box.top + 50, bubbles: true };
for (const kind of ["mouseenter", "mousemove"]) over.dispatchEvent(new MouseEvent(kind, at));
document.querySelector("[data-do=log]").click();
document.querySelector("[data-do=in]").click();
document.querySelector("[data-do=right]").click();
"""


def test_the_page_draws_zooms_and_explains_in_a_browser(recorded, tmp_path):
    page = make_page([read(recorded())])
    left = in_browser(page, USE, tmp_path)
    assert left.count("<canvas") == 3
    assert re.search(r'data-steps="(\d+) (\d+)"', left).groups() == ("28", "60")
    tip = re.search(r'<div id="tip"[^>]*>(.*?)</div>', left).group(1)
    assert "skip, step 20" in tip
    assert "the loss is nan; step skipped" in tip


GESTURES = """
const charts = document.getElementById("charts"), over = document.querySelector("#loss .u-over");
const box = over.getBoundingClientRect(), seen = [];
const send = (kind, share, more, target = over) => target.dispatchEvent(
  new ({ w: WheelEvent, p: PointerEvent }[kind[0]] ?? MouseEvent)(kind, {
    clientX: box.left + share * box.width, clientY: box.top + 50, movementX: 1,
    bubbles: true, cancelable: true, ...more }));
const drag = (from, to, more) => {
  send("mousemove", from, more); send("mousedown", from, more); send("mousemove", to, more);
  send("mouseup", to, more, document);
};
const look = () => seen.push(charts.dataset.steps);
drag(0.25, 0.75); look();
drag(0.5, 0.75, { shiftKey: true }); look();
const scrolls = send("wheel", 0.5, { deltaY: -100 }); look();
const zooms = !send("wheel", 0.5, { deltaY: -100, ctrlKey: true }); look();
send("dblclick", 0.5); look();
const finger = (kind, id, share) => send(kind, share, { pointerId: id, pointerType: "touch" });
finger("pointerdown", 1, 0.4); finger("pointerdown", 2, 0.6);
finger("pointermove", 1, 0.3); finger("pointermove", 2, 0.7);
finger("pointerup", 2, 0.7); look();
finger("pointermove", 1, 0.4); finger("pointerup", 1, 0.4); look();
charts.dataset.seen = [...seen, scrolls, zooms].join("|");
"""


def test_the_charts_follow_mouse_wheel_and_fingers(recorded, tmp_path):
    left = in_browser(make_page([read(recorded())]), GESTURES, tmp_path)
    *seen, scrolls, zooms = re.search('data-seen="(.*?)"', left).group(1).split("|")
    assert seen[:3] == ["16 47", "8 39", "8 39"]  # drag, shift-drag, the wheel alone
    assert seen[3:5] == ["11 36", "0 63"]  # the wheel with control, double click
    assert seen[5:] == ["16 47", "13 44"]  # two fingers, one finger
    assert (scrolls, zooms) == ("true", "true")


LOOK = """
const rgb = (text) => text.match(/\\w\\w/g).map((part) => parseInt(part, 16));
const canvas = document.querySelector("#loss canvas"), paint = canvas.getContext("2d");
const root = document.documentElement, style = getComputedStyle(root);
const wanted = rgb(style.getPropertyValue("--run1"));
const { data } = paint.getImageData(0, 0, canvas.width, canvas.height);
let drawn = 0;
for (let i = 0; i < data.length; i += 4) drawn += wanted.every((part, j) => part === data[i + j]);
root.dataset.seen = [
  drawn > 50, root.scrollWidth <= innerWidth, getComputedStyle(document.body).backgroundColor
].join("|");
"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page_compares_runs_on_a_phone(recorded, tmp_path, dark):
    page = make_page([read(recorded()), read(recorded("other.jsonl", 0.03))], "Two rates")
    left = in_browser(page, LOOK, tmp_path, width=500, dark=dark)
    background = "rgb(20, 22, 26)" if dark else "rgb(247, 247, 245)"
    # The colour of the second run is on the canvas; nothing is wider than the screen.
    assert f'data-seen="true|true|{background}"' in left
    assert left.count("<canvas") == 3
    assert "other.jsonl level" in left
    assert left.count('class="verdict"') == 2
    assert "Two rates" in left


def test_the_page_is_alone_and_says_what_happened(recorded):
    page = make_page([read(recorded())])
    assert "64 of 64 steps" in page
    assert "2 steps skipped." in page
    assert "Copyright (c)" in page  # of uPlot
    assert not re.findall(r'(?:src|href)="', page)
    assert len(page) < 200_000


def test_names_cannot_break_out_of_the_page(recorded):
    path = recorded("<script>alert(1)<.jsonl")
    page = make_page([read(path)])
    assert "<script>alert(1)" not in page
    assert "\\u003cscript>alert(1)" in page


# -- the command -------------------------------------------------------------------------------


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_report_writes_a_page_and_a_picture(recorded):
    path = recorded()
    for option, name, start in (([], "run.html", b"<!doctype"), (["--png"], "run.png", b"\x89PNG")):
        result = run("report", path, *option)
        assert result.exit_code == 0, result.output
        assert path.with_name(name).read_bytes().startswith(start)
        assert result.stdout.strip() == str(path.with_name(name))


@pytest.mark.parametrize(("package", "option"), [("jinja2", []), ("matplotlib.figure", ["--png"])])
def test_report_names_the_extra_that_is_missing(recorded, monkeypatch, package, option):
    monkeypatch.setitem(sys.modules, package, None)
    result = run("report", recorded(), *option)
    assert result.exit_code == 1
    assert 'pip install "adaptlr[report]"' in result.stderr


def test_report_says_what_is_wrong_in_a_line(tmp_path):
    (tmp_path / "foreign.jsonl").write_text("{}\n")
    result = run("report", tmp_path / "foreign.jsonl")
    assert result.exit_code == 1
    assert "is not a recording of adaptlr" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    result = run("report", tmp_path / "foreign.jsonl", "-o", tmp_path)
    assert result.exit_code == 2
    assert f"{tmp_path} cannot be read: Is a directory" in run("report", tmp_path).stderr


def test_report_says_that_the_disk_is_full(recorded):
    path = recorded()
    for option in ([], ["--png"]):
        result = run("report", path, "-o", "/dev/full", *option)
        assert result.exit_code == 1
        assert "adaptlr: /dev/full cannot be written: No space left on device" in result.stderr


def test_a_run_without_steps_has_a_page_and_no_picture(tmp_path):
    optimizer = torch.optim.SGD([torch.zeros(2, requires_grad=True)], lr=0.1)
    control = AdaptiveLR(optimizer, total_steps=64, recorder=tmp_path / "run.jsonl")
    control.detach()
    page = make_page([read(tmp_path / "run.jsonl")])
    assert "No step was recorded." in page
    assert in_browser(page, "", tmp_path).count("<canvas") == 3
    result = run("report", tmp_path / "run.jsonl", "--png")
    assert "a plot needs the record of one step at least" in result.stderr


def test_a_run_of_broken_losses_has_a_page(tmp_path):
    optimizer = torch.optim.SGD([torch.zeros(2, requires_grad=True)], lr=0.1)
    control = AdaptiveLR(optimizer, total_steps=64, recorder=tmp_path / "run.jsonl")
    for _ in range(8):
        control.step(math.nan)
    with pytest.raises(RuntimeError):
        control.step(math.nan)
    control.detach()
    page = make_page([read(tmp_path / "run.jsonl")])
    assert "ended by the guard" in page
    assert in_browser(page, "", tmp_path).count("<canvas") == 3
