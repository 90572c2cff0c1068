"""A recording is read whatever state it is in; what is none is refused with a reason."""

from __future__ import annotations

import json

import numpy as np
import pytest

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


def rows_of(count: int, **values) -> np.ndarray:
    """Records that are numbers alone, but for ``values``."""
    rows = np.zeros(count, record_dtype)
    for name, value in {"step": np.arange(count), "grad_norm": np.nan, **values}.items():
        rows[name] = value
    return rows


def number(value: float) -> str:
    """Write a number as docs and the format say: nine significant digits, or its name."""
    names = {"nan": '"NaN"', "inf": '"Infinity"', "-inf": '"-Infinity"'}
    text = f"{value:.9g}"
    return names.get(text, text)


def test_numbers_are_written_with_nine_digits():
    numbers = np.random.default_rng(0)
    rows = rows_of(20_000, step=np.arange(20_000) ** 4)
    edges = [0.0, -0.0, 1.0, 1e-4, 1e-5, 123456789.5, 1e16, np.nan, np.inf, -np.inf]
    edges += [999999999.4, 999999999.6, 0.99999999949, 0.9999999995, 0.9999999999, 100000000.5]
    for name in (*NUMBERS, "grad_norm"):
        usual = 10.0 ** numbers.uniform(-5, 10, len(rows))
        rows[name] = numbers.choice([-1, 1], len(rows)) * usual
        rows[name][::5] = 10.0 ** numbers.uniform(-320, 308, len(rows[::5]))
        rows[name][1::5] = np.round(rows[name][1::5], 3)
        rows[name][2::5] = np.floor(usual[2::5] * 64) / 64  # many lie between two texts
        rows[name][: len(edges)] = edges
    for row, line in zip(rows, record_lines(rows, "", str).decode().splitlines(), strict=True):
        words = [f'"{name}":{number(row[name])}' for name in NUMBERS]
        if not np.isnan(row["grad_norm"]):
            words.append(f'"grad_norm":{number(row["grad_norm"])}')
        assert line == f'{{"step":{row["step"]},{",".join(words)}}}'
    with pytest.raises(ValueError, match="expected rows of Record in one piece"):
        record_lines(rows[::2], "", str)


def test_words_are_asked_for_once_a_kind():
    rows = rows_of(9, flags=[0, 1, 0, 1, 2, 1, 1, 0, 2], phase=[0, 0, 0, 2, 0, 2, 0, 0, 0])
    asked = []

    def words_of(row) -> str:
        asked.append((row["flags"], row["phase"]))
        return f',"kind":{len(asked)}'

    lines = [json.loads(line) for line in record_lines(rows, ',"time":1', words_of).splitlines()]
    assert sorted(asked) == [(1, 0), (1, 2), (2, 0)]
    kinds = [line.get("kind") for line in lines]
    assert [kinds[i] for i in (0, 2, 7)] == [None] * 3
    assert [kinds[1], kinds[3], kinds[4]] == [kinds[6], kinds[5], kinds[8]]
    assert [line.get("time") for line in lines] == [1] + [None] * 8


def test_a_line_says_what_its_record_has():
    rows = rows_of(7)
    rows["flags"][2], rows["loss"][5], rows["grad_norm"][3] = 1, np.inf, 0.5
    text = records_to_json(rows, 9.0).decode().splitlines()
    assert [json.loads(line)["step"] for line in text] == list(range(7))
    assert [line.count('"time":9.00') for line in text] == [1, 0, 0, 0, 0, 0, 0]
    assert '"flags":["NONFINITE"]' in text[2]
    assert text[3].endswith('"grad_norm":0.5}')
    assert '"loss":"Infinity"' in text[5]
    assert records_to_json(rows[:0], 9.0) == b""


def test_numbers_survive_as_float32(path):
    values = np.random.default_rng(0).standard_normal(50).astype(np.float32)
    lines = (json.loads(record(step, float(value))) for step, value in enumerate(values))
    path.write_text(header() + "".join(map(to_json, lines)))
    assert np.array_equal(read(path).records["loss"].astype(np.float32), values)
