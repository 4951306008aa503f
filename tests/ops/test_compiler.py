"""NVRTC behind a cache: what comes back, what is kept, and what the errors say. No GPU is needed."""

import hashlib
import importlib.metadata
import itertools
import logging
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from restyle_deploy.errors import BackendUnavailableError, BuildError
from restyle_deploy.ops import compiler
from restyle_deploy.ops.compiler import (
    CompiledKernels,
    KernelResources,
    compile_kernels,
    default_cache,
    kernel_source_hash,
    parse_resources,
    read_source,
)
from restyle_deploy.ops.kernels import geometry
from restyle_deploy.ops.kernels.launches import ALL_FACTORS, FUSED_BIAS_ACT, fused_bias_act_expression

SOURCE = """
#include <cuda_fp16.h>
template <typename T, int SHIFT>
__global__ void shift(const T* x, int count, T* y) {
    __shared__ T row[64];
    const int i = threadIdx.x % 64;
    row[i] = x[i];
    __syncthreads();
    if (i < count) y[i] = row[(i + SHIFT) % 64];
}
"""
EXPRESSIONS = ("shift<float, 1>", "shift<__half, 2>")
# The form of ptxas 13.5, and of 12, with a function that is not inlined.
REPORT = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1aIfEvv' for 'sm_75'
ptxas info    : Function properties for _Z1aIfEvv
ptxas         .     24 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 256 bytes smem, 372 bytes cmem[0]
ptxas info    : Compile time = 15.295 ms
ptxas info    : Compiling entry function '_Z1bv' for 'sm_75'
ptxas info    : Function properties for _Z1bv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Function properties for _Z4calli
    16 bytes stack frame, 4 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 255 registers, 372 bytes cmem[0]
"""


@pytest.fixture(scope="module")
def nvrtc() -> None:
    try:
        compiler.check_available()
    except BackendUnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture
def compiled(nvrtc: None, tmp_path: Path) -> CompiledKernels:
    return compile_kernels("shift", EXPRESSIONS, arch="sm_90", cache=tmp_path, source=SOURCE)


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, only the cache can answer."""

    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("compiled")

    monkeypatch.setattr(compiler, "_compile", refuse)


def test_report_is_read() -> None:
    assert parse_resources(REPORT) == {
        "_Z1aIfEvv": KernelResources(registers=40, spill_bytes=12, shared_bytes=256, stack_bytes=24),
        "_Z1bv": KernelResources(registers=255, spill_bytes=4, shared_bytes=0, stack_bytes=16),
    }


def test_a_cubin_has_its_symbols_and_its_report(compiled: CompiledKernels) -> None:
    assert compiled.code.startswith(b"\x7fELF")
    assert (compiled.format, compiled.arch) == ("cubin", "sm_90")
    assert tuple(compiled.names) == EXPRESSIONS
    assert all(symbol.encode() in compiled.code for symbol in compiled.names.values())
    assert [compiled.resources[expression].shared_bytes for expression in EXPRESSIONS] == [256, 128]
    assert all(0 < each.registers < 64 for each in compiled.resources.values())


def test_ptx_is_text_for_the_architecture(nvrtc: None, tmp_path: Path) -> None:
    compiled = compile_kernels("shift", EXPRESSIONS, arch="sm_86", format="ptx", cache=tmp_path, source=SOURCE)
    assert b".target sm_86" in compiled.code
    assert all(symbol.encode() in compiled.code for symbol in compiled.names.values())
    assert compiled.resources == {}


def test_spills_and_stack_are_seen(nvrtc: None, tmp_path: Path) -> None:
    source = """
    template <int N> __global__ void sums(const float* x, int n, float* y) {
        float kept[N];
        for (int i = 0; i < N; ++i) kept[i] = x[i];
        for (int i = 0; i < n; ++i) y[i] = kept[(i * 7) % N];
    }
    """
    (resources,) = compile_kernels(
        "sums", ["sums<100>"], arch="sm_80", cache=tmp_path, source=source
    ).resources.values()
    assert resources.stack_bytes == 400


def test_the_second_time_comes_from_the_cache(compiled: CompiledKernels, tmp_path: Path, no_compiler: None) -> None:
    assert compile_kernels("shift", EXPRESSIONS, arch="sm_90", cache=tmp_path, source=SOURCE) == compiled


