"""One launch of a kernel on torch's current stream."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from restyle_deploy.ops.kernels.launches import Launch
from restyle_deploy.ops.launching import enqueue
from restyle_deploy.runtime.device import cuda_core_errors, current_context, primary_context


def run(launch: Launch, inputs: Sequence[Tensor | None], y: Tensor) -> None:
    """Enqueue a kernel on the current stream of the device of `y`; see `launching.enqueue`.

    Args:
        launch: what to launch.
        inputs: the tensors in parameter order, on the device of `y`; None for an absent factor.
        y: is written.
    Raises:
        BackendUnavailableError, BuildError: as `compile_kernels`.
        DeviceError: the driver refuses the launch, or work before it failed.
    """
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in inputs]
    # Torch's own scope does nothing in a thread whose device it is already, though no context may be current there yet.
    with current_context(primary_context(y.device.index)), cuda_core_errors(str(y.device)):
        enqueue(launch, addresses, y.data_ptr(), stream=torch.cuda.current_stream(y.device).cuda_stream)
