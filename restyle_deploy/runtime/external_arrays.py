"""Arrays of callers on a GPU (torch's, CuPy's, Numba's, PyCUDA's) as views, without a copy and in the right order."""

from __future__ import annotations

import math
import operator
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from restyle_deploy.device_array import DLPACK_CUDA, DeviceArray
from restyle_deploy.errors import DeviceError
from restyle_deploy.runtime.device import check_stream, import_dlpack, order_streams, place_of, primary_context

DLPACK_CUDA_MANAGED = 13


def view_external(source: Any, *, device_index: int, stream: int) -> DeviceArray | None:
    """Return a view of an array on a device, which is kept alive; None for what is none on a GPU.

    DLPack comes first, as it orders the streams for every library: torch's `__cuda_array_interface__` names none.

    Args:
        source: anything.
        device_index: of the device, whose context is current.
        stream: that the array will be read on; it is made to wait for the work that fills the array.
    Raises:
        ValueError: the array is on another device, or in memory of another context on it.
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
    interface = _interface_of(source)
    if interface is None:
        return None
    return _view_by_interface(source, interface, device_index=device_index, stream=stream)


def _view_by_dlpack(source: Any, *, device_index: int, stream: int) -> DeviceArray:
    try:
        with _torch_on(source, device_index):
            view = import_dlpack(source, stream=stream)
    except (BufferError, RuntimeError, NotImplementedError, TypeError) as error:  # a gradient, an element type
        raise TypeError(f"images: a {type(source).__name__} that cannot be read by DLPack: {error}") from error
    _check_contiguous(source, view.shape, view.strides)
    return DeviceArray(
        address=view.address,
        shape=view.shape,
        dtype=view.dtype,
        device_index=device_index,
        stream=stream,
        owner=(view.owner, source),
    )


def _torch_on(source: Any, device_index: int) -> AbstractContextManager[Any]:
    """Return a scope in which torch, where the source is its tensor, takes the array's device for the current one.

    It remembers a device of its own for each thread, whatever context is current, and exports from no other.
    """
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(source, torch.Tensor):
        return nullcontext()
    scope: AbstractContextManager[Any] = torch.cuda.device(device_index)
    return scope


def _view_by_interface(source: Any, interface: Any, *, device_index: int, stream: int) -> DeviceArray:
    fields = _read_interface(source, interface)
    if fields.producer == 0:
        raise ValueError("images: its __cuda_array_interface__ names stream 0, which the protocol does not allow")
    if math.prod(fields.shape):
        _check_place(fields.address, device_index)
    _check_contiguous(
        source, fields.shape, fields.strides and [stride // fields.dtype.itemsize for stride in fields.strides]
    )
    if fields.producer is not None:
        context = primary_context(device_index)
        check_stream(fields.producer, context=context)
        order_streams(fields.producer, stream, context=context)
    return DeviceArray(
        address=fields.address,
        shape=fields.shape,
        dtype=fields.dtype,
        device_index=device_index,
        stream=stream,
        owner=source,
    )


@dataclass(frozen=True, kw_only=True)
class _Interface:
    """What a `__cuda_array_interface__` tells: strides in bytes, None for C order; the producer's stream or None."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    address: int
    strides: tuple[int, ...] | None
    producer: int | None


def _read_interface(source: Any, interface: Any) -> _Interface:
    """Return the fields of an interface; raise `TypeError` where it does not keep to the protocol."""
    try:
        shape = tuple(operator.index(size) for size in interface["shape"])
        dtype = np.dtype(str(interface["typestr"]))  # without `str`, None would be float64
        address = operator.index(interface["data"][0])
        strides = interface.get("strides")
        strides = None if strides is None else tuple(operator.index(stride) for stride in strides)
        producer, mask = interface.get("stream"), interface.get("mask")
        producer = None if producer is None else operator.index(producer)
        if min(shape, default=0) < 0 or not 0 <= address < 2**64 or len(strides or shape) != len(shape):
            raise ValueError(f"shape {shape}, strides {strides}, address {address}")
        if dtype.itemsize == 0 or dtype.hasobject:
            raise ValueError(f"typestr {interface['typestr']!r}")
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise TypeError(
            f"images: the __cuda_array_interface__ of a {type(source).__name__} is not as the protocol has it: "
            f"{type(error).__name__}: {error}"
        ) from error
    if mask is not None:
        raise TypeError(f"images: a masked {type(source).__name__}; pass its data alone")
    return _Interface(shape=shape, dtype=dtype, address=address, strides=strides, producer=producer)


def _interface_of(source: Any) -> Any:
    """Return a caller's `__cuda_array_interface__`; None where it has none."""
    try:
        return getattr(source, "__cuda_array_interface__", None)
    except Exception as error:  # of whoever wrote it: torch's refuses tensors with a gradient
        raise TypeError(
            f"images: the __cuda_array_interface__ of a {type(source).__name__} cannot be read: "
            f"{type(error).__name__}: {error}"
        ) from error


def _check_place(address: int, device_index: int) -> None:
    """Raise `ValueError` unless an address is in memory that the session's kernels can reach."""
    try:
        place = place_of(address)
    except DeviceError as error:
        raise ValueError(f"images: the address {address:#x} is not in a GPU's memory ({error})") from error
    _check_device(place.device_index, device_index)
    if place.context not in (None, 0, primary_context(device_index)):
        raise ValueError(
            f"images: the address {address:#x} was allocated in a CUDA context of its own, whose memory the session "
            f"cannot reach; work in the one that libraries share on cuda:{device_index}: with PyCUDA, "
            "import pycuda.autoprimaryctx in place of pycuda.autoinit"
        )


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
