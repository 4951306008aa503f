"""Arrays that cross the border by DLPack and `__cuda_array_interface__`, on a stand-in for the driver."""

from __future__ import annotations

import pytest

from tests.backends.host_driver.stand_in import HostDriver
from tests.runtime.device_scripts import run

pytest.importorskip("cuda.core", reason="cuda-core is not installed")

START = """
import gc
import weakref
from dataclasses import replace

import numpy as np
from cuda.bindings import driver
from cuda.core import Device
from cuda.core.utils import StridedMemoryView
from restyle_deploy.runtime.cuda_device import open_device

device = open_device("cuda:0")
block, pinned, back = device.allocate(4096), device.allocate_host(4096), device.allocate_host(4096)
array = device.array(block, 0, (2, 3, 4), "float32")
source, result = (device.array(each, 0, (2, 3, 4), "float32") for each in (pinned, back))
source[:] = 7
Device(0).set_current()
other = Device(0).create_stream()
handle = int(other.handle)

class ByDlpack:
    def __init__(self, exported, device=None):
        self.exported, self.device, self.asked = exported, device or exported.__dlpack_device__(), []
    def __dlpack_device__(self):
        return self.device
    def __dlpack__(self, *, stream=None, **arguments):
        self.asked.append(stream)
        return self.exported.__dlpack__(stream=stream, **arguments)

class ByInterface:
    def __init__(self, **changes):
        fields = {"shape": (2, 3, 4), "typestr": "<f4", "data": (array.address, False), "version": 3}
        self.__cuda_array_interface__ = fields | changes

def refusal(source):
    try:
        device.external_array(source)
    except (TypeError, ValueError) as error:
        print(type(error).__name__, error)
"""


def test_torch_exports_from_the_device_that_it_takes_for_the_current_one(host_driver: HostDriver) -> None:
    script = """
import contextlib
import sys
from types import SimpleNamespace

entered = []

@contextlib.contextmanager
def on(index):
    entered.append(index)
    yield
    entered.append("left")

sys.modules["torch"] = SimpleNamespace(Tensor=ByDlpack, cuda=SimpleNamespace(device=on))
device.external_array(ByDlpack(array))
print(entered)
device.external_array(ByInterface())
print(len(entered))
"""
    assert run(host_driver, START, script).output == "[0, 'left']\n2\n"


def test_a_view_of_a_callers_array_copies_nothing_and_keeps_it(host_driver: HostDriver) -> None:
    script = """
makers = (
    lambda: ByDlpack(array),
    lambda: ByInterface(),
    lambda: ByInterface(strides=(48, 16, 4)),
    lambda: ByInterface(version=2),
)
for make in makers:
    exporter = make()
    alive, view = weakref.ref(exporter), device.external_array(exporter)
    print(view.address == array.address, view.shape, view.dtype, view.device_index, view.stream == device.stream)
    del exporter
    gc.collect()
    print(alive() is not None)
    del view
    gc.collect()
    print(alive() is None)
print(device.external_array(array) is array)
"""
    done = run(host_driver, START, script)
    line = "True (2, 3, 4) float32 0 True"
    assert done.output.splitlines() == [*[line, "True", "True"] * 4, "True"]
    assert done.named("cuMemcpyAsync", "cuStreamSynchronize", "cuEventSynchronize") == []


def test_the_work_that_fills_a_callers_array_is_waited_for(host_driver: HostDriver) -> None:
    """An exporter by DLPack orders the streams; the other protocol names a stream; a caller may name one, too."""
    script = """
def read(exporter, **arguments):
    source[:] += 1
    driver.cuMemcpyAsync(array.address, source.ctypes.data, array.nbytes, handle)
    device.copy(result, device.external_array(exporter, **arguments))
    device.synchronize()
    print(result[0, 0, 0])

exporter = ByDlpack(replace(array, stream=handle))
read(exporter)
print(exporter.asked == [device.stream])
read(ByInterface(stream=handle))
read(ByInterface(), stream=handle)
read(replace(array, stream=handle))
other.sync()
read(ByInterface(stream=None))
"""
    # The last one names no stream, and the work on the other one is done too late.
    assert run(host_driver, START, script).output.splitlines() == ["8.0", "True", "9.0", "10.0", "11.0", "11.0"]


