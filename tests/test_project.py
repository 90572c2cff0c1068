"""The project keeps its own rules: its checks pass, and what is written more than once agrees."""

from __future__ import annotations

import ast
import enum
import inspect
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

import pytest

import adaptlr
from adaptlr import _extension, config, reference_state, telemetry

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").glob("*.*"))
CHECKS = {
    "ruff-format": ["ruff", "format", "--check", "."],
    "ruff-check": ["ruff", "check", "."],
    "mypy": ["mypy", "--strict", "adaptlr"],
    "clang-format": ["clang-format", "--dry-run", "--Werror", *SOURCES],
    "codespell": ["codespell"],
}


def text_of(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


# -- checks ------------------------------------------------------------------------------------


def find_tool(name: str) -> str:
    """Prefer the tool beside this Python: its environment need not be activated."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    tool = shutil.which(name, path=path)
    if tool is None:
        pytest.skip(f'{name} is not installed; pip install -c constraints.txt -e ".[dev]"')
    return tool


@pytest.mark.parametrize("check", CHECKS)
def test_check_passes(check):
    tool, *arguments = CHECKS[check]
    run = subprocess.run(
        [find_tool(tool), *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, f"{run.stdout}{run.stderr}"


def test_pre_commit_runs_the_same_checks():
    hooks = re.findall(r"^ +- id: (\S+)$", text_of(".pre-commit-config.yaml"), re.MULTILINE)
    assert sorted(hooks) == sorted(CHECKS)


# -- documents ---------------------------------------------------------------------------------


def test_contributing_is_short():
    assert len(text_of("CONTRIBUTING.md").splitlines()) <= 40


def test_version_is_the_same_everywhere():
    changelog = re.search(r"^## \[?(\d[^\s\]]*)", text_of("CHANGELOG.md"), re.MULTILINE)
    project = re.search(r'^version = "(.+)"$', text_of("pyproject.toml"), re.MULTILINE)
    assert changelog is not None
    assert project is not None
    assert changelog[1] == project[1] == adaptlr.__version__


def test_ci_runs_the_command_of_the_readme():
    command = text_of(".ci/run").splitlines()[-1]
    assert "pytest" in command
    assert command in text_of("README.md").splitlines()


def test_constraints_pin_every_dependency():
    tomllib = pytest.importorskip("tomllib", reason="tomllib came with Python 3.11")
    settings = tomllib.loads(text_of("pyproject.toml"))
    project = settings["project"]
    lists = [
        settings["build-system"]["requires"],
        project["dependencies"],
        *project["optional-dependencies"].values(),
    ]
    named = {re.split(r"[\[<>=; ]", entry)[0] for entries in lists for entry in entries}
    pinned = set(re.findall(r"^([\w-]+)==", text_of("constraints.txt"), re.MULTILINE))
    assert named - {"adaptlr"} <= pinned


def project_files() -> Iterator[Path]:
    git = find_tool("git")
    command = [git, "ls-files", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    for name in listing.stdout.splitlines():
        path = ROOT / name
        if path.is_file() and path.suffix not in {".png", ".csv"}:
            yield path


def test_no_file_tells_where_or_how_it_was_written():
    machine = r"(?<![\w.~])/(?:home|root|tmp|work|Users)/\w"
    way = r"\b(?:[Tt]his|that|an earlier|a previous|a later|[Aa]nother|[Ee]very) session\b"
    for path in project_files():
        found = re.search(f"{machine}|{way}", path.read_text(encoding="utf-8"))
        assert found is None, f"{path.relative_to(ROOT)}: {found}"


# -- public names ------------------------------------------------------------------------------


def parameters_of(value: Callable[..., object]) -> list[str]:
    """Names of the arguments of a function, or of a constructor where a class has its own."""
    if inspect.isclass(value) and issubclass(value, (enum.Enum, BaseException)):
        return []
    return list(inspect.signature(value).parameters)


@pytest.mark.parametrize("name", adaptlr.__all__)
def test_public_name_is_documented(name):
    value = getattr(adaptlr, name)
    documentation = inspect.getdoc(value) or ""
    assert documentation
    assert not inspect.isclass(value) or documentation != inspect.getdoc(value.__mro__[1])
    parameters = parameters_of(value)
    _, heading, described = documentation.partition("Args:")
    if not heading:
        _, heading, described = documentation.partition("Attributes:")
    assert heading or not parameters
    for parameter in parameters:
        assert re.search(rf"^ +(\w+, )*{parameter}(, \w+)*:", described, re.MULTILINE), parameter


@pytest.mark.parametrize("name", adaptlr.__all__)
def test_public_methods_are_documented(name):
    value = getattr(adaptlr, name)
    for method, member in vars(value).items():
        if not method.startswith("_") and (callable(member) or isinstance(member, property)):
            assert inspect.getdoc(member), method


# -- names that are written more than once -----------------------------------------------------


def struct_fields(struct: str) -> dict[str, str]:
    """Fields of a struct of state.h and of its bases, each with the comment on its line."""
    pattern = rf"^struct {struct}(?: : (\w+))? {{$(.*?)^}};$"
    found = re.search(pattern, text_of("csrc/state.h"), re.M | re.S)
    assert found is not None
    fields = struct_fields(found[1]) if found[1] else {}
    field = r"^ +(\w+) (\w+)(?:\[\w+\])?;(?: *// *(.*))?$"
    for kind, name, comment in re.findall(field, found[2], re.MULTILINE):
        inner = struct_fields(kind) if kind == "Progress" else {}
        fields |= {f"{name}.{part}": text for part, text in inner.items()} or {name: comment}
    return fields


@pytest.mark.parametrize("struct", ["Config", "State", "Record"])
def test_fields_are_those_of_the_extension(struct):
    assert list(struct_fields(struct)) == list(getattr(_extension, f"{struct.lower()}_dtype").names)


@pytest.mark.parametrize("name", ["Phase", "Action", "Flag"])
def test_public_enums_are_those_of_the_reference(name):
    public, reference = getattr(telemetry, name), getattr(reference_state, name)
    assert {m.name: int(m) for m in public} == {
        name: int(value) for name, value in vars(reference).items() if name.isupper()
    }


def test_decays_and_guard_modes_are_those_of_the_reference():
    assert [decay.name.lower() for decay in reference_state.Decay] == list(config.DECAYS)
    assert dict(reference_state.GuardMode.__members__) == dict(config.GuardMode.__members__)


@pytest.mark.parametrize("struct", ["State", "Record"])
def test_every_field_is_explained(struct):
    specification = text_of("docs/algorithm.md")
    explained = {name for name, comment in struct_fields("State").items() if comment}
    for name, comment in struct_fields(struct).items():
        base = name.removeprefix("previous_").removeprefix("target_")
        known = base in explained or re.search(rf"`{base}`|\b{base}\b", specification)
        assert comment or known, name


def test_symbols_of_the_specification_are_names_of_the_code():
    code = "".join(path.read_text("utf-8") for path in sorted((ROOT / "csrc").glob("*.h")))
    rows = re.findall(r"^\| \$.+?\| (`.+?) \|", text_of("docs/algorithm.md"), re.MULTILINE)
    names = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert "total_steps" in names
    for name in names:
        assert re.search(rf"\b{name}\b", code), name


# -- the extension -----------------------------------------------------------------------------


def public(names: Iterator[str]) -> set[str]:
    return {name for name in names if not name.startswith("_")}


def stub_names(body: list[ast.stmt]) -> Iterator[str]:
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id


def test_stub_names_what_the_extension_exports():
    stub = ast.parse(text_of("adaptlr/_extension.pyi"))
    assert public(stub_names(stub.body)) == public(iter(vars(_extension)))
    classes = {node.name: node for node in stub.body if isinstance(node, ast.ClassDef)}
    for name in public(iter(classes)):
        # A base whose name begins with an underscore exists in the stub alone.
        bases = [classes[base.id] for base in classes[name].bases if isinstance(base, ast.Name)]
        described = [stub_names(node.body) for node in (classes[name], *bases)]
        assert public(chain(*described)) == public(iter(vars(getattr(_extension, name)))), name


# -- import ------------------------------------------------------------------------------------


def import_seconds() -> float:
    program = (
        "import time, torch; start = time.process_time(); import adaptlr; "
        "print(time.process_time() - start)"
    )
    # As for a user: compiled once, then read from the cache.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    run = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    return float(run.stdout)


def test_import_adds_at_most_50_ms_to_that_of_torch():
    # Processor time, and the best of three: another process may have the cores meanwhile.
    assert any(import_seconds() <= 0.05 for _ in range(3))


def test_the_core_imports_no_framework():
    frameworks = "{'accelerate', 'lightning', 'transformers'}"
    program = f"import sys, adaptlr; print(*{frameworks} & sys.modules.keys())"
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == ""
