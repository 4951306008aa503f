"""Where torch runs a graph: on the CPU, or on the stream of a session's GPU with memory that captured runs may keep."""

from __future__ import annotations

import re
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional

from restyle_deploy.backends.base import Queue, RunnerOptions
from restyle_deploy.backends.cpu import host_arrays
from restyle_deploy.backends.cuda_devices import device_arrays, device_error, queue_of
from restyle_deploy.device_array import Array, DeviceArray
from restyle_deploy.runtime.device import current_context, index_of, primary_context

_DEVICE_ERRORS = tuple(
    kind for kind in (torch.OutOfMemoryError, getattr(torch, "AcceleratorError", None)) if kind is not None
)
# How torch begins messages of CUDA and its libraries, which are plain `RuntimeError`s.
_LIBRARY_ERROR = re.compile(r"CUDA error|CUDA out of memory|CUDA driver error|CUBLAS_STATUS|CUDNN_STATUS|cuDNN error")
# Torch's settings of convolutions belong to the process: sessions that enqueue with others take turns.
_SETTINGS = threading.RLock()
_CONVOLUTIONS = getattr(torch.backends.cudnn, "conv")  # noqa: B009 - it is there, and not in torch's types
_RECURRENT = getattr(torch.backends.cudnn, "rnn")  # noqa: B009 - likewise
# What cuBLAS keeps for a stream, by device and stream, as long as the process lives: see `_create_workspace`.
_WORKSPACES: dict[tuple[str, int], Any] = {}
# The memory of all graphs on one queue: they run one after the other, so what one leaves the next one takes. It is
# theirs: with the last of them it goes back, though the queue may live on, with results that lie on the device.
_POOLS: WeakKeyDictionary[Queue, weakref.ref[Any]] = WeakKeyDictionary()


class Execution(Protocol):
    """How the runs of one graph are surrounded."""

    def tensors_of(self, buffers: Mapping[str, Array]) -> dict[str, Tensor]:
        """Return views of a caller's buffers; raise `TypeError` or `ValueError` for those of another device."""
        ...

    def scope(self) -> AbstractContextManager[None]:
        """Return what a run is done in."""
        ...

    def free_what_is_kept(self) -> bool:
        """Give back memory that torch keeps for later; return False where that is none, or is not possible now."""
        ...


class HostExecution:
    """On the CPU; a run is complete when it returns."""

    def __init__(self, threads: int | None) -> None:
        self._threads = threads

    def tensors_of(self, buffers: Mapping[str, Array]) -> dict[str, Tensor]:
        """Return views of NumPy's arrays."""
        return {name: torch.from_numpy(array) for name, array in host_arrays(buffers).items()}

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Let torch use as many threads as were asked for, for so long."""
        kept = torch.get_num_threads()
        if self._threads in (None, kept):
            yield
            return
        torch.set_num_threads(self._threads)
        try:
            yield
        finally:
            torch.set_num_threads(kept)

    def free_what_is_kept(self) -> bool:
        """Torch keeps none of the host's."""
        return False


