"""Building the extension, and getting kernels where nvcc was not there for it."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from adaptlr import _extension, kernel_image, nvrtc

ROOT = Path(__file__).parents[1]
ELF = b"\x7fELF"


@pytest.fixture(scope="module")
def setup() -> Iterator[ModuleType]:
    """setup.py as a module; it reads csrc/ relative to the project's directory."""
    pytest.importorskip("pybind11")
    pytest.importorskip("setuptools")
    spec = importlib.util.spec_from_file_location("adaptlr_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = Path.cwd()
    os.chdir(ROOT)
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        os.chdir(before)


@pytest.fixture(autouse=True)
def _fresh_choice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.delenv("ADAPTLR_KERNELS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    kernel_image._kernel_image.cache_clear()
    yield
    kernel_image._kernel_image.cache_clear()


WHOLE = b"--gpu-architecture=sm_90 --fmad=false --std=c++17"
SEPARATELY = b" --relocatable-device-code=true --split-compile=0 --minimal"


class CountingCompiler(nvrtc.Library):
    """Stands in for NVRTC."""

    def __init__(self) -> None:
        self.path, self.version, self.cuda_version, self.calls = "libnvrtc", "13.0", 13000, 0

    def compile(self, main: str, sources: Any, options: Sequence[str]) -> bytes:
        assert main in sources
        self.calls += 1
        return ELF + " ".join(options).encode()


def refuse(device: int, image: bytes = b"") -> None:
    raise RuntimeError("refused.")


# -- the extension ------------------------------------------------------------


@pytest.mark.skipif(_extension.cuda_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_the_extension_loads_and_says_what_is_missing() -> None:
    with pytest.raises(RuntimeError, match=r"NVIDIA driver|CUDA could not"):
        _extension.load_kernels(0, b"image")


def test_sources_are_embedded_as_they_are_and_include_no_system_header() -> None:
    sources = _extension.kernel_sources
    assert set(sources) >= {"kernels.cu", "controller.h", "state.h"}
    for name, text in sources.items():
        assert text == (ROOT / "csrc" / name).read_text(encoding="utf-8")
        for included in re.findall(r'#include "(.+)"', text):
            assert included in sources
    for name in sources.keys() - {"state.h"}:  # state.h keeps its own from NVRTC
        assert "#include <" not in sources[name]


# -- setup.py ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "wanted"), [("", None), ("0", False), ("1", True)])
def test_variable_decides_about_nvcc(setup: ModuleType, value: str, wanted: bool | None) -> None:
    assert setup.use_nvcc({"ADAPTLR_CUDA": value}) is wanted


def test_bad_variable_is_refused(setup: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"^ADAPTLR_CUDA must be 0 or 1, got 'yes'$"):
        setup.use_nvcc({"ADAPTLR_CUDA": "yes"})


def fake_nvcc(directory: Path, script: str) -> dict[str, str]:
    """An environment in which nvcc is a shell script."""
    nvcc = directory / "nvcc"
    nvcc.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    nvcc.chmod(0o755)
    return {"PATH": str(directory)}


GOOD_NVCC = """
case "$*" in
  *--list-gpu-code*) echo sm_80 sm_87 sm_90 ;;
  *--version*) echo "Cuda compilation tools, release 12.4, V12.4.131" ;;
  *) while [ "$1" != "-o" ]; do shift; done; printf 'image\\000"' > "$2" ;;
esac
"""


def test_nvcc_builds_for_the_architectures_that_it_knows(setup: ModuleType, tmp_path: Path) -> None:
    image, outcome = setup.build_fatbin(fake_nvcc(tmp_path, GOOD_NVCC), tmp_path)
    assert image == b'image\0"'
    assert outcome == "kernels compiled by nvcc 12.4 for sm_80 sm_90"


def test_failing_nvcc_is_a_warning_unless_it_is_wanted(setup: ModuleType, tmp_path: Path) -> None:
    environment = fake_nvcc(tmp_path, "echo broken >&2; exit 1")
    with pytest.warns(UserWarning, match="broken"):
        image, outcome = setup.build_fatbin(environment, tmp_path)
    assert image == b""
    assert outcome == "nvcc failed; kernels will be compiled by NVRTC at first use"
    with pytest.raises(setup.CompileError, match="broken"):
        setup.build_fatbin({**environment, "ADAPTLR_CUDA": "1"}, tmp_path)


def test_absent_nvcc_is_an_error_only_if_it_is_wanted(
    setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "find_nvcc", lambda environment: None)
    assert setup.build_fatbin({}, tmp_path)[0] == b""
    with pytest.raises(setup.CompileError, match="ADAPTLR_CUDA=1, but nvcc is not in PATH"):
        setup.build_fatbin({"ADAPTLR_CUDA": "1"}, tmp_path)


def test_build_without_nvcc_embeds_the_sources_alone(setup: ModuleType, tmp_path: Path) -> None:
    where = ("--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp"))
    unoptimised = "import setup; setup.COMPILE_FLAGS += ('-O0',); setup.build()"
    built = subprocess.run(
        [sys.executable, "-c", unoptimised, "build_ext", *where],
        cwd=ROOT,
        env={**os.environ, "ADAPTLR_CUDA": "0"},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    expected = "adaptlr: ADAPTLR_CUDA=0; kernels will be compiled by NVRTC at first use"
    assert expected in built.stdout
    code = (
        "import _extension as e; "
        "assert e.fatbin == b'' and 'kernels.cu' in e.kernel_sources, e.kernel_sources.keys()"
    )
    directory = str(tmp_path / "lib" / "adaptlr")
    environment = {**os.environ, "PYTHONPATH": directory}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


# -- the choice of an image ---------------------------------------------------


def test_bad_choice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTLR_KERNELS", "ptx")
    expected = "ADAPTLR_KERNELS must be one of 'fatbin', 'nvrtc', 'host', got 'ptx'"
    with pytest.raises(ValueError, match=f"^{expected}$"):
        kernel_image.kernel_image(0)


def test_host_needs_no_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTLR_KERNELS", "host")
    assert kernel_image.kernel_image(0) is None


def test_missing_fatbin_is_an_error_if_it_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTLR_KERNELS", "fatbin")
    monkeypatch.setattr(_extension, "fatbin", b"")
    with pytest.raises(RuntimeError, match="This build of adaptlr has no fatbin; rebuild"):
        kernel_image.kernel_image(0)


def test_refused_fatbin_gives_way_to_nvrtc(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(device: int, image: bytes) -> None:
        if not image.startswith(ELF):
            refuse(device)

    monkeypatch.setattr(_extension, "fatbin", b"for other GPUs")
    monkeypatch.setattr(_extension, "load_kernels", load)
    monkeypatch.setattr(_extension, "compute_capability", lambda device: (9, 0))
    monkeypatch.setattr(_extension, "driver_version", lambda: 13000)
    monkeypatch.setattr(_extension, "link_kernels", lambda device, parts: parts + b" linked")
    monkeypatch.setattr(nvrtc, "libraries", lambda: iter([CountingCompiler()]))
    assert kernel_image.kernel_image(0) == ELF + WHOLE + SEPARATELY + b" linked"


@pytest.mark.parametrize("driver_version", [12090, 13000])
def test_kernels_that_the_driver_cannot_link_are_compiled_as_a_whole(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, driver_version: int
) -> None:
    compiler = CountingCompiler()
    monkeypatch.setenv("ADAPTLR_KERNELS", "nvrtc")
    monkeypatch.setattr(_extension, "load_kernels", lambda device, image: None)
    monkeypatch.setattr(_extension, "compute_capability", lambda device: (9, 0))
    monkeypatch.setattr(_extension, "driver_version", lambda: driver_version)
    monkeypatch.setattr(_extension, "link_kernels", refuse)
    monkeypatch.setattr(nvrtc, "libraries", lambda: iter([compiler]))
    assert kernel_image.kernel_image(0) == ELF + WHOLE
    assert compiler.calls == (1 if driver_version < 13000 else 2)  # an older one is not asked
    assert len(cached_files(tmp_path)) == 1


def test_without_any_image_the_host_decides_with_one_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_extension, "fatbin", b"for other GPUs")
    monkeypatch.setattr(_extension, "load_kernels", refuse)
    monkeypatch.setattr(_extension, "compute_capability", refuse)
    with pytest.warns(RuntimeWarning, match=r"loss\.item\(\) in every step.*refused\.$"):
        assert kernel_image.kernel_image(0) is None
    assert kernel_image.kernel_image(0) is None  # a second warning would be an error here


# -- NVRTC and its cache -------------------------------------------------------------------------


def cached_files(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "cache" / "adaptlr").iterdir())


def test_compiles_once_per_architecture(tmp_path: Path) -> None:
    compiler = CountingCompiler()
    first = kernel_image.compiled_for("sm_90", compiler)
    assert kernel_image.compiled_for("sm_90", compiler) == first
    assert compiler.calls == 1
    kernel_image.compiled_for("sm_80", compiler)
    assert compiler.calls == 2
    assert len(cached_files(tmp_path)) == 2


def test_damaged_cache_is_compiled_anew(tmp_path: Path) -> None:
    compiler = CountingCompiler()
    image = kernel_image.compiled_for("sm_90", compiler)
    (path,) = cached_files(tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    assert kernel_image.compiled_for("sm_90", compiler) == image
    assert compiler.calls == 2


def test_cache_that_cannot_be_written_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    obstacle = tmp_path / "file"
    obstacle.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(obstacle))
    assert kernel_image.compiled_for("sm_90", CountingCompiler()).startswith(ELF)


def test_write_that_fails_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "replace", fail)
    assert kernel_image.compiled_for("sm_90", CountingCompiler()).startswith(ELF)
    assert cached_files(tmp_path) == []


@pytest.fixture
def library() -> nvrtc.Library:
    found = next(nvrtc.libraries(), None)
    if found is None:
        pytest.skip("NVRTC is not installed")
    return found


def test_nvrtc_compiles_the_embedded_sources(library: nvrtc.Library) -> None:
    for link in (None, lambda parts: parts):
        image = kernel_image.compiled_for("sm_90", library, link)
        assert image.startswith(ELF)
        assert b"adaptlr_control_step" in image


def test_refusal_of_nvrtc_shows_its_log(library: nvrtc.Library) -> None:
    with pytest.raises(RuntimeError, match=r"could not compile the kernels with.*wrong_name"):
        library.compile("kernels.cu", {"kernels.cu": "wrong_name x;"}, ["--std=c++17"])
