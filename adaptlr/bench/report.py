"""Measurements as tables: Markdown for people, CSV and JSON for programs."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from adaptlr.bench.facts import Facts
from adaptlr.bench.timing import Quartiles

COLUMNS = (
    *("section", "row", "host_us_lower", "host_us_median", "host_us_upper"),
    *("device_us", "kernels"),
)


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        section: Table that the row belongs to.
        name: What was measured.
        host: Microseconds that the host spends in one call; None for a kernel by itself.
        device: Microseconds that the device works for it; None on the CPU.
        kernels: Kernels and copies that one call puts on the device; None on the CPU.
    """

    section: str
    name: str
    host: Quartiles | None
    device: float | None = None
    kernels: float | None = None


@dataclass(frozen=True)
class Target:
    """A limit that adaptlr has set itself, and whether this machine keeps it."""

    name: str
    limit: str
    measured: str
    met: bool


@dataclass(frozen=True)
class Report:
    """All that one run of the benchmark has found."""

    facts: Facts
    rounds: int
    rows: list[Row]
    targets: list[Target]

    def markdown(self) -> str:
        """Return the report as Markdown tables."""
        sections = dict.fromkeys(row.section for row in self.rows)
        parts = [
            self.facts.line(),
            f"Microseconds; medians and quartiles of {self.rounds} interleaved rounds"
            + (", a tenth of them for 100 tensors." if self.facts.device == "cpu" else "."),
            "## Targets",
            _table(
                ("target", "limit", "measured", "met"),
                [(t.name, t.limit, t.measured, "yes" if t.met else "**no**") for t in self.targets],
            ),
        ]
        for section in sections:
            rows = [row for row in self.rows if row.section == section]
            parts += [f"## {section}", self._rows(rows)]
        return "\n\n".join(parts) + "\n"

    def _rows(self, rows: Sequence[Row]) -> str:
        header = ("", "host us", "quartiles")
        cells = [(row.name, *_host_cells(row.host)) for row in rows]
        if self.facts.device == "cpu":
            return _table(header, cells)
        on_device = [(_number(row.device, ".2f"), _number(row.kernels, ".4g")) for row in rows]
        both = [(*cell, *device) for cell, device in zip(cells, on_device, strict=True)]
        return _table((*header, "device us", "kernels"), both)

    def csv(self) -> str:
        """Return the rows as CSV, under a comment with the facts."""
        text = io.StringIO()
        text.write(f"# {self.facts.line()}\n")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in self.rows:
            host = [f"{value:.4f}" for value in row.host or ()] or [""] * 3
            device = [_number(row.device, ".4f"), _number(row.kernels, ".6g")]
            writer.writerow([row.section, row.name, *host, *device])
        return text.getvalue()

    def json(self) -> str:
        """Return everything as one JSON object."""
        return json.dumps(asdict(self) | {"rows": [_flat(row) for row in self.rows]}, indent=2)


def _flat(row: Row) -> dict[str, object]:
    return asdict(row) | {"host": row.host._asdict() if row.host else None}


def _host_cells(host: Quartiles | None) -> tuple[str, str]:
    if host is None:
        return "", ""
    return f"{host.median:.2f}", f"{host.lower:.2f} to {host.upper:.2f}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---"] * len(header)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))
