"""Arrays of a device, as far as no device is needed; tests/runtime/test_device.py has their protocols."""

import numpy as np
import pytest

from restyle_deploy.device_array import DeviceArray

ARRAY = DeviceArray(address=4096, shape=(4, 3, 2), dtype=np.dtype("float32"), device_index=1, stream=7, owner="block")


def test_sizes() -> None:
    assert (ARRAY.ndim, ARRAY.nbytes, len(ARRAY)) == (3, 96, 4)


def test_a_part_is_a_view_of_rows_that_keeps_the_owner() -> None:
    part = ARRAY.part(1, 3)
    assert (part.address, part.shape, part.nbytes) == (4096 + 24, (2, 3, 2), 48)
    assert (part.dtype, part.device_index, part.stream, part.owner) == (ARRAY.dtype, 1, 7, "block")
    assert part.part(2, 2).shape == (0, 3, 2)


@pytest.mark.parametrize(("first", "last"), [(-1, 2), (2, 1), (0, 5)])
def test_rows_that_there_are_not(first: int, last: int) -> None:
    with pytest.raises(IndexError, match=rf"rows {first} to {last} of an array of shape \[4, 3, 2\]"):
        ARRAY.part(first, last)


def test_what_dlpack_does_not_allow_is_refused_before_cuda_is_asked() -> None:
    assert ARRAY.__dlpack_device__() == (2, 1)
    with pytest.raises(BufferError, match="copy it with the library that takes it"):
        ARRAY.__dlpack__(copy=True)
    with pytest.raises(BufferError, match=r"cuda:1 is exported as it is: .*dl_device=\(1, 0\)"):
        ARRAY.__dlpack__(dl_device=(1, 0))
    with pytest.raises(ValueError, match="stream is 0"):
        ARRAY.__dlpack__(stream=0)
