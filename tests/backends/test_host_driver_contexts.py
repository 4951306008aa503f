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
