"""Named arrays in blocks of memory that are allocated once, and the loop's state in one of them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from restyle_deploy.bundle import Bundle
from restyle_deploy.device_array import Array, DeviceArray
from restyle_deploy.engines import GraphRecord
from restyle_deploy.runtime.base import Block, Device
from restyle_deploy.tensors import TensorSpec

# Of arrays in a block: what vector loads and copy engines of GPUs like best.
ALIGNMENT = 256

# The loop's arrays beside those that its graphs name.
LATENTS = ("latent_even", "latent_odd")
AVERAGE_LATENT, AVERAGE_CURRENT = "average_latent", "average_current"


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where an array lies in a block.

    Attributes:
        offset: bytes from the block's begin.
        shape: of one row; the array has a leading axis of rows.
        dtype: NumPy's name.
    """

    offset: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def aligned(nbytes: int) -> int:
    """Return the next multiple of `ALIGNMENT`."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def place_arrays(shapes: Mapping[str, tuple[int, ...]], rows: int) -> tuple[dict[str, Place], int]:
    """Lay float32 arrays of so many rows one after the other.

    Args:
        shapes: of a row, by name.
        rows: of each array.
    Returns:
        The places by name, and the bytes of all.
    """
    places, offset = {}, 0
    for name, shape in shapes.items():
        places[name] = Place(offset=offset, shape=shape, dtype="float32")
        offset += aligned(rows * places[name].row_bytes)
    return places, offset


class Arrays:
    """Named arrays in a block that somebody else owns."""

    def __init__(self, device: Device, block: Block, places: Mapping[str, Place], *, begin: int = 0) -> None:
        """Place them `begin` bytes into the block."""
        self._device, self._block, self._places, self._begin = device, block, places, begin
        self._parts: dict[tuple[str, int, int], Array] = {}  # a call asks for a dozen, the same as the last one

    def part(self, name: str, first: int, last: int) -> Array:
        """Return the rows `first` to `last` (exclusive) of an array: a view that owns nothing."""
        key = (name, first, last)
        if key not in self._parts:
            place = self._places[name]
            offset = self._begin + place.offset + first * place.row_bytes
            self._parts[key] = self._device.array(self._block, offset, (last - first, *place.shape), place.dtype)
        return self._parts[key]

    def close(self) -> None:
        """Let go of the views, which keep the host's memory; safe to call twice."""
        self._parts.clear()

    def shaped(self, name: str, leading: tuple[int, ...], dtype: str, shape: tuple[int, ...]) -> Array:
        """Return the begin of an array in another shape or dtype, which must not be larger."""
        offset = self._begin + self._places[name].offset
        return self._device.array(self._block, offset, (*leading, *shape), dtype)


class State:
    """What all loops of a session work on, for up to so many images: a loop of fewer uses the first rows.

    Two latents take turns. Beside the inputs and outputs that graphs name there is the bundle's average, from which the
    loop starts, once per image.
    """

    def __init__(self, device: Device, block: Block, places: Mapping[str, Place], bundle: Bundle) -> None:
        """Take a block and put the average into its first rows; waits for that.

        Args:
            device, block: where it lies, from the block's begin.
            places: from `place_arrays` with `state_shapes`.
            bundle: gives the average.
        """
        self.arrays = Arrays(device, block, places)
        self._device, self._places = device, places
        self._average_rows = 1
        for name, values in ((AVERAGE_LATENT, bundle.latent_avg), (AVERAGE_CURRENT, bundle.average_image)):
            _put(device, self.arrays.part(name, 0, 1), values[None])

    def part(self, name: str, first: int, last: int) -> Array:
        """Return images `first` to `last` (exclusive) of an array: a view."""
        return self.arrays.part(name, first, last)

    def close(self) -> None:
        """Let go of the views; safe to call twice."""
        self.arrays.close()

    @property
    def names(self) -> frozenset[str]:
        """Names of its arrays."""
        return frozenset(self._places)

    def set_average(self, batch: int) -> None:
        """Enqueue the copy of the average to where a loop of so many images starts."""
        averages = {LATENTS[0]: AVERAGE_LATENT, "current": AVERAGE_CURRENT}
        for row in range(self._average_rows, batch):
            for average in averages.values():
                self._device.copy(self.part(average, row, row + 1), self.part(average, 0, 1))
        self._average_rows = max(self._average_rows, batch)
        for name, average in averages.items():
            self._device.copy(self.part(name, 0, batch), self.part(average, 0, batch))


def state_shapes(bundle: Bundle, graphs: Mapping[str, GraphRecord]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of one image's arrays, by name.

    Args:
        bundle: an opened bundle.
        graphs: those that are loaded, by role.
    """
    records = (*bundle.graphs.values(), *graphs.values())
    specs = {spec.name: spec for record in records for spec in record.inputs + record.outputs}
    shapes = {name: _row_shape(spec) for name, spec in specs.items() if name not in ("latent", "latent_out")}
    latent = _row_shape(specs["latent"])
    return {
        **shapes,
        **dict.fromkeys(LATENTS, latent),
        AVERAGE_LATENT: latent,
        AVERAGE_CURRENT: shapes["current"],
    }


def part_of(array: Array, first: int, last: int) -> Array:
    """Return rows `first` to `last` (exclusive) of an array: a view."""
    return array.part(first, last) if isinstance(array, DeviceArray) else array[first:last]


def _row_shape(spec: TensorSpec) -> tuple[int, ...]:
    return spec.concrete_shape(1)[1:]


def _put(device: Device, destination: Array, values: NDArray[np.float32]) -> None:
    staging = device.allocate_host(values.nbytes)
    try:
        staged = device.array(staging, 0, values.shape, "float32")
        assert isinstance(staged, np.ndarray)
        np.copyto(staged, values)
        device.copy(destination, staged)
        device.synchronize()
    finally:
        staging.close()
