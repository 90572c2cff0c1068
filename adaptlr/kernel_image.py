"""The kernels in the form that a device can load: as nvcc built them, or compiled here by NVRTC."""

from __future__ import annotations

import functools
import hashlib
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from adaptlr import _extension, nvrtc

CHOICES = ("fatbin", "nvrtc", "host")
OPTIONS = ("--fmad=false", "--std=c++17")  # as in setup.py
MAIN_SOURCE = "kernels.cu"

Link = Callable[[bytes], bytes]


def kernel_image(device: int) -> bytes | None:
    """Return the image of the kernels for a CUDA device, or None where the host has to decide.

    The environment variable ``ADAPTLR_KERNELS`` chooses: ``fatbin`` takes what was built with the
    package, ``nvrtc`` compiles the same sources once and caches the result, ``host`` returns None.
    Unset, the first of these that works is taken, and a warning tells if it is the last.

    Args:
        device: Index of the device, as torch counts.

    Raises:
        ValueError: if ``ADAPTLR_KERNELS`` has another value.
        RuntimeError: if the image that it names cannot be had.
    """
    return _kernel_image(device, os.environ.get("ADAPTLR_KERNELS", ""))


@functools.cache
def _kernel_image(device: int, choice: str) -> bytes | None:
    if choice == "host":
        return None
    if choice == "fatbin":
        return _fatbin(device)
    if choice == "nvrtc":
        return _compiled(device)
    if choice:
        names = ", ".join(repr(name) for name in CHOICES)
        raise ValueError(f"ADAPTLR_KERNELS must be one of {names}, got {choice!r}")
    return _first_that_works(device)


def _first_that_works(device: int) -> bytes | None:
    reasons = []
    for source in (_fatbin, _compiled):
        try:
            return source(device)
        except RuntimeError as error:
            reasons.append(str(error))
    warnings.warn(
        f"adaptlr has no kernels for cuda:{device} and decides on the host, which waits for "
        "loss.item() in every step. Install torch's CUDA wheels, which bring NVRTC, or "
        f"rebuild adaptlr with ADAPTLR_CUDA=1 where nvcc is. {' '.join(dict.fromkeys(reasons))}",
        RuntimeWarning,
        stacklevel=2,
    )
    return None


def _fatbin(device: int) -> bytes:
    image = _extension.fatbin
    if not image:
        raise RuntimeError(
            "This build of adaptlr has no fatbin; rebuild it with ADAPTLR_CUDA=1 where nvcc is."
        )
    _extension.load_kernels(device, image)
    return image


def _compiled(device: int) -> bytes:
    """Compile with the first NVRTC whose image the driver takes."""
    major, minor = _extension.compute_capability(device)
    failures = []
    for library, link in _ways(device):
        try:
            image = compiled_for(f"sm_{major}{minor}", library, link)
            _extension.load_kernels(device, image)
            return image
        except RuntimeError as error:
            failures.append(str(error))
    raise RuntimeError(
        " ".join(dict.fromkeys(failures))
        or "NVRTC was not found; pip install nvidia-cuda-nvrtc brings it."
    )


def _ways(device: int) -> Iterator[tuple[nvrtc.Library, Link | None]]:
    """What may compile the kernels, and link them: the fast way first."""
    for library in nvrtc.libraries():
        if library.cuda_version <= _extension.driver_version():  # else the driver cannot link them
            yield library, partial(_extension.link_kernels, device)
        yield library, None


def compiled_for(architecture: str, library: nvrtc.Library, link: Link | None = None) -> bytes:
    """Return the kernels for an architecture such as ``sm_90``, from the cache if it has them.

    Args:
        architecture: Name of the architecture, as the compiler calls it.
        library: The compiler.
        link: Links functions that were compiled each by itself, which takes half as long.

    Raises:
        RuntimeError: if NVRTC does not know the architecture or refuses the sources, or if they
            cannot be linked.
    """
    options: tuple[str, ...] = (f"--gpu-architecture={architecture}", *OPTIONS)
    if link is not None:
        options += library.separately
    path = _cache_directory() / _cache_name(options, library)
    image = _read(path)
    if image is None:
        image = library.compile(MAIN_SOURCE, _extension.kernel_sources, options)
        image = image if link is None else link(image)
        _write(path, image)
    return image


def _cache_directory() -> Path:
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path("~/.cache").expanduser()) / "adaptlr"


def _cache_name(options: Sequence[str], library: nvrtc.Library) -> str:
    text = repr((sorted(_extension.kernel_sources.items()), options))
    inputs = hashlib.sha256(text.encode()).hexdigest()[:32]
    return f"{inputs}-nvrtc{library.version}.cubin"


def _read(path: Path) -> bytes | None:
    """Read an image behind its digest. The driver must never see half a file."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, image = content[:32], content[32:]
    return image if digest == hashlib.sha256(image).digest() else None


def _write(path: Path, image: bytes) -> None:
    """Write as one, so that processes that start together do not meet. A cache may be read-only."""
    temporary = None
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(hashlib.sha256(image).digest() + image)
        os.replace(temporary, path)
    except OSError:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
