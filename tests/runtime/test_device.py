"""A GPU as a `Device`, through the real cuda-core and cuda-bindings on a stand-in for the driver."""

from __future__ import annotations

import sys
from collections import Counter

import pytest

from restyle_deploy.errors import BackendUnavailableError
from restyle_deploy.ops import compiler
from restyle_deploy.ops.kernels.image_launches import launch_pixels_from_images, launch_prepare_images
from restyle_deploy.ops.kernels.launches import Launch
from restyle_deploy.runtime import device as device_module
from restyle_deploy.runtime.cuda_device import open_device
from tests.backends.host_driver.stand_in import HostDriver
from tests.runtime.device_scripts import COPIES, FOREIGN_CAPTURE, run

pytest.importorskip("cuda.core", reason="cuda-core is not installed")


def test_copies_are_done_when_an_event_is_reached(host_driver: HostDriver) -> None:
    script = """
there_and_back()
event = device.record()
print(result, event.is_done())
event.wait()
print(result, event.is_done())
print(device.name, device.is_host, isinstance(source, np.ndarray), middle.device_index, middle.stream == device.stream)
"""
    lines = run(host_driver, COPIES, script).output.splitlines()
    assert lines == ["[nan nan nan nan] False", "[1. 2. 3. 4.] True", "cuda:0 False True 0 True"]


def test_views_of_a_block(host_driver: HostDriver) -> None:
    script = """
block = device.allocate(4096)
whole, part = device.array(block, 0, (8,), "float32"), device.array(block, 256, (2, 3), "uint8")
print(part.address - whole.address, part.shape, part.dtype, block.address % 256)
pinned = device.allocate_host(1024)
device.array(pinned, 512, (2, 2), "float32")[:] = 1
print(device.array(pinned, 512, (4,), "float32"))
for offset, shape in ((4092, (2,)), (-4, (1,))):
    try:
        device.array(block, offset, shape, "float32")
    except AssertionError as error:
        print(error)
block.close()
try:
    device.array(block, 0, (8,), "float32")
except AssertionError as error:
    print(error)
"""
    assert run(host_driver, COPIES, script).output.splitlines() == [
        "256 (2, 3) uint8 0",
        "[1. 1. 1. 1.]",
        "8 bytes at 4092 of a block of 4096",
        "4 bytes at -4 of a block of 4096",
        "the block is closed",
    ]


def test_too_much_memory_is_refused_with_what_is_free(host_driver: HostDriver) -> None:
    script = """
block = device.allocate(64 << 20)
try:
    device.allocate(192 << 20)
except DeviceError as error:
    print(error)
block.close()
block.close()
device.allocate(192 << 20).close()
"""
    done = run(host_driver, COPIES, script, memory_bytes=(192 << 20) + 1024)
    assert done.output == (
        "cuda:0: 0.19 GiB asked for, 0.13 of 0.19 GiB are free (cuMemAlloc: CUDA_ERROR_OUT_OF_MEMORY); "
        "a smaller max_batch needs less\n"
    )


def test_200_times_open_run_close_gives_all_back(host_driver: HostDriver) -> None:
    script = """
import gc
device.close()
del middle, source, result

def free():
    driver.cuCtxPushCurrent(driver.cuDevicePrimaryCtxRetain(0)[1])
    value = driver.cuMemGetInfo()[1]
    driver.cuCtxPopCurrent()
    return value

def once():
    device = open_device("cuda:0")
    device.reserve_scratch(1 << 20)
    device.scratch_address()
    blocks = [device.allocate(1 << 16), device.allocate_host(1 << 16)]
    on_device, pinned = (device.array(block, 0, (64,), "float32") for block in blocks)
    events = []
    def enqueue():
        device.copy(on_device, pinned)
        events.append(device.record(timing=True))
    replay = device.capture(enqueue)
    replay()
    device.external_array(on_device).__dlpack__(stream=1)
    device.record().wait()
    replay.close()
    for block in blocks:
        block.close()
    device.close()
    device.close()

once()
gc.collect()
before = free()
for _ in range(200):
    once()
gc.collect()
print(before - free())
"""
    done = run(host_driver, COPIES, script)
    assert done.output == "0\n"
    counts = Counter(call.name for call in done.calls)
    # Three blocks of START are left to it.
    assert counts["cuMemAlloc"] - counts["cuMemFree"] == 1
    assert counts["cuMemAllocHost"] - counts["cuMemFreeHost"] == 2
    assert counts["cuGraphInstantiateWithFlags"] == counts["cuGraphExecDestroy"] == counts["cuGraphDestroy"] == 201
    assert counts["cuEventCreate"] == counts["cuEventDestroy"] >= 3 * 201
    assert counts["cuStreamCreateWithPriority"] == 2  # that of START, and one with which all others took turns
    assert counts["cuStreamDestroy"] == 0


