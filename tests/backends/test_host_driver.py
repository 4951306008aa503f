"""The stand-in for the CUDA driver: what tests on machines without a GPU may rely on."""

import pytest

from tests.backends.host_driver.stand_in import Call, HostDriver

pytest.importorskip("cuda.core", reason="cuda-core is not installed")

START = """
import ctypes
import numpy as np
from cuda.core import Device, EventOptions, LaunchConfig, LegacyPinnedMemoryResource, launch

def pinned(count):
    buffer = LegacyPinnedMemoryResource().allocate(4 * count)
    return buffer, np.frombuffer((ctypes.c_char * buffer.size).from_address(int(buffer.handle)), np.float32)

device = Device(0)
device.set_current()
stream = device.create_stream()
source, values = pinned(4)
values[:] = [1, 2, 3, 4]
target, result = pinned(4)
"""


def test_device(host_driver: HostDriver) -> None:
    script = START + "print(device.name, *device.compute_capability, device.arch)"
    assert host_driver.run(script).output == "Host stand-in 8 9 89\n"
    assert host_driver.run(script, capability="12.0").output == "Host stand-in 12 0 120\n"


def test_copies_are_done_when_waited_for(host_driver: HostDriver) -> None:
    run = host_driver.run(
        START
        + """
from cuda.bindings import driver
buffer = device.allocate(16, stream=stream)
buffer.copy_from(source, stream=stream)
buffer.copy_to(target, stream=stream)
print(result)
stream.sync()
print(result)
buffer.fill(np.float32(5), stream=stream)
buffer.copy_to(target, stream=stream)
driver.cuCtxSynchronize()
print(result)
"""
    )
    assert run.output.splitlines() == ["[nan nan nan nan]", "[1. 2. 3. 4.]", "[5. 5. 5. 5.]"]
    assert [call.arguments for call in run.named("cuMemcpyAsync")] == [("16",)] * 3
    assert run.named("unsupported") == []


@pytest.mark.parametrize("value", ["np.uint8(7)", "np.float16(7)", "np.float32(7)"])
def test_fills(host_driver: HostDriver, value: str) -> None:
    script = f"""
value = {value}
buffer = device.allocate(16, stream=stream)
buffer.fill(value, stream=stream)
buffer.copy_to(target, stream=stream)
stream.sync()
print(np.array_equal(result.view(value.dtype), np.full(16 // value.itemsize, 7)))
"""
    assert host_driver.run(START + script).output == "True\n"


def test_copy_from_pageable_memory_is_done_before_it_returns(host_driver: HostDriver) -> None:
    script = """
from cuda.bindings import driver
buffer = device.allocate(16, stream=stream)
pageable = values.copy()
print(driver.cuMemcpyAsync(int(buffer.handle), pageable.ctypes.data, 16, stream.handle)[0].name)
pageable[:] = 0
buffer.copy_to(target, stream=stream)
stream.sync()
print(result)
"""
    assert host_driver.run(START + script).output.splitlines() == ["CUDA_SUCCESS", "[1. 2. 3. 4.]"]


def test_handles_of_others_are_known(host_driver: HostDriver) -> None:
    script = """
from cuda.core import Buffer, Stream
buffer = device.allocate(16, stream=stream)
borrowed = Buffer.from_handle(buffer.handle, 16)
print(borrowed.is_device_accessible, borrowed.is_host_accessible, borrowed.device_id)
same = Stream.from_handle(int(stream.handle))
print(same.is_nonblocking, same.priority, same.device.device_id)
"""
    assert host_driver.run(START + script).output.splitlines() == ["True False 0", "True 0 0"]


def test_memory_pool_of_ones_own(host_driver: HostDriver) -> None:
    script = """
from cuda.core import DeviceMemoryResource, DeviceMemoryResourceOptions
pool = DeviceMemoryResource(device, DeviceMemoryResourceOptions(max_size=4096))
print(pool.allocate(16, stream=stream).size)
pool.close()
"""
    run = host_driver.run(START + script)
    assert run.output == "16\n"
    assert len(run.named("cuMemPoolCreate")) == len(run.named("cuMemPoolDestroy")) == 1


TWO_STREAMS = (
    START
    + """
other = device.create_stream()
buffer = device.allocate(16, stream=stream)
buffer.copy_from(source, stream=stream)
event = stream.record()
if {waits}:
    other.wait(event)
buffer.copy_to(target, stream=other)
other.sync()
print(result)
"""
)


def test_missing_wait_between_streams_shows(host_driver: HostDriver) -> None:
    assert host_driver.run(TWO_STREAMS.format(waits=False)).output == "[nan nan nan nan]\n"
    assert host_driver.run(TWO_STREAMS.format(waits=True)).output == "[1. 2. 3. 4.]\n"


def test_events(host_driver: HostDriver) -> None:
    run = host_driver.run(
        START
        + """
timed = EventOptions(timing_enabled=True)
first = stream.record(options=timed)
target.copy_from(source, stream=stream)
second = stream.record(options=timed)
print(second.is_done, second.is_done, second.is_done, second.is_done)
second.sync()
print(second - first >= 0, result)
"""
    )
    assert run.output.splitlines() == ["False False False True", "True [1. 2. 3. 4.]"]


