"""What a `CudaDevice` hands out: blocks of memory, events and replays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from restyle_deploy.cuda_driver import (
    LEGACY_STREAM,
    call,
    check_stream,
    current_context,
    driver,
    unaffected_by_captures,
)
from restyle_deploy.errors import DeviceError
from restyle_deploy.runtime.base import Event


class CudaBlock:
    """Memory of the device, or pinned memory of the host. Safe to close twice.

    Attributes:
        nbytes: its size.
        address: of its first byte, at a multiple of 256.
        is_pinned: whether it is the host's.
    """

    def __init__(self, address: int, nbytes: int, *, is_pinned: bool, release: Callable[[CudaBlock], None]) -> None:
        """Take over an allocation.

        Args:
            address, nbytes: of the allocation.
            is_pinned: whether it is the host's.
            release: gives it back once the device has no use for it.
        """
        self.address, self.nbytes, self.is_pinned = address, nbytes, is_pinned
        self._release: Callable[[CudaBlock], None] | None = release

    @property
    def is_open(self) -> bool:
        """Whether it has not been closed."""
        return self._release is not None

    def close(self) -> None:
        """Give the memory back once the work that was enqueued before has ended; for that the calling thread waits."""
        release, self._release = self._release, None
        if release is not None:
            release(self)


class CudaEvent:
    """A mark in a stream, in a capture too. Any thread may ask or wait."""

    def __init__(self, stream: int, *, context: int, timing: bool, is_capturing: bool) -> None:
        """Put the mark into a stream.

        Args:
            stream: as a number.
            context: of the device, current.
            timing: whether the time is to be taken.
            is_capturing: whether the stream is being captured: then it is reached in each replay.
        """
        flags = driver().CUevent_flags
        self._context = context
        self._handle = call("cuEventCreate", int(flags.CU_EVENT_DEFAULT if timing else flags.CU_EVENT_DISABLE_TIMING))
        self._destroy = driver().cuEventDestroy
        if is_capturing:
            # Without the flag it would only order the captured work, and could be neither waited for nor read.
            external = int(driver().CUevent_record_flags.CU_EVENT_RECORD_EXTERNAL)
            call("cuEventRecordWithFlags", self._handle, stream, external)
        else:
            call("cuEventRecord", self._handle, stream)

    def __del__(self) -> None:
        if hasattr(self, "_destroy"):
            self._destroy(self._handle)  # nobody is left who could be told of an error

    def is_done(self) -> bool:
        """Whether it has been reached; does not wait. Raises `DeviceError` if work before it failed."""
        with current_context(self._context), unaffected_by_captures():
            (status,) = driver().cuEventQuery(self._handle)
            if status == driver().CUresult.CUDA_ERROR_NOT_READY:
                return False
            if int(status) != 0:
                call("cuEventQuery", self._handle)  # raises, with the name
            return True

    def wait(self) -> None:
        """Let the calling thread wait until it is reached. Raises `DeviceError` if work before it failed."""
        with current_context(self._context), unaffected_by_captures():
            call("cuEventSynchronize", self._handle)

    def hold(self, stream: int) -> None:
        """Let later work of a stream of the device wait until it is reached; 0 is the legacy default stream.

        Raises:
            ValueError: it is no stream of the device.
            DeviceError: the driver refuses.
        """
        with current_context(self._context):
            try:
                call("cuStreamWaitEvent", stream or LEGACY_STREAM, self._handle, 0)
            except DeviceError:
                check_stream(stream, context=self._context)
                raise

    def elapsed_ms(self, since: Event) -> float:
        """Return the time from an earlier event to this one; both were recorded with `timing` and are done."""
        with current_context(self._context), unaffected_by_captures():
            return float(call("cuEventElapsedTime", cast(CudaEvent, since)._handle, self._handle))


class CudaReplay:
    """A CUDA graph that is launched on the stream it was captured from."""

    def __init__(self, executable: Any, *, stream: int, context: int, synchronize: Callable[[], None]) -> None:
        """Take over an instantiated graph.

        Args:
            executable: the `CUgraphExec`.
            stream, context: where it is launched.
            synchronize: waits for the stream.
        """
        self._executable: Any | None = executable
        self._stream, self._context, self._synchronize = stream, context, synchronize

    def __call__(self) -> None:
        """Enqueue all of it, in one launch.

        Raises:
            DeviceError: the driver refuses.
            ValueError: it is closed.
        """
        if self._executable is None:
            raise ValueError("the replay is closed")
        with current_context(self._context):
            call("cuGraphLaunch", self._executable, self._stream)

    def close(self) -> None:
        """Wait for launches that are in flight, and release the graph; safe to call twice."""
        executable, self._executable = self._executable, None
        if executable is not None:
            self._synchronize()
            with current_context(self._context), unaffected_by_captures():
                call("cuGraphExecDestroy", executable)


def graph_of(enqueue: Callable[[], None], stream: int) -> Any:
    """Return what `enqueue` enqueues on a stream as a `CUgraphExec`, without doing it.

    Raises:
        DeviceError: `enqueue` failed, which its cause tells, or did what a graph cannot hold.
    """
    # Other modes forbid the process to load a module or to allocate meanwhile, though that is no part of the graph.
    call("cuStreamBeginCapture", stream, driver().CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED)
    is_complete = False
    try:
        enqueue()
        is_complete = True
    except Exception as error:
        raise DeviceError(f"the work cannot be recorded as a CUDA graph: {error}") from error
    finally:
        status, graph = driver().cuStreamEndCapture(stream)  # the stream must go on, whatever has happened
        if not is_complete and int(status) == 0:
            call("cuGraphDestroy", graph)
    if int(status) != 0:
        raise DeviceError(f"the work cannot be recorded as a CUDA graph: {status.name}")
    try:
        executable = call("cuGraphInstantiate", graph, 0)
    finally:
        call("cuGraphDestroy", graph)
    call("cuGraphUpload", executable, stream)  # so that the first launch is as quick as the others
    return executable
