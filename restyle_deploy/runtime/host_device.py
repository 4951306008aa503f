"""The host as a `Device`: NumPy's memory, and every call is complete when it returns."""

import mmap
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from restyle_deploy.device_array import Array
from restyle_deploy.runtime.base import Block, Event, Replay
from restyle_deploy.runtime.images import normalize_images, resize_image, uint8_from_images

# Of DLPack's `DLDeviceType`: the host's memory, and what CUDA and ROCm have pinned of it.
_DLPACK_HOST = (1, 3, 11)


# As NumPy does it with what it allocates: large pages cost fewer faults.
HUGE_PAGES_FROM = 4 * 2**20


class HostBlock:
    """Zeroed memory, which the system commits page by page as it is touched."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.memory: NDArray[np.uint8] | None = _map_memory(nbytes)

    def close(self) -> None:
        """Drop the memory; it goes when no array of it is left. Safe to call twice."""
        self.memory = None


def _map_memory(nbytes: int) -> NDArray[np.uint8]:
    """Return new memory of the system's. What malloc gives may be memory that the process has kept, cleared at once."""
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    mapping = mmap.mmap(-1, max(nbytes, 1), **private)
    if nbytes >= HUGE_PAGES_FROM and hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a system without them
            mapping.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(mapping, np.uint8)[:nbytes]


class HostEvent:
    """A moment: all that was called before it is done."""

    def __init__(self) -> None:
        self.seconds = time.perf_counter()

    def is_done(self) -> bool:
        """Return True."""
        return True

    def wait(self) -> None:
        """Return at once."""

    def hold(self, stream: int) -> None:
        """Raise `ValueError`: the host has no streams."""
        raise ValueError("the host has no CUDA streams")

    def elapsed_ms(self, since: Event) -> float:
        """Return the milliseconds since an earlier one."""
        return (self.seconds - cast(HostEvent, since).seconds) * 1e3


class HostReplay:
    """Work to call again."""

    def __init__(self, enqueue: Callable[[], None]) -> None:
        self._enqueue: Callable[[], None] | None = enqueue

    def __call__(self) -> None:
        """Do the work."""
        assert self._enqueue is not None, "the replay is closed"
        self._enqueue()

    def close(self) -> None:
        """Drop what it holds; safe to call twice."""
        self._enqueue = None


class HostDevice:
    """Satisfies `runtime.base.Device` on the CPU, with nothing asynchronous."""

    name = "cpu"
    stream = 0
    is_host = True

    def allocate(self, nbytes: int) -> HostBlock:
        """Allocate zeroed memory; the system commits what is touched."""
        return HostBlock(nbytes)

    def allocate_host(self, nbytes: int) -> HostBlock:
        """See `allocate`."""
        return HostBlock(nbytes)

    def array(self, block: Block, offset: int, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
        """Return a view of a block."""
        memory = cast(HostBlock, block).memory
        assert memory is not None, "the block is closed"
        return np.ndarray(shape, dtype, buffer=memory.data, offset=offset)

    def copy(self, destination: Array, source: Array) -> None:
        """Copy between arrays of one shape, of any layout."""
        np.copyto(_numpy(destination), _numpy(source))

    def prepare_images(self, source: Array, target: Array) -> None:
        """Resize and normalise image by image, by way of PIL; float images are copied. Any layout."""
        images, targets = _numpy(source), _numpy(target)
        if images.dtype != np.uint8:
            np.copyto(targets, images)
            return
        height, width = targets.shape[2:]
        for image, prepared in zip(images, targets, strict=True):
            prepared[:] = normalize_images(resize_image(image, (height, width))[None])[0]

    def pixels_from_images(self, images: Array, pixels: Array) -> None:
        """Clip, truncate and move the channels, image by image; what is not finite becomes any value."""
        source, target = _numpy(images), _numpy(pixels)
        flat = source.reshape(-1, *source.shape[-3:])
        with np.errstate(invalid="ignore"):
            for image, written in zip(flat, target.reshape(-1, *target.shape[-3:]), strict=True):
                written[:] = uint8_from_images(image)

    def record(self, *, timing: bool = False) -> HostEvent:
        """Note the time."""
        return HostEvent()

    def check_stream(self, stream: int) -> None:
        """Raise `ValueError`: the host has no streams."""
        self.wait_for_stream(stream)

    def wait_for_stream(self, stream: int) -> None:
        """Raise `ValueError`: the host has no streams."""
        raise ValueError("the host has no CUDA streams")

    def hold_stream(self, stream: int) -> None:
        """See `wait_for_stream`."""
        self.wait_for_stream(stream)

    def capture(self, enqueue: Callable[[], None]) -> Replay:
        """Return what calls `enqueue` again."""
        return HostReplay(enqueue)

    def unaffected_by_captures(self) -> AbstractContextManager[None]:
        """Do nothing: what others capture on a GPU does not matter here."""
        return nullcontext()

    def external_array(self, source: Any, *, stream: int | None = None) -> NDArray[Any] | None:
        """Return a view of an array in host memory, NumPy's or by DLPack; see `Device.external_array`."""
        return array_on_host(source, self.name)

    def reserve_scratch(self, nbytes: int) -> None:
        """Do nothing: libraries on the CPU have memory of their own."""

    def scratch_address(self) -> int:
        """Return 0: there is none."""
        return 0

    def synchronize(self) -> None:
        """Return at once."""

    def close(self) -> None:
        """Do nothing."""


def array_on_host(source: Any, device: str) -> NDArray[Any] | None:
    """Return a NumPy array, or a view of one in host memory that speaks DLPack; None for what is neither.

    Args:
        source: anything.
        device: of the session, for the message.
    Raises:
        ValueError: an array on another device than the host and the session's.
        TypeError: it is in host memory but cannot be read.
    """
    if isinstance(source, np.ndarray):
        return source
    if not hasattr(source, "__dlpack_device__"):
        _refuse_array_on_gpu(source, device)
        return None
    kind, index = source.__dlpack_device__()
    if int(kind) not in _DLPACK_HOST:
        raise ValueError(
            f"images: an array of device {int(index)} of kind {int(kind)} in DLPack's count, "
            f"the session is on {device}; copy it to the host"
        )
    try:
        return np.from_dlpack(source)
    except (BufferError, RuntimeError) as error:
        raise TypeError(f"images: got a {type(source).__name__} that NumPy cannot read: {error}") from error


def _refuse_array_on_gpu(source: Any, device: str) -> None:
    """Raise `ValueError` for an array that lies on a GPU, by its `__cuda_array_interface__`."""
    cause = None
    try:
        if not hasattr(source, "__cuda_array_interface__"):
            return
    except Exception as error:  # of whoever wrote it: it has one, which cannot be read
        cause = error
    raise ValueError(f"images: an array on a GPU, the session is on {device}; copy it to the host") from cause


def _numpy(array: Array) -> NDArray[Any]:
    return cast(NDArray[Any], array)
