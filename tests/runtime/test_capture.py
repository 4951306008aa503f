"""CUDA graphs of a `CudaDevice`, through the real cuda-core and cuda-bindings on a stand-in for the driver."""

from __future__ import annotations

import pytest

from tests.backends.host_driver.stand_in import HostDriver
from tests.runtime.device_scripts import ALLOCATIONS, COPIES, WAITS, between, run

pytest.importorskip("cuda.core", reason="cuda-core is not installed")


def test_a_replay_is_one_launch_and_neither_allocates_nor_waits(host_driver: HostDriver) -> None:
    script = """
replay = device.capture(there_and_back)
driver.cuMemGetInfo()
for _ in range(3):
    replay()
driver.cuMemGetInfo()
print(result)
for start in (1, 5):
    source[:] = np.arange(start, start + 4)
    replay()
    device.synchronize()
    print(result)
replay.close()
replay.close()
try:
    replay()
except ValueError as error:
    print(error)
"""
    done = run(host_driver, COPIES, script)
    calls = between(done, "cuMemGetInfo")
    assert calls["cuGraphLaunch"] == 3
    assert not calls.keys() & {*WAITS, *ALLOCATIONS, "cuMemcpyAsync", "cuGraphUpload"}
    results = ["[nan nan nan nan]", "[1. 2. 3. 4.]", "[5. 6. 7. 8.]"]
    assert done.output.splitlines() == [*results, "the replay is closed"]
    assert len(done.named("cuGraphExecDestroy")) == len(done.named("cuGraphDestroy")) == 1


def test_marks_of_a_capture_are_reached_in_each_replay(host_driver: HostDriver) -> None:
    script = """
marks = []
def enqueue():
    marks.append(device.record(timing=True))
    there_and_back()
    marks.append(device.record(timing=True))
begin = device.record(timing=True)
replay = device.capture(enqueue)
times = []
for _ in range(2):
    replay()
    print(marks[1].is_done())
    marks[1].wait()
    print(result, marks[1].elapsed_ms(marks[0]) >= 0)
    times.append(marks[0].elapsed_ms(begin))
print(times[1] > times[0])
"""
    done = run(host_driver, COPIES, script)
    assert done.output.splitlines() == [*["False", "[1. 2. 3. 4.] True"] * 2, "True"]
    # CU_EVENT_RECORD_EXTERNAL, and that in the capture alone
    assert [call.arguments for call in done.named("cuEventRecordWithFlags")] == [("1",)] * 2


def test_a_capture_that_is_refused_leaves_the_device_as_it_was(host_driver: HostDriver) -> None:
    script = """
def fail():
    there_and_back()
    raise RuntimeError("cannot be captured")
for enqueue in (fail, lambda: device.synchronize()):
    try:
        device.capture(enqueue)
    except DeviceError as error:
        print(error, "|", type(error.__cause__).__name__)
there_and_back()
device.record().wait()
print(result)
replay = device.capture(there_and_back)
"""
    done = run(host_driver, COPIES, script)
    assert done.output.splitlines() == [
        "cuda:0: the work cannot be recorded as a CUDA graph: cannot be captured | RuntimeError",
        "cuda:0: the work cannot be recorded as a CUDA graph: "
        "cuStreamSynchronize: CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED | DeviceError",
        "[1. 2. 3. 4.]",
    ]
    assert len(done.named("cuGraphDestroy")) == 3


def test_memory_may_come_and_go_during_a_capture(host_driver: HostDriver) -> None:
    """A library allocates lazily; a result that is collected gives its block back, which waits until the end."""
    script = """
old = device.allocate(512)
def enqueue():
    device.allocate(1024)
    old.close()
    there_and_back()
replay = device.capture(enqueue)
replay()
device.synchronize()
print(result)
"""
    done = run(host_driver, COPIES, script)
    assert done.output == "[1. 2. 3. 4.]\n"
    names = [call.name for call in done.calls]
    assert names.index("cuMemFree") > names.index("cuStreamEndCapture")
