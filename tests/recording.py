"""A GPU made up on the host: its work waits in a queue until somebody waits for it, and every call is written down."""

import ctypes
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from restyle_deploy.device_array import Array, DeviceArray
from restyle_deploy.errors import DeviceError
from restyle_deploy.runtime.base import Block, Event, Replay
from restyle_deploy.runtime.host_device import HostDevice

STREAM = 77

Work = Callable[[], None]


def array_from(array: Array) -> NDArray[Any]:
    """Return a device's array as NumPy's, in the same memory."""
    if not isinstance(array, DeviceArray):
        return array
    memory = (ctypes.c_uint8 * array.nbytes).from_address(array.address)
    return np.ctypeslib.as_array(memory).view(array.dtype).reshape(array.shape)


class RecordedBlock:
    """Memory full of NaN, before it is written and after it is closed; it is never given back."""

    def __init__(self, device: "RecordingDevice", nbytes: int, *, is_pinned: bool) -> None:
        self.nbytes, self.is_pinned, self.is_open = nbytes, is_pinned, True
        self.memory = np.full(nbytes, 0xFF, np.uint8)
        self._device = device

    def close(self) -> None:
        if self.is_open:
            self._device.note("free", self.nbytes)
            self.is_open = False
            if self._device.memory_left is not None:
                self._device.memory_left += self.nbytes
            self._device.execute()  # as the driver does
            self.memory.fill(0xFF)
            self._device.open_blocks.remove(self)


class RecordedEvent:
    """A mark, reached when the queue has come to it."""

    def __init__(self, device: "RecordingDevice", *, timing: bool) -> None:
        self._device, self._timing = device, timing
        self._reached: float | None = None

    def reach(self) -> None:
        self._reached = time.perf_counter()

    def is_done(self) -> bool:
        return self._reached is not None

    def wait(self) -> None:
        self._device.note("wait")
        self._device.execute(self)

    def hold(self, stream: int) -> None:
        self._device.note("event holds", stream)

    def elapsed_ms(self, since: Event) -> float:
        earlier = cast(RecordedEvent, since)
        assert self._timing
        assert earlier._timing
        assert self._reached is not None
        assert earlier._reached is not None
        return (self._reached - earlier._reached) * 1e3


class RecordedReplay:
    """Work that one launch enqueues."""

    def __init__(self, device: "RecordingDevice", work: list[Work]) -> None:
        self._device, self._work, self.is_open = device, work, True

    def __call__(self) -> None:
        assert self.is_open
        self._device.note("launch", len(self._work))
        self._device.push(*self._work)

    def close(self) -> None:
        if self.is_open:
            self._device.note("close replay")
        self.is_open = False