def test_what_is_no_array_of_a_gpu(host_driver: HostDriver) -> None:
    script = """
for each in (np.zeros(3), [1.0], None, ByDlpack(array, device=(1, 0)), ByDlpack(array, device=(3, 0))):
    print(device.external_array(each))
"""
    assert run(host_driver, START, script).output.splitlines() == ["None"] * 5


def test_arrays_that_are_refused(host_driver: HostDriver) -> None:
    script = """
class Strided:
    def __dlpack_device__(self):
        return 2, 0
    def __dlpack__(self, **arguments):
        from cuda.core import Buffer
        buffer = Buffer.from_handle(array.address, array.nbytes, owner=array)
        return StridedMemoryView.from_buffer(buffer, (2, 3, 4), (1, 8, 2), dtype=array.dtype).__dlpack__()

class Graded(ByDlpack):
    def __dlpack__(self, **arguments):
        raise BufferError("it has a gradient")

refusal(ByDlpack(array, device=(2, 1)))
refusal(replace(array, device_index=1))
refusal(Strided())
refusal(Graded(array))
refusal(ByInterface(strides=(48, 4, 12)))
refusal(ByInterface(mask=object()))
refusal(ByInterface(stream=0))
refusal(ByInterface(data=(16, False)))
print(device.external_array(ByInterface(shape=(0, 3, 4), data=(0, False))).shape)
print(device.external_array(ByInterface(shape=(2, 1, 4), strides=(16, 77, 4))).shape)
"""
    other = (
        "ValueError images: an array on cuda:1, the session is on cuda:0; copy it there, "
        "or open a session with device='cuda:1'"
    )
    strided = "of shape [2, 3, 4]; make it contiguous, with torch by .contiguous()"
    assert run(host_driver, START, script).output.splitlines() == [
        other,
        other,
        f"TypeError images: a strided Strided {strided}",
        "TypeError images: a Graded that cannot be read by DLPack: it has a gradient",
        f"TypeError images: a strided ByInterface {strided}",
        "TypeError images: a masked ByInterface; pass its data alone",
        "ValueError images: its __cuda_array_interface__ names stream 0, which the protocol does not allow",
        "ValueError images: the address 0x10 is not in a GPU's memory "
        "(cuPointerGetAttribute: CUDA_ERROR_INVALID_VALUE)",
        "(0, 3, 4)",
        "(2, 1, 4)",
    ]


def test_interfaces_that_do_not_keep_to_the_protocol(host_driver: HostDriver) -> None:
    script = """
class Raising:
    @property
    def __cuda_array_interface__(self):
        raise RuntimeError("no such thing")

class Given:
    def __init__(self, interface):
        self.__cuda_array_interface__ = interface

wrong = [
    ByInterface(data=None), ByInterface(data=()), ByInterface(data=("1", False)), ByInterface(data=(-8, False)),
    ByInterface(data=(2**64, False)), ByInterface(typestr="<q9"), ByInterface(typestr=None), ByInterface(typestr="|O"),
    ByInterface(shape=None), ByInterface(shape=(2, "3", 4)), ByInterface(shape=(-2, 3, 4)), ByInterface(strides=(4,)),
    ByInterface(strides=5), ByInterface(stream="1"), Given({}), Given(7), Raising(),
]
for each in wrong:
    refusal(each)
"""
    lines = run(host_driver, START, script).output.splitlines()
    assert len(lines) == 17
    known = "TypeError images: the __cuda_array_interface__ of a "
    assert [line for line in lines if not line.startswith(known)] == []
    assert all("is not as the protocol has it: " in line for line in lines[:-1])
    assert lines[-1] == f"{known}Raising cannot be read: RuntimeError: no such thing"


