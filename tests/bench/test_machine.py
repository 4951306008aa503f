import os
import time
from pathlib import Path

import pytest

from restyle_deploy.bench.gpu_monitor import GpuMonitor, GpuReading
from restyle_deploy.bench.machine import (
    GpuRecord,
    MachineCounters,
    MachineWatch,
    gpu_record_from,
    read_counters,
    read_governor,
    read_quota_s,
    record_from_counters,
)
from tests.bench.fakes import FakeClock, FakeNvml

ADDRESS = "0000:01:00.0"


def counters(busy_s: float, stolen_s: float = 0.0, own_s: float = 0.0, quota_s: float | None = None) -> MachineCounters:
    return MachineCounters(busy_s=busy_s, stolen_s=stolen_s, own_s=own_s, quota_s=quota_s)


def test_means_over_a_span() -> None:
    record = record_from_counters(counters(100, 5, 20, 1), counters(130, 7, 40, 2), seconds=10, cores=4)
    assert (record.other_cores, record.stolen_cores, record.quota_share) == (1.0, 0.2, 0.1)
    assert record.as_json() == {
        "seconds": 10,
        "cores": 4,
        "other_cores": 1.0,
        "stolen_cores": 0.2,
        "quota_share": 0.1,
        "gpu": None,
    }


def test_too_short_a_span_tells_nothing() -> None:
    record = record_from_counters(counters(100), counters(130), seconds=0.5, cores=4)
    assert (record.other_cores, record.stolen_cores, record.quota_share) == (None, None, None)


def test_no_quota_is_left_open_and_rounding_gives_no_negative_load() -> None:
    record = record_from_counters(counters(100), counters(109.9, own_s=10), seconds=10, cores=4)
    assert (record.other_cores, record.quota_share) == (0.0, None)


def test_this_machine_counts_this_process() -> None:
    before = read_counters()
    end = time.process_time() + 0.2
    while time.process_time() < end:
        pass
    after = read_counters()
    assert after.own_s - before.own_s >= 0.2
    assert after.busy_s - before.busy_s >= 0.15  # counted in steps of a hundredth of a second
    assert after.stolen_s >= before.stolen_s


def test_watch_reads_the_gpu_no_more_often_than_asked() -> None:
    clock, nvml = FakeClock(), FakeNvml(ADDRESS)
    watch = MachineWatch(gpu=GpuMonitor(nvml, ADDRESS), interval_s=1, clock=clock, read=lambda: counters(0))
    for temperature in range(40, 80):
        nvml.temperature_c, nvml.sm_mhz = temperature, 2000 - temperature
        watch.tick()
        clock.seconds += 0.25
    record = watch.record()
    assert record.seconds == 10
    assert record.cores == os.cpu_count()
    assert record.gpu is not None
    assert record.gpu.readings == 10
    assert (record.gpu.highest_temperature_c, record.gpu.lowest_sm_mhz, record.gpu.highest_sm_mhz) == (76, 1924, 1960)


def test_watch_without_a_gpu_has_none() -> None:
    watch = MachineWatch(clock=FakeClock(), read=lambda: counters(0))
    watch.tick()
    assert watch.record().gpu is None


def test_real_counters_are_the_default() -> None:
    record = MachineWatch().record()
    assert 0 <= record.seconds < 60


def test_what_held_a_gpu_back_in_any_reading_is_kept() -> None:
    def reading(limits: tuple[str, ...] | None, power_w: float | None) -> GpuReading:
        return GpuReading(sm_mhz=1, memory_mhz=2, temperature_c=None, power_w=power_w, limits=limits, processes=1)

    record = gpu_record_from([reading((), 100), reading(("b",), None), reading(("a", "b"), 300), reading(None, 200)])
    assert (record.limits, record.highest_power_w, record.highest_temperature_c) == (("a", "b"), 300, None)


def test_a_gpu_that_was_never_read_is_left_open() -> None:
    assert gpu_record_from([]) == GpuRecord(
        lowest_sm_mhz=None,
        highest_sm_mhz=None,
        lowest_memory_mhz=None,
        highest_temperature_c=None,
        highest_power_w=None,
        limits=None,
        processes=None,
        readings=0,
    )


@pytest.mark.parametrize(
    ("content", "seconds"),
    [
        ("usage_usec 5\nnr_throttled 3\nthrottled_usec 2500000\n", 2.5),
        ("nr_periods 9\nnr_throttled 3\nthrottled_time 1500000000\n", 1.5),
        ("usage_usec 5\n", None),
        ("", None),
    ],
)
def test_quota_of_both_versions_of_control_groups(tmp_path: Path, content: str, seconds: float | None) -> None:
    (tmp_path / "cpu.stat").write_text(content)
    assert read_quota_s(tmp_path / "cpu.stat") == seconds


def test_governors_of_all_cores_are_named_once(tmp_path: Path) -> None:
    assert read_governor(tmp_path) is None
    for core, governor in enumerate(("powersave", "performance", "powersave")):
        folder = tmp_path / f"cpu{core}" / "cpufreq"
        folder.mkdir(parents=True)
        (folder / "scaling_governor").write_text(f"{governor}\n")
    assert read_governor(tmp_path) == "performance, powersave"
