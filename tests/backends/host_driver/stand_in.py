"""Builds the stand-in for the CUDA driver (driver.h says what it is) and runs scripts with it."""

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

SOURCES = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Call:
    """A call of a driver function: its name without version suffix, and the arguments that the sources record."""

    name: str
    arguments: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a script printed, and the driver calls that it led to, in their order."""

    output: str
    calls: tuple[Call, ...]

    def named(self, *names: str) -> list[Call]:
        """The calls of these functions."""
        return [call for call in self.calls if call.name in names]


@dataclass(frozen=True, kw_only=True)
class HostDriver:
    """A built stand-in: `directory` holds libcuda.so.1."""

    directory: Path

    def run(
        self, script: str, *, capability: str = "8.9", memory_bytes: int = 24 << 30, parameters: Sequence[int] = ()
    ) -> Run:
        """Run Python text in a process whose CUDA driver is the stand-in.

        Args:
            script: the text.
            capability: of the device.
            memory_bytes: of the device.
            parameters: bytes of each parameter of the kernels that are launched; their arguments are recorded then.
        Raises:
            AssertionError: The script failed; the message has its standard error and the last driver calls.
        """
        with tempfile.TemporaryDirectory() as scratch:
            record = Path(scratch) / "record"
            record.touch()
            environment = os.environ | {
                "LD_LIBRARY_PATH": f"{self.directory}:{os.environ.get('LD_LIBRARY_PATH', '')}",
                "HOST_DRIVER_RECORD": str(record),
                "HOST_DRIVER_CAPABILITY": capability,
                "HOST_DRIVER_MEMORY": str(memory_bytes),
                "HOST_DRIVER_PARAMETERS": "".join(map(str, parameters)),
            }
            process = subprocess.run(
                [sys.executable, "-c", script],
                env=environment,
                capture_output=True,
                text=True,
                timeout=300,
                check=False,
            )
            lines = record.read_text().splitlines()
        if process.returncode != 0:
            last = "\n".join(lines[-10:])
            raise AssertionError(f"exit code {process.returncode}\n{process.stderr}\nlast driver calls:\n{last}")
        return Run(output=process.stdout, calls=tuple(_parse_call(line) for line in lines))


def build_host_driver(cache: Path) -> HostDriver:
    """Compile the stand-in, unless `cache` has it already; skips the test where the compiler or cuda.h is missing."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler: g++ is not on the path")
    include = _cuda_include()
    sources = sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")])
    contents = hashlib.sha256(b"".join(path.read_bytes() for path in [*sources, include / "cuda.h"])).hexdigest()
    directory = cache / contents[:16]
    if not (directory / "libcuda.so.1").exists():
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            _compile(compiler, include, sources, Path(scratch) / "libcuda.so.1")
            directory.mkdir(exist_ok=True)
            (Path(scratch) / "libcuda.so.1").replace(directory / "libcuda.so.1")
    return HostDriver(directory=directory)


def _compile(compiler: str, include: Path, sources: list[Path], library: Path) -> None:
    inputs = [str(path) for path in sources if path.suffix == ".cpp"]
    flags = ["-std=c++17", "-shared", "-fPIC", "-Wall", "-Wextra", f"-I{include}"]
    command = [compiler, *flags, "-o", str(library), *inputs, "-ldl"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def _cuda_include() -> Path:
    found = importlib.util.find_spec("nvidia")
    roots = found.submodule_search_locations if found is not None else None
    for root in roots or ():
        if (Path(root) / "cu13/include/cuda.h").is_file():
            return Path(root) / "cu13/include"
    pytest.skip("no cuda.h: nvidia-cuda-runtime 13 is not installed")


def _parse_call(line: str) -> Call:
    name, *arguments = line.split("\t")
    return Call(name=re.sub(r"_v\d+$", "", name), arguments=tuple(arguments))
