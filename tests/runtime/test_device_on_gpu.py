"""A GPU as a `Device`, on one: what the stand-in for the driver cannot tell, and arrays of torch and CuPy."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.utils.dlpack import from_dlpack

from restyle_deploy.device_array import Array, DeviceArray
from restyle_deploy.errors import DeviceError
from restyle_deploy.ops.compiler import check_available
from restyle_deploy.ops.torch_gpu import why_torch_sees_no_gpu
from restyle_deploy.runtime.base import Device
from restyle_deploy.runtime.cuda_device import open_device
from restyle_deploy.runtime.device import call, current_context, primary_context
from restyle_deploy.runtime.images import normalize_images, resize_image, uint8_from_images

pytestmark = pytest.mark.gpu
MEBIBYTE = 2**20


@pytest.fixture
def device() -> Iterator[Device]:
    if reason := why_torch_sees_no_gpu():
        pytest.skip(reason)
    check_available()
    opened = open_device("cuda:0")
    yield opened
    opened.close()


def upload(device: Device, values: NDArray[Any]) -> Array:
    """Return values in memory of the device that lives as long as the test's process."""
    staged = device.array(device.allocate_host(values.nbytes), 0, values.shape, values.dtype.name)
    assert isinstance(staged, np.ndarray)
    staged[:] = values
    array = device.array(device.allocate(values.nbytes), 0, values.shape, values.dtype.name)
    device.copy(array, staged)
    return array


def download(device: Device, array: Array) -> NDArray[Any]:
    staged = device.array(device.allocate_host(array.nbytes), 0, array.shape, array.dtype.name)
    assert isinstance(staged, np.ndarray)
    device.copy(staged, array)
    device.record().wait()
    return staged


def free_bytes() -> int:
    with current_context(primary_context(0)):
        free, _ = call("cuMemGetInfo")
    return int(free)


@pytest.mark.parametrize(
    ("source", "size"),
    [
        ((256, 256), (256, 256)),
        ((1024, 1024), (256, 256)),
        ((720, 1280), (256, 256)),
        ((1280, 720), (256, 256)),
        ((97, 131), (192, 256)),
        ((40_000, 9), (256, 8)),
    ],
)
def test_prepared_images_are_those_of_the_host_to_the_bit(
    device: Device, source: tuple[int, int], size: tuple[int, int]
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, *source, 3), dtype=np.uint8)
    target = upload(device, np.full((2, 3, *size), np.nan, np.float32))
    device.prepare_images(upload(device, images), target)
    got = download(device, target)
    np.testing.assert_array_equal(got, normalize_images(np.stack([resize_image(image, size) for image in images])))


@pytest.mark.parametrize("shape", [(2, 3, 64, 64), (3, 2, 3, 33, 17)])
def test_pixels_are_those_of_the_host(device: Device, shape: tuple[int, ...]) -> None:
    images = np.random.default_rng(0).uniform(-1.5, 1.5, shape).astype(np.float32)
    expected = uint8_from_images(images)
    pixels = upload(device, np.zeros_like(expected))
    device.pixels_from_images(upload(device, images), pixels)
    np.testing.assert_array_equal(download(device, pixels), expected)


def test_a_replay_does_the_work_again(device: Device) -> None:
    images = upload(device, np.full((1, 3, 64, 64), 1, np.float32))
    other = upload(device, np.full((1, 3, 64, 64), -1, np.float32))
    pixels = upload(device, np.zeros((1, 64, 64, 3), np.uint8))
    device.pixels_from_images(images, pixels)  # compiles
    marks = []

    def enqueue() -> None:
        marks.append(device.record(timing=True))
        device.pixels_from_images(images, pixels)
        marks.append(device.record(timing=True))

    replay = device.capture(enqueue)
    for source, value in ((other, 0), (upload(device, np.full((1, 3, 64, 64), 1, np.float32)), 255)):
        device.copy(images, source)
        replay()
        assert (download(device, pixels) == value).all()
        assert 0 < marks[1].elapsed_ms(marks[0]) < 1000
    replay.close()


def test_a_capture_that_waits_is_refused_and_work_goes_on(device: Device) -> None:
    with pytest.raises(DeviceError, match="cannot be recorded as a CUDA graph"):
        device.capture(device.synchronize)
    values = np.arange(12, dtype=np.float32)
    np.testing.assert_array_equal(download(device, upload(device, values)), values)


def test_torch_reads_results_and_gives_images(device: Device) -> None:
    values = np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(np.float32)
    array = upload(device, values)
    assert isinstance(array, DeviceArray)
    taken: torch.Tensor = from_dlpack(array)
    assert taken.data_ptr() == array.address
    np.testing.assert_array_equal(taken.cpu().numpy(), values)
    np.testing.assert_array_equal(torch.as_tensor(array, device="cuda:0").cpu().numpy(), values)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        given = taken * 2
        view = device.external_array(given)
    assert isinstance(view, DeviceArray)
    assert view.address == given.data_ptr()
    np.testing.assert_array_equal(download(device, view), values * 2)
    assert device.external_array(torch.zeros(3)) is None
    with pytest.raises(TypeError, match="contiguous"):
        device.external_array(given.transpose(2, 3))


def test_the_callers_own_device_stays_current(device: Device) -> None:
    before = torch.cuda.current_device()
    device.record().wait()
    assert torch.cuda.current_device() == before


def test_cupy_reads_results_and_gives_images(device: Device) -> None:
    cupy = pytest.importorskip("cupy")
    values = np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(np.float32)
    array = upload(device, values)
    assert isinstance(array, DeviceArray)
    for taken in (cupy.from_dlpack(array), cupy.asarray(array)):
        assert taken.data.ptr == array.address
        np.testing.assert_array_equal(cupy.asnumpy(taken), values)
    view = device.external_array(cupy.asarray(values) * 2)
    assert view is not None
    np.testing.assert_array_equal(download(device, view), values * 2)


def test_200_times_open_run_close_gives_all_back(device: Device) -> None:
    def once() -> None:
        opened = open_device("cuda:0")
        opened.reserve_scratch(64 * MEBIBYTE)
        opened.scratch_address()
        blocks = [opened.allocate(64 * MEBIBYTE), opened.allocate_host(MEBIBYTE)]
        on_device, pinned = (opened.array(block, 0, (1024,), "float32") for block in blocks)
        replay = opened.capture(lambda: opened.copy(on_device, pinned))
        replay()
        opened.record().wait()
        replay.close()
        for block in blocks:
            block.close()
        opened.close()

    once()
    gc.collect()
    before = free_bytes()
    for _ in range(200):
        once()
    gc.collect()
    assert before - free_bytes() < 2 * MEBIBYTE
