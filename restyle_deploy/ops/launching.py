"""One launch of a kernel of ours on a stream: compiled or taken from the cache, loaded, enqueued."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from restyle_deploy.ops.compiler import compile_kernels
from restyle_deploy.ops.kernels.launches import Launch
from restyle_deploy.runtime import device


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
    kernel = load_kernel(device.current_architecture(), launch.kernel, launch.expression)
    # To cuda-core a Python int is an address.
    scalars = [np.int32(value) for value in launch.scalars]
    device.launch_kernel(kernel, [*inputs, *scalars, output], grid=launch.grid, block=launch.block, stream=stream)


@functools.cache
def load_kernel(arch: str, kernel: str, expression: str) -> Any:
    """Return an instantiation for an architecture, "sm_89" style; the driver brings it to each context.

    Raises:
        BackendUnavailableError, BuildError: as `compile_kernels`.
    """
    compiled = compile_kernels(kernel, [expression], arch=arch)
    return device.load_kernel(compiled.code, compiled.names[expression], name=kernel)
