"""A GPU as a `Device`: memory, and one stream of work. All that it says to CUDA goes through `runtime.device`."""

from __future__ import annotations

import ctypes
import functools
import math
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any, cast

import numpy as np

from restyle_deploy.device_array import Array, DeviceArray
from restyle_deploy.errors import DeviceError
from restyle_deploy.ops.kernels.image_launches import launch_pixels_from_images, launch_prepare_images
from restyle_deploy.ops.launching import enqueue as enqueue_kernel
from restyle_deploy.runtime import device as cuda
from restyle_deploy.runtime.base import Block, Device, Replay
from restyle_deploy.runtime.device import (
    CudaBlock,
    CudaEvent,
    CudaReplay,
    cuda_core_errors,
    current_context,
    graph_of,
    order_streams,
    primary_context,
    unaffected_by_captures,
)
from restyle_deploy.runtime.external_arrays import view_external

GIBIBYTE = 2**30


def open_device(name: str) -> Device:
    """Open the host or a GPU; the caller closes it.

    Args:
        name: `cpu`, or `cuda:0` and so on.
    Raises:
        BackendUnavailableError: there is no such GPU, no driver, or no cuda-core.
        ValueError: no such name.
    """
    from restyle_deploy.runtime.host_device import HostDevice

    if name == HostDevice.name:
        return HostDevice()
    kind, _, index = name.partition(":")
    if kind != "cuda" or not index.isdecimal():
        raise ValueError(f"unknown device {name!r}, expected cpu, or cuda:0, cuda:1 and so on")
    return CudaDevice(int(index))


