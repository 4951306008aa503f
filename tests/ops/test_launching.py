"""Launches through the real cuda-core, on a stand-in for the driver that records them."""

import subprocess
import sys

import pytest

from restyle_deploy.errors import BackendUnavailableError
from restyle_deploy.ops import compiler
from restyle_deploy.ops.kernels.launches import (
    Epilogue,
    Factor,
    Filtering,
    Launch,
    launch_fused_bias_act,
    launch_upfirdn2d,
)
from restyle_deploy.runtime.device import wrap_stream
from tests.backends.host_driver.stand_in import HostDriver, Run

EPILOGUE = Epilogue(factors=Factor(31), noise_strength=0.5, negative_slope=0.2, gain=-2.0)
FILTERING = Filtering(pads=(1, 1, 1, 1), filter_size=(4, 4), is_separable=True)
LAUNCHES = {
    "fused_bias_act": launch_fused_bias_act((2, 8, 9, 7), EPILOGUE, dtype="float16", channels_last=True),
    "upfirdn2d": launch_upfirdn2d((2, 3, 66, 9), FILTERING, EPILOGUE, dtype="float32"),
}
# As the sources have them: the pointers of the inputs, int32 numbers, the pointer of y.
PARAMETERS = {
    "fused_bias_act": (*[8] * 5, *[4] * 6, 8),
    "upfirdn2d": (*[8] * 6, *[4] * 15, 8),
}
SYMBOLS = {
    "fused_bias_act": "_Z14fused_bias_actI6__halfLi31ELb1EEvPKT_PKfS3_S5_S5_iiiiiiPS1_",
    "upfirdn2d": "_Z9upfirdn2dIfLi1ELi31ELb0EEvPKT_PKfS4_S2_S4_S4_iiiiiiiiiiiiiiiPS0_",
}
START = """
from cuda.core import Device
from restyle_deploy.ops.kernels.launches import Launch
from restyle_deploy.ops.launching import enqueue, load_kernel
device = Device(0)
device.set_current()
"""


@pytest.fixture(autouse=True)
def nvrtc() -> None:
    try:
        compiler.check_available()
    except BackendUnavailableError as error:
        pytest.skip(str(error))


def launch_on(driver: HostDriver, launch: Launch, inputs: list[int], script: str, *, capability: str = "8.9") -> Run:
    start = f"{START}\nlaunch, inputs, output = {launch!r}, {inputs}, {1 << 41}\n"
    return driver.run(start + script, capability=capability, parameters=PARAMETERS[launch.kernel])


@pytest.mark.parametrize("kernel", LAUNCHES)
def test_a_launch_passes_addresses_and_int32(host_driver: HostDriver, kernel: str) -> None:
    launch = LAUNCHES[kernel]
    inputs = [(1 << 40) + number for number in range(PARAMETERS[kernel].count(8) - 1)]
    inputs[-1] = 0  # an absent factor
    run = launch_on(host_driver, launch, inputs, "enqueue(launch, inputs, output, stream=0)")
    (call,) = run.named("cuLaunchKernelEx")
    symbol, *numbers, stream, arguments = call.arguments
    assert (symbol, stream) == (SYMBOLS[kernel], "1")  # CU_STREAM_LEGACY
    assert tuple(map(int, numbers)) == (*launch.grid, *launch.block, 0)
    scalars = [scalar % 2**32 for scalar in launch.scalars]
    assert list(map(int, arguments.split())) == [*inputs, *scalars, 1 << 41]
    assert launch.scalars[-1] < 0  # the sign bit of a float is that of the int32


def test_a_kernel_is_loaded_once_for_its_architecture(host_driver: HostDriver) -> None:
    script = """
for _ in range(2):
    enqueue(launch, inputs, output, stream=0)
print(load_kernel(f"sm_{device.arch}", launch.kernel, launch.expression) is load_kernel(
    "sm_120", launch.kernel, launch.expression))
"""
    run = launch_on(host_driver, LAUNCHES["fused_bias_act"], [0] * 5, script, capability="12.0")
    assert run.output == "True\n"
    assert (len(run.named("cuLibraryLoadData")), len(run.named("cuLaunchKernelEx"))) == (1, 2)


def test_a_launch_is_on_its_stream(host_driver: HostDriver) -> None:
    script = """
stream = device.create_stream()
enqueue(launch, inputs, output, stream=int(stream.handle))
print(int(stream.handle))
"""
    run = launch_on(host_driver, LAUNCHES["fused_bias_act"], [0] * 5, script)
    (call,) = run.named("cuLaunchKernelEx")
    assert call.arguments[-2] == run.output.strip()


def test_a_thread_that_has_not_met_cuda_launches_for_torch(host_driver: HostDriver) -> None:
    """Torch makes no context current in a thread that takes its memory from what is kept."""
    script = f"""
import contextlib
import threading
from types import SimpleNamespace
import torch
from cuda.bindings import driver
from restyle_deploy.ops.cuda_launch import run
from restyle_deploy.ops.kernels.launches import Launch

torch.cuda.current_stream = lambda device: SimpleNamespace(cuda_stream=0)
torch.cuda.device = contextlib.nullcontext  # the device is the thread's already: torch does nothing

def work():
    y = SimpleNamespace(device=torch.device("cuda:0"), data_ptr=lambda: 1 << 41)
    run({LAUNCHES["fused_bias_act"]!r}, [None] * 5, y)
    print("launched", int(driver.cuCtxGetCurrent()[1]))

thread = threading.Thread(target=work)
thread.start()
thread.join()
"""
    run = host_driver.run(script, parameters=PARAMETERS["fused_bias_act"])
    assert run.output == "launched 0\n"
    assert len(run.named("cuLaunchKernelEx")) == 1


def test_a_refused_launch_for_torch_is_a_device_error(host_driver: HostDriver) -> None:
    script = f"""
from types import SimpleNamespace
import torch
from restyle_deploy.errors import DeviceError
from restyle_deploy.ops.cuda_launch import run
from restyle_deploy.ops.kernels.launches import Launch

torch.cuda.current_stream = lambda device: SimpleNamespace(cuda_stream=0xBAD)
try:
    run({LAUNCHES["fused_bias_act"]!r}, [None] * 5, SimpleNamespace(device=torch.device("cuda:0"), data_ptr=lambda: 0))
except DeviceError as error:
    print(error)
"""
    run = host_driver.run(script, parameters=PARAMETERS["fused_bias_act"])
    assert run.output.startswith("cuda:0: the driver refuses: CUDA_ERROR_")


def test_a_stream_is_wrapped_once() -> None:
    pytest.importorskip("cuda.core", reason="cuda-core is not installed")
    stream = wrap_stream(7)
    assert stream.__cuda_stream__() == (0, 7)
    assert wrap_stream(7) is stream


def test_launching_needs_no_torch() -> None:
    script = "import sys, restyle_deploy.ops.launching; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
