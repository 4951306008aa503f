"""The host as a device, and arrays of other libraries in its memory."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from restyle_deploy import Session
from restyle_deploy.runtime.host_device import HostDevice, array_on_host
from restyle_deploy.runtime.images import normalize_images, resize_image, uint8_from_images
from restyle_deploy.runtime.opening import open_device
from restyle_deploy.runtime.targets import targets_from_images
from tests.fakes import create_session
from tests.pictures import picture


@pytest.fixture
def device() -> HostDevice:
    return HostDevice()


def test_arrays_are_views_of_blocks(device: HostDevice) -> None:
    block = device.allocate(64)
    whole, part = device.array(block, 0, (16,), "float32"), device.array(block, 8, (2, 3), "float32")
    part[:] = 1
    assert whole.tolist() == [0, 0, *[1] * 6, *[0] * 8]
    assert part.flags.c_contiguous
    block.close()
    block.close()
    assert part.sum() == 6  # the memory goes with the last array
    with pytest.raises(AssertionError, match="the block is closed"):
        device.array(block, 0, (1,), "float32")


# A part of the heap, with something behind it, is free, its pages given back: malloc would give it, and clear it.
UNTOUCHED = """
import ctypes
from pathlib import Path
import numpy as np
from restyle_deploy.runtime.host_device import HostDevice

def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

np.ones(31 * 2**20, np.uint8)  # from now on malloc takes blocks of up to this size from the heap
freed = [np.ones(2**20, np.uint8) for _ in range(300)]
kept = np.ones(2**20, np.uint8)
freed.clear()
if hasattr(ctypes.CDLL(None), "malloc_trim"):
    ctypes.CDLL(None).malloc_trim(0)
device = HostDevice()
before = resident_bytes()
block = device.allocate(2**28)
device.array(block, 2**27, (2**20,), "uint8")[:] = 1
print(resident_bytes() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="this system does not tell what is resident")
def test_memory_that_is_not_touched_is_not_there() -> None:
    """In a process of its own, whose heap is known."""
    done = subprocess.run([sys.executable, "-c", UNTOUCHED], capture_output=True, text=True, check=True)
    assert 2**20 <= int(done.stdout) < 2**25


def test_images_are_prepared_as_before_in_one_go(device: HostDevice) -> None:
    images = np.stack([picture(seed, 40, 50) for seed in range(3)])
    found = np.empty((3, 3, 32, 32), np.float32)
    device.prepare_images(images, found)
    np.testing.assert_array_equal(found, normalize_images(np.stack([resize_image(one, (32, 32)) for one in images])))
    np.testing.assert_array_equal(found, targets_from_images(images, create_session()[0].config))
    copy = np.empty_like(found)
    device.prepare_images(found, copy)
    np.testing.assert_array_equal(copy, found)


def test_pixels_are_those_that_upstream_saves(device: HostDevice) -> None:
    images = np.random.default_rng(0).uniform(-2, 2, (2, 3, 3, 8, 4)).astype(np.float32)
    pixels = np.empty((2, 3, 8, 4, 3), np.uint8)
    device.pixels_from_images(images, pixels)
    np.testing.assert_array_equal(pixels, uint8_from_images(images))
    images.fill(np.nan)
    device.pixels_from_images(images, pixels)  # any value, and no warning


def test_work_is_done_when_a_call_returns(device: HostDevice) -> None:
    done: list[int] = []
    replay = device.capture(lambda: done.append(1))
    assert not done
    replay()
    replay()
    assert done == [1, 1]
    replay.close()
    replay.close()
    with pytest.raises(AssertionError, match="the replay is closed"):
        replay()
    first, second = device.record(timing=True), device.record(timing=True)
    assert first.is_done()
    first.wait()
    device.synchronize()
    device.close()
    assert second.elapsed_ms(first) >= 0


def test_host_has_no_streams(device: HostDevice) -> None:
    for call in (device.wait_for_stream, device.hold_stream, device.record().hold):
        with pytest.raises(ValueError, match="the host has no CUDA streams"):
            call(0)


def test_host_has_no_scratch(device: HostDevice) -> None:
    device.reserve_scratch(100)
    assert device.scratch_address() == 0


def test_open_device_opens_the_host() -> None:
    assert isinstance(open_device("cpu"), HostDevice)


# Arrays of other libraries


class OnDevice:
    """Speaks DLPack, and is nowhere."""

    def __init__(self, kind: int) -> None:
        self._kind = kind

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._kind, 1

    def __dlpack__(self, **_: Any) -> Any:
        raise BufferError("it is no array")


class CudaArray:
    __cuda_array_interface__: dict[str, Any] = {}


class UnreadableCudaArray:
    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        raise RuntimeError("no such thing")


def test_tensors_of_the_host_are_read_in_place() -> None:
    torch = pytest.importorskip("torch")
    tensor = torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)
    view = array_on_host(tensor, "cpu")
    assert view is not None
    assert view.ctypes.data == tensor.data_ptr()
    session, *_ = create_session()
    expected = session.invert(tensor.numpy().copy(), steps=2)
    np.testing.assert_array_equal(session.invert(tensor, steps=2).latents, expected.latents)
    pixels = torch.from_numpy(picture(0)[None])
    np.testing.assert_array_equal(session.invert(pixels).latents, session.invert(pixels.numpy()).latents)


def test_tensor_that_cannot_be_read_is_refused() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match="images: got a Tensor that NumPy cannot read"):
        create_session()[0].invert(torch.zeros((1, 3, 32, 32), requires_grad=True))


@pytest.mark.parametrize("kind", [1, 3, 11])
def test_memory_that_a_gpu_library_has_pinned_is_the_hosts(kind: int) -> None:
    class Pinned(OnDevice):
        def __dlpack__(self, **options: Any) -> Any:
            return array.__dlpack__(**options)

    array = picture(0)[None]
    view = array_on_host(Pinned(kind), "cpu")
    assert view is not None
    assert view.ctypes.data == array.ctypes.data


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (OnDevice(2), ValueError, "device 1 of kind 2 in DLPack's count, the session is on cpu; copy it to the host"),
        (OnDevice(1), TypeError, "got a OnDevice that NumPy cannot read: it is no array"),
        (CudaArray(), ValueError, "an array on a GPU, the session is on cpu; copy it to the host"),
        (UnreadableCudaArray(), ValueError, "an array on a GPU, the session is on cpu; copy it to the host"),
        (object(), TypeError, "images: got object, expected a NumPy array"),
    ],
)
def test_arrays_elsewhere_are_refused(images: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        create_session()[0].invert(images)


def test_interface_that_cannot_be_read_is_the_cause() -> None:
    with pytest.raises(ValueError, match="an array on a GPU") as refusal:
        array_on_host(UnreadableCudaArray(), "cpu")
    assert str(refusal.value.__cause__) == "no such thing"
    with pytest.raises(ValueError, match="an array on a GPU") as refusal:
        array_on_host(CudaArray(), "cpu")
    assert refusal.value.__cause__ is None


def test_opening_and_closing_many_times_leaves_nothing(toy_bundle: Path) -> None:
    """Sessions of the host give their memory back: what stays is less than one of them has."""
    import tracemalloc

    def open_and_run() -> None:
        with Session.open(toy_bundle, threads=1) as session:
            session.invert(picture(0)[None], steps=2, every_step=True)

    open_and_run()
    tracemalloc.start()
    try:
        for _ in range(20):
            open_and_run()
        left = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert left < 200_000
