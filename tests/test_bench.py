"""The overhead benchmark: complete, finite and readable. Its figures are not judged here."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from adaptlr import AdaptiveLR
from adaptlr.bench import DEFAULT_ROUNDS, Report, measure
from adaptlr.bench.eager import FIELDS, EagerController
from adaptlr.bench.facts import facts_of
from adaptlr.bench.kernels import DeviceWork
from adaptlr.bench.measure import make_rows
from adaptlr.bench.report import COLUMNS
from adaptlr.bench.subjects import (
    ATTACHED,
    BARE,
    CONTROL,
    COSINE,
    EAGER,
    EMPTY,
    FLAGGED,
    LAUNCHING,
    OBSERVE,
    UNGUARDED,
    ZEROING,
    make_anchors,
)
from adaptlr.bench.targets import targets_of
from adaptlr.bench.timing import Subject

ROUNDS = 10
CPU = torch.device("cpu")
# lerp and addcmul round otherwise than the extension, by a few ulp (2.2e-16) a step; that fades
# with a memory of 256 steps; the t-statistic divides by what is left of a difference.
RTOL = 1e-10


@pytest.fixture(scope="module")
def report() -> Report:
    return measure(CPU, ROUNDS)


def tables_of(markdown: str) -> list[list[list[str]]]:
    """Return the cells of every table, and check that its rows are as wide as its header."""
    tables: list[list[list[str]]] = [[]]
    for line in markdown.splitlines():
        if line.startswith("|"):
            tables[-1].append([cell.strip() for cell in line.strip("|").split("|")])
        elif tables[-1]:
            tables.append([])
    tables = [table for table in tables if table]
    for header, rule, *rows in tables:
        assert set(rule) == {"---"}
        assert {len(row) for row in (rule, *rows)} == {len(header)}
    return tables


def test_every_comparison_has_its_arms(report: Report) -> None:
    sections = {row.section for row in report.rows}
    assert len(sections) == 8  # 2 optimizers x 1 or 4 groups x 2 models
    for section in sections:
        names = {row.name for row in report.rows if row.section == section}
        assert {"added by adaptlr", BARE, ATTACHED} <= names


def test_every_anchor_is_a_row(report: Report) -> None:
    names = {row.name for row in report.rows}
    anchors = {subject.name for subject in make_anchors([torch.tensor(2.0)] * 10, calls=1)}
    assert len(anchors) == 11
    assert anchors <= names


def test_times_are_positive_and_finite(report: Report) -> None:
    for row in report.rows:
        assert row.host is not None
        assert all(map(math.isfinite, row.host)), row
        assert row.host.lower <= row.host.median <= row.host.upper, row
        if not row.name.startswith("added"):  # a difference may drown in noise
            assert row.host.lower > 0.0, row
        assert row.device is None


def test_markdown_is_facts_targets_and_one_table_a_comparison(report: Report) -> None:
    first_line = report.markdown().partition("\n")[0]
    assert f"torch {torch.__version__}" in first_line
    targets, *comparisons = tables_of(report.markdown())
    assert targets[0] == ["target", "limit", "measured", "met"]
    assert {row[3] for row in targets[2:]} <= {"yes", "**no**"}
    assert len(comparisons) == 8


def test_targets_follow_from_the_rows(report: Report) -> None:
    host = {row.name: row.host for row in reversed(report.rows)}
    added, cosine = host["added by adaptlr"], host["CosineAnnealingLR.step()"]
    assert added is not None
    assert cosine is not None
    assert [target.met for target in report.targets[:2]] == [
        added.median <= 1.5,
        added.median < cosine.median,
    ]


def test_csv_and_json_hold_every_row(report: Report) -> None:
    comment, *lines = report.csv().splitlines()
    assert comment == f"# {report.facts.line()}"
    rows = list(csv.DictReader(lines))
    assert tuple(rows[0]) == COLUMNS
    assert [row["row"] for row in rows] == [row.name for row in report.rows]
    loaded = json.loads(report.json())
    assert loaded["rows"][0]["host"]["median"] == pytest.approx(
        float(rows[0]["host_us_median"]), abs=1e-4
    )


def test_gpu_report_sets_host_and_device_time_apart() -> None:
    title = "SGD, 1 group, 1 small tensor a group"
    host = {BARE: 20.0, FLAGGED: 21.0, LAUNCHING: 26.0, ATTACHED: 27.0}
    host |= {OBSERVE: 1.0, CONTROL: 7.0, EMPTY: 5.0, ZEROING: 12.0, EAGER: 700.0}
    host |= {UNGUARDED: 7.0, f"{COSINE}, tensor lr": 28.0}
    kernels = {BARE: {"sgd": [3.0]}, FLAGGED: {"sgd": [4.0]}, OBSERVE: {}}
    kernels |= {CONTROL: {"adaptlr_control_step": [2.25]}, EMPTY: {"empty": [0.5]}}
    kernels[UNGUARDED] = {"adaptlr_control_step": [3.25]}
    kernels[LAUNCHING] = {"sgd": [4.0], "empty": [0.5]}
    kernels[ATTACHED] = {"sgd": [4.0], "adaptlr_control_step": [2.5]}
    kernels |= {ZEROING: {}, EAGER: {}, f"{COSINE}, tensor lr": {}}
    rows = make_rows(
        title,
        [Subject(name, lambda _: None, calls=1) for name in host],
        {name: np.full(4, time) for name, time in host.items()},
        {name: DeviceWork(durations, calls=1) for name, durations in kernels.items()},
    )
    facts = dataclasses.replace(facts_of(CPU, "abc"), device="cuda", gpu="GPU X", driver="1")
    report = Report(facts, ROUNDS, rows, targets_of(rows, "cuda"))
    targets, table = tables_of(report.markdown())
    assert report.markdown().startswith("GPU X, driver 1, ")
    assert facts.slug() == "gpu-x"
    assert [(row[2], row[3]) for row in targets[2:]] == [
        ("2.25 us", "yes"),
        ("2.50 us", "yes"),
        ("3.25 us", "**no**"),
        ("8.00 us, 1.60 times", "**no**"),
        ("6.00 us, 1.20 times", "yes"),
        ("7.00 us, 4.0 times cheaper", "**no**"),
        ("7.00 us, 100.0 times cheaper", "yes"),
        ("12.00 us", "yes"),
    ]
    assert ["added by adaptlr", "7.00", "7.00 to 7.00", "3.50", "1"] in table
    assert ["of it by torch, for the skip flag", "1.00", "1.00 to 1.00", "1.00", "0"] in table
    assert ["the control kernel, ring record included", "", "", "2.50", "1"] in table


def test_too_few_rounds_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^rounds must be at least 10, got 9$"):
        measure(CPU, rounds=9)


def test_eager_version_computes_what_the_extension_does() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.zeros(2)
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    controller = AdaptiveLR(optimizer, total_steps=400, warmup=30, snapshot="off")
    noise = torch.randn(400, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    losses = 2.0 - torch.arange(400) * 1e-3 + 0.1 * noise
    losses[200] = math.nan
    for loss in losses[:20]:  # past the start-up
        controller.step(loss)
    path = controller._path
    eager = EagerController(path.state(), controller._attachment.config.row, CPU)
    for loss in losses[20:]:
        parameter.grad = torch.zeros(2)  # the skipped step has taken it away
        controller.step(loss)
        eager.step(loss)
        assert float(eager.lr) == pytest.approx(controller.lr, rel=1e-6, abs=1e-9)  # float32
    state = path.state()
    expected = [float(state[name]) for name in FIELDS]
    np.testing.assert_allclose(eager.fields.numpy(), expected, rtol=RTOL)
    np.testing.assert_allclose(float(eager.t_statistic), float(state["t_statistic"]), rtol=RTOL)


def test_command_prints_the_tables_and_writes_the_csv(tmp_path: Path) -> None:
    testing = pytest.importorskip("typer.testing")
    pytest.importorskip("rich")
    from adaptlr.cli import app
    from adaptlr.cli.bench import ROUNDS as COMMAND_ROUNDS

    assert COMMAND_ROUNDS == DEFAULT_ROUNDS
    path = tmp_path / "overhead.csv"
    arguments = ["bench", "--device", "cpu", "--rounds", str(ROUNDS), "--csv", str(path)]
    result = testing.CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert len(tables_of(result.stdout)) == 9
    assert path.read_text().startswith("# ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "abacus"], "device must be auto, cpu, cuda or cuda:N, got abacus"),
        (["--csv", "/no/such/place/x.csv"], "csv must be in a directory that exists, got "),
    ],
)
def test_command_refuses_bad_options(options: list[str], message: str) -> None:
    testing = pytest.importorskip("typer.testing")
    from adaptlr.cli import app

    result = testing.CliRunner().invoke(app, ["bench", *options])
    assert result.exit_code == 2
    assert message in result.output
