"""A recording is read whatever state it is in; what is none is refused with a reason."""

from __future__ import annotations

import json

import numpy as np
import pytest

from adaptlr import lines
from adaptlr._extension import record_dtype, record_lines
from adaptlr.lines import FORMAT, NUMBERS, records_to_json, to_json
from adaptlr.recording import Reader, read


def record(step: int, loss: float = 2.0, **more) -> str:
    return to_json({"step": step, **dict.fromkeys(NUMBERS, loss), **more})


def header(**more) -> str:
    return to_json({"format": FORMAT, "adaptlr": "0.1.0", "part": 1, **more})


def event(step: int, kind: str = "skip") -> str:
    return to_json(
        {"event": kind, "step": step, "reason": "", "lr": 0.1, "factor": 1.0, "time": 1.0}
    )


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.jsonl"


def test_a_torn_line_is_counted_wherever_it_is(path):
    torn = record(1)[:20] + "\n"
    path.write_text(header() + record(0) + torn + record(2) + "nonsense\n" + record(3)[:30])
    result = read(path)
    assert result.records["step"].tolist() == [0, 2]
    assert result.damaged == 3
    assert not result.closed


def test_what_was_recorded_later_counts(path):
    first = [*map(record, range(10)), event(3), event(9)]
    second = [event(5, "resume"), *(record(step, 1.0) for step in range(5, 8)), event(6)]
    path.write_text("".join([header(), *first, header(), *second, to_json({"end": "closed"})]))
    result = read(path)
    assert result.records["step"].tolist() == list(range(8))
    assert result.records["loss"].tolist() == [2.0] * 5 + [1.0] * 3
    assert result.replaced == 5
    assert [(e.step, e.kind) for e in result.events] == [(3, "skip"), (5, "resume"), (6, "skip")]
    assert result.closed


def test_a_run_of_any_length_is_read_in_pieces(path):
    lines = [header().encode(), *(record(step).encode() for step in range(2500))]
    reader = Reader(path)
    for start in range(0, len(lines), 700):
        reader.feed(lines[start : start + 700])
        steps = reader.recording().records["step"]
        assert steps.tolist() == list(range(min(start + 699, 2500)))


def test_what_a_line_leaves_out_has_its_usual_value(path):
    path.write_text(header() + record(0) + record(1, grad_norm=3.0, phase="HOLD", flags=["SPIKE"]))
    plain, full = read(path).records
    assert (plain["phase"], plain["flags"], plain["action"]) == (0, 0, 0)
    assert np.isnan(plain["grad_norm"])
    assert (full["phase"], full["flags"], full["grad_norm"]) == (2, 2, 3.0)


def test_lines_of_something_else_are_counted_and_spaces_are_none(path):
    lines = [
        record(0),
        record(1).replace(":", ": "),  # as another tool may write it
        record(-1),
        to_json({"step": 10.0**30, **dict.fromkeys(NUMBERS, 2.0)}),
        record(2, None),  # a NaN of another tool
        record(3, phase="SOON"),
        to_json({"step": 4}),
        to_json({"event": "skip"}),
        to_json({"gap": 3}),
        to_json({"news": "of another kind"}),
        "[1, 2]\n",
        "\n",
        record(5),
    ]
    path.write_text(header() + "".join(lines))
    result = read(path)
    assert result.records["step"].tolist() == [0, 1, 2, 5]
    assert result.damaged == 8
    assert result.events == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty: a recording begins with a header"),
        ('{"loss": 1.0}\n', "is not a recording of adaptlr: its first line must be a header"),
        ("step,loss\n0,1.0\n", "is not a recording of adaptlr: its first line must be a header"),
        (header(format=99), f"must be of format {FORMAT}, got 99, written by adaptlr 0.1.0"),
        (header(config=None), "is not a recording of adaptlr: a header is damaged"),
        (header(config={"total_steps": "many"}), "a header is damaged"),
        (header(time="yesterday"), "a header is damaged"),
        (header() + record(0) + header(format=2), f"must be of format {FORMAT}, got 2, written"),
    ],
)
def test_a_foreign_file_is_refused(path, text, message):
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read(path)


def test_a_missing_file_is_named(path):
    with pytest.raises(FileNotFoundError, match=r"path must be a recording, got .*run\.jsonl"):
        read(path)


def test_the_extension_writes_a_line_as_python_does():
    numbers = np.random.default_rng(0)
    rows = np.zeros(1000, record_dtype)
    rows["step"], rows["grad_norm"] = np.arange(1000) ** 4, np.nan
    for name in NUMBERS:
        rows[name] = numbers.choice([-1, 1], 1000) * 10.0 ** numbers.uniform(-320, 308, 1000)
        rows[name][:6] = [0.0, -0.0, 1.0, 1e-5, 123456789.5, 1e16]
    expected = [lines._full_line(row, None) for row in rows]
    assert record_lines(rows).decode().splitlines(keepends=True) == expected
    with pytest.raises(ValueError, match="expected rows of Record in one piece"):
        record_lines(rows[::2])


def test_records_keep_their_order_whoever_writes_them():
    rows = np.zeros(7, record_dtype)
    rows["step"], rows["grad_norm"] = np.arange(7), np.nan
    rows["flags"][2], rows["loss"][5] = 1, np.inf
    text = records_to_json(rows, 9.0).splitlines()
    assert [json.loads(line)["step"] for line in text] == list(range(7))
    assert [line.count('"time":9.00') for line in text] == [1, 0, 0, 0, 0, 0, 0]
    assert '"flags":["NONFINITE"]' in text[2]
    assert '"loss":"Infinity"' in text[5]
    assert records_to_json(rows[:0], 9.0) == ""


def test_numbers_survive_as_float32(path):
    values = np.random.default_rng(0).standard_normal(50).astype(np.float32)
    lines = (json.loads(record(step, float(value))) for step, value in enumerate(values))
    path.write_text(header() + "".join(map(to_json, lines)))
    assert np.array_equal(read(path).records["loss"].astype(np.float32), values)
