"""Shapes and dtypes of what crosses a graph's border."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from restyle_deploy.device_array import Array, DeviceArray
from restyle_deploy.errors import ShapeError

BATCH = "N"


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """Name, dtype and shape of a graph's input or output.

    Attributes:
        name: as in the graph.
        dtype: NumPy's name of the element type.
        shape: sizes; a string (`"N"`) stands for a free one.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def concrete_shape(self, batch: int) -> tuple[int, ...]:
        """Return the shape with every free size set to `batch`."""
        return tuple(batch if isinstance(size, str) else size for size in self.shape)

    def check(self, array: Array, batch: int) -> None:
        """Raise `ShapeError` unless `array` has this dtype, this shape at `batch`, and is C-contiguous."""
        expected = self.concrete_shape(batch)
        is_contiguous = isinstance(array, DeviceArray) or array.flags.c_contiguous
        if array.shape != expected or array.dtype != np.dtype(self.dtype) or not is_contiguous:
            layout = "contiguous" if is_contiguous else "strided"
            raise ShapeError(
                f"{self.name}: got {layout} {array.dtype} {list(array.shape)}, "
                f"expected contiguous {self.dtype} {list(expected)}"
            )

    def allocate(self, batch: int, *, leading: tuple[int, ...] = ()) -> NDArray[Any]:
        """Return a zeroed array of this dtype and shape after the `leading` sizes, owned by the caller."""
        return np.zeros((*leading, *self.concrete_shape(batch)), self.dtype)
