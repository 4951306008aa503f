"""NVIDIA GPUs as their driver's management library (NVML) sees them: clocks, temperature, throttling, memory."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from restyle_deploy.errors import BackendUnavailableError
from restyle_deploy.runtime.device import find_bus_address

# What holds the clocks back, by the name of NVML's bit: nvml.h, nvmlClocksEventReasons.
LIMITS = {
    "nvmlClocksThrottleReasonSwPowerCap": "power limit",
    "nvmlClocksThrottleReasonHwSlowdown": "hardware slowdown",
    "nvmlClocksThrottleReasonSwThermalSlowdown": "thermal slowdown by the driver",
    "nvmlClocksThrottleReasonHwThermalSlowdown": "thermal slowdown by the hardware",
    "nvmlClocksThrottleReasonHwPowerBrakeSlowdown": "power brake",
}
POWER_LIMIT = LIMITS["nvmlClocksThrottleReasonSwPowerCap"]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class GpuFacts:
    """A GPU; `None` for what its driver does not tell.

    Attributes:
        name: as its maker calls it.
        driver: version of the driver.
        memory_bytes: in all.
        max_sm_mhz, max_memory_mhz: highest clocks of the multiprocessors and of the memory.
        power_limit_w: in force.
        persistent: whether the driver stays loaded between programs.
    """

    name: str
    driver: str
    memory_bytes: int | None
    max_sm_mhz: int | None
    max_memory_mhz: int | None
    power_limit_w: float | None
    persistent: bool | None


@dataclass(frozen=True, kw_only=True)
class GpuReading:
    """A GPU at one moment; `None` for what its driver does not tell.

    Attributes:
        sm_mhz, memory_mhz: clocks of the multiprocessors and of the memory.
        temperature_c: of the chip.
        power_w: drawn.
        limits: what holds the clocks back, values of `LIMITS`.
        processes: that compute on the GPU, this one included.
    """

    sm_mhz: int | None
    memory_mhz: int | None
    temperature_c: int | None
    power_w: float | None
    limits: tuple[str, ...] | None
    processes: int | None


class GpuMonitor:
    """A GPU opened in NVML; usable in `with`. It asks the driver only, and disturbs no work on the GPU."""

    def __init__(self, nvml: ModuleType, handle: Any) -> None:
        """Take over a handle of the initialised library; see `open_gpu_monitor`."""
        self._nvml: ModuleType | None = nvml
        self._handle = handle

    def facts(self) -> GpuFacts:
        """Return what stays the same."""
        nvml, handle = self._opened(), self._handle
        memory = _ask(nvml, nvml.nvmlDeviceGetMemoryInfo, handle)
        limit_mw = _ask(nvml, nvml.nvmlDeviceGetEnforcedPowerLimit, handle)
        persistence = _ask(nvml, nvml.nvmlDeviceGetPersistenceMode, handle)
        return GpuFacts(
            name=str(nvml.nvmlDeviceGetName(handle)),
            driver=str(nvml.nvmlSystemGetDriverVersion()),
            memory_bytes=None if memory is None else int(memory.total),
            max_sm_mhz=_ask(nvml, nvml.nvmlDeviceGetMaxClockInfo, handle, nvml.NVML_CLOCK_SM),
            max_memory_mhz=_ask(nvml, nvml.nvmlDeviceGetMaxClockInfo, handle, nvml.NVML_CLOCK_MEM),
            power_limit_w=None if limit_mw is None else limit_mw / 1e3,
            persistent=None if persistence is None else persistence == nvml.NVML_FEATURE_ENABLED,
        )

    def read(self) -> GpuReading:
        """Look at the GPU now."""
        nvml, handle = self._opened(), self._handle
        power_mw = _ask(nvml, nvml.nvmlDeviceGetPowerUsage, handle)
        bits = _ask(nvml, nvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle)  # the name that old drivers have too
        processes = _ask(nvml, nvml.nvmlDeviceGetComputeRunningProcesses, handle)
        return GpuReading(
            sm_mhz=_ask(nvml, nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_SM),
            memory_mhz=_ask(nvml, nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_MEM),
            temperature_c=_ask(nvml, nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU),
            power_w=None if power_mw is None else power_mw / 1e3,
            limits=None if bits is None else tuple(text for name, text in LIMITS.items() if bits & getattr(nvml, name)),
            processes=None if processes is None else len(processes),
        )

    def used_bytes(self) -> int | None:
        """Return the memory in use on the whole GPU, by any process."""
        nvml = self._opened()
        memory = _ask(nvml, nvml.nvmlDeviceGetMemoryInfo, self._handle)
        return None if memory is None else int(memory.used)

    def close(self) -> None:
        """Release the library; safe to call twice."""
        nvml, self._nvml = self._nvml, None
        if nvml is not None:
            nvml.nvmlShutdown()

    def __enter__(self) -> GpuMonitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _opened(self) -> ModuleType:
        if self._nvml is None:
            raise ValueError("the GPU monitor is closed")
        return self._nvml


def open_gpu_monitor(device: str) -> GpuMonitor:
    """Open the GPU that CUDA calls `device`.

    CUDA and NVML number GPUs each in their own order: they are matched by the address on the bus.

    Args:
        device: `cuda:N`.
    Raises:
        BackendUnavailableError: nvidia-ml-py or the driver is missing, or there is no such GPU, or none can be told
            to be this one.
    """
    nvml = _initialised_nvml()
    try:
        return GpuMonitor(nvml, _find_handle(nvml, int(device.removeprefix("cuda:"))))
    except BaseException:
        nvml.nvmlShutdown()
        raise


def list_gpus() -> tuple[GpuFacts, ...]:
    """Return the facts of all GPUs, in NVML's order; none where NVML is missing.

    One that the driver has lost, or does not describe, is left out: the log says so.
    """
    try:
        nvml = _initialised_nvml()
    except BackendUnavailableError as error:
        _logger.debug("GPUs are not described: %s", error)
        return ()
    try:
        described = [_describe_gpu(nvml, index) for index in range(_count_gpus(nvml))]
        return tuple(facts for facts in described if facts is not None)
    finally:
        nvml.nvmlShutdown()


def _count_gpus(nvml: ModuleType) -> int:
    try:
        return int(nvml.nvmlDeviceGetCount())
    except nvml.NVMLError as error:
        _logger.warning("GPUs are not described: NVML does not count them: %s", error)
        return 0


def _describe_gpu(nvml: ModuleType, index: int) -> GpuFacts | None:
    """Return a GPU's facts; None where the driver fails, as for one that has fallen off the bus."""
    try:
        return GpuMonitor(nvml, nvml.nvmlDeviceGetHandleByIndex(index)).facts()
    except nvml.NVMLError as error:
        _logger.warning("GPU %d of NVML is not described: %s", index, error)
        return None


