"""One launch of a kernel of ours on a stream, through cuda-core: compiled or taken from the cache, loaded, enqueued."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from restyle_deploy.ops.compiler import compile_kernels
from restyle_deploy.ops.kernels.launches import Launch

if TYPE_CHECKING:
    from cuda.core import Kernel, Stream

LEGACY_STREAM = 1  # CU_STREAM_LEGACY: what a handle of 0, the default stream, stands for


def enqueue(launch: Launch, inputs: Sequence[int], output: int, *, stream: int) -> None:
    """Enqueue a kernel on a stream of the current device; nothing is waited for.

    The first launch of an instantiation compiles it, or takes it from the cache, and loads it.

    Args:
        launch: what to launch.
        inputs: addresses on the device in parameter order; 0 for an absent factor.
        output: address of y.
        stream: a `CUstream` as a number; 0 for the default stream.
    Raises:
        BackendUnavailableError, BuildError: as `compile_kernels`.
    """
    from cuda.core import Device, LaunchConfig
    from cuda.core import launch as launch_kernel

    kernel = load_kernel(f"sm_{Device().arch}", launch.kernel, launch.expression)
    # To cuda-core a Python int is an address.
    scalars = [np.int32(value) for value in launch.scalars]
    config = LaunchConfig(grid=launch.grid, block=launch.block)
    launch_kernel(_wrap_stream(stream or LEGACY_STREAM), config, kernel, *inputs, *scalars, output)


@functools.cache
def load_kernel(arch: str, kernel: str, expression: str) -> Kernel:
    """Return an instantiation for an architecture, "sm_89" style; the driver brings it to each context.

    Raises:
        BackendUnavailableError, BuildError: as `compile_kernels`.
    """
    from cuda.core import ObjectCode

    compiled = compile_kernels(kernel, [expression], arch=arch)
    return ObjectCode.from_cubin(compiled.code, name=kernel).get_kernel(compiled.names[expression])


@functools.lru_cache(maxsize=256)
def _wrap_stream(handle: int) -> Stream:
    """Return cuda-core's view of a stream: no more than its handle, so that one serves as long as the process lives."""
    from cuda.core import Stream

    return Stream.from_handle(handle)
