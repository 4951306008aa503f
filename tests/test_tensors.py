"""What is checked at a graph's border."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from restyle_deploy.errors import ShapeError
from restyle_deploy.tensors import BATCH, TensorSpec

SPEC = TensorSpec(name="target", dtype="float32", shape=(BATCH, 3, 4, 5))


def test_a_free_size_is_the_batch() -> None:
    assert SPEC.concrete_shape(7) == (7, 3, 4, 5)


def test_an_allocated_array_fits() -> None:
    array = SPEC.allocate(2)
    assert not array.any()
    SPEC.check(array, 2)


@pytest.mark.parametrize(
    ("array", "got"),
    [
        (np.zeros((2, 3, 4, 5), np.float64), r"contiguous float64 \[2, 3, 4, 5\]"),
        (np.zeros((1, 3, 4, 5), np.float32), r"contiguous float32 \[1, 3, 4, 5\]"),
        (np.zeros((2, 3, 4), np.float32), r"contiguous float32 \[2, 3, 4\]"),
        (np.zeros((2, 3, 5, 4), np.float32).swapaxes(2, 3), r"strided float32 \[2, 3, 4, 5\]"),
        (np.zeros((2, 3, 4, 5), ">f4"), r"contiguous >f4 \[2, 3, 4, 5\]"),
    ],
    ids=["dtype", "batch", "rank", "strides", "byte order"],
)
def test_an_array_that_does_not_fit_is_described(array: NDArray[Any], got: str) -> None:
    with pytest.raises(ShapeError, match=rf"target: got {got}, expected contiguous float32 \[2, 3, 4, 5\]"):
        SPEC.check(array, 2)
