"""All that talks to CUDA: contexts, memory, streams, events, graphs, kernels, and arrays of other libraries.

cuda-core owns streams, launches kernels, and reads and writes DLPack. It has no plain allocations and no external
events of a capture, and the names of its graphs and errors move between versions: for these there is the driver's own
interface in cuda-bindings. Both are imported when they are first needed, by this file alone (`ops.compiler` asks NVRTC,
which needs no device). It imports nothing of the package but errors, so that kernels and backends may use it too.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from restyle_deploy.errors import BackendUnavailableError, DeviceError

if TYPE_CHECKING:
    from restyle_deploy.runtime.base import Event

# What mends most failures of work on a GPU; an error of a kernel stays with the process's context.
REMEDY = "where memory lacks, a smaller max_batch needs less; after a failed launch, begin a new process"
# Of both protocols: what consumers that name no stream use.
LEGACY_STREAM = 1
# Handles that mean a default stream: the legacy one by its two, and that of each thread.
DEFAULT_STREAMS = (0, 1, 2)
NO_DRIVER = "there is no NVIDIA driver"
NEEDED = "the CUDA kernels need {}, which is not installed; run: pip install 'restyle-deploy[cuda]'"

_IDLE_STREAMS: defaultdict[int, list[Any]] = defaultdict(list)


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


def find_devices() -> tuple[tuple[str, ...], str]:
    """Return the GPUs, `cuda:0` and so on, and why there is none where there is none."""
    try:
        import cuda.core  # noqa: F401
    except ModuleNotFoundError as error:
        return (), f"{error.name} is not installed; run: pip install 'restyle-deploy[cuda]'"
    if driver_version() is None:
        return (), NO_DRIVER
    try:
        # Not by cuda-core, which until version 1.1 counts the machine's and not those that the process may use.
        call("cuInit", 0)
        count = int(call("cuDeviceGetCount"))
    except DeviceError as error:
        return (), str(error)
    return tuple(f"cuda:{index}" for index in range(count)), "" if count else "the driver lists no GPU"


def find_processor(device: str) -> str:
    """Return the compute capability of one of the devices, "sm_89" style."""
    from cuda.core import Device

    return f"sm_{Device(index_of(device)).arch}"


def find_name(device: str) -> str:
    """Return the name of one of the devices, such as "NVIDIA L4"."""
    from cuda.core import Device

    return str(Device(index_of(device)).name)


def find_bus_address(device: str) -> str:
    """Return where one of the devices is on the bus.

    Raises:
        ModuleNotFoundError: cuda-core is not installed.
        Exception: of cuda-core's classes: no driver, or no such GPU.
    """
    from cuda.core import Device

    return str(Device(index_of(device)).pci_bus_id)


def index_of(device: str) -> int:
    """Return the number in `cuda:0`."""
    return int(device.partition(":")[2])


def driver_version() -> tuple[int, int] | None:
    """Return the newest CUDA version that the driver knows; None where there is no driver, or no cuda-bindings."""
    try:
        from cuda.bindings import driver as module
    except ModuleNotFoundError:
        return None
    try:
        status, number = module.cuDriverGetVersion()
    except RuntimeError:  # of cuda-bindings, where it finds no driver
        return None
    return (number // 1000, number % 1000 // 10) if int(status) == 0 else None


def require_cuda_core() -> None:
    """Raise `BackendUnavailableError` unless cuda-core is installed."""
    try:
        import cuda.core  # noqa: F401
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "cuda":
            raise
        raise BackendUnavailableError(NEEDED.format("cuda-core")) from error


def check_gpu(index: int) -> None:
    """Raise `BackendUnavailableError` unless there are cuda-core, a driver and this GPU."""
    require_cuda_core()
    if driver_version() is None:
        raise BackendUnavailableError(f"cuda:{index}: {NO_DRIVER} on this machine")
    call("cuInit", 0)
    count = int(call("cuDeviceGetCount"))
    if index >= count:
        raise BackendUnavailableError(f"cuda:{index}: no such GPU, the driver has {count}")


def take_stream(index: int) -> Any:
    """Return a stream of cuda-core's on a device, which nobody else uses; it does not wait for the legacy one.

    Whoever is done with it gives it back: libraries keep memory for each stream that they have met, and never free it,
    so that a new one for each session would lose that.
    """
    from cuda.core import Device

    device = Device(index)
    device.set_current()
    try:
        return _IDLE_STREAMS[index].pop()
    except IndexError:
        return device.create_stream()


def give_stream_back(index: int, stream: Any) -> None:
    """Take back what `take_stream` has returned; work that is still in it comes first for the next user."""
    _IDLE_STREAMS[index].append(stream)


@functools.lru_cache(maxsize=256)
def wrap_stream(handle: int) -> Any:
    """Return cuda-core's view of a stream: no more than its handle, so that one serves as long as the process lives."""
    from cuda.core import Stream

    return Stream.from_handle(handle)


def synchronize_stream(stream: int) -> None:
    """Let the calling thread wait for a stream of the current context. Raises `DeviceError` if work failed."""
    call("cuStreamSynchronize", stream)