class CudaDevice:
    """A GPU and one stream on it; satisfies `Device`. What it is told it enqueues, unless it says that it waits.

    One thread at a time calls it, which the session's lock sees to; what it hands out, any thread. The calling thread's
    own device is current again after each call.

    Attributes:
        name: `cuda:0` and so on.
        stream: the `CUstream` as a number; valid as long as anything refers to this object, closed or not.
        is_host: False.
    """

    is_host = False

    def __init__(self, index: int) -> None:
        """Open a GPU.

        Args:
            index: as in `cuda:0`.
        Raises:
            BackendUnavailableError: there is no such GPU, no driver, or no cuda-core.
            DeviceError: the GPU refuses a context, as when its memory is full or it is another process's alone.
        """
        cuda.check_gpu(index)
        self.name, self._index = f"cuda:{index}", index
        self._context = primary_context(index)
        with current_context(self._context), unaffected_by_captures(), cuda_core_errors(self.name):
            stream = cuda.take_stream(index)
        self.stream = int(stream.handle)
        weakref.finalize(self, cuda.give_stream_back, index, stream)
        self._is_capturing = self._is_closed = False
        self._scratch_bytes = 0
        self._scratch: CudaBlock | None = None
        self._released: deque[CudaBlock] = deque()  # during a capture, perhaps by other threads

    def allocate(self, nbytes: int) -> CudaBlock:
        """Allocate memory of the device; see `Device.allocate`. Raises `DeviceError` with what was asked for."""
        self._check_open()
        with current_context(self._context), unaffected_by_captures():
            try:
                address = cuda.allocate(nbytes, pinned=False)
            except DeviceError as error:
                free, total = cuda.free_memory()
                raise DeviceError(
                    f"{self.name}: {nbytes / GIBIBYTE:.2f} GiB asked for, {free / GIBIBYTE:.2f} of "
                    f"{total / GIBIBYTE:.2f} GiB are free ({error}); a smaller max_batch needs less"
                ) from error
        return CudaBlock(address, nbytes, is_pinned=False, release=self._release)

    def allocate_host(self, nbytes: int) -> CudaBlock:
        """Allocate pinned memory; see `Device.allocate_host`. Raises `DeviceError` with what was asked for."""
        self._check_open()
        with current_context(self._context), unaffected_by_captures():
            try:
                address = cuda.allocate(nbytes, pinned=True)
            except DeviceError as error:
                raise DeviceError(
                    f"{nbytes / GIBIBYTE:.2f} GiB of pinned host memory asked for: {error}; "
                    "a smaller max_batch needs less"
                ) from error
        return CudaBlock(address, nbytes, is_pinned=True, release=self._release)

    def array(self, block: Block, offset: int, shape: tuple[int, ...], dtype: str) -> Array:
        """Return a view of a block; see `Device.array`. It does not keep the block, but the stream."""
        memory, kind = cast(CudaBlock, block), np.dtype(dtype)
        nbytes = math.prod(shape) * kind.itemsize
        assert memory.is_open, "the block is closed"
        assert 0 <= offset <= memory.nbytes - nbytes, f"{nbytes} bytes at {offset} of a block of {memory.nbytes}"
        if memory.is_pinned:
            pinned = (ctypes.c_uint8 * nbytes).from_address(memory.address + offset)
            return np.ctypeslib.as_array(pinned).view(kind).reshape(shape)
        return DeviceArray(
            address=memory.address + offset,
            shape=shape,
            dtype=kind,
            device_index=self._index,
            stream=self.stream,
            owner=self,
        )

    def copy(self, destination: Array, source: Array) -> None:
        """Enqueue a copy; see `Device.copy`. With host memory that is not pinned the calling thread would wait."""
        assert destination.nbytes == source.nbytes, f"{source.nbytes} bytes into {destination.nbytes}"
        with current_context(self._context):
            cuda.copy(_address_of(destination), _address_of(source), source.nbytes, stream=self.stream)

    def prepare_images(self, source: Array, target: Array) -> None:
        """Enqueue the resize and normalisation; see `Device.prepare_images`.

        The first call compiles the kernels, or takes them from the cache.

        Raises:
            ValueError: shapes that do not go together.
            BackendUnavailableError, BuildError: see `ops.compiler.compile_kernels`.
            DeviceError: the driver refuses the launch, or work before it failed.
        """
        if source.dtype == np.float32:
            self.copy(target, source)
            return
        launch = launch_prepare_images(source.shape, target.shape, pillow=_pillow_version())
        with current_context(self._context), cuda_core_errors(self.name):
            enqueue_kernel(launch, [_address_of(source)], _address_of(target), stream=self.stream)

    def pixels_from_images(self, images: Array, pixels: Array) -> None:
        """Enqueue the conversion; see `Device.pixels_from_images`. NaN becomes 0. Raises as `prepare_images`."""
        assert images.nbytes == 4 * pixels.nbytes, f"{list(images.shape)} into {list(pixels.shape)}"
        launch = launch_pixels_from_images(images.shape)
        with current_context(self._context), cuda_core_errors(self.name):
            enqueue_kernel(launch, [_address_of(images)], _address_of(pixels), stream=self.stream)

    def record(self, *, timing: bool = False) -> CudaEvent:
        """Put a mark into the queue; in a capture, one that each replay reaches anew."""
        with current_context(self._context):
            return CudaEvent(self.stream, context=self._context, timing=timing, is_capturing=self._is_capturing)

    def check_stream(self, stream: int) -> None:
        """Refuse what is no stream of this GPU; see `Device.check_stream`."""
        cuda.check_stream(stream, context=self._context)

    def wait_for_stream(self, stream: int) -> None:
        """Let later work wait for another stream; 0 and 1 are the legacy default stream. See `Device`."""
        order_streams(stream, self.stream, context=self._context)

    def hold_stream(self, stream: int) -> None:
        """Let another stream wait for the work so far; 0 and 1 are the legacy default stream. See `Device`."""
        order_streams(self.stream, stream, context=self._context)

    def capture(self, enqueue: Callable[[], None]) -> Replay:
        """Record what `enqueue` enqueues as a CUDA graph; see `Device.capture`.

        Other threads may load modules, allocate, wait for streams of theirs and capture meanwhile, and `enqueue` may
        load and allocate: these calls are no part of the graph. `enqueue` must not wait for the stream, and nobody for
        the whole device (`torch.cuda.synchronize`), which the driver refuses while anything is captured.

        Raises:
            DeviceError: `enqueue` failed, which its cause tells, or did what a graph cannot hold.
        """
        self._check_open()
        with current_context(self._context), unaffected_by_captures():
            self._is_capturing = True
            try:
                executable = graph_of(enqueue, self.stream)
            except DeviceError as error:
                raise DeviceError(f"{self.name}: {error}") from error.__cause__
            finally:
                self._is_capturing = False
                self._release_what_came()
        return CudaReplay(executable, stream=self.stream, context=self._context, synchronize=self.synchronize)

    def unaffected_by_captures(self) -> AbstractContextManager[None]:
        """See `Device.unaffected_by_captures`; libraries load and allocate when a graph is bound or runs first."""
        return unaffected_by_captures()

    def external_array(self, source: Any, *, stream: int | None = None) -> DeviceArray | None:
        """Return a view of a caller's array on this GPU; see `Device.external_array`.

        Args:
            source: anything.
            stream: one whose work is waited for, beside what the array's protocol says.
        Raises:
            ValueError: the array is on another GPU, or in memory of another context.
            TypeError: it is not contiguous, or cannot be exported.
            DeviceError: the driver refuses, or work before failed.
        """
        with current_context(self._context), cuda_core_errors(self.name):
            array = view_external(source, device_index=self._index, stream=self.stream)
        if array is not None and stream is not None:
            self.wait_for_stream(stream)
        return array

    def reserve_scratch(self, nbytes: int) -> None:
        """Ask for working memory; see `Device.reserve_scratch`.

        Raises:
            DeviceError: it is allocated already, and smaller.
        """
        if self._scratch is not None and nbytes > self._scratch.nbytes:
            raise DeviceError(
                f"{self.name}: {nbytes} bytes of working memory asked for, and the graphs are bound to "
                f"{self._scratch.nbytes}; all graphs of a session are loaded before the first one is bound"
            )
        self._scratch_bytes = max(self._scratch_bytes, nbytes)

    def scratch_address(self) -> int:
        """Return the address of the working memory; 0 where none was asked for. See `Device.scratch_address`."""
        if self._scratch is None and self._scratch_bytes:
            self._scratch = self.allocate(self._scratch_bytes)
        return 0 if self._scratch is None else self._scratch.address

    def synchronize(self) -> None:
        """Let the calling thread wait until the queue is empty. Raises `DeviceError` if work failed."""
        with current_context(self._context), unaffected_by_captures():
            cuda.synchronize_stream(self.stream)

    def close(self) -> None:
        """Wait, then release the working memory; safe to call twice.

        The stream goes with the last array that names it, and kernels stay loaded for the process's next session.

        Raises:
            DeviceError: work failed.
        """
        if self._is_closed:
            return
        self._is_closed = True
        with ExitStack() as closing:  # all of it, though a device that has failed refuses each
            if self._scratch is not None:
                closing.callback(self._scratch.close)
            closing.callback(self._release_what_came)  # a block may have come when a capture had just ended
            self.synchronize()

    def _check_open(self) -> None:
        if self._is_closed:
            raise ValueError(f"the device {self.name} is closed")

    def _release_what_came(self) -> None:
        while self._released:
            self._release(self._released.popleft())

    def _release(self, block: CudaBlock) -> None:
        if self._is_capturing:  # a collected result's, perhaps: waiting now would spoil the capture
            self._released.append(block)
            return
        with current_context(self._context), unaffected_by_captures():
            try:
                cuda.synchronize_stream(self.stream)
            finally:
                cuda.release(block.address, pinned=block.is_pinned)


@functools.cache
def _pillow_version() -> int:
    """Return the major version of the library that resizes images on the host, for equal results on both."""
    import PIL

    return int(PIL.__version__.partition(".")[0])


def _address_of(array: Array) -> int:
    if isinstance(array, DeviceArray):
        return array.address
    assert array.flags.c_contiguous, "a strided array of the host"
    return int(array.__array_interface__["data"][0])