@pytest.mark.parametrize(
    "changes",
    [
        {"source": SOURCE + "\n"},
        {"arch": "sm_80"},
        {"format": "ptx"},
        {"expressions": EXPRESSIONS[:1]},
    ],
)
def test_whatever_changes_the_code_is_another_entry(
    compiled: CompiledKernels, tmp_path: Path, no_compiler: None, changes: dict[str, str]
) -> None:
    arguments = {"expressions": EXPRESSIONS, "arch": "sm_90", "source": SOURCE, **changes}
    with pytest.raises(AssertionError, match="compiled"):
        compile_kernels("shift", cache=tmp_path, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("what", ["_compiler_hash", "_headers_version", "SOURCES"])
def test_another_compiler_or_header_is_another_entry(
    compiled: CompiledKernels, tmp_path: Path, no_compiler: None, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    headers = tmp_path / "headers"
    headers.mkdir()
    (headers / "common.cuh").write_text("// another one\n", encoding="utf-8")
    monkeypatch.setattr(compiler, what, headers if what == "SOURCES" else lambda: "99.0")
    with pytest.raises(AssertionError, match="compiled"):
        compile_kernels("shift", EXPRESSIONS, arch="sm_90", cache=tmp_path, source=SOURCE)


@pytest.mark.parametrize("channels_last", [False, True])
def test_threads_load_everything_before_they_store(nvrtc: None, tmp_path: Path, channels_last: bool) -> None:
    """No load may pass a store: one that comes later in the code waits, and with it all that follows."""
    expression = fused_bias_act_expression("float16", ALL_FACTORS, channels_last=channels_last)
    compiled = compile_kernels(FUSED_BIAS_ACT, [expression], arch="sm_75", format="ptx", cache=tmp_path)
    accesses = re.findall(r"\b(ld|st)\.global\.", compiled.code.decode())
    stores = {len(list(group)) for kind, group in itertools.groupby(accesses) if kind == "st"}
    # Four planes or pixels, or one plane of those that are left.
    assert stores == ({geometry.BIAS_ACT_PIXELS} if channels_last else {geometry.BIAS_ACT_PLANES, 1})


@pytest.mark.parametrize("option", ["--use_fast_math", "--define-macro=COUNT=4"])
def test_another_option_of_the_compiler_is_another_entry(
    compiled: CompiledKernels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    options = compiler._options
    monkeypatch.setattr(compiler, "_options", lambda arch, format: [*options(arch, format), option])
    compile_kernels("shift", EXPRESSIONS, arch="sm_90", cache=tmp_path, source=SOURCE)
    assert len(list(tmp_path.glob("*.json"))) == 2


def test_where_headers_lie_makes_no_entry(
    compiled: CompiledKernels, tmp_path: Path, no_compiler: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = shutil.copytree(compiler.SOURCES, tmp_path / "elsewhere")
    monkeypatch.setattr(compiler, "SOURCES", elsewhere)
    assert compile_kernels("shift", EXPRESSIONS, arch="sm_90", cache=tmp_path, source=SOURCE) == compiled


@pytest.mark.parametrize("damage", [b"", b"no line", b"0000\n{}", None])
def test_a_damaged_entry_is_compiled_again(
    compiled: CompiledKernels, tmp_path: Path, damage: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    (entry,) = tmp_path.glob("*.json")
    whole = entry.read_bytes()
    entry.write_bytes(whole[:-9] if damage is None else damage)
    with caplog.at_level(logging.WARNING, logger=compiler.__name__):
        again = compile_kernels("shift", EXPRESSIONS, arch="sm_90", cache=tmp_path, source=SOURCE)
    assert again == compiled
    assert entry.read_bytes() == whole
    assert ("is damaged" in caplog.text) == (damage is None or b"\n" in damage)


def test_a_cache_that_cannot_be_written_is_no_obstacle(
    nvrtc: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "file"
    file.touch()
    assert compile_kernels("shift", EXPRESSIONS, arch="sm_75", cache=file, source=SOURCE).arch == "sm_75"
    assert "compiled kernels are not kept" in caplog.text


def test_nothing_half_written_is_left(compiled: CompiledKernels, tmp_path: Path) -> None:
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]


@pytest.mark.parametrize(
    ("expression", "source", "arch", "message"),
    [
        ("shift<float, 1>", SOURCE.replace("row[i]", "row[j]"), "sm_90", r"shift\.cu for sm_90: .*\"j\" is undefined"),
        ("twist<float>", SOURCE, "sm_90", r"shift\.cu for sm_90: .*\"twist\" is undefined"),
        ("shift<float, 1>", SOURCE, "sm_7", r"shift\.cu for sm_7: .*gpu-architecture"),
    ],
)
def test_what_the_compiler_refuses_is_said_in_a_line(
    nvrtc: None, tmp_path: Path, expression: str, source: str, arch: str, message: str
) -> None:
    with pytest.raises(BuildError, match=message) as caught:
        compile_kernels("shift", [expression], arch=arch, cache=tmp_path, source=source)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_another_call_is_named(nvrtc: None) -> None:
    from cuda.bindings.nvrtc import nvrtcResult

    with pytest.raises(BuildError, match="NVRTC: NVRTC_ERROR_OUT_OF_MEMORY"):
        compiler._check((nvrtcResult.NVRTC_ERROR_OUT_OF_MEMORY,))


def test_missing_cuda_core_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    with pytest.raises(BackendUnavailableError, match=r"need cuda-core.*pip install 'restyle-deploy\[cuda\]'"):
        compile_kernels("shift", EXPRESSIONS, arch="sm_90", cache=tmp_path, source=SOURCE)


def test_missing_nvrtc_is_named(nvrtc: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from cuda.bindings import nvrtc as bindings
    from cuda.pathfinder import DynamicLibNotFoundError

    def fail() -> None:
        raise DynamicLibNotFoundError("no libnvrtc")

    monkeypatch.setattr(bindings, "nvrtcVersion", fail)
    with pytest.raises(BackendUnavailableError, match=r"need nvidia-cuda-nvrtc.*restyle-deploy\[cuda\]"):
        compile_kernels("shift", EXPRESSIONS, arch="sm_90", cache=tmp_path, source=SOURCE)


def test_missing_headers_are_named(nvrtc: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import cuda.pathfinder

    monkeypatch.setattr(cuda.pathfinder, "find_nvidia_header_directory", lambda name: None)
    with pytest.raises(BackendUnavailableError, match=r"need nvidia-cuda-runtime.*restyle-deploy\[cuda\]"):
        compile_kernels("shift", EXPRESSIONS, arch="sm_90", cache=tmp_path, source=SOURCE)


def test_the_compiler_is_told_by_its_library(nvrtc: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import cuda.pathfinder

    found = cuda.pathfinder.load_nvidia_dynamic_lib("nvrtc").abs_path
    assert found is not None
    assert compiler._compiler_hash() == hashlib.sha256(Path(found).read_bytes()).hexdigest()
    hashes = set()
    for name in ("one", "another"):
        library = tmp_path / name
        library.write_text(name, encoding="utf-8")
        loaded = SimpleNamespace(abs_path=str(library))
        monkeypatch.setattr(cuda.pathfinder, "load_nvidia_dynamic_lib", lambda name, loaded=loaded: loaded)
        hashes.add(compiler._compiler_hash())
    assert len(hashes) == 2


def test_a_compiler_whose_file_is_not_known_is_told_by_its_version(
    nvrtc: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import cuda.pathfinder

    loaded = SimpleNamespace(abs_path=None)
    monkeypatch.setattr(cuda.pathfinder, "load_nvidia_dynamic_lib", lambda name: loaded)
    assert re.fullmatch(r"1[2-9]\.\d+", compiler._compiler_hash())


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RESTYLE_DEPLOY_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    assert default_cache() == Path("/home/someone/.cache/restyle-deploy/kernels")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert default_cache() == Path("/cache/restyle-deploy/kernels")
    monkeypatch.setenv("RESTYLE_DEPLOY_CACHE", "/elsewhere")
    assert default_cache() == Path("/elsewhere/kernels")


def test_an_unknown_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown kernel 'shift'; known are"):
        read_source("shift")


def test_the_hash_is_of_all_sources_and_of_how_they_are_launched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler, "SOURCES", tmp_path)
    names = ("a.cu", "common.cuh", "geometry.py", "launches.py")
    for name in names:
        (tmp_path / name).write_text("a", encoding="utf-8")
    hashes = [kernel_source_hash(), kernel_source_hash()]
    assert len(set(hashes)) == 1
    for name in names:
        (tmp_path / name).write_text("b", encoding="utf-8")
        hashes.append(kernel_source_hash())
    assert len(set(hashes)) == 1 + len(names)


def test_kernels_that_are_in_no_engine_do_not_make_engines_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "SOURCES", tmp_path)
    for name in compiler.LAUNCH_SOURCES:
        (tmp_path / name).touch()
    before = kernel_source_hash()
    (tmp_path / compiler.IMAGE_SOURCE).write_text("a", encoding="utf-8")
    assert kernel_source_hash() == before


def test_version_of_the_headers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The package's, or what a toolkit's own header says."""
    try:
        compiler.check_available()
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    assert re.fullmatch(r"\d+\.\d+\.\d+", compiler._headers_version())
    monkeypatch.setattr(compiler, "_header_folder", lambda: tmp_path)
    (tmp_path / "cuda.h").write_text("#define CUDA_VERSION 13010\n", encoding="utf-8")
    assert compiler._headers_version() == "13010"
    (tmp_path / "cuda.h").write_text("", encoding="utf-8")
    assert compiler._headers_version() == str(tmp_path)


def test_headers_that_are_reached_by_a_link_are_the_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "site" / "include").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "site")
    for site, folder in (("site", "link"), ("link", "site"), ("link", "link")):
        distribution = SimpleNamespace(version="13.0.96", locate_file=lambda path, site=site: tmp_path / site)
        monkeypatch.setattr(importlib.metadata, "distribution", lambda name, found=distribution: found)
        monkeypatch.setattr(compiler, "_header_folder", lambda folder=folder: tmp_path / folder / "include")
        assert compiler._headers_version() == "13.0.96"


def test_headers_without_a_version_are_told_by_their_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compiler, "_header_folder", lambda: tmp_path)
    assert compiler._headers_version() == str(tmp_path)
