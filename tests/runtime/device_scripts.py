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


def run(driver: HostDriver, start: str, script: str, *, memory_bytes: int = 24 << 30) -> Run:
    """Run one script after the other in a process, and see to it that the stand-in has all functions it called."""
    done = driver.run(start + script, memory_bytes=memory_bytes)
    assert done.named("unsupported") == []
    return done


def between(run: Run, mark: str) -> Counter[str]:
    """Count the calls between the two calls of a function."""
    first, last = (index for index, call in enumerate(run.calls) if call.name == mark)
    return Counter(call.name for call in run.calls[first + 1 : last])