def _initialised_nvml() -> ModuleType:
    try:
        import pynvml
    except ModuleNotFoundError as error:
        raise BackendUnavailableError(
            "a GPU's clocks are read by nvidia-ml-py, not installed here; run: pip install 'restyle-deploy[bench]'"
        ) from error
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise BackendUnavailableError(f"NVML, which is part of the NVIDIA driver, cannot be used: {error}") from error
    nvml: ModuleType = pynvml
    return nvml


def _find_handle(nvml: ModuleType, index: int) -> Any:
    address = _bus_address(index)
    try:
        if address is not None:
            return nvml.nvmlDeviceGetHandleByPciBusId(address.encode())
        count = nvml.nvmlDeviceGetCount()
        if count == 1 and index == 0:
            return nvml.nvmlDeviceGetHandleByIndex(0)
    except nvml.NVMLError as error:
        raise BackendUnavailableError(f"NVML has no GPU for cuda:{index}: {error}") from error
    raise BackendUnavailableError(
        f"which of the {count} GPUs that NVML lists is cuda:{index} cannot be told without cuda-core; "
        "run: pip install 'restyle-deploy[cuda]'"
    )


def _bus_address(index: int) -> str | None:
    """Return where CUDA's GPU is on the bus; None where cuda-core is not installed or sees no GPU."""
    try:
        return find_bus_address(f"cuda:{index}")
    except ModuleNotFoundError:
        return None
    except Exception as error:  # CUDA's own classes: no driver, or no such GPU
        _logger.debug("CUDA has no GPU %d: %s", index, error)
        return None


def _ask(nvml: ModuleType, question: Callable[..., Any], *arguments: Any) -> Any:
    """Return the driver's answer; None where this GPU, driver or user gets none."""
    try:
        return question(*arguments)
    except (nvml.NVMLError_NotSupported, nvml.NVMLError_NoPermission, nvml.NVMLError_FunctionNotFound):
        return None
