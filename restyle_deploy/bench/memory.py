"""The most memory that a process held, on the host and on a GPU."""

import sys
import threading
from collections.abc import Callable
from pathlib import Path

from restyle_deploy.bench.figures import Memory

PROCESS_FOLDER = Path("/proc/self")


class MemoryWatch:
    """Watches from entering to leaving; usable in `with`, around the opening and the first call of each kind.

    The host's peak is the system's own count. A GPU's use is read by a thread, which would disturb calls that are
    timed: leave before those. It counts the whole GPU, less what was in use on entering, with the CUDA context and
    with what other programs may take meanwhile.
    """

    def __init__(self, read_device_bytes: Callable[[], int | None] | None = None, *, interval_s: float = 0.01) -> None:
        """Make one.

        Args:
            read_device_bytes: such as `GpuMonitor.used_bytes`; None where there is no GPU.
            interval_s: between two readings of it.
        """
        self._read = read_device_bytes or (lambda: None)
        self._interval_s = interval_s
        self._before: int | None = None
        self._highest = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory-watch", daemon=True)

    def __enter__(self) -> "MemoryWatch":
        reset_peak()
        self._before = self._read()
        if self._before is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._before is not None:
            self._thread.join()
            self._sample()

    def result(self) -> Memory:
        """Return the peaks: on the host until now, on the GPU until leaving."""
        device_bytes = None if self._before is None else max(0, self._highest - self._before)
        return Memory(peak_host_bytes=read_peak_bytes(), peak_device_bytes=device_bytes)

    def _watch(self) -> None:
        while not self._ended.wait(self._interval_s):
            self._sample()

    def _sample(self) -> None:
        self._highest = max(self._highest, self._read() or 0)


def read_peak_bytes(folder: Path = PROCESS_FOLDER) -> int:
    """Return the most memory that was resident: since `reset_peak` on Linux, since the process began elsewhere."""
    peak = read_status_bytes("VmHWM", folder)
    if peak is not None:
        return peak
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def read_status_bytes(name: str, folder: Path = PROCESS_FOLDER) -> int | None:
    """Return a field of Linux's status file, such as VmHWM (the peak) or VmRSS (resident now); None elsewhere."""
    status = folder / "status"
    lines = status.read_text(encoding="ascii", errors="replace").splitlines() if status.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


def reset_peak(folder: Path = PROCESS_FOLDER) -> None:
    """Let the peak start anew from what is resident now; does nothing where the system does not offer it."""
    try:
        (folder / "clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return
