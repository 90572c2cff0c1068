"""Builds the extension; everything else about the package is in pyproject.toml.

ADAPTLR_CUDA=0 builds without nvcc, ADAPTLR_CUDA=1 insists on it. Without the variable nvcc is used
if it is found; kernels that it has not compiled are compiled by NVRTC when they are first needed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

SOURCE_DIRECTORY = Path("csrc")
KERNELS = SOURCE_DIRECTORY / "kernels.cu"
# Code for 8.0 runs on 8.6 and 8.9 as well; GPUs newer than the last take the PTX.
ARCHITECTURES = (75, 80, 90, 100, 120)
NVCC_FLAGS = ("-std=c++17", "-fmad=false", "--threads", "0", "-fatbin")
COMPILE_FLAGS = ("-O2", "-ffp-contract=off", "-fvisibility=hidden")


def use_nvcc(environment: Mapping[str, str]) -> bool | None:
    """Whether the user wants nvcc: yes, no, or None for "if there is one"."""
    value = environment.get("ADAPTLR_CUDA", "")
    choices = {"": None, "0": False, "1": True}
    if value not in choices:
        raise ValueError(f"ADAPTLR_CUDA must be 0 or 1, got {value!r}")
    return choices[value]


def find_nvcc(environment: Mapping[str, str]) -> str | None:
    """The nvcc of PATH, of CUDA_HOME or of the usual place, in this order."""
    homes = [environment.get("CUDA_HOME"), "/usr/local/cuda"]
    path = [environment.get("PATH", os.defpath), *(f"{home}/bin" for home in homes if home)]
    return shutil.which("nvcc", path=os.pathsep.join(path))


def run(*command: str | Path) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise CompileError(f"{' '.join(map(str, command))}\n{result.stdout}{result.stderr}")
    return result.stdout


def architectures(nvcc: str) -> list[int]:
    known = {int(number) for number in re.findall(r"sm_(\d+)\b", run(nvcc, "--list-gpu-code"))}
    return [number for number in ARCHITECTURES if number in known]


def compile_fatbin(nvcc: str, directory: Path) -> tuple[bytes, str]:
    """Returns the image and a line about it."""
    numbers = architectures(nvcc)
    codes = [f"arch=compute_{number},code=sm_{number}" for number in numbers]
    codes.append(f"arch=compute_{numbers[-1]},code=compute_{numbers[-1]}")
    image = directory / "kernels.fatbin"
    run(nvcc, *NVCC_FLAGS, *(f"-gencode={code}" for code in codes), "-o", image, KERNELS)
    release = re.search(r"release (\S+),", run(nvcc, "--version"))
    version = release.group(1) if release else "of unknown version"
    names = " ".join(f"sm_{number}" for number in numbers)
    return image.read_bytes(), f"kernels compiled by nvcc {version} for {names}"


def build_fatbin(environment: Mapping[str, str], directory: Path) -> tuple[bytes, str]:
    """Decides about nvcc. An empty image leaves the kernels to NVRTC."""
    wanted = use_nvcc(environment)
    nvcc = find_nvcc(environment) if wanted is not False else None
    if nvcc is None:
        if wanted:
            raise CompileError(
                "ADAPTLR_CUDA=1, but nvcc is not in PATH, CUDA_HOME/bin or /usr/local/cuda/bin; "
                "install the CUDA toolkit or unset the variable"
            )
        reason = "ADAPTLR_CUDA=0" if wanted is False else "nvcc not found"
        return b"", f"{reason}; kernels will be compiled by NVRTC at first use"
    try:
        return compile_fatbin(nvcc, directory)
    except CompileError as error:
        if wanted:
            raise
        warnings.warn(f"adaptlr: nvcc could not compile the kernels: {error}", stacklevel=2)
        return b"", "nvcc failed; kernels will be compiled by NVRTC at first use"


def kernel_sources(path: Path = KERNELS) -> dict[str, str]:
    """The file and all that it includes in quotes, by name."""
    text = path.read_text(encoding="utf-8")
    sources = {path.name: text}
    for name in re.findall(r'^#include "(.+)"$', text, re.MULTILINE):
        sources.update(kernel_sources(path.with_name(name)))
    return sources


def embed(fatbin: bytes, sources: Mapping[str, str]) -> str:
    """The header that carries both into the extension. See csrc/embedded.h."""
    lines = [fatbin[i : i + 64] for i in range(0, len(fatbin), 64)] or [b""]
    literals = "\n".join('"' + "".join(f"\\{byte:03o}" for byte in line) + '"' for line in lines)
    entries = "\n".join(
        f'{{"{name}", R"adaptlr({text})adaptlr"}},' for name, text in sources.items()
    )
    return (
        "namespace adaptlr {\n"
        f"constexpr std::string_view kFatbin{{\n{literals}, {len(fatbin)}}};\n"
        f"constexpr KernelSource kKernelSources[] = {{\n{entries}\n}};\n"
        "} // namespace adaptlr\n"
    )


class BuildExtension(build_ext):
    """Compiles the kernels first, because the extension contains them."""

    def build_extension(self, extension: Pybind11Extension) -> None:
        directory = Path(self.build_temp) / "generated"
        directory.mkdir(parents=True, exist_ok=True)
        fatbin, outcome = build_fatbin(os.environ, directory)
        header = directory / "embedded_kernels.h"
        text = embed(fatbin, kernel_sources())
        if not header.exists() or header.read_text(encoding="utf-8") != text:
            header.write_text(text, encoding="utf-8")
        extension.include_dirs.append(str(directory))
        extension.depends.append(str(header))
        super().build_extension(extension)
        print(f"adaptlr: {outcome}")


def extension() -> Pybind11Extension:
    # The slowest first: they are compiled in parallel.
    sources = sorted(SOURCE_DIRECTORY.glob("*.cpp"), key=lambda path: -path.stat().st_size)
    return Pybind11Extension(
        "adaptlr._extension",
        [str(path) for path in sources],
        depends=[str(path) for path in (KERNELS, *sorted(SOURCE_DIRECTORY.glob("*.h")))],
        libraries=["dl"] if sys.platform == "linux" else [],
        extra_compile_args=list(COMPILE_FLAGS),
        cxx_std=17,
    )


def build() -> None:
    ParallelCompile(default=0).install()  # as many jobs as there are cores
    setup(ext_modules=[extension()], cmdclass={"build_ext": BuildExtension})


if __name__ == "__main__":
    build()