def test_stream_is_its_devices_alone_until_that_is_gone(host_driver: HostDriver) -> None:
    script = """
first, second = open_device("cuda:0"), open_device("cuda:0")
kept, stream = second.array(second.allocate(256), 0, (64,), "float32"), second.stream
second.close()
del second
third = open_device("cuda:0")
print(len({device.stream, first.stream, stream, third.stream}))
del kept
print(open_device("cuda:0").stream == stream)
"""
    assert run(host_driver, COPIES, script).output == "4\nTrue\n"


def test_any_thread_may_call_and_keeps_its_own_context(host_driver: HostDriver) -> None:
    script = """
def work():
    print(int(driver.cuCtxGetCurrent()[1]))
    there_and_back()
    event = device.record()
    device.capture(there_and_back)()
    event.wait()
    array(8, pinned=False)
    middle.__dlpack__(stream=1)
    print(result, event.is_done(), int(driver.cuCtxGetCurrent()[1]))
thread = threading.Thread(target=work)
thread.start()
thread.join()
"""
    assert run(host_driver, COPIES, script).output.splitlines() == ["0", "[1. 2. 3. 4.] True 0"]


@pytest.mark.parametrize("own", [False, True])
def test_captures_of_others_hold_up_nothing(host_driver: HostDriver, own: bool) -> None:
    """ONNX Runtime and torch capture in the mode that forbids all threads to wait, to ask, to allocate and to free."""
    script = f"""
def work():
    there_and_back()
    event = device.record(timing=True)
    print(event.is_done())
    event.wait()
    print(result, event.elapsed_ms(event))
    blocks = [device.allocate(1024), device.allocate_host(1024)]
    replay = device.capture(there_and_back)
    replay()
    replay.close()
    for block in blocks:
        block.close()
    device.synchronize()
    from restyle_deploy.runtime.cuda_device import open_device
    open_device("cuda:0").close()
    print(driver.cuStreamSynchronize(device.stream)[0].name)  # a call of someone else's, as before

if {own}:
    driver.cuStreamBeginCapture(other.handle, driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
    work()
    print(driver.cuStreamEndCapture(other.handle)[0].name)
else:
    thread.start()
    begun.wait(60)
    work()
    done.set()
    thread.join()
"""
    assert run(host_driver, COPIES + FOREIGN_CAPTURE, script).output.splitlines() == [
        "False",
        "[1. 2. 3. 4.] 0.0",
        "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED",
        "CUDA_SUCCESS",
    ]


def test_block_that_comes_when_a_capture_has_just_ended_goes_with_the_device(host_driver: HostDriver) -> None:
    script = """
block = device.allocate(1024)
device._is_capturing = True  # as another thread has found it
block.close()
device._is_capturing = False
driver.cuCtxGetDevice()
device.close()
"""
    done = run(host_driver, COPIES, script)
    names = [call.name for call in done.calls]
    assert names.count("cuMemFree") == 1
    assert names.index("cuMemFree") > names.index("cuCtxGetDevice")


def test_streams_that_are_none_are_named(host_driver: HostDriver) -> None:
    script = """
from cuda.core import Device
Device(0).set_current()
other = Device(0).create_stream()
for stream in (0, 1, 2, int(other.handle)):
    device.check_stream(stream)
    device.record().hold(stream)
driver.cuCtxCreate(None, 0, 0)
foreign = int(driver.cuStreamCreateWithPriority(1, 0)[1])
driver.cuCtxPopCurrent()
event = device.record()
for check in (lambda: device.check_stream(12345), lambda: event.hold(12345), lambda: device.check_stream(foreign)):
    try:
        check()
    except ValueError as error:
        print(str(error).replace(hex(foreign), "FOREIGN"))
"""
    unknown = (
        "stream: 0x3039 is no stream of the driver (cuStreamGetCtx: CUDA_ERROR_INVALID_HANDLE); pass its handle, "
        "with torch torch.cuda.current_stream().cuda_stream"
    )
    assert run(host_driver, COPIES, script).output.splitlines() == [
        unknown,
        unknown,
        "stream: FOREIGN is of another GPU than the session's, or of another context than the one that libraries share "
        "on it; make the stream on the session's GPU, with PyCUDA after import pycuda.autoprimaryctx",
    ]


def test_what_cuda_core_raises_is_a_device_error(host_driver: HostDriver) -> None:
    script = """
import cuda.core
from cuda.core._utils.cuda_utils import CUDAError

class Refused:
    def __init__(self, index):
        pass
    def set_current(self):
        pass
    def create_stream(self):
        raise CUDAError("CUDA_ERROR_OUT_OF_MEMORY: The API call failed\\nmore")

kept, cuda.core.Device = cuda.core.Device, Refused
try:
    open_device("cuda:0")
except DeviceError as error:
    print(error, "|", type(error.__cause__).__name__)
cuda.core.Device = kept
"""
    assert run(host_driver, COPIES, script).output == (
        "cuda:0: the driver refuses: CUDA_ERROR_OUT_OF_MEMORY: The API call failed; where memory lacks, a smaller "
        "max_batch needs less; after a failed launch, begin a new process | CUDAError\n"
    )


