import re
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pynvml
import pytest

from restyle_deploy.bench import gpu_monitor
from restyle_deploy.bench.gpu_monitor import GpuFacts, GpuReading, list_gpus, open_gpu_monitor
from restyle_deploy.errors import BackendUnavailableError
from tests.bench.fakes import FakeNvml

FIRST, SECOND = "0000:01:00.0", "0000:02:00.0"

Install = Callable[..., FakeNvml]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Put a made-up NVML with these GPUs in the library's place; CUDA lists them in the opposite order."""

    def install(*addresses: str, has_cuda: bool = True) -> FakeNvml:
        nvml = FakeNvml(*addresses)
        monkeypatch.setitem(sys.modules, "pynvml", nvml)
        core: Any = None
        if has_cuda:
            core = ModuleType("cuda.core")
            core.Device = lambda index: SimpleNamespace(pci_bus_id=addresses[::-1][index])
        monkeypatch.setitem(sys.modules, "cuda.core", core)
        return nvml

    return install


def test_the_stand_in_has_the_librarys_names() -> None:
    names = {name for name in vars(FakeNvml) if name.startswith("nvml")} | set(gpu_monitor.LIMITS)
    assert len(names) > 15
    assert [name for name in names if not hasattr(pynvml, name)] == []


def test_facts_and_readings(install: Install) -> None:
    nvml = install(FIRST)
    nvml.limits = pynvml.nvmlClocksThrottleReasonSwPowerCap | pynvml.nvmlClocksThrottleReasonGpuIdle
    with open_gpu_monitor("cuda:0") as monitor:
        assert monitor.facts() == GpuFacts(
            name=f"GPU at {FIRST}",
            driver="580.1",
            memory_bytes=80 * 2**30,
            max_sm_mhz=1980,
            max_memory_mhz=2619,
            power_limit_w=700.0,
            persistent=True,
        )
        assert monitor.read() == GpuReading(
            sm_mhz=1980, memory_mhz=2619, temperature_c=45, power_w=300.0, limits=("power limit",), processes=1
        )
        assert monitor.used_bytes() == 2**30
    assert nvml.opened == 0


def test_what_a_gpu_does_not_tell_is_left_open(install: Install) -> None:
    nvml = install(FIRST)
    nvml.unsupported = {"memory", "power", "limits", "persistence"}
    with open_gpu_monitor("cuda:0") as monitor:
        assert (monitor.facts().memory_bytes, monitor.facts().persistent) == (None, None)
        reading = monitor.read()
        assert (reading.power_w, reading.limits, reading.sm_mhz) == (None, None, 1980)
        assert monitor.used_bytes() is None


def test_other_errors_of_the_driver_pass_through(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = install(FIRST)

    def lose(*_: object) -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)

    monkeypatch.setattr(nvml, "nvmlDeviceGetPowerUsage", lose)
    with open_gpu_monitor("cuda:0") as monitor, pytest.raises(pynvml.NVMLError, match=r"(?i)gpu is lost"):
        monitor.read()


def test_cudas_gpu_is_found_by_its_address(install: Install) -> None:
    install(FIRST, SECOND)
    with open_gpu_monitor("cuda:0") as monitor:
        assert monitor.facts().name == f"GPU at {SECOND}"


def test_the_only_gpu_needs_no_address(install: Install) -> None:
    install(FIRST, has_cuda=False)
    with open_gpu_monitor("cuda:0") as monitor:
        assert monitor.facts().name == f"GPU at {FIRST}"


def test_one_of_several_needs_cuda_core(install: Install) -> None:
    nvml = install(FIRST, SECOND, has_cuda=False)
    with pytest.raises(BackendUnavailableError, match=r"which of the 2 GPUs .* is cuda:1 .*restyle-deploy\[cuda\]"):
        open_gpu_monitor("cuda:1")
    assert nvml.opened == 0


def test_a_gpu_that_nvml_has_not_is_told(install: Install) -> None:
    nvml = install(FIRST)
    nvml.addresses = ()
    with pytest.raises(BackendUnavailableError, match="NVML has no GPU for cuda:0"):
        open_gpu_monitor("cuda:0")
    assert nvml.opened == 0


def test_missing_library_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(BackendUnavailableError, match=r"nvidia-ml-py, .*pip install 'restyle-deploy\[bench\]'"):
        open_gpu_monitor("cuda:0")
    assert list_gpus() == ()


def test_missing_driver_is_told(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = install(FIRST)

    def fail() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(nvml, "nvmlInit", fail)
    with pytest.raises(BackendUnavailableError, match="part of the NVIDIA driver, cannot be used"):
        open_gpu_monitor("cuda:0")
    assert list_gpus() == ()


def test_all_gpus_are_listed(install: Install) -> None:
    nvml = install(FIRST, SECOND)
    assert [gpu.name for gpu in list_gpus()] == [f"GPU at {FIRST}", f"GPU at {SECOND}"]
    assert nvml.opened == 0


@pytest.mark.parametrize("question", ["nvmlDeviceGetHandleByIndex", "nvmlDeviceGetName"])
def test_a_lost_gpu_does_not_hide_the_others(
    install: Install, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, question: str
) -> None:
    nvml = install(FIRST, SECOND)
    answer = getattr(nvml, question)

    def answer_for_one(gpu: Any) -> Any:
        if gpu in (0, FIRST):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        return answer(gpu)

    monkeypatch.setattr(nvml, question, answer_for_one)
    assert [gpu.name for gpu in list_gpus()] == [f"GPU at {SECOND}"]
    assert re.search(r"GPU 0 of NVML is not described: .*lost", caplog.text, re.IGNORECASE)
    assert nvml.opened == 0


def test_a_driver_that_cannot_count_its_gpus_lists_none(
    install: Install, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    nvml = install(FIRST)

    def fail() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_UNKNOWN)

    monkeypatch.setattr(nvml, "nvmlDeviceGetCount", fail)
    assert list_gpus() == ()
    assert "NVML does not count them" in caplog.text
    assert nvml.opened == 0


def test_closing_twice_is_safe_and_ends_it(install: Install) -> None:
    nvml = install(FIRST)
    monitor = open_gpu_monitor("cuda:0")
    monitor.close()
    monitor.close()
    assert nvml.opened == 0
    with pytest.raises(ValueError, match="the GPU monitor is closed"):
        monitor.read()


@pytest.mark.gpu
def test_the_real_gpu_is_read() -> None:
    with open_gpu_monitor("cuda:0") as monitor:
        facts, reading = monitor.facts(), monitor.read()
        used = monitor.used_bytes()
    assert facts.name
    assert facts.memory_bytes is not None
    assert used is not None
    assert 0 < used < facts.memory_bytes
    assert reading.sm_mhz is not None
    assert reading.sm_mhz > 0
    assert facts in list_gpus()
