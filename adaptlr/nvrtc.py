"""NVRTC, the CUDA compiler that torch's CUDA wheels bring along, through ctypes."""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib.util
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path


class Library:
    """One libnvrtc.

    Attributes:
        path: Where it is.
        version: Of CUDA, e.g. ``"13.0"``.
        cuda_version: The same as the driver counts, e.g. 13000.
    """

    def __init__(self, path: str) -> None:
        """Load it.

        Args:
            path: File name of the library, or a name that the dynamic loader can find.

        Raises:
            OSError: if it cannot be loaded.
        """
        self.path = path
        self._library = ctypes.CDLL(path)
        self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        self.version = f"{major.value}.{minor.value}"
        self.cuda_version = 1000 * major.value + 10 * minor.value

    @property
    def separately(self) -> tuple[str, ...]:
        """Options to compile every function by itself, side by side: the result is to be linked."""
        relocatable = ("--relocatable-device-code=true",)
        return relocatable + (
            ("--split-compile=0", "--minimal") if self.cuda_version >= 12040 else ()
        )

    def compile(self, main: str, sources: Mapping[str, str], options: Sequence[str]) -> bytes:
        """Compile ``sources[main]`` to a cubin; the other sources are the files it may include.

        Raises:
            RuntimeError: with the compiler's log, if it refuses.
        """
        headers = {name: text for name, text in sources.items() if name != main}
        program = ctypes.c_void_p()
        self._call(
            "nvrtcCreateProgram",
            ctypes.byref(program),
            sources[main].encode(),
            main.encode(),
            ctypes.c_int(len(headers)),
            _strings(headers.values()),
            _strings(headers),
        )
        try:
            if self._result("nvrtcCompileProgram", program, len(options), _strings(options)) != 0:
                raise RuntimeError(
                    f"NVRTC {self.version} ({self.path}) could not compile the kernels with "
                    f"{' '.join(options)}: {self._text('nvrtcGetProgramLog', program).strip()}"
                )
            return self._bytes("nvrtcGetCUBIN", program)
        finally:
            self._result("nvrtcDestroyProgram", ctypes.byref(program))

    def _result(self, name: str, *arguments: object) -> int:
        return int(getattr(self._library, name)(*arguments))

    def _call(self, name: str, *arguments: object) -> None:
        result = self._result(name, *arguments)
        if result != 0:
            reason = self._library.nvrtcGetErrorString(result).decode()
            raise RuntimeError(f"{name} of {self.path} failed: {reason}.")

    def _bytes(self, name: str, program: ctypes.c_void_p) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"{name}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._call(name, program, buffer)
        return buffer.raw

    def _text(self, name: str, program: ctypes.c_void_p) -> str:
        return self._bytes(name, program).rstrip(b"\0").decode(errors="replace")


def _strings(texts: Iterable[str]) -> ctypes.Array[ctypes.c_char_p]:
    encoded = [text.encode() for text in texts]
    return (ctypes.c_char_p * len(encoded))(*encoded)


def libraries() -> Iterator[Library]:
    """Load every NVRTC that can be found, the one that torch uses first."""
    seen = set()
    for path in _candidates():
        name = os.path.realpath(path) if os.path.exists(path) else path
        if name in seen:
            continue
        seen.add(name)
        try:
            yield Library(path)
        except (OSError, AttributeError, RuntimeError):  # of another platform, or broken
            continue


def _candidates() -> Iterator[str]:
    yield from _loaded()
    for directory in (*_wheels(), *_toolkits()):
        # The highest version first; libnvrtc-builtins is a part of it, not a compiler.
        yield from sorted(map(str, directory.glob("libnvrtc[.-]*so*")), reverse=True)
    system = ctypes.util.find_library("nvrtc")
    if system:
        yield system


def _loaded() -> list[str]:
    """Libraries that are in this process already."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    paths = (line.split(maxsplit=5)[5] for line in lines if "libnvrtc" in line)
    return sorted({path for path in paths if "builtins" not in Path(path).name})


def _wheels() -> Iterator[Path]:
    """The directories of NVIDIA's wheels, that of torch's own CUDA version first, and torch's."""
    torch = sys.modules.get("torch")
    cuda = getattr(getattr(torch, "version", None), "cuda", None) or ""
    major = f"cu{cuda.partition('.')[0]}"
    spec = importlib.util.find_spec("nvidia")
    for parent in (spec.submodule_search_locations or []) if spec else []:
        newest_first = sorted((path.name for path in Path(parent).glob("cu[0-9]*")), reverse=True)
        names = (major, "cuda_nvrtc", *newest_first)
        yield from (Path(parent) / name / "lib" for name in names)
    if torch is not None and torch.__file__:
        yield Path(torch.__file__).parent / "lib"


def _toolkits() -> Iterator[Path]:
    for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda"):
        if home:
            yield Path(home) / "lib64"
