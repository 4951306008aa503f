"""Compile the CUDA sources with a C++ compiler and launch the kernels on the host."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from restyle_deploy.ops import kernels
from restyle_deploy.ops.kernels.launches import Launch

HERE = Path(__file__).parent
SOURCES = Path(kernels.__file__).parent
COMPILERS = ("g++", "c++", "clang++")
# The kernels see memory as other types than it was written, as CUDA's do, and may not contract what they do not say.
FLAGS = ("-std=c++17", "-Og", "-shared", "-fPIC", "-fno-strict-aliasing", "-ffp-contract=off")
# Bounds of arrays, and alignment of every access, in shared memory too.
SANITIZE = ("-fsanitize=undefined", "-fno-sanitize-recover=undefined")


class HostKernelError(Exception):
    """A kernel did on the host what it must not do."""


def find_compiler() -> str | None:
    """Return the C++ compiler to use: the first of COMPILERS that there is."""
    return next((path for path in map(shutil.which, COMPILERS) if path), None)


def build_library(
    source: str, expressions: Sequence[str], *, folder: Path = SOURCES, extra_flags: Sequence[str] = ()
) -> Path:
    """Compile instantiations of a source to a shared library, or return it as compiled before.

    Args:
        source: name of a file in `folder`.
        expressions: C++ expressions such as `fused_bias_act<float, 31, false>`.
        folder: of the source and its headers.
        extra_flags: added to FLAGS.
    Raises:
        RuntimeError: the compiler refuses it.
    """
    compiler = find_compiler()
    assert compiler is not None, "the caller has looked"
    rows = [f'    {{"{expression}", host_kernel({expression})}},' for expression in expressions]
    table = "\n".join(["const std::map<std::string, HostKernel> host_kernels = {", *rows, "};"])
    text = f'#include "host_cuda.h"\n#include "{source}"\n{table}\n'
    flags = [*FLAGS, *extra_flags, f"-I{HERE}", f"-I{folder}"]
    files = sorted([*HERE.glob("*.h"), *folder.glob("*.cu*")])
    facts = [compiler, *flags, text, *(path.read_text(encoding="utf-8") for path in files)]
    digest = hashlib.sha256("\0".join(facts).encode()).hexdigest()[:32]
    cache = Path(tempfile.gettempdir()) / f"restyle-deploy-host-kernels-{os.getuid()}"
    cache.mkdir(mode=0o700, exist_ok=True)
    library = cache / f"{digest}.so"
    if not library.exists():
        # Another process may be at the same: whoever is last puts the same library in its place.
        with tempfile.TemporaryDirectory(dir=cache) as directory:
            unit, made = Path(directory) / "unit.cpp", Path(directory) / "made.so"
            unit.write_text(text, encoding="utf-8")
            command = [compiler, *flags, str(unit), "-o", str(made)]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode != 0:
                raise RuntimeError(f"{compiler} refuses {source}:\n{result.stderr[:4000]}")
            made.replace(library)
    return library


def build_libraries(requests: Sequence[tuple[str, Sequence[str]]]) -> list[Path]:
    """Compile several libraries, two at a time. Each request is a source and its expressions."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        return list(pool.map(lambda request: build_library(*request), requests))


@dataclass(frozen=True, kw_only=True)
class HostLibrary:
    """A library that `build_library` made, in this process."""

    path: Path

    def launch(
        self,
        expression: str,
        arguments: Sequence[Tensor | int | None],
        *,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        schedule: int = 0,
    ) -> None:
        """Run a kernel to its end.

        Args:
            expression: the instantiation.
            arguments: one per parameter. The last tensor may be written to, the others not; None is a null pointer.
            grid: blocks along x, y, z.
            block: threads along x, y, z.
            schedule: in which order threads run: 0 ascending, 1 descending, else a shuffle.
        Raises:
            HostKernelError: the kernel did something wrong.
        """
        values = [_argument(argument) for argument in arguments]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
        spans = [number for tensor in tensors for number in _span(tensor, is_writable=tensor is tensors[-1])]
        launch = ctypes.CDLL(str(self.path)).host_launch
        launch.restype = ctypes.c_char_p
        size = ctypes.c_uint * 3
        message = launch(
            *(expression.encode(), size(*grid), size(*block), pointers),
            *((ctypes.c_uint64 * len(spans))(*spans), len(tensors), ctypes.c_uint(schedule)),
        )
        if message is not None:
            raise HostKernelError(f"{expression}: {message.decode()}")

    def run(self, launch: Launch, inputs: Sequence[Tensor | None], y: Tensor, *, schedule: int = 0) -> None:
        """Run a planned launch, as `cuda_launch.run` does on a GPU."""
        arguments = (*inputs, *launch.scalars, y)
        self.launch(launch.expression, arguments, grid=launch.grid, block=launch.block, schedule=schedule)


def _argument(argument: Tensor | int | None) -> ctypes.c_void_p | ctypes.c_int32:
    if isinstance(argument, int):
        return ctypes.c_int32(argument)
    return ctypes.c_void_p(None if argument is None else argument.data_ptr())


def _span(tensor: Tensor, *, is_writable: bool) -> tuple[int, int, int]:
    """Return the first and the last address of a dense tensor, and whether it is an output."""
    begin = tensor.data_ptr()
    return begin, begin + tensor.numel() * tensor.element_size(), int(is_writable)