class CudaExecution:
    """On a GPU, enqueued on the session's stream.

    All memory of a run comes from a pool that serves the graphs of one queue and lives as long as one of them. A CUDA
    graph that has recorded a run keeps the addresses: whatever other code in the process allocates later, they stay its
    own. Runs that share the pool do not meet, as they are on one stream.
    """

    def __init__(self, options: RunnerOptions) -> None:
        """Take the options' queue.

        Raises:
            ValueError: there is none.
        """
        self._queue, self._device = queue_of(options), options.device
        self._tf32 = options.precision == "tf32"
        index = index_of(options.device)
        self._stream = torch.cuda.ExternalStream(self._queue.stream, device=index)
        found = _POOLS.get(self._queue)
        pool = None if found is None else found()
        if pool is None:
            self._create_workspace()
            with torch.cuda.device(index):
                self._pool = torch.cuda.MemPool()
            _POOLS[self._queue] = weakref.ref(self._pool)
        else:
            self._pool = pool

    def tensors_of(self, buffers: Mapping[str, Array]) -> dict[str, Tensor]:
        """Return views of device arrays."""
        arrays = device_arrays(buffers, self._device)
        return {name: torch.as_tensor(_Interface(array), device=self._device) for name, array in arrays.items()}

    def scope(self) -> AbstractContextManager[None]:
        """Enqueue on the session's stream, from the session's pool, in the arithmetic that the precision names.

        The settings of the arithmetic are the process's: torch code of other threads that runs meanwhile has them too.

        Raises:
            DeviceError: the GPU lacks memory, or refuses what torch enqueues.
        """
        return self._scope(self._pool)

    def free_what_is_kept(self) -> bool:
        """Give back what lies idle in torch's other pools, which it does not do by itself for a run from this one.

        (pytorch/pytorch issue 159674.) Not while the stream is captured.
        """
        with torch.cuda.device(index_of(self._device)), torch.cuda.stream(self._stream):
            if torch.cuda.is_current_stream_capturing():
                return False
            torch.cuda.empty_cache()
        return True

    @contextmanager
    def _scope(self, pool: Any) -> Iterator[None]:
        index = index_of(self._device)
        with (
            _device_errors(self._device),
            _SETTINGS,
            current_context(primary_context(index)),  # torch's own scope need not bring the caller's back
            torch.cuda.device(index),
            torch.cuda.stream(self._stream),
            torch.cuda.use_mem_pool(pool, index),
            _arithmetic(tf32=self._tf32),
        ):
            yield

    def _create_workspace(self) -> None:
        """Let cuBLAS allocate what it keeps for a stream, in a pool that nothing else is taken from.

        CUDA graphs keep its address, and torch frees it while they live: when other code of the process captures graphs
        or, in some versions, when a thread ends (pytorch/pytorch issues 192061 and 193402). What is freed goes back to
        where it came from. Torch itself keeps it as long as the process lives, even for streams that are no more; ours
        go to the next session, and so does this.
        """
        key = self._device, self._queue.stream
        if key in _WORKSPACES:
            return
        with torch.cuda.device(index_of(self._device)):
            pool = torch.cuda.MemPool()
        with self._scope(pool), torch.inference_mode():
            ones = torch.ones(16, 16, device=self._device)
            functional.linear(ones, ones, ones[0])
            torch.bmm(ones[None], ones[None])
        _WORKSPACES[key] = pool


class _Interface:
    """A device array as torch takes it: without the stream, which is the run's own."""

    def __init__(self, array: DeviceArray) -> None:
        self._array = array
        self.__cuda_array_interface__ = {
            "shape": array.shape,
            "typestr": array.dtype.str,
            "data": (array.address, False),
            "version": 2,
        }


@contextmanager
def _device_errors(device: str) -> Iterator[None]:
    """Turn what torch raises of a GPU and its libraries into a `DeviceError`; errors of a program pass through."""
    try:
        yield
    except RuntimeError as error:
        is_of_device = isinstance(error, _DEVICE_ERRORS) or (
            type(error) is RuntimeError and _LIBRARY_ERROR.search(str(error)) is not None
        )
        if not is_of_device:
            raise
        raise device_error(f"{device}: PyTorch {torch.__version__}", error) from error


@contextmanager
def _arithmetic(*, tf32: bool) -> Iterator[None]:
    """Let convolutions be those that measure fastest, in TF32 or not; matrix products, which are small, never are.

    Of those that give the same bits each time: sums in any order, by atomic additions, would make a replay differ from
    the run that it has recorded. The older setting, for recurrent layers as well, goes along: where the two differ,
    torch refuses to tell it, to any thread.
    """
    convolutions = "tf32" if tf32 else "ieee"
    settings: list[tuple[Any, str, Any]] = [
        (torch.backends.cudnn, "benchmark", True),
        (torch.backends.cudnn, "deterministic", True),
        (_CONVOLUTIONS, "fp32_precision", convolutions),
        (_RECURRENT, "fp32_precision", convolutions),
        (torch.backends.cuda.matmul, "fp32_precision", "ieee"),
    ]
    if _has_older_setting():
        settings.insert(0, (torch.backends.cudnn, "allow_tf32", tf32))
    kept = [(holder, name, _setting_of(holder, name)) for holder, name, _ in settings]
    try:
        for holder, name, value in settings:
            setattr(holder, name, value)
        yield
    finally:
        for holder, name, value in kept:
            setattr(holder, name, value)


def _has_older_setting() -> bool:
    """Whether torch tells it; it does not where a program has set only one of both."""
    try:
        return isinstance(torch.backends.cudnn.allow_tf32, bool)
    except RuntimeError:
        return False


def _setting_of(holder: Any, name: str) -> Any:
    """Return a setting as it can be put back.

    Torch does not tell whether the precision of matrix products is their own or that of all; "none" lets them follow.
    """
    value = getattr(holder, name)
    follows = holder is torch.backends.cuda.matmul and value == getattr(torch.backends, name, None)
    return "none" if follows else value
