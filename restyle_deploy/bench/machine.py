"""What else happened on the machine during a measurement: other processes, a hypervisor, a quota, a GPU's clocks."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from restyle_deploy.bench.gpu_monitor import GpuMonitor, GpuReading

CPU_FOLDER = Path("/sys/devices/system/cpu")
# A container's own limits; of cgroup version 2, and of version 1.
QUOTA_FILES = (Path("/sys/fs/cgroup/cpu.stat"), Path("/sys/fs/cgroup/cpu/cpu.stat"))
# The kernel counts in hundredths of a second: over less than this, the shares below would be noise.
SHORTEST_S = 1.0


@dataclass(frozen=True, kw_only=True)
class MachineCounters:
    """Counters that only rise; `None` for what this system does not count.

    Attributes:
        busy_s: of all cores, by all processes.
        stolen_s: of all cores, that a hypervisor gave to others while there was work here.
        own_s: of all cores, by this process.
        quota_s: that this process's container was held back by its CPU quota.
    """

    busy_s: float
    stolen_s: float
    own_s: float
    quota_s: float | None


@dataclass(frozen=True, kw_only=True)
class GpuRecord:
    """A GPU over a measurement, from readings between the calls; `None` for what its driver does not tell.

    Attributes:
        lowest_sm_mhz, highest_sm_mhz, lowest_memory_mhz: clocks.
        highest_temperature_c: of the chip.
        highest_power_w: drawn.
        limits: what held the clocks back in any reading, values of `gpu_monitor.LIMITS`.
        processes: the most that computed on the GPU, this one included.
        readings: number of them.
    """

    lowest_sm_mhz: int | None
    highest_sm_mhz: int | None
    lowest_memory_mhz: int | None
    highest_temperature_c: int | None
    highest_power_w: float | None
    limits: tuple[str, ...] | None
    processes: int | None
    readings: int


@dataclass(frozen=True, kw_only=True)
class MachineRecord:
    """The machine over a measurement; `None` for what cannot be told here, or over so short a time.

    Attributes:
        seconds: that the record spans.
        cores: logical ones of the machine.
        other_cores: cores that other processes kept busy, on average.
        stolen_cores: cores that a hypervisor gave to others while there was work here, on average.
        quota_share: of the time, held back by the container's CPU quota.
        gpu: where one was watched.
    """

    seconds: float
    cores: int
    other_cores: float | None
    stolen_cores: float | None
    quota_share: float | None
    gpu: GpuRecord | None = None

    def as_json(self) -> dict[str, object]:
        """Return what a report keeps."""
        return asdict(self)


class MachineWatch:
    """Watches the machine from its making on, without a thread: nothing of it runs while a call is timed."""

    def __init__(
        self,
        *,
        gpu: GpuMonitor | None = None,
        interval_s: float = 0.5,
        clock: Callable[[], float] = time.monotonic,
        read: Callable[[], MachineCounters] | None = None,
    ) -> None:
        """Begin.

        Args:
            gpu: read now and then; the caller closes it.
            interval_s: least time between two readings of the GPU.
            clock: seconds, monotonic.
            read: the counters; None for `read_counters`.
        """
        self._gpu, self._interval_s, self._clock, self._read = gpu, interval_s, clock, read or read_counters
        self._readings: list[GpuReading] = []
        self._begin_s, self._begin = clock(), self._read()
        self._next_s = self._begin_s

    def tick(self, _: object = None) -> None:
        """Read the GPU if it is time to: call it after each measured call, as `measure_interleaved`'s `after_call`."""
        if self._gpu is not None and self._clock() >= self._next_s:
            self._readings.append(self._gpu.read())
            self._next_s = self._clock() + self._interval_s

    def record(self) -> MachineRecord:
        """Return what was seen until now."""
        end = self._read()
        return record_from_counters(
            self._begin,
            end,
            seconds=self._clock() - self._begin_s,
            cores=os.cpu_count() or 1,
            gpu=gpu_record_from(self._readings) if self._gpu is not None else None,
        )


def record_from_counters(
    begin: MachineCounters, end: MachineCounters, *, seconds: float, cores: int, gpu: GpuRecord | None = None
) -> MachineRecord:
    """Return the means over a span; those of less than `SHORTEST_S` are left open."""
    if seconds < SHORTEST_S:
        return MachineRecord(
            seconds=seconds, cores=cores, other_cores=None, stolen_cores=None, quota_share=None, gpu=gpu
        )
    others_s = (end.busy_s - begin.busy_s) - (end.own_s - begin.own_s)
    is_limited = begin.quota_s is not None and end.quota_s is not None
    return MachineRecord(
        seconds=seconds,
        cores=cores,
        other_cores=max(0.0, others_s / seconds),  # the two are not counted at the very same moment
        stolen_cores=(end.stolen_s - begin.stolen_s) / seconds,
        quota_share=((end.quota_s or 0.0) - (begin.quota_s or 0.0)) / seconds if is_limited else None,
        gpu=gpu,
    )


def gpu_record_from(readings: Sequence[GpuReading]) -> GpuRecord:
    """Return the extremes of a GPU's readings, which may be none."""

    def known(name: str) -> list[Any]:
        return [value for reading in readings if (value := getattr(reading, name)) is not None]

    limits = known("limits")
    return GpuRecord(
        lowest_sm_mhz=min(known("sm_mhz"), default=None),
        highest_sm_mhz=max(known("sm_mhz"), default=None),
        lowest_memory_mhz=min(known("memory_mhz"), default=None),
        highest_temperature_c=max(known("temperature_c"), default=None),
        highest_power_w=max(known("power_w"), default=None),
        limits=tuple(sorted({limit for some in limits for limit in some})) if limits else None,
        processes=max(known("processes"), default=None),
        readings=len(readings),
    )


def read_counters() -> MachineCounters:
    """Read the system's counters now."""
    import psutil

    times = psutil.cpu_times()
    busy = ("user", "nice", "system", "irq", "softirq")  # not all systems have the last ones
    return MachineCounters(
        busy_s=sum(getattr(times, name, 0.0) for name in busy),
        stolen_s=getattr(times, "steal", 0.0),
        own_s=time.process_time(),
        quota_s=next((read_quota_s(path) for path in QUOTA_FILES if path.is_file()), None),
    )


def read_quota_s(path: Path) -> float | None:
    """Return the seconds that a control group was held back by its quota, from its cpu.stat; None if it has no such."""
    pairs = dict(line.split(maxsplit=1) for line in path.read_text(encoding="ascii").splitlines() if " " in line)
    for name, unit_s in (("throttled_usec", 1e-6), ("throttled_time", 1e-9)):  # version 2, version 1
        if name in pairs:
            return int(pairs[name]) * unit_s
    return None


def read_governor(folder: Path = CPU_FOLDER) -> str | None:
    """Return how Linux chooses the cores' clocks, such as "performance"; None where it does not, as in most guests."""
    files = sorted(folder.glob("cpu[0-9]*/cpufreq/scaling_governor"))
    names = sorted({path.read_text(encoding="ascii").strip() for path in files})
    return ", ".join(names) or None
