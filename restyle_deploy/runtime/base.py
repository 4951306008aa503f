"""What a device offers the loop: memory, copies and a queue of work. The host has it too, with nothing asynchronous."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

from restyle_deploy.device_array import Array


class Block(Protocol):
    """A piece of memory. Whoever allocated it closes it; safe to close twice."""

    nbytes: int

    def close(self) -> None:
        """Give the memory back once the work that was enqueued before has ended."""
        ...


class Event(Protocol):
    """A mark in the queue: done when all that was enqueued before it is."""

    def is_done(self) -> bool:
        """Whether it has been reached; does not wait."""
        ...

    def wait(self) -> None:
        """Let the calling thread wait until it is reached. Raises `DeviceError` if work before it failed."""
        ...

    def hold(self, stream: int) -> None:
        """Let later work of another stream of the device wait until it is reached; the calling thread goes on."""
        ...

    def elapsed_ms(self, since: Event) -> float:
        """Return the time from an earlier event to this one; both were recorded with `timing` and are done."""
        ...


class Replay(Protocol):
    """Work that was recorded once. Calling it enqueues all of it, in one launch, and allocates nothing."""

    def __call__(self) -> None:
        """Enqueue it."""
        ...

    def close(self) -> None:
        """Release what it holds; safe to call twice."""
        ...


class Device(Protocol):
    """Memory and one queue of work, in whose order everything below happens. Owned by a session.

    Attributes:
        name: `cpu`, or `cuda:0` and so on.
        stream: the queue, a `CUstream` as a number; 0 on the host.
        is_host: whether arrays are NumPy's, and every call is complete when it returns.
    """

    name: str
    stream: int
    is_host: bool

    def allocate(self, nbytes: int) -> Block:
        """Allocate memory of the device. Raises `DeviceError` with what was asked for and what is free."""
        ...

    def allocate_host(self, nbytes: int) -> Block:
        """Allocate host memory that the device can copy from and to without a detour (pinned)."""
        ...

    def array(self, block: Block, offset: int, shape: tuple[int, ...], dtype: str) -> Array:
        """Return a view of a block, `offset` bytes in, which owns nothing: NumPy's of host memory."""
        ...

    def copy(self, destination: Array, source: Array) -> None:
        """Enqueue a copy between arrays of as many bytes: host to device, back, or within. Host memory is pinned."""
        ...

    def prepare_images(self, source: Array, target: Array) -> None:
        """Enqueue: uint8 [N, H, W, 3], resized as PIL does -> float32 [N, 3, h, w] in [-1, 1]; float32 is copied."""
        ...

    def pixels_from_images(self, images: Array, pixels: Array) -> None:
        """Enqueue: float32 [..., 3, R, R'] -> uint8 [..., R, R', 3], clipped and truncated as upstream saves them."""
        ...

    def record(self, *, timing: bool = False) -> Event:
        """Put a mark into the queue."""
        ...

    def check_stream(self, stream: int) -> None:
        """Raise `ValueError`, which names `stream`, for a caller's that is none of the device."""
        ...

    def wait_for_stream(self, stream: int) -> None:
        """Let later work in the queue wait for all that is in another stream of the device now."""
        ...

    def hold_stream(self, stream: int) -> None:
        """Let later work in another stream wait for all that is in the queue now."""
        ...

    def capture(self, enqueue: Callable[[], None]) -> Replay:
        """Record what `enqueue` enqueues, without doing it. Raises `DeviceError` where something cannot be recorded."""
        ...

    def unaffected_by_captures(self) -> AbstractContextManager[None]:
        """Let the calling thread load, allocate and wait while a `with` lasts, whatever other threads capture."""
        ...

    def external_array(self, source: Any, *, stream: int | None = None) -> Array | None:
        """Return a view of a caller's array on this device, by `__cuda_array_interface__` or DLPack, without a copy.

        The queue is made to wait for the work that fills it, as the protocols say. None for something that is no array
        of this device. Raises `ValueError` for one on another device.
        """
        ...

    def reserve_scratch(self, nbytes: int) -> None:
        """Ask for working memory that all graphs share, as they run one after the other; the largest request counts."""
        ...

    def scratch_address(self) -> int:
        """Return the address of the working memory; allocated at the first call, at the size asked for until then."""
        ...

    def synchronize(self) -> None:
        """Let the calling thread wait until the queue is empty. Never called between the first and the last step."""
        ...

    def close(self) -> None:
        """Wait, then release queue, scratch and kernels; safe to call twice."""
        ...
