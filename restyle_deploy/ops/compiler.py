"""Our CUDA kernels through NVRTC: code for an architecture, kept on disk, and the compiler's report; without a GPU."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import re
from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from restyle_deploy.errors import BackendUnavailableError, BuildError
from restyle_deploy.files import replace_when_complete, sha256_of_file
from restyle_deploy.ops.cuda_versions import check_driver, compiler_version
from restyle_deploy.runtime.device import NEEDED

CodeFormat = Literal["cubin", "ptx"]

SOURCES = Path(__file__).parent / "kernels"
LAUNCH_SOURCES = ("geometry.py", "launches.py")
IMAGE_SOURCE = "images.cu"  # surrounds the loop, and is in no engine
CACHE_VARIABLE = "RESTYLE_DEPLOY_CACHE"
CACHE_VERSION = 1
LANGUAGE = "c++17"
INCLUDE = "-I"

_logger = logging.getLogger(__name__)
_ENTRY = re.compile(r"Compiling entry function '(\S+)'")
_PROPERTIES = re.compile(r"Function properties for (\S+)")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+)(?:\+\d+)? bytes smem")


@dataclass(frozen=True, kw_only=True)
class KernelResources:
    """What a thread, or for `shared_bytes` a block, of a kernel takes on the GPU, as ptxas reports it.

    Attributes:
        registers: 32-bit registers.
        spill_bytes: bytes stored to and loaded from local memory for want of registers.
        shared_bytes: static shared memory.
        stack_bytes: stack frame in local memory.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    stack_bytes: int


@dataclass(frozen=True, kw_only=True)
class CompiledKernels:
    """Some instantiations of one source file.

    Attributes:
        code: to be loaded by the CUDA driver.
        format: of the code.
        arch: "sm_90" style.
        names: symbol in the code by name expression.
        resources: by name expression; empty for PTX, which is assembled later.
    """

    code: bytes
    format: CodeFormat
    arch: str
    names: Mapping[str, str]
    resources: Mapping[str, KernelResources] = field(default_factory=dict)


def compile_kernels(
    kernel: str,
    expressions: Sequence[str],
    *,
    arch: str,
    format: CodeFormat = "cubin",
    cache: Path | None = None,
    source: str | None = None,
) -> CompiledKernels:
    """Compile instantiations of a kernel, or take them from the cache.

    Args:
        kernel: name of a file in `SOURCES`, without suffix.
        expressions: C++ name expressions; see `launches.INSTANTIATIONS`.
        arch: "sm_75" to "sm_121".
        format: "cubin" for just this architecture, "ptx" for it and later ones.
        cache: directory of compiled code; `default_cache()` if None. One that cannot be written costs time only.
        source: what to compile instead of the file.
    Raises:
        BackendUnavailableError: cuda-core, NVRTC or the CUDA headers are not installed.
        BuildError: the compiler refuses the source, an expression or the architecture.
    """
    text = read_source(kernel) if source is None else source
    key = _cache_key(text, expressions, arch=arch, format=format)
    path = (cache or default_cache()) / f"{key}.json"
    found = _read_entry(path)
    if found is not None:
        return found
    _logger.info("compiling %d instantiations of %s for %s", len(expressions), kernel, arch)
    compiled = _compile(kernel, text, expressions, arch=arch, format=format)
    _write_entry(path, compiled)
    return compiled


def check_available() -> None:
    """Find out whether kernels can be compiled here, and launched on a GPU if there is one.

    A driver, where there is one, has to be of CUDA 13.0 or newer; see `cuda_versions.check_driver`.

    Raises:
        BackendUnavailableError: cuda-core, NVRTC or the CUDA headers are not installed, or the driver is too old.
    """
    check_driver()
    _header_folder()


