"""What is public has a docstring that says what it takes, gives back and raises."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator

import pytest

import adaptlr

# Public beside `adaptlr.__all__`: what is imported from a module.
MODULES = {
    "adaptlr.recording": ("read", "Recording", "RecordedEvent"),
    "adaptlr.sinks": ("TensorBoard", "WandB", "Trackio", "CSV", "Command"),
    "adaptlr.integrations.transformers": ("attach", "AdaptiveLRCallback"),
    "adaptlr.integrations.accelerate": ("attach",),
    "adaptlr.integrations.lightning": ("AdaptiveLRCallback",),
}
PUBLIC = [("adaptlr", name) for name in adaptlr.__all__]
PUBLIC += [(module, name) for module, names in MODULES.items() for name in names]


def callables_of(module: str, name: str) -> Iterator[tuple[str, Callable[..., object], str]]:
    """Yield what a user may call: its name, its code, and the docstring that speaks of it."""
    try:
        thing = getattr(importlib.import_module(module), name)
    except ImportError as error:
        pytest.skip(str(error))
    if inspect.isfunction(thing):
        yield name, thing, inspect.getdoc(thing) or ""
        return
    for method, function in vars(thing).items():
        if method in ("__init__", "__post_init__"):
            yield name, function, inspect.getdoc(thing) or ""
        elif inspect.isfunction(function) and not method.startswith(("_", "on_")):
            yield f"{name}.{method}", function, inspect.getdoc(function) or ""


def raised_by(function: Callable[..., object]) -> set[str]:
    """Return the exceptions that a function raises by itself; `require` raises a ValueError."""
    try:
        source = textwrap.dedent(inspect.getsource(function))
    except OSError:  # made by `dataclass`
        return set()
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            found.add(getattr(node.exc.func, "id", ""))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "require":
            found.add("ValueError")
    return {error for error in found if error.endswith("Error")}


each_public_name = pytest.mark.parametrize(
    ("module", "name"), PUBLIC, ids=list(map(".".join, PUBLIC))
)


@each_public_name
def test_a_docstring_says_what_is_taken(module, name):
    for called, function, text in callables_of(module, name):
        for parameter in inspect.signature(function).parameters.keys() - {"self", "_"}:
            described = rf"^ +(?:\w+, )*\*{{0,2}}{parameter}(?:, \w+)*:|``{parameter}``"
            assert re.search(described, text, re.MULTILINE), f"{called}({parameter})"


@each_public_name
def test_a_docstring_says_what_is_returned(module, name):
    for called, function, text in callables_of(module, name):
        if inspect.signature(function).return_annotation not in ("None", None):
            assert re.search("Returns:|^Returns? ", text) or "return" in text.split("\n")[0], called


@each_public_name
def test_a_docstring_says_what_is_raised(module, name):
    for called, function, text in callables_of(module, name):
        for error in raised_by(function):
            assert f"{error}: " in text, f"{called} raises {error}"
