"""Arrays of callers on a GPU (torch's, CuPy's, Numba's, PyCUDA's) as views, without a copy and in the right order."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from restyle_deploy.cuda_driver import call, driver, order_streams, primary_context
from restyle_deploy.device_array import DLPACK_CUDA, DeviceArray
from restyle_deploy.errors import DeviceError

DLPACK_CUDA_MANAGED = 13


def view_external(source: Any, *, device_index: int, stream: int) -> DeviceArray | None:
    """Return a view of an array on a device, which is kept alive; None for what is none on a GPU.

    DLPack comes first, as it orders the streams for every library: torch's `__cuda_array_interface__` names none.

    Args:
        source: anything.
        device_index: of the device, whose context is current.
        stream: that the array will be read on; it is made to wait for the work that fills the array.
    Raises:
        ValueError: the array is on another device.
        TypeError: it is not contiguous, or of a type that NumPy has not, or cannot be exported.
    """
    if isinstance(source, DeviceArray):
        _check_device(source.device_index, device_index)
        source.hold(stream)
        return source
    if hasattr(source, "__dlpack__") and hasattr(source, "__dlpack_device__"):
        kind, index = (int(value) for value in source.__dlpack_device__())
        if kind not in (DLPACK_CUDA, DLPACK_CUDA_MANAGED):
            return None
        if kind == DLPACK_CUDA:
            _check_device(index, device_index)
        return _view_by_dlpack(source, device_index=device_index, stream=stream)
    interface = getattr(source, "__cuda_array_interface__", None)
    if interface is None:
        return None
    return _view_by_interface(source, interface, device_index=device_index, stream=stream)


def _view_by_dlpack(source: Any, *, device_index: int, stream: int) -> DeviceArray:
    from cuda.core.utils import StridedMemoryView

    try:
        view = StridedMemoryView.from_dlpack(source, stream_ptr=stream)
        shape, strides, dtype = tuple(view.shape), view.strides, view.dtype
    except (BufferError, RuntimeError, NotImplementedError, TypeError) as error:  # a gradient, an element type
        raise TypeError(f"images: a {type(source).__name__} that cannot be read by DLPack: {error}") from error
    dtype = np.dtype(dtype)
    _check_contiguous(source, shape, strides)
    return DeviceArray(
        address=int(view.ptr),
        shape=shape,
        dtype=dtype,
        device_index=device_index,
        stream=stream,
        owner=(view, source),
    )


def _view_by_interface(source: Any, interface: Any, *, device_index: int, stream: int) -> DeviceArray:
    shape, dtype = tuple(map(int, interface["shape"])), np.dtype(interface["typestr"])
    address, producer = int(interface["data"][0]), interface.get("stream")
    if interface.get("mask") is not None:
        raise TypeError(f"images: a masked {type(source).__name__}; pass its data alone")
    if producer == 0:
        raise ValueError("images: its __cuda_array_interface__ names stream 0, which the protocol does not allow")
    if math.prod(shape):
        _check_device(_device_of(address), device_index)
    strides = interface.get("strides")
    _check_contiguous(source, shape, strides and [stride // dtype.itemsize for stride in strides])
    if producer is not None:
        order_streams(int(producer), stream, context=primary_context(device_index))
    return DeviceArray(
        address=address,
        shape=shape,
        dtype=dtype,
        device_index=device_index,
        stream=stream,
        owner=source,
    )


def _device_of(address: int) -> int:
    attribute = driver().CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
    try:
        return int(call("cuPointerGetAttribute", attribute, address))
    except DeviceError as error:
        raise ValueError(f"images: the address {address:#x} is not in a GPU's memory ({error})") from error


def _check_device(index: int, expected: int) -> None:
    if index != expected:
        raise ValueError(
            f"images: an array on cuda:{index}, the session is on cuda:{expected}; copy it there, or open a session "
            f"with device='cuda:{index}'"
        )


def _check_contiguous(source: Any, shape: tuple[int, ...], strides: Any) -> None:
    """Raise `TypeError` unless strides, in elements, are those of C order; None stands for them."""
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides or ()), strict=False):
        if size > 1 and stride != expected:
            raise TypeError(
                f"images: a strided {type(source).__name__} of shape {list(shape)}; make it contiguous, with torch by "
                ".contiguous()"
            )
        expected *= size