def test_streams_wait_for_each_other(host_driver: HostDriver) -> None:
    script = """
from cuda.core import Device
Device(0).set_current()
other = Device(0).create_stream()
handle, back = int(other.handle), array(4, pinned=True)
device.copy(middle, source)
device.hold_stream(handle)
driver.cuMemcpyAsync(back.ctypes.data, middle.address, 16, handle)
other.sync()
print(back)
source[:] = 9
driver.cuMemcpyAsync(middle.address, source.ctypes.data, 16, handle)
device.wait_for_stream(handle)
device.copy(result, middle)
device.synchronize()
print(result)
try:
    device.wait_for_stream(12345)
except DeviceError as error:
    print(error)
"""
    done = run(host_driver, COPIES, script)
    assert done.output.splitlines() == [
        "[1. 2. 3. 4.]",
        "[9. 9. 9. 9.]",
        "cuEventRecord: CUDA_ERROR_INVALID_HANDLE",
    ]


def test_working_memory_is_the_largest_that_was_asked_for(host_driver: HostDriver) -> None:
    script = """
print(device.scratch_address())
for nbytes in (100, 5000, 300):
    device.reserve_scratch(nbytes)
address = device.scratch_address()
print(address != 0, device.scratch_address() == address)
device.reserve_scratch(5000)
try:
    device.reserve_scratch(5001)
except DeviceError as error:
    print(error)
device.close()
for call in (lambda: device.allocate(4), lambda: device.allocate_host(4), lambda: device.capture(print)):
    try:
        call()
    except ValueError as error:
        print(error)
"""
    done = run(host_driver, COPIES, script)
    assert done.output.splitlines() == [
        "0",
        "True True",
        "cuda:0: 5001 bytes of working memory asked for, and the graphs are bound to 5000; "
        "all graphs of a session are loaded before the first one is bound",
        *["the device cuda:0 is closed"] * 3,
    ]
    assert [call.arguments for call in done.named("cuMemAlloc")] == [("16",), ("5000",)]
    assert len(done.named("cuMemFree")) == 1


IMAGE_BLOCK = """
block = device.allocate(1 << 20)
images, target = device.array(block, 0, (2, 30, 20, 3), "uint8"), device.array(block, 8192, (2, 3, 16, 16), "float32")
pixels = device.array(block, 65536, (2, 16, 16, 3), "uint8")
print(device.stream, block.address)
"""


@pytest.mark.parametrize(
    ("script", "launch", "offsets", "parameters"),
    [
        (
            "device.prepare_images(images, target)",
            launch_prepare_images((2, 30, 20, 3), (2, 3, 16, 16), pillow=12),
            (0, 8192),
            (8, 4, 4, 4, 4, 8),
        ),
        (
            "device.pixels_from_images(target, pixels)",
            launch_pixels_from_images((2, 3, 16, 16)),
            (8192, 65536),
            (8, 4, 4, 8),
        ),
    ],
    ids=["prepare", "pixels"],
)
def test_image_kernels_are_launched_on_the_stream(
    host_driver: HostDriver, script: str, launch: Launch, offsets: tuple[int, int], parameters: tuple[int, ...]
) -> None:
    try:
        compiler.check_available()
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    done = host_driver.run(COPIES + IMAGE_BLOCK + script, parameters=parameters)
    stream, address = map(int, done.output.split())
    (call,) = done.named("cuLaunchKernelEx")
    assert launch.expression.partition("<")[0] in call.arguments[0]
    assert tuple(map(int, call.arguments[1:9])) == (*launch.grid, *launch.block, 0, stream)
    source, target = (address + offset for offset in offsets)
    assert list(map(int, call.arguments[9].split())) == [source, *launch.scalars, target]


def test_float_images_are_copied(host_driver: HostDriver) -> None:
    done = run(
        host_driver,
        COPIES,
        IMAGE_BLOCK + "device.prepare_images(target, device.array(block, 0, (2, 3, 16, 16), 'float32'))",
    )
    assert [call.arguments for call in done.named("cuMemcpyAsync")] == [(str(2 * 3 * 16 * 16 * 4),)]


@pytest.mark.parametrize("name", ["gpu", "cuda", "cuda:", "cuda:-1", "CPU"])
def test_names_of_no_device(name: str) -> None:
    with pytest.raises(ValueError, match=f"unknown device '{name}', expected cpu, or cuda:0"):
        open_device(name)


def test_the_host_is_a_device() -> None:
    assert open_device("cpu").is_host


def test_a_gpu_that_is_not_there(host_driver: HostDriver) -> None:
    script = """
from restyle_deploy.errors import BackendUnavailableError
try:
    open_device("cuda:1")
except BackendUnavailableError as error:
    print(error)
"""
    assert run(host_driver, COPIES, script).output == "cuda:1: no such GPU, the driver has 1\n"


def test_a_missing_driver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_module, "driver_version", lambda: None)
    with pytest.raises(BackendUnavailableError, match="cuda:0: there is no NVIDIA driver on this machine"):
        open_device("cuda:0")


def test_missing_cuda_core_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    with pytest.raises(BackendUnavailableError, match=r"cuda-core.*pip install 'restyle-deploy\[cuda\]'"):
        open_device("cuda:0")
