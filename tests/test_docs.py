"""What the documentation shows runs, and what it names is there."""

from __future__ import annotations

import doctest
import inspect
import math
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import adaptlr
from adaptlr import controller

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]


def blocks_of(page: str | Path) -> list[tuple[str, str]]:
    """Return the Python of a page, block by block, each with the output that is shown below it."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", text, re.DOTALL)


def test_the_readme_s_ten_lines_run(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    assert "Status(step=200" in capsys.readouterr().out


def test_the_example_of_choosing_a_rate_runs(capsys):
    ((block, _),) = blocks_of("choosing_lr.md")
    exec(compile(block, "choosing_lr.md", "exec"), {})
    prior, estimate, found = capsys.readouterr().out.splitlines()
    assert prior.startswith("LRRange(3e-05 to 0.001")
    assert estimate.startswith("LREstimate(")
    assert found.startswith("RangeTest(lr=")


WHOLE = ("index", "quickstart", "settings", "unattended", "faq")


@pytest.mark.parametrize("page", WHOLE)
def test_the_code_of_a_page_prints_what_stands_below_it(
    page, tmp_path, monkeypatch, capsys, one_thread
):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    blocks = blocks_of(f"{page}.md")
    assert blocks
    for block, shown in blocks:
        exec(compile(block, f"{page}.md", "exec"), names)
        printed = capsys.readouterr().out.strip()
        same = doctest.OutputChecker().check_output(shown.strip(), printed, doctest.ELLIPSIS)
        assert same or not shown, printed


def test_the_code_of_the_recorder_s_page_runs(tmp_path, monkeypatch, capsys, one_thread):
    pytest.importorskip("tensorboard")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"adaptlr": adaptlr}
    for block, _ in blocks_of("recorder.md"):
        parameter = torch.zeros(2, requires_grad=True)
        names["optimizer"] = torch.optim.SGD([parameter], lr=0.1)
        exec(compile(block, "recorder.md", "exec"), names)
        one = names.pop("controller", None)
        if isinstance(one, adaptlr.AdaptiveLR):
            for loss in (1.0, math.nan):
                one.step(loss)
            one.detach()
    assert len(names["run"].headers) == 2
    assert list(names["run"].records["step"]) == [0, 1]
    assert "'event': 'skip'" in capsys.readouterr().out  # print is one of the sinks


# What each page is about, and what it takes.
GUIDES = {
    "huggingface": ("accelerate", "transformers"),
    "accelerate": ("accelerate",),
    "lightning": ("lightning",),
    "migrating": (),
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore:.*LeafSpec.*:FutureWarning")
@pytest.mark.parametrize("guide", GUIDES)
def test_the_code_of_a_guide_runs(guide, tmp_path, monkeypatch, one_thread):
    for package in GUIDES[guide]:
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": guide}
    for block, _ in blocks_of(f"{guide}.md"):
        exec(compile(block, f"{guide}.md", "exec"), names)
    controllers = [value for value in names.values() if isinstance(value, adaptlr.AdaptiveLR)]
    if "callback" in names:
        controllers.append(names["callback"].controller)
    assert [len(one.history()) for one in controllers] == [
        one._attachment.config.total_steps for one in controllers
    ]
    assert controllers


# The quick ones; hf_trainer.py and sft_lora.py take a model that takes its time.
EXAMPLES = {
    "plain_loop": ("sklearn",),
    "gan": ("sklearn",),
    "accelerate_loop": ("sklearn", "accelerate"),
    "lightning_module": ("sklearn", "lightning"),
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore:.*LeafSpec.*:FutureWarning")
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs(name, tmp_path, monkeypatch, capsys, one_thread):
    for package in EXAMPLES[name]:
        pytest.importorskip(package)
    example = ROOT / f"examples/{name}.py"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(example), "--steps", "20"])
    runpy.run_path(str(example), run_name="__main__")
    assert "Status(step=20" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []  # it cleans up


def test_the_first_run_of_how_it_decides_goes_as_its_page_says(tmp_path, one_thread):
    for package in ("matplotlib", "sklearn"):
        pytest.importorskip(package)
    from benchmarks.quality import decisions_plot as plot

    controller = plot.train(torch.optim.AdamW, 1e-2, plot.single_batches)
    page = (DOCS / "how_it_decides.md").read_text(encoding="utf-8")
    (event,) = controller.events()
    assert f"**{event.kind}**, step {event.step}: {event.reason}" in page
    spike = controller.history()[plot.SHUFFLED_STEP]
    assert adaptlr.Flag(int(spike["flags"])) is adaptlr.Flag.SPIKE
    assert spike["score"] == pytest.approx(7, abs=0.5)
    plot.draw(controller, tmp_path / "run.png")
    assert (tmp_path / "run.png").stat().st_size > 10_000


@pytest.mark.cuda
def test_the_graph_of_the_docs_runs(capsys):
    ((block, _),) = blocks_of("cuda_graphs.md")
    exec(compile(block.replace("10_000", "300"), "cuda_graphs.md", "exec"), {})
    assert capsys.readouterr().out.count("Status(step=") == 3


@pytest.mark.cuda
def test_the_graph_example_runs():
    example = ROOT / "examples/cuda_graph.py"
    result = subprocess.run([sys.executable, example], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "captured" in result.stdout


def test_the_page_of_the_command_line_has_every_command_and_its_json():
    typer = pytest.importorskip("typer")
    cli = pytest.importorskip("adaptlr.cli")
    page = (DOCS / "command_line.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \|(.*)\|$", page, re.MULTILINE))
    commands = typer.main.get_command(cli.app).commands
    assert list(rows) == list(commands)
    for name, command in commands.items():
        options = {option for parameter in command.params for option in parameter.opts}
        assert ("--json" in options) == ("--json" in rows[name]), name
        assert set(re.findall(r"--[a-z]+", rows[name])) <= options, name


@pytest.mark.parametrize("name", adaptlr.__all__)
def test_docstring_examples_run(name):
    thing = getattr(adaptlr, name)
    finder = doctest.DocTestFinder(recurse=inspect.isclass(thing))
    runner = doctest.DocTestRunner()
    for test in finder.find(thing, name, globs=dict(vars(controller))):
        assert runner.run(test).failed == 0, test.name


def test_the_code_of_every_page_is_run_by_a_test():
    with_code = {page.stem for page in DOCS.rglob("*.md") if blocks_of(page.relative_to(DOCS))}
    assert with_code == {*WHOLE, *GUIDES, "choosing_lr", "cuda_graphs", "recorder"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+?)(?:#[\w-]+)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_every_test_that_the_readme_names_is_there():
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*"))
    for name in re.findall(r"`(test_\w+)…?`", README):
        assert f"def {name}" in sources, name


def test_the_readme_quotes_measured_figures_only():
    results = "".join(path.read_text() for path in (ROOT / "benchmarks/results").glob("*.md"))
    table = README.split("What it costs")[1].split("\n\n")[1]
    figures = re.findall(r"\d+\.\d+", table)
    assert figures
    for figure in figures:
        assert figure in results, figure