def test_memory_is_limited_and_comes_back(host_driver: HostDriver) -> None:
    run = host_driver.run(
        START
        + """
buffer = device.allocate(1000, stream=stream)
try:
    device.allocate(25, stream=stream)
except Exception as error:
    print(error)
buffer.close(stream)
device.allocate(1024, stream=stream)
""",
        memory_bytes=1024,
    )
    assert "CUDA_ERROR_OUT_OF_MEMORY" in run.output
    assert [call.arguments for call in run.named("cuMemAllocFromPoolAsync")] == [("1000",), ("25",), ("1024",)]


def test_copy_beyond_an_allocation_is_refused(host_driver: HostDriver) -> None:
    script = """
from cuda.bindings import driver
buffer = device.allocate(16, stream=stream)
print(driver.cuMemcpyAsync(int(buffer.handle) + 8, int(source.handle), 12, stream.handle)[0].name)
"""
    assert host_driver.run(START + script).output == "CUDA_ERROR_INVALID_VALUE\n"


def test_graph_does_its_work_at_each_launch(host_driver: HostDriver) -> None:
    run = host_driver.run(
        START
        + """
buffer = device.allocate(16, stream=stream)
builder = stream.create_graph_builder()
builder.begin_building()
buffer.copy_from(source, stream=builder)
buffer.copy_to(target, stream=builder)
try:
    stream.sync()
except Exception as error:
    print(str(error).split(":")[0])
graph = builder.end_building().complete()
stream.sync()
print(result)
for start in (1, 5):
    values[:] = np.arange(start, start + 4)
    graph.launch(stream)
    stream.sync()
    print(result)
"""
    )
    results = ["[nan nan nan nan]", "[1. 2. 3. 4.]", "[5. 6. 7. 8.]"]
    assert run.output.splitlines() == ["CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", *results]
    assert len(run.named("cuGraphLaunch")) == 2


def test_capture_spreads_over_events_and_allocates_nothing(host_driver: HostDriver) -> None:
    run = host_driver.run(
        START
        + """
other = device.create_stream()
buffer = device.allocate(16, stream=stream)
builder = stream.create_graph_builder()
builder.begin_building()
buffer.copy_from(source, stream=builder)
left, right = builder.split(2)
buffer.copy_to(target, stream=right)
try:
    device.allocate(16, stream=right)
except Exception as error:
    print(error)
graph = type(builder).join(left, right).end_building().complete()
stream.sync()
print(result)
graph.launch(stream)
stream.sync()
print(result)
"""
    )
    refusal, *results = run.output.splitlines()
    assert "capturing stream" in refusal
    assert results == ["[nan nan nan nan]", "[1. 2. 3. 4.]"]


def test_kernels_are_found_and_their_launches_recorded(host_driver: HostDriver) -> None:
    run = host_driver.run(
        START
        + """
from cuda.core import Program, ProgramOptions
source = 'extern "C" __global__ void twice(float* x) { x[threadIdx.x] *= 2; }'
code = Program(source, "c++", ProgramOptions(arch="sm_89")).compile("cubin")
kernel = code.get_kernel("twice")
launch(stream, LaunchConfig(grid=(3, 2), block=64, shmem_size=16), kernel, device.allocate(256, stream=stream))
try:
    code.get_kernel("thrice")
except Exception as error:
    print(error)
"""
    )
    assert "CUDA_ERROR_NOT_FOUND" in run.output
    (call,) = run.named("cuLaunchKernelEx")
    assert call.arguments[:8] == ("twice", "3", "2", "1", "64", "1", "1", "16")


def test_arguments_of_launches_are_recorded_by_their_sizes(host_driver: HostDriver) -> None:
    run = host_driver.run(
        START
        + """
from cuda.core import Program, ProgramOptions
source = 'extern "C" __global__ void add(float* x, int by) { x[threadIdx.x] += by; }'
kernel = Program(source, "c++", ProgramOptions(arch="sm_89")).compile("cubin").get_kernel("add")
launch(stream, LaunchConfig(grid=1, block=64), kernel, 1 << 40, np.int32(-1))
print(int(stream.handle))
""",
        parameters=(8, 4),
    )
    (call,) = run.named("cuLaunchKernelEx")
    assert call.arguments[-2:] == (run.output.strip(), f"{1 << 40} {2**32 - 1}")


def test_what_is_missing_is_named(host_driver: HostDriver) -> None:
    script = "from cuda.bindings import driver\nprint(driver.cuCtxResetPersistingL2Cache()[0].name)"
    run = host_driver.run(START + script)
    assert run.output == "CUDA_ERROR_NOT_SUPPORTED\n"
    assert run.named("unsupported") == [Call(name="unsupported", arguments=("cuCtxResetPersistingL2Cache",))]


def test_cuda_runtime_is_told_that_the_driver_is_not_genuine(host_driver: HostDriver) -> None:
    run = host_driver.run("from cuda.bindings import runtime\nprint(runtime.cudaGetDeviceCount()[0].name)")
    assert run.output == "cudaErrorSymbolNotFound\n"
    assert run.named("cuGetExportTable") != []


def test_failing_script_shows_its_error_and_the_last_calls(host_driver: HostDriver) -> None:
    with pytest.raises(AssertionError, match=r"(?s)exit code 1.*ZeroDivisionError.*cuDevicePrimaryCtxRelease"):
        host_driver.run(START + "1 / 0")
