"""An array in the memory of a CUDA device, as graphs are bound to it and as callers get it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from restyle_deploy.runtime.device import (
    LEGACY_STREAM,
    current_context,
    export_dlpack,
    order_streams,
    primary_context,
)

# Of DLPack's `DLDeviceType`.
DLPACK_CUDA = 2
# What a consumer passes to `__dlpack__` that orders the streams by itself.
NO_ORDER = -1


class Ready(Protocol):
    """When an array's content is complete; an event of `runtime.base` on a GPU."""

    def hold(self, stream: int) -> None:
        """Let later work of a stream wait until then; the host does not wait."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class DeviceArray:
    """C-contiguous memory on a CUDA device. Speaks `__cuda_array_interface__` and DLPack; no call copies or waits.

    Attributes:
        address: of the first element.
        shape: sizes.
        dtype: of the elements.
        device_index: of the device, as in `cuda:0`.
        stream: the `CUstream`, as a number, on which the content becomes complete; who reads it on another one waits
            for it, which both protocols do.
        owner: kept alive as long as the array or anything made of it is.
        ready: when the content is complete, where that is known: readers then wait for this, not for all that has come
            into the stream since, and the stream may be gone.
    """

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    device_index: int = 0
    stream: int = 0
    owner: object = None
    ready: Ready | None = None

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def part(self, first: int, last: int) -> DeviceArray:
        """Return rows `first` to `last` (exclusive) of the leading axis: a view that keeps the owner alive.

        Raises:
            IndexError: there are no such rows.
        """
        if not self.shape or not 0 <= first <= last <= self.shape[0]:
            raise IndexError(f"rows {first} to {last} of an array of shape {list(self.shape)}")
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        return replace(self, address=self.address + first * row_bytes, shape=(last - first, *self.shape[1:]))

    def hold(self, stream: int) -> None:
        """Let later work of a stream wait until the content is complete; the host does not wait.

        Args:
            stream: of the array's device, as a number; 0 and 1 are the legacy default stream.
        Raises:
            DeviceError: there is no such stream.
        """
        if self.ready is not None:
            self.ready.hold(stream)
        else:
            order_streams(self.stream, stream, context=primary_context(self.device_index))

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """Version 3 of the protocol. The legacy default stream, which it names, waits until the content is complete.

        So do libraries that read no `stream` there, as torch, as long as they work on that stream. Reading this
        attribute is what makes it wait.
        """
        self.hold(LEGACY_STREAM)
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.address if self.nbytes else 0, False),
            "strides": None,
            "version": 3,
            "stream": LEGACY_STREAM,
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        """Return DLPack's number for CUDA, and the device's."""
        return DLPACK_CUDA, self.device_index

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """Return a DLPack capsule, which keeps the owner alive until its consumer is done with it.

        Args:
            stream: of the consumer, which is made to wait until the content is complete; None for the legacy default
                stream, -1 for a consumer that sees to the order by itself.
            max_version: the newest version that the consumer knows; None for one from before versions.
            dl_device: where the consumer wants it; None, or this device.
            copy: whether the consumer insists on a copy, which it has to make by itself.
        Raises:
            BufferError: it is wanted elsewhere, or as a copy.
            ValueError: `stream` is 0, which the protocol does not allow on CUDA.
        """
        if copy or dl_device not in (None, self.__dlpack_device__()):
            raise BufferError(
                f"an array on cuda:{self.device_index} is exported as it is: got copy={copy}, dl_device={dl_device}; "
                "copy it with the library that takes it"
            )
        if stream == 0:
            raise ValueError("stream is 0, which DLPack does not allow on CUDA; 1 is the legacy default stream")
        if stream != NO_ORDER:
            self.hold(LEGACY_STREAM if stream is None else stream)
        with current_context(primary_context(self.device_index)):
            return export_dlpack(
                self.address, self.shape, self.dtype, nbytes=self.nbytes, owner=self, max_version=max_version
            )


Array = NDArray[Any] | DeviceArray
