"""Calls of the CUDA driver whose errors are checked, and the order of streams; for what lies on a device.

cuda-core owns streams and launches kernels. It has no plain allocations, and no external events of a capture, and the
names of its graphs and errors move between versions: for these there is the driver's own interface of cuda-bindings,
which is imported when it is first needed.
"""

from __future__ import annotations

import functools
from types import TracebackType
from typing import Any

from restyle_deploy.errors import DeviceError

# What mends most failures of work on a GPU; an error of a kernel stays with the process's context.
REMEDY = "where memory lacks, a smaller max_batch needs less; after a failed launch, begin a new process"
# Of both protocols: what consumers that name no stream use.
LEGACY_STREAM = 1
# Handles that mean a default stream: the legacy one by its two, and that of each thread.
DEFAULT_STREAMS = (0, 1, 2)


def call(function: str, *arguments: Any) -> Any:
    """Call a function of the driver and return what it gives beside its status: None, a value, or a tuple of them.

    Args:
        function: its name without version suffix.
        arguments: as cuda-bindings takes them; handles are whole numbers or its own objects.
    Raises:
        DeviceError: the driver refuses, or work that was enqueued before has failed.
    """
    status, *values = getattr(driver(), function)(*arguments)
    if int(status) != 0:
        raise DeviceError(f"{function}: {status.name}")
    return values[0] if len(values) == 1 else tuple(values) or None


@functools.cache
def driver() -> Any:
    """Return the module of cuda-bindings."""
    from cuda.bindings import driver as module

    return module


@functools.cache
def primary_context(device_index: int) -> int:
    """Return the context that all libraries of the process share on a device; kept until the process ends.

    Raises:
        DeviceError: the driver refuses.
    """
    call("cuInit", 0)
    return int(call("cuDevicePrimaryCtxRetain", device_index))


class current_context:  # noqa: N801  used like a function, and a generator would cost each call a microsecond more
    """Makes a context the calling thread's while a `with` lasts; a caller's own device is current again afterwards."""

    def __init__(self, context: int) -> None:
        self._context = context
        self._is_pushed = False

    def __enter__(self) -> None:
        if int(call("cuCtxGetCurrent")) != self._context:
            call("cuCtxPushCurrent", self._context)
            self._is_pushed = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._is_pushed:
            self._is_pushed = False
            call("cuCtxPopCurrent")


class unaffected_by_captures:  # noqa: N801  as above
    """Lets the calling thread wait, ask, allocate and free while a `with` lasts, whatever is captured elsewhere.

    While any thread captures a stream in the mode "global", as ONNX Runtime and `torch.cuda.graph` do, the driver
    refuses such calls of all threads, and spoils that capture. Ours are no part of it.
    """

    def __enter__(self) -> None:
        relaxed = driver().CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        self._former = call("cuThreadExchangeStreamCaptureMode", relaxed)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        call("cuThreadExchangeStreamCaptureMode", self._former)


def check_stream(stream: int, *, context: int) -> None:
    """Refuse a stream of another device or context, or one that the driver does not know.

    Args:
        stream: a caller's, as a number; 0 to 2 are the default streams.
        context: of the device.
    Raises:
        ValueError: it is refused. (Of a number that never was a stream, the driver need not notice.)
    """
    if stream in DEFAULT_STREAMS:
        return
    try:
        found = int(call("cuStreamGetCtx", stream))
    except DeviceError as error:
        raise ValueError(
            f"stream: {stream:#x} is no stream of the driver ({error}); pass its handle, with torch "
            "torch.cuda.current_stream().cuda_stream"
        ) from error
    if found != context:
        raise ValueError(
            f"stream: {stream:#x} is of another GPU than the session's, or of another context than the one that "
            "libraries share on it; make the stream on the session's GPU, with PyCUDA after import "
            "pycuda.autoprimaryctx"
        )


def order_streams(first: int, later: int, *, context: int) -> None:
    """Let later work of one stream wait for all that is in another one now; the host waits for nothing.

    Args:
        first, later: streams as numbers, of one device; 0 and 1 are the legacy default stream.
        context: of the device.
    Raises:
        DeviceError: there is no such stream.
    """
    first, later = first or LEGACY_STREAM, later or LEGACY_STREAM
    if first == later:
        return
    with current_context(context):
        event = call("cuEventCreate", int(driver().CUevent_flags.CU_EVENT_DISABLE_TIMING))
        try:
            call("cuEventRecord", event, first)
            call("cuStreamWaitEvent", later, event, 0)
        finally:
            call("cuEventDestroy", event)  # the wait stays: the driver keeps what it needs of the event
