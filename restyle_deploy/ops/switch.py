"""A switch: the two operators on CUDA tensors by our kernels instead of torch's own operations."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType

from torch import Tensor

_kernels: ContextVar[ModuleType | None] = ContextVar("kernels", default=None)


@contextmanager
def use_cuda_kernels() -> Iterator[None]:
    """Inside, the reference model runs our kernels on a GPU; elsewhere nothing changes.

    It holds for the thread or task that enters it. There are no gradients inside.

    Raises:
        BackendUnavailableError: cuda-core, NVRTC or the CUDA headers are not installed.
    """
    from restyle_deploy.ops import compiler, cuda_ops

    compiler.check_available()
    token = _kernels.set(cuda_ops)
    try:
        yield
    finally:
        _kernels.reset(token)


def active_kernels(x: Tensor) -> ModuleType | None:
    """Return the module `cuda_ops` where its functions shall compute on `x`, else None."""
    return _kernels.get() if x.is_cuda else None