def allocate(nbytes: int, *, pinned: bool) -> int:
    """Return the address of memory of the current context's device, or of pinned memory of the host.

    It is a plain allocation, not from a stream-ordered pool: one made while the stream is captured would become a node
    of the graph, with the graph's lifetime; and the device's pool, as cuda-core sets it, keeps what it is given back,
    where other libraries cannot get at it. A plain one is ours at once, for as long as graphs hold its address, and
    goes back to the driver when it is released. It is slow, but done when a session is opened.

    Raises:
        DeviceError: there is not so much.
    """
    return int(call("cuMemAllocHost" if pinned else "cuMemAlloc", nbytes))


def release(address: int, *, pinned: bool) -> None:
    """Give back what `allocate` returned; no work may use it any more. Raises `DeviceError` if work failed."""
    call("cuMemFreeHost" if pinned else "cuMemFree", address)


def free_memory() -> tuple[int, int]:
    """Return the bytes of the current context's device that are free, and all it has."""
    free, total = call("cuMemGetInfo")
    return int(free), int(total)


def copy(destination: int, source: int, nbytes: int, *, stream: int) -> None:
    """Enqueue a copy between addresses of a device or the host."""
    call("cuMemcpyAsync", destination, source, nbytes, stream)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where memory is: the number of its device, and its context; None or 0 for memory that belongs to none."""

    device_index: int
    context: int | None


def place_of(address: int) -> Place:
    """Return where an address of a device is.

    Raises:
        DeviceError: it is in no GPU's memory.
    """
    attributes = driver().CUpointer_attribute
    index = int(call("cuPointerGetAttribute", attributes.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, address))
    try:
        context = int(call("cuPointerGetAttribute", attributes.CU_POINTER_ATTRIBUTE_CONTEXT, address))
    except DeviceError:  # memory that belongs to none, as that of pools
        return Place(device_index=index, context=None)
    return Place(device_index=index, context=context)


def export_dlpack(
    address: int,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    *,
    nbytes: int,
    owner: object,
    max_version: tuple[int, int] | None,
) -> Any:
    """Return memory of the current context's device as a DLPack capsule, which keeps `owner`; see `__dlpack__`."""
    from cuda.core import Buffer
    from cuda.core.utils import StridedMemoryView

    buffer = Buffer.from_handle(address, nbytes, owner=owner)
    return StridedMemoryView.from_buffer(buffer, shape=shape, dtype=dtype).__dlpack__(max_version=max_version)


@dataclass(frozen=True, kw_only=True)
class View:
    """A caller's array: strides in elements, None for C order; `owner` keeps it as long as it is used."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None
    dtype: np.dtype[Any]
    owner: object


def import_dlpack(source: Any, *, stream: int) -> View:
    """Return an array of the current context's device by DLPack, which makes a stream wait for its content.

    Raises:
        BufferError, RuntimeError, NotImplementedError, TypeError: whoever made it refuses, or NumPy has no such type.
    """
    from cuda.core.utils import StridedMemoryView

    view = StridedMemoryView.from_dlpack(source, stream_ptr=stream)
    return View(
        address=int(view.ptr), shape=tuple(view.shape), strides=view.strides, dtype=np.dtype(view.dtype), owner=view
    )


def current_architecture() -> str:
    """Return the compute capability of the current context's device, "sm_89" style."""
    from cuda.core import Device

    return f"sm_{Device().arch}"


def load_kernel(code: bytes, symbol: str, *, name: str) -> Any:
    """Return a kernel of a cubin; the driver brings it to each context.

    Args:
        code: the cubin.
        symbol: of the kernel in it.
        name: for messages.
    """
    from cuda.core import ObjectCode

    return ObjectCode.from_cubin(code, name=name).get_kernel(symbol)


def launch_kernel(
    kernel: Any, arguments: Sequence[Any], *, grid: tuple[int, ...], block: tuple[int, ...], stream: int
) -> None:
    """Enqueue a kernel of `load_kernel` in the current context; nothing is waited for.

    Args:
        kernel: what to launch.
        arguments: whole numbers are addresses; others are of NumPy's types.
        grid, block: blocks, and threads of each.
        stream: as a number; 0 for the default stream.
    """
    from cuda.core import LaunchConfig, launch

    launch(wrap_stream(stream or LEGACY_STREAM), LaunchConfig(grid=grid, block=block), kernel, *arguments)


@contextmanager
def cuda_core_errors(name: str) -> Iterator[None]:
    """Turn what cuda-core raises of the driver, which is its own, into a `DeviceError`."""
    try:
        yield
    except Exception as error:
        if type(error).__name__ != "CUDAError":  # in a private module, which moves between versions
            raise
        reason = str(error).strip().partition("\n")[0]
        raise DeviceError(f"{name}: the driver refuses: {reason}; {REMEDY}") from error


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


def end_capture(stream: int) -> None:
    """End a capture of a stream that a library has begun and not finished; nothing happens where there is none.

    Args:
        stream: a `CUstream` as a number.
    """
    module = driver()
    error, status = module.cuStreamIsCapturing(stream)
    if error == module.CUresult.CUDA_SUCCESS and status != module.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_NONE:
        _, graph = module.cuStreamEndCapture(stream)  # an error where the capture is invalid, which then has no graph
        if graph is not None and int(graph):
            module.cuGraphDestroy(graph)
