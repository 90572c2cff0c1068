"""The site of the docs builds without a warning, needs no network, and has every public name."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_docstrings import PUBLIC

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """Build the site; Python's warnings and those of mkdocs end the build."""
    for package in ("mkdocs", "material", "mkdocstrings_handlers.python", "math_core"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-W", "error", "-m", "mkdocs", "build", "--strict", "-d", folder]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}  # of the theme, about its successor
    done = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    return folder


def test_pages_fetch_nothing_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        elements = re.findall(r"<(?:script|link|img|iframe)\b[^>]*>", page.read_text("utf-8"))
        assert elements
        assert not [text for text in elements if re.search(r'(?:src|href)="(?:https?:)?//', text)]


def test_no_formula_is_left_as_latex(site):
    page = (site / "algorithm.html").read_text("utf-8")
    assert page.count("<math") > 200
    assert "arithmatex" not in page


def test_links_to_neighbours_of_the_docs_lead_to_their_pages(site):
    page = (site / "accelerate.html").read_text("utf-8")
    assert 'href="examples/gan.html"' in page
    assert "AdaptiveLR" in (site / "examples/gan.html").read_text("utf-8")
    assert (site / "benchmarks/results/guard_nvidia-h100-80gb-hbm3.png").exists()


def test_every_public_name_is_in_the_reference(site):
    pages = "".join(page.read_text("utf-8") for page in (site / "reference").glob("*.html"))
    missing = [name for name in map(".".join, PUBLIC) if f'id="{name}"' not in pages]
    assert missing == []


def test_the_dial_of_the_settings_is_the_measured_one():
    measured = (ROOT / "benchmarks/results/false_alarms.md").read_text("utf-8")
    rows = re.findall(
        r"^\| ([\d.]+) \| (independent, light|independent, heavy|auto)\S* ?\w* \| (.+) \|$",
        measured.split("## The dial")[1],
        re.MULTILINE,
    )
    dial: dict[str, list[str]] = {}
    for setting, _, numbers in rows:
        _, alarms, kept, *_ = numbers.split(" | ")
        dial.setdefault(setting, []).extend([kept, alarms])
    shown = (ROOT / "docs/settings.md").read_text("utf-8")
    assert len(dial) == 5
    for setting, (light, alarms, heavy, _, correlated, _) in dial.items():
        assert f"| {setting} | {light} | {heavy} | {correlated} | {alarms} |" in shown
