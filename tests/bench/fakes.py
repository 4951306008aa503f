"""A clock that stands still but for what is done to it, and an NVIDIA driver's library that is made up."""

from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pynvml


class FakeClock:
    """Stands still but for what calls and sleeping add, and for what asking it costs."""

    TURN_S = 1e-4  # of a loop that waits by asking the time

    def __init__(self, *, cost_s: float = 0.0) -> None:
        self.seconds = 100.0
        self.cost_s = cost_s
        self.slept_s: list[float] = []

    def __call__(self) -> float:
        self.seconds += self.cost_s
        return self.seconds

    def sleep(self, seconds: float) -> None:
        self.slept_s.append(seconds)
        self.seconds += max(seconds, self.TURN_S)

    def call_taking(self, *durations_ms: float) -> Callable[[], None]:
        """Return a call that takes these durations, one after the other, and then the last for ever."""
        left = list(durations_ms)

        def run() -> None:
            self.seconds += (left.pop(0) if len(left) > 1 else left[0]) / 1e3

        return run


class FakeNvml(ModuleType):
    """As much of `pynvml` as is used, with its own constants and exceptions: GPUs by their address on the bus."""

    def __init__(self, *addresses: str) -> None:
        super().__init__("pynvml")
        self.addresses = addresses
        self.opened = 0
        self.unsupported: set[str] = set()
        self.sm_mhz, self.temperature_c, self.power_mw, self.limits = 1980, 45, 300_000, 0
        self.used = 2**30
        for name in dir(pynvml):
            if name.startswith(("NVML_", "NVMLError", "nvmlClocks")):
                setattr(self, name, getattr(pynvml, name))

    def _answer(self, name: str, value: Any) -> Any:
        if name in self.unsupported:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return value

    def nvmlInit(self) -> None:
        self.opened += 1

    def nvmlShutdown(self) -> None:
        self.opened -= 1

    def nvmlDeviceGetCount(self) -> int:
        return len(self.addresses)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        return self.addresses[index]

    def nvmlDeviceGetHandleByPciBusId(self, address: bytes) -> str:
        if address.decode() not in self.addresses:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return address.decode()

    def nvmlDeviceGetName(self, handle: str) -> str:
        return f"GPU at {handle}"

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.1"

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        return self._answer("memory", SimpleNamespace(total=80 * 2**30, used=self.used))

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: str) -> int:
        return 700_000

    def nvmlDeviceGetPersistenceMode(self, handle: str) -> int:
        return int(self._answer("persistence", pynvml.NVML_FEATURE_ENABLED))

    def nvmlDeviceGetMaxClockInfo(self, handle: str, kind: int) -> int:
        return 1980 if kind == pynvml.NVML_CLOCK_SM else 2619

    def nvmlDeviceGetClockInfo(self, handle: str, kind: int) -> int:
        return self.sm_mhz if kind == pynvml.NVML_CLOCK_SM else 2619

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        return int(self._answer("power", self.power_mw))

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:
        assert sensor == pynvml.NVML_TEMPERATURE_GPU
        return self.temperature_c

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: str) -> int:
        return int(self._answer("limits", self.limits))

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[object]:
        return [object()]
