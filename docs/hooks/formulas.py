"""Turns formulas into MathML, which browsers draw by themselves: no script, no fonts to fetch.

What is between ``$`` has come through ``pymdownx.arithmatex`` by then. A formula that cannot be
read ends the build.
"""

from __future__ import annotations

import html
import re
from typing import Any

from math_core import LatexToMathML

_converter = LatexToMathML()


def on_page_content(content: str, **_: Any) -> str:
    """Replace the formulas of a page."""
    content = re.sub(r'<span class="arithmatex">\\\((.+?)\\\)</span>', _inline, content)
    block = r'<div class="arithmatex">\s*\\\[(.+?)\\\]\s*</div>'
    return re.sub(block, _display, content, flags=re.DOTALL)


def _inline(found: re.Match[str]) -> str:
    return _converter.convert_with_local_state(html.unescape(found[1]), displaystyle=False)


def _display(found: re.Match[str]) -> str:
    # \tag, which the formulas have, is allowed in a numbered environment only.
    latex = rf"\begin{{equation}}{html.unescape(found[1]).strip()}\end{{equation}}"
    formula = _converter.convert_with_local_state(latex, displaystyle=True)
    return f'<div class="formula">{formula}</div>'
