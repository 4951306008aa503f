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

# Of both protocols: what consumers that name no stream use.
LEGACY_STREAM = 1


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
