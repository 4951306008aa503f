"""The GPUs as the TensorRT backends name them: the real cuda-core, on a stand-in for the driver."""

import sys

import pytest

from restyle_deploy.backends.tensorrt_device import find_devices, index_of
from tests.backends.host_driver.stand_in import HostDriver

IMPORT = "from restyle_deploy.backends.tensorrt_device import find_devices, find_name, find_processor, set_current\n"


@pytest.mark.parametrize(("capability", "processor"), [("8.9", "sm_89"), ("12.0", "sm_120")])
def test_gpu_of_this_machine(host_driver: HostDriver, capability: str, processor: str) -> None:
    script = IMPORT + "print(find_devices(), find_processor('cuda:0'), find_name('cuda:0'), sep=';')"
    run = host_driver.run(script, capability=capability)
    assert run.output == f"(('cuda:0',), '');{processor};Host stand-in\n"


def test_device_is_made_current(host_driver: HostDriver) -> None:
    run = host_driver.run(IMPORT + "set_current('cuda:0')")
    assert len(run.named("cuCtxSetCurrent")) == 1


def test_no_cuda_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    devices, reason = find_devices()
    assert devices == ()
    assert reason.endswith("is not installed; run: pip install 'restyle-deploy[cuda]'")


def test_number_of_a_device() -> None:
    assert index_of("cuda:13") == 13
