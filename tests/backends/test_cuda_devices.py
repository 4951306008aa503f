"""The GPUs as backends name them: the real cuda-core, on a stand-in for the driver."""

import sys
from dataclasses import replace

import numpy as np
import pytest

from restyle_deploy.backends.base import RunnerOptions
from restyle_deploy.backends.cuda_devices import device_arrays, queue_of
from restyle_deploy.runtime.device import find_devices, index_of
from tests.backends.host_driver.stand_in import HostDriver
from tests.backends.recording_library import RecordingQueue, array_at

IMPORT = """
from restyle_deploy.backends.cuda_devices import current_device
from restyle_deploy.runtime.device import find_devices, find_name, find_processor
"""


@pytest.mark.parametrize(("capability", "processor"), [("8.9", "sm_89"), ("12.0", "sm_120")])
def test_gpu_of_this_machine(host_driver: HostDriver, capability: str, processor: str) -> None:
    script = IMPORT + "print(find_devices(), find_processor('cuda:0'), find_name('cuda:0'), sep=';')"
    run = host_driver.run(script, capability=capability)
    assert run.output == f"(('cuda:0',), '');{processor};Host stand-in\n"


def test_gpus_are_counted_as_the_process_may_use_them(host_driver: HostDriver) -> None:
    """Cuda-core 1.0 and 1.1 count those of the machine."""
    script = """
from cuda.core import Device
Device.get_all_devices = None
print(find_devices())
"""
    assert host_driver.run(IMPORT + script).output == "(('cuda:0',), '')\n"


def test_driver_that_refuses_to_start_says_why(host_driver: HostDriver) -> None:
    script = """
from cuda.bindings import driver
driver.cuInit = lambda flags: (driver.CUresult.CUDA_ERROR_SYSTEM_DRIVER_MISMATCH,)
print(find_devices())
"""
    assert host_driver.run(IMPORT + script).output == "((), 'cuInit: CUDA_ERROR_SYSTEM_DRIVER_MISMATCH')\n"


def test_device_is_current_for_so_long(host_driver: HostDriver) -> None:
    script = """
from cuda.bindings import driver
from restyle_deploy.runtime.device import primary_context
with current_device("cuda:0"):
    print(int(driver.cuCtxGetCurrent()[1]) == primary_context(0))
print(int(driver.cuCtxGetCurrent()[1]))
"""
    assert host_driver.run(IMPORT + script).output == "True\n0\n"


def test_no_cuda_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    devices, reason = find_devices()
    assert devices == ()
    assert reason.endswith("is not installed; run: pip install 'restyle-deploy[cuda]'")


def test_number_of_a_device() -> None:
    assert index_of("cuda:13") == 13


def test_queue_of_a_device_that_nobody_opened() -> None:
    options, queue = RunnerOptions(device="cuda:1"), RecordingQueue()
    with pytest.raises(ValueError, match=r"a graph on cuda:1 runs in the queue of an opened device, .* is None; open"):
        queue_of(options)
    assert queue_of(replace(options, queue=queue)) is queue


def test_arrays_of_other_memory_are_refused() -> None:
    here, there, host = array_at(256, device_index=1), array_at(256), np.zeros((1, 2), np.float32)
    assert device_arrays({"x": here}, "cuda:1") == {"x": here}
    with pytest.raises(TypeError, match="got NumPy arrays for y, expected arrays of cuda:1, where the graph runs"):
        device_arrays({"x": here, "y": host}, "cuda:1")
    with pytest.raises(ValueError, match="y is on cuda:0, the graph runs on cuda:1"):
        device_arrays({"x": here, "y": there}, "cuda:1")


END_CAPTURE = """
from cuda.bindings import driver
from restyle_deploy.runtime.cuda_device import open_device
from restyle_deploy.runtime.device import end_capture

device = open_device("cuda:0")
end_capture(device.stream)
mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_GLOBAL
print(driver.cuStreamBeginCapture(device.stream, mode)[0].name, driver.cuStreamSynchronize(device.stream)[0].name)
end_capture(device.stream)
print(driver.cuStreamSynchronize(device.stream)[0].name)
device.close()
"""


def test_capture_that_a_library_left_is_ended(host_driver: HostDriver) -> None:
    run = host_driver.run(END_CAPTURE)
    assert run.output.splitlines() == ["CUDA_SUCCESS CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "CUDA_SUCCESS"]
    assert (len(run.named("cuStreamEndCapture")), len(run.named("cuGraphDestroy"))) == (1, 1)
