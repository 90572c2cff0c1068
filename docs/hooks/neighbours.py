"""Brings onto the site what lies beside docs/: examples, measurements, the change log.

In the repository, pages of docs/ link to them as ``../examples/gan.py``; on the site they are pages
too. Results that only a program reads (CSV, JSON Lines) are copied, to be downloaded.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
NEIGHBOURS = ("CHANGELOG.md", "benchmarks/README.md", "benchmarks/results/*.*", "examples/*.py")


def on_files(files: Files, *, config: Any) -> Files:
    """Add the neighbours to the files of the site."""
    for pattern in NEIGHBOURS:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            if path.suffix == ".py":
                files.append(File.generated(config, _page(name), content=_listing(path)))
            else:
                files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Let links to neighbours lead to their pages."""
    if "/" in page.file.src_uri:  # in a folder of docs/, or itself a neighbour
        return markdown
    return re.sub(r"\]\(\.\./([\w./-]+)\)", lambda link: f"]({_page(link[1])})", markdown)


def _page(name: str) -> str:
    return name.removesuffix(".py") + ".md" if name.endswith(".py") else name


def _listing(path: Path) -> str:
    return f"# {path.name}\n\n```python\n{path.read_text(encoding='utf-8')}```\n"
