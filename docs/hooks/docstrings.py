"""How docstrings of the package become the reference of the site.

A name in single backticks, ``Guard`` or ``step`` say, becomes a link, if it is public or a method
of the same class. What a constructor does is said by its class, so its own docstring is left out.
An example is set as code, for which griffe wants the plural.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import griffe

PACKAGE = Path(__file__).parents[2] / "adaptlr"


def _public() -> frozenset[str]:
    """Return ``adaptlr.__all__`` without importing what needs torch."""
    for node in ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return frozenset(ast.literal_eval(node.value))
    raise LookupError("adaptlr/__init__.py must define __all__")


class Docstrings(griffe.Extension):
    """Adds links, and takes the docstrings of constructors away."""

    def __init__(self) -> None:
        """Read the public names."""
        self._names = _public()

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        """See to a class and its methods, once all of them are known."""
        own = {name for name in cls.members if not name.startswith("_")}
        for name, member in cls.members.items():
            if name == "__init__":
                member.docstring = None
            elif not member.is_alias:
                self._link(member, cls, own)
        self._link(cls, cls, own)

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        """See to a function of a module."""
        if isinstance(func.parent, griffe.Module):
            self._link(func, None, set())

    def _link(self, thing: griffe.Object, cls: griffe.Class | None, own: set[str]) -> None:
        if thing.docstring is None:
            return

        def linked(found: re.Match[str]) -> str:
            name = found[1]
            first = name.removeprefix("adaptlr.").split(".")[0]
            if first in self._names and first != (cls.name if cls else ""):
                return f"[`{name}`][adaptlr.{first}]"
            if cls is not None and cls.name in self._names and name in own and name != thing.name:
                return f"[`{name}`][adaptlr.{cls.name}.{name}]"
            return found[0]

        text = re.sub(r"^Example:$", "Examples:", thing.docstring.value, flags=re.MULTILINE)
        thing.docstring.value = re.sub(r"(?<![`\[])`([\w.]+)`(?![`\]])", linked, text)
