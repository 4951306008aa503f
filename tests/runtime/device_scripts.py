"""Scripts that use a `CudaDevice` on the stand-in for the driver."""

from collections import Counter

from tests.backends.host_driver.stand_in import HostDriver, Run

WAITS = ("cuStreamSynchronize", "cuEventSynchronize", "cuCtxSynchronize")
ALLOCATIONS = ("cuMemAlloc", "cuMemAllocHost", "cuMemFree", "cuMemFreeHost", "cuMemAllocFromPoolAsync")

# What copies four values to the device and back.
COPIES = """
import threading
import numpy as np
from cuda.bindings import driver
from restyle_deploy.errors import DeviceError
from restyle_deploy.runtime.cuda_device import open_device

device = open_device("cuda:0")

def array(count, *, pinned):
    block = device.allocate_host(4 * count) if pinned else device.allocate(4 * count)
    return device.array(block, 0, (count,), "float32")

source, result, middle = array(4, pinned=True), array(4, pinned=True), array(4, pinned=False)
source[:] = [1, 2, 3, 4]

def there_and_back():
    device.copy(middle, source)
    device.copy(result, middle)
"""

# Another library's capture, in a thread of its own: `thread.start()`, `begun.wait()`, and `done.set()` to end it. It
# forbids all threads of the process to wait, to ask, to allocate and to free, unless they see to it.
FOREIGN_CAPTURE = """
from cuda.core import Device
Device(0).set_current()
other = Device(0).create_stream()
begun, done = threading.Event(), threading.Event()

def capture():
    Device(0).set_current()
    driver.cuStreamBeginCapture(other.handle, driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_GLOBAL)
    begun.set()
    done.wait(60)
    print(driver.cuStreamEndCapture(other.handle)[0].name)

thread = threading.Thread(target=capture)
"""


def run(driver: HostDriver, start: str, script: str, *, memory_bytes: int = 24 << 30) -> Run:
    """Run one script after the other in a process, and see to it that the stand-in has all functions it called."""
    done = driver.run(start + script, memory_bytes=memory_bytes)
    assert done.named("unsupported") == []
    return done


def between(run: Run, mark: str) -> Counter[str]:
    """Count the calls between the two calls of a function."""
    first, last = (index for index, call in enumerate(run.calls) if call.name == mark)
    return Counter(call.name for call in run.calls[first + 1 : last])