def default_cache() -> Path:
    """Return $RESTYLE_DEPLOY_CACHE, or the user's cache folder, and therein the folder of compiled kernels."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen) / "kernels"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "restyle-deploy" / "kernels"


def read_source(kernel: str) -> str:
    """Return the text of a kernel's file.

    Raises:
        ValueError: no such kernel.
    """
    path = SOURCES / f"{kernel}.cu"
    if not path.is_file():
        raise ValueError(f"unknown kernel {kernel!r}; known are {', '.join(sorted(_kernel_names()))}")
    return path.read_text(encoding="utf-8")


def kernel_source_hash() -> str:
    """Return the SHA-256 of all kernel sources, and of how they are launched: what an engine's plugins are made of.

    An engine that holds no kernel is launched by what is installed when it runs: the two must have been made together.
    """
    digest = hashlib.sha256()
    sources = [path for path in SOURCES.glob("*.cu*") if path.name != IMAGE_SOURCE]
    for path in sorted([*sources, *(SOURCES / name for name in LAUNCH_SOURCES)]):
        digest.update(f"{path.name}\0{path.read_text(encoding='utf-8')}\0".encode())
    return digest.hexdigest()


def parse_resources(report: str) -> dict[str, KernelResources]:
    """Read what ptxas says with `-v`; by symbol."""
    resources: dict[str, KernelResources] = {}
    entry, function, stack, spills = "", "", 0, 0
    for line in report.splitlines():
        if match := _ENTRY.search(line):
            entry, function, stack, spills = match[1], "", 0, 0
        elif match := _PROPERTIES.search(line):
            function = match[1]
        elif match := _STACK.search(line):
            # A function that is called, not inlined, is reported apart; its spills are the kernel's, too.
            stack = max(stack, int(match[1])) if function != entry else int(match[1])
            spills += int(match[2]) + int(match[3])
        elif entry and (match := _REGISTERS.search(line)):
            shared = _SHARED.search(line)
            resources[entry] = KernelResources(
                registers=int(match[1]),
                spill_bytes=spills,
                shared_bytes=int(shared[1]) if shared else 0,
                stack_bytes=stack,
            )
            entry = ""
    return resources


def _compile(kernel: str, source: str, expressions: Sequence[str], *, arch: str, format: CodeFormat) -> CompiledKernels:
    # cuda-core's Program asks the driver before it gives PTX, and there may be none here.
    from cuda.bindings import nvrtc

    get_size, get_code = {
        "cubin": (nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN),
        "ptx": (nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX),
    }[format]
    names = [expression.encode() for expression in expressions]
    program = _check(nvrtc.nvrtcCreateProgram(source.encode(), f"{kernel}.cu".encode(), 0, None, None))
    try:
        for name in names:
            _check(nvrtc.nvrtcAddNameExpression(program, name))
        options = [option.encode() for option in _options(arch, format)]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        log = bytearray(_check(nvrtc.nvrtcGetProgramLogSize(program)))
        _check(nvrtc.nvrtcGetProgramLog(program, log))
        report = log.rstrip(b"\0").decode(errors="replace")
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise BuildError(f"{kernel}.cu for {arch}: {_first_error(report, status)}")
        symbols = [_check(nvrtc.nvrtcGetLoweredName(program, name)).decode() for name in names]
        code = bytearray(_check(get_size(program)))
        _check(get_code(program, code))
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    resources = parse_resources(report) if format == "cubin" else {}
    return CompiledKernels(
        code=bytes(code),
        format=format,
        arch=arch,
        names=dict(zip(expressions, symbols, strict=True)),
        resources={name: resources[symbol] for name, symbol in zip(expressions, symbols, strict=True) if resources},
    )


def _options(arch: str, format: CodeFormat) -> list[str]:
    target = arch if format == "cubin" else arch.replace("sm_", "compute_")
    options = [f"-arch={target}", f"-std={LANGUAGE}", f"{INCLUDE}{SOURCES}", f"{INCLUDE}{_header_folder()}"]
    if format == "cubin":
        options.append("--ptxas-options=-v")
    return options


def _check(result: tuple[Any, ...]) -> Any:
    """Return what a call of NVRTC gives beside its status."""
    status, *values = result
    if int(status) != 0:
        raise BuildError(f"NVRTC: {status.name}")
    return values[0] if values else None


def _compiler_hash() -> str:
    """Return the SHA-256 of NVRTC's library, the one in use; its version where the file cannot be told.

    The version alone would not do: that of the package says nothing where a library from elsewhere is loaded.
    """
    major, minor = compiler_version()
    from cuda.pathfinder import load_nvidia_dynamic_lib

    path = load_nvidia_dynamic_lib("nvrtc").abs_path
    return f"{major}.{minor}" if path is None else _hash_once(Path(path))


@cache
def _hash_once(library: Path) -> str:
    """Return the SHA-256 of a library that is loaded; 0.1 to 0.3 s for the 141 MB of NVRTC 13.5."""
    return sha256_of_file(library)


def _headers_version() -> str:
    """Return the version of the CUDA headers: of their package, else that in `cuda.h`, else their folder."""
    folder = _header_folder()
    with suppress(importlib.metadata.PackageNotFoundError):  # a toolkit's
        distribution = importlib.metadata.distribution("nvidia-cuda-runtime")
        # Both as they lie on the disk: one may lead through a link, as in some environments.
        if folder.resolve().is_relative_to(Path(str(distribution.locate_file(""))).resolve()):
            return distribution.version
    with suppress(OSError):  # not every folder has the file
        header = (folder / "cuda.h").read_text(encoding="utf-8", errors="replace")
        if found := re.search(r"#define CUDA_VERSION (\d+)", header):
            return found[1]
    return str(folder)


def _header_folder() -> Path:
    """Return the folder of `cuda_fp16.h`: a package's, or an installed toolkit's."""
    from cuda.pathfinder import find_nvidia_header_directory

    folder = find_nvidia_header_directory("cudart")
    if folder is None:
        raise BackendUnavailableError(NEEDED.format("nvidia-cuda-runtime"))
    return Path(folder)


def _cache_key(source: str, expressions: Sequence[str], *, arch: str, format: CodeFormat) -> str:
    headers = [path.read_text(encoding="utf-8") for path in sorted(SOURCES.glob("*.cuh"))]
    # Included files count by what is in them, wherever they lie.
    options = [option for option in _options(arch, format) if not option.startswith(INCLUDE)]
    compiler = [_compiler_hash(), _headers_version()]
    facts = [CACHE_VERSION, source, headers, list(expressions), arch, format, options, compiler]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _read_entry(path: Path) -> CompiledKernels | None:
    """Return a cache entry; None where there is none that is whole."""
    try:
        digest, content = path.read_bytes().split(b"\n", 1)
    except (OSError, ValueError):
        return None
    if hashlib.sha256(content).hexdigest().encode() != digest:
        _logger.warning("%s is damaged: compiled again", path)
        return None
    entry = json.loads(content)
    resources = {expression: KernelResources(**values) for expression, values in entry.pop("resources").items()}
    return CompiledKernels(**{**entry, "code": b64decode(entry["code"]), "resources": resources})


def _write_entry(path: Path, compiled: CompiledKernels) -> None:
    """Write an entry behind its hash; a cache that cannot be written is reported and left alone."""
    entry = {**asdict(compiled), "code": b64encode(compiled.code).decode()}
    content = json.dumps(entry).encode()
    try:
        with replace_when_complete(path) as temporary:
            temporary.write_bytes(hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
    except OSError as error:
        _logger.warning("compiled kernels are not kept: %s", error)


def _first_error(report: str, status: Any) -> str:
    """Return the compiler's first line that is an error; else its first line, or the status."""
    lines = [line.strip() for line in report.splitlines() if line.strip()]
    return next((line for line in lines if "error:" in line), lines[0] if lines else status.name)


def _kernel_names() -> list[str]:
    return [path.stem for path in SOURCES.glob("*.cu")]
