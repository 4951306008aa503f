"""One launch of a kernel on torch's current stream, through cuda-core."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from restyle_deploy.ops.compiler import compile_kernels
from restyle_deploy.ops.kernels.launches import Launch

if TYPE_CHECKING:
    from cuda.core import Kernel, Stream

LEGACY_STREAM = 1  # CU_STREAM_LEGACY: what a handle of 0, torch's default stream, stands for


def run(launch: Launch, inputs: Sequence[Tensor | None], y: Tensor) -> None:
    """Enqueue a kernel on the current stream of the device of `y`; nothing is waited for.

    The first launch of an instantiation compiles it, or takes it from the cache, and loads it.

    Args:
        launch: what to launch.
        inputs: the tensors in parameter order, on the device of `y`; None for an absent factor.
        y: is written.
    Raises:
        BackendUnavailableError, BuildError: as `compile_kernels`.
    """
    pointers = [0 if tensor is None else tensor.data_ptr() for tensor in inputs]
    # To cuda-core a Python int is an address.
    scalars = [np.int32(value) for value in launch.scalars]
    device = y.device
    with torch.cuda.device(device):
        kernel = _load_kernel(torch.cuda.get_device_capability(device), launch.kernel, launch.expression)

        import cuda.core as cuda_core

        stream = _wrap_stream(torch.cuda.current_stream(device).cuda_stream or LEGACY_STREAM)
        config = cuda_core.LaunchConfig(grid=launch.grid, block=launch.block)
        cuda_core.launch(stream, config, kernel, *pointers, *scalars, y.data_ptr())


@functools.lru_cache(maxsize=256)
def _wrap_stream(handle: int) -> Stream:
    """Return cuda-core's view of a stream: no more than its handle, so that one serves as long as the process lives."""
    from cuda.core import Stream

    return Stream.from_handle(handle)


@functools.cache
def _load_kernel(capability: tuple[int, int], kernel: str, expression: str) -> Kernel:
    """Compile one instantiation, or take it from the cache, and load it; the driver brings it to each context."""
    major, minor = capability
    compiled = compile_kernels(kernel, [expression], arch=f"sm_{major}{minor}")

    from cuda.core import ObjectCode

    return ObjectCode.from_cubin(compiled.code, name=kernel).get_kernel(compiled.names[expression])
