"""The stand-in for the CUDA driver: contexts, plain allocations, and what a capture's mode forbids."""

import pytest

from tests.backends.host_driver.stand_in import HostDriver

pytest.importorskip("cuda.core", reason="cuda-core is not installed")

START = """
from cuda.core import Device
device = Device(0)
device.set_current()
stream = device.create_stream()
"""


def test_strict_captures_forbid_allocations_and_external_marks_need_one(host_driver: HostDriver) -> None:
    script = """
from cuda.bindings import driver
event = driver.cuEventCreate(0)[1]
print(driver.cuEventRecordWithFlags(event, stream.handle, 1)[0].name)
modes = driver.CUstreamCaptureMode
for mode in (modes.CU_STREAM_CAPTURE_MODE_GLOBAL, modes.CU_STREAM_CAPTURE_MODE_RELAXED):
    driver.cuStreamBeginCapture(stream.handle, mode)
    print(driver.cuMemAlloc(16)[0].name, driver.cuEventRecordWithFlags(event, stream.handle, 1)[0].name)
    graph = driver.cuStreamEndCapture(stream.handle)[1]
print(driver.cuEventQuery(event)[0].name)
executable = driver.cuGraphInstantiate(graph, 0)[1]
driver.cuGraphLaunch(executable, stream.handle)
print(driver.cuEventQuery(event)[0].name)
stream.sync()
print(driver.cuEventQuery(event)[0].name)
"""
    assert host_driver.run(START + script).output.splitlines() == [
        "CUDA_ERROR_INVALID_VALUE",
        "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED CUDA_SUCCESS",
        "CUDA_SUCCESS CUDA_SUCCESS",
        "CUDA_SUCCESS",
        "CUDA_ERROR_NOT_READY",
        "CUDA_SUCCESS",
    ]


def test_contexts_are_pushed_and_popped(host_driver: HostDriver) -> None:
    script = """
from cuda.bindings import driver
driver.cuInit(0)
context = driver.cuDevicePrimaryCtxRetain(0)[1]
print(driver.cuMemAlloc(16)[0].name, driver.cuCtxPopCurrent()[0].name)
driver.cuCtxPushCurrent(context)
status, address = driver.cuMemAlloc(16)
_, free, total = driver.cuMemGetInfo()
print(status.name, total - free, driver.cuMemFree(address)[0].name, total - driver.cuMemGetInfo()[1])
print(int(driver.cuCtxPopCurrent()[1]) == int(context), int(driver.cuCtxGetCurrent()[1]))
"""
    assert host_driver.run(script).output.splitlines() == [
        "CUDA_ERROR_INVALID_CONTEXT CUDA_ERROR_INVALID_CONTEXT",
        "CUDA_SUCCESS 16 CUDA_SUCCESS 0",
        "True 0",
    ]


def test_what_waits_is_prohibited_while_another_thread_captures_globally(host_driver: HostDriver) -> None:
    script = """
import threading
from cuda.bindings import driver
modes = driver.CUstreamCaptureMode
other = device.create_stream()
event = driver.cuEventCreate(0)[1]
driver.cuEventRecord(event, other.handle)
_, block = driver.cuMemAlloc(16)
_, pinned = driver.cuMemAllocHost(16)

def ask():
    device.set_current()
    print(*(result[0].name.removeprefix("CUDA_") for result in (
        driver.cuEventQuery(event), driver.cuEventSynchronize(event), driver.cuStreamSynchronize(other.handle),
        driver.cuMemAlloc(16), driver.cuMemAllocHost(16), driver.cuMemFree(block), driver.cuMemFreeHost(pinned),
        driver.cuLibraryLoadData(b"none", [], [], 0, [], [], 0),
    )))

def ask_relaxed():
    former = driver.cuThreadExchangeStreamCaptureMode(modes.CU_STREAM_CAPTURE_MODE_RELAXED)[1]
    ask()
    print(former.name, driver.cuThreadExchangeStreamCaptureMode(former)[1].name)

for mode, work in (("THREAD_LOCAL", ask), ("GLOBAL", ask), ("GLOBAL", ask_relaxed)):
    driver.cuStreamBeginCapture(stream.handle, getattr(modes, f"CU_STREAM_CAPTURE_MODE_{mode}"))
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if mode == "THREAD_LOCAL":
        ask()  # it is this one's
    driver.cuStreamEndCapture(stream.handle)
    driver.cuEventRecord(event, other.handle)
    other.sync()
    _, block = driver.cuMemAlloc(16)
    _, pinned = driver.cuMemAllocHost(16)
"""
    allowed, refused = " ".join(["SUCCESS"] * 7), " ".join(["ERROR_STREAM_CAPTURE_UNSUPPORTED"] * 8)
    assert host_driver.run(START + script).output.splitlines() == [
        f"ERROR_NOT_READY {allowed}",
        refused,
        refused,
        f"SUCCESS {allowed}",
        "CU_STREAM_CAPTURE_MODE_GLOBAL CU_STREAM_CAPTURE_MODE_RELAXED",
    ]


def test_memory_and_streams_know_the_context_that_they_were_made_in(host_driver: HostDriver) -> None:
    script = """
from cuda.bindings import driver
attribute = driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_CONTEXT

def contexts():
    address, made = driver.cuMemAlloc(16)[1], driver.cuStreamCreateWithPriority(1, 0)[1]
    return int(driver.cuPointerGetAttribute(attribute, address)[1]), int(driver.cuStreamGetCtx(made)[1])

print(contexts() == (int(driver.cuCtxGetCurrent()[1]),) * 2)
primary = driver.cuCtxGetCurrent()[1]
own = driver.cuCtxCreate(None, 0, 0)[1]
print(contexts() == (int(own),) * 2, int(own) != int(primary))
print(int(driver.cuCtxPopCurrent()[1]) == int(own), int(driver.cuCtxGetCurrent()[1]) == int(primary))
print(driver.cuStreamGetCtx(12345)[0].name)
"""
    assert host_driver.run(START + script).output.splitlines() == [
        "True",
        "True True",
        "True True",
        "CUDA_ERROR_INVALID_HANDLE",
    ]