class RecordingDevice:
    """Satisfies `Device`. What is enqueued happens when something is waited for, in its order and not before.

    Attributes:
        calls: names and details of all calls, in their order.
        open_blocks: those that are allocated.
        refused: how many captures are refused from now on.
        unknown_streams: that callers may not pass.
        memory_left: bytes that may still be allocated; None for any number.
        is_open: until it is closed.
    """

    name = "cuda:0"
    stream = STREAM
    is_host = False

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.open_blocks: list[RecordedBlock] = []
        self.refused = 0
        self.unknown_streams: set[int] = set()
        self.memory_left: int | None = None
        self.is_open = True
        self._host = HostDevice()
        self._queue: deque[Work] = deque()
        self._captured: list[Work] | None = None
        self._executing = threading.RLock()
        self._graveyard: list[RecordedBlock] = []

    # What tests ask

    def count(self) -> Counter[str]:
        """Return how often each kind of call was made."""
        return Counter(name for name, *_ in self.calls)

    @property
    def names(self) -> list[str]:
        """The kinds of calls, in their order."""
        return [name for name, *_ in self.calls]

    def put(self, values: NDArray[Any]) -> DeviceArray:
        """Return a caller's array on the device."""
        block = self._allocate(values.nbytes, is_pinned=False)
        array = cast(DeviceArray, self.array(block, 0, values.shape, values.dtype.name))
        np.copyto(array_from(array), values)
        return array

    def read(self, array: DeviceArray) -> NDArray[Any]:
        """Return a copy of an array's content once all that is enqueued has been done."""
        self.execute()
        return array_from(array).copy()

    @property
    def pending(self) -> int:
        """Pieces of work that have not been done."""
        return len(self._queue)

    def execute(self, event: RecordedEvent | None = None) -> None:
        """Do what is enqueued, or what is up to an event."""
        with self._executing:
            while self._queue and not (event is not None and event.is_done()):
                self._queue.popleft()()

    # What a session calls

    def note(self, name: str, *details: Any) -> None:
        self.calls.append((name, *details))

    def push(self, *work: Work) -> None:
        (self._queue if self._captured is None else self._captured).extend(work)

    def enqueue(self, name: str, work: Work) -> None:
        self.note(name)
        self.push(work)

    def allocate(self, nbytes: int) -> RecordedBlock:
        self.note("allocate", nbytes)
        return self._allocate(nbytes, is_pinned=False)

    def allocate_host(self, nbytes: int) -> RecordedBlock:
        self.note("allocate pinned", nbytes)
        return self._allocate(nbytes, is_pinned=True)

    def array(self, block: Block, offset: int, shape: tuple[int, ...], dtype: str) -> Array:
        recorded = cast(RecordedBlock, block)
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        assert recorded.is_open
        assert 0 <= offset <= recorded.nbytes - nbytes
        if recorded.is_pinned:
            return recorded.memory[offset : offset + nbytes].view(dtype).reshape(shape)
        address = recorded.memory.ctypes.data + offset
        return DeviceArray(address=address, shape=shape, dtype=np.dtype(dtype), stream=STREAM, owner=self)

    def copy(self, destination: Array, source: Array) -> None:
        assert destination.nbytes == source.nbytes
        for array in (destination, source):
            assert isinstance(array, DeviceArray) or self._is_pinned(array), "host memory that is not pinned"
        kinds = ["host" if isinstance(array, np.ndarray) else "device" for array in (source, destination)]
        to, of = array_from(destination), array_from(source)
        self.enqueue(f"copy {kinds[0]} to {kinds[1]}", lambda: np.copyto(to, of.reshape(to.shape)))

    def prepare_images(self, source: Array, target: Array) -> None:
        images, targets = self._on_device(source), self._on_device(target)
        self.enqueue("prepare images", lambda: self._host.prepare_images(images, targets))

    def pixels_from_images(self, images: Array, pixels: Array) -> None:
        source, target = self._on_device(images), self._on_device(pixels)
        self.enqueue("pixels from images", lambda: self._host.pixels_from_images(source, target))

    def record(self, *, timing: bool = False) -> RecordedEvent:
        event = RecordedEvent(self, timing=timing)
        self.enqueue("record timing" if timing else "record", event.reach)
        return event

    def check_stream(self, stream: int) -> None:
        if stream in self.unknown_streams:
            raise ValueError(f"stream: made up: {stream} is no stream")

    def wait_for_stream(self, stream: int) -> None:
        self.note("wait for stream", stream)

    def hold_stream(self, stream: int) -> None:
        self.note("hold stream", stream)

    def capture(self, enqueue: Callable[[], None]) -> Replay:
        self.note("capture")
        if self.refused:
            self.refused -= 1
            raise DeviceError("made up: it cannot be recorded")
        assert self._captured is None
        work: list[Work] = []
        self._captured = work
        before = len(self.calls)
        try:
            enqueue()
        finally:
            self._captured = None
        del self.calls[before:]  # they are the replay's
        return RecordedReplay(self, work)

    def unaffected_by_captures(self) -> AbstractContextManager[None]:
        return nullcontext()

    def external_array(self, source: Any, *, stream: int | None = None) -> DeviceArray | None:
        self.note("external array")
        if stream is not None:
            self.wait_for_stream(stream)
        return source if isinstance(source, DeviceArray) else None

    def reserve_scratch(self, nbytes: int) -> None:
        self.note("reserve scratch", nbytes)

    def scratch_address(self) -> int:
        return 0

    def synchronize(self) -> None:
        self.note("synchronize")
        self.execute()

    def close(self) -> None:
        self.execute()
        self.is_open = False

    def _allocate(self, nbytes: int, *, is_pinned: bool) -> RecordedBlock:
        if self.memory_left is not None:
            if nbytes > self.memory_left:
                raise DeviceError(f"made up: {nbytes} bytes are asked for, {self.memory_left} are free")
            self.memory_left -= nbytes
        block = RecordedBlock(self, nbytes, is_pinned=is_pinned)
        self.open_blocks.append(block)
        self._graveyard.append(block)
        return block

    def _is_pinned(self, array: NDArray[Any]) -> bool:
        address = array.ctypes.data
        return any(
            block.is_pinned and 0 <= address - block.memory.ctypes.data <= block.nbytes - array.nbytes
            for block in self.open_blocks
        )

    @staticmethod
    def _on_device(array: Array) -> NDArray[Any]:
        assert isinstance(array, DeviceArray)
        return array_from(array)
