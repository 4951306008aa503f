import subprocess
import sys
import threading
from pathlib import Path

import pytest

from restyle_deploy.bench.memory import MemoryWatch, read_peak_bytes, reset_peak

MEBIBYTE = 2**20


def test_peak_of_the_status_file(tmp_path: Path) -> None:
    (tmp_path / "status").write_text("Name:\tpython\nVmHWM:\t    2048 kB\nVmRSS:\t    1024 kB\n")
    assert read_peak_bytes(tmp_path) == 2048 * 1024


def test_peak_without_a_status_file_is_the_systems(tmp_path: Path) -> None:
    assert read_peak_bytes(tmp_path) > MEBIBYTE


def test_reset_does_nothing_where_it_is_not_offered(tmp_path: Path) -> None:
    reset_peak(tmp_path / "absent")
    assert not (tmp_path / "absent").exists()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux lets the peak start anew")
def test_peak_is_of_the_watched_time() -> None:
    # In a process of its own: one that has run other tests has free memory that stays resident.
    program = (
        "import numpy as np\n"
        "from restyle_deploy.bench.memory import MemoryWatch\n"
        f"before = np.ones({64 * MEBIBYTE}, np.uint8)\n"
        "del before\n"
        "with MemoryWatch() as watch:\n"
        "    small = watch.result().peak_host_bytes\n"
        f"    held = np.ones({128 * MEBIBYTE}, np.uint8)\n"
        "print(watch.result().peak_host_bytes - small)\n"
    )
    grown = int(subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout)
    assert 120 * MEBIBYTE < grown < 150 * MEBIBYTE


def test_device_peak_is_seen_between_two_looks() -> None:
    looked = threading.Event()
    in_use = [10 * MEBIBYTE]

    def read() -> int:
        if in_use[0] == 90 * MEBIBYTE:
            looked.set()
        return in_use[0]

    with MemoryWatch(read, interval_s=0.001) as watch:
        in_use[0] = 90 * MEBIBYTE
        assert looked.wait(timeout=30)
        in_use[0] = 30 * MEBIBYTE
    assert watch.result().peak_device_bytes == 80 * MEBIBYTE


def test_last_look_is_on_leaving() -> None:
    values = iter([5, 25])
    with MemoryWatch(lambda: next(values), interval_s=3600) as watch:
        pass
    assert watch.result().peak_device_bytes == 20


def test_device_memory_that_nobody_tells_is_left_open() -> None:
    for read in (None, lambda: None):
        with MemoryWatch(read) as watch:
            pass
        assert watch.result().peak_device_bytes is None


def test_the_watch_ends_with_an_error_inside() -> None:
    threads = threading.active_count()
    with pytest.raises(KeyError), MemoryWatch(lambda: 1):
        raise KeyError
    assert threading.active_count() == threads
    assert sys.exc_info() == (None, None, None)