def test_memory_of_another_context_is_refused_with_the_remedy(host_driver: HostDriver) -> None:
    script = """
driver.cuCtxCreate(None, 0, 0)
address = int(driver.cuMemAlloc(96)[1])
foreign = int(driver.cuStreamCreateWithPriority(1, 0)[1])
driver.cuCtxPopCurrent()
refusal(ByInterface(data=(address, False)))
refusal(ByInterface(stream=foreign))
"""
    memory, stream = run(host_driver, START, script).output.splitlines()
    assert "was allocated in a CUDA context of its own, whose memory the session cannot reach" in memory
    assert memory.startswith("ValueError images: the address 0x")
    assert memory.endswith("import pycuda.autoprimaryctx in place of pycuda.autoinit")
    assert stream.startswith("ValueError stream: 0x")


EXPORTS = """
def taken_by(stream):
    print(result[0, 0, 0])
    driver.cuMemcpyAsync(result.ctypes.data, array.address, array.nbytes, stream)
    driver.cuStreamSynchronize(stream)
    print(result[0, 0, 0])
device.copy(array, source)
"""


@pytest.mark.parametrize(
    ("export", "stream", "waits"),
    [
        ("array.__dlpack__(stream=handle)", "handle", True),
        ("array.__dlpack__(stream=-1)", "handle", False),
        ("array.__dlpack__()", "1", True),
        ("array.__cuda_array_interface__", "1", True),
        ("replace(array, stream=0, ready=device.record()).__dlpack__(stream=handle)", "handle", True),
        ("replace(array, stream=0).__dlpack__(stream=handle)", "handle", False),
    ],
)
def test_who_takes_a_result_waits_for_it(host_driver: HostDriver, export: str, stream: str, waits: bool) -> None:
    done = run(host_driver, START, f"{EXPORTS}\nkept = {export}\ntaken_by({stream})")
    assert done.output.splitlines() == ["nan", "7.0" if waits else "nan"]
    assert done.named("cuEventSynchronize") == []


def test_a_result_is_described_by_both_protocols(host_driver: HostDriver) -> None:
    script = """
interface = array.part(1, 2).__cuda_array_interface__
print(interface.pop("data") == (array.address + 48, False), interface)
for versions in ({}, {"max_version": (1, 0)}, {"dl_device": (2, 0), "copy": False}):
    print(repr(array.__dlpack__(stream=-1, **versions)).split('"')[1])
view = StridedMemoryView.from_dlpack(array.part(1, 2), stream_ptr=-1)
print(view.ptr - array.address, view.shape, view.strides, view.dtype, view.device_id, view.readonly)
"""
    assert run(host_driver, START, script).output.splitlines() == [
        "True {'shape': (1, 3, 4), 'typestr': '<f4', 'strides': None, 'version': 3, 'stream': 1}",
        "dltensor",
        "dltensor_versioned",
        "dltensor",
        "48 (1, 3, 4) (12, 4, 1) float32 0 False",
    ]


def test_the_owner_lives_until_the_consumer_is_done(host_driver: HostDriver) -> None:
    script = """
class Owner:
    pass

for take in (lambda array: StridedMemoryView.from_dlpack(array, stream_ptr=-1), lambda array: array.part(0, 1),
             lambda array: array.__dlpack__(stream=-1)):
    owner = Owner()
    alive = weakref.ref(owner)
    taken = take(replace(array, owner=owner))
    del owner
    gc.collect()
    print(alive() is not None)
    del taken
    gc.collect()
    print(alive() is None)
"""
    assert run(host_driver, START, script).output.splitlines() == ["True"] * 6


def test_the_stream_of_a_result_outlives_the_device(host_driver: HostDriver) -> None:
    script = """
device.close()
alive = weakref.ref(device)
del device
gc.collect()
array.__dlpack__(stream=handle)
print(alive() is not None)
del array, source, result, block, pinned, back
gc.collect()
print(alive() is None)
"""
    assert run(host_driver, START, script).output.splitlines() == ["True", "True"]
