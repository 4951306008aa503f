"""A contender of the table of the GPU, in a process of its own.

    python -m benchmarks.gpu_worker CONTENDER BUNDLE CHECKPOINT|- INPUTS.npy STEPS DEVICE

Its commands: `open`, `call COUNT [FILE.npz]`, `endure COUNT`; see `benchmarks.processes`.
"""

from __future__ import annotations

import gc
import sys
import time
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.contenders import ModelFiles
from benchmarks.gpu_contenders import GPU_CONTENDERS, GpuContender, Inverter
from benchmarks.gpu_table import Growth
from benchmarks.memory import read_status_mib
from benchmarks.processes import WorkerProcess, serve
from restyle_deploy.bench.gpu_monitor import open_gpu_monitor
from restyle_deploy.bench.memory import MemoryWatch
from restyle_deploy.bench.process import claim_stdout
from restyle_deploy.bundle import read_bundle
from restyle_deploy.errors import BackendUnavailableError
from restyle_deploy.runtime.targets import targets_from_images

BYTES_PER_MIB = 2**20
WATCH_INTERVAL_S = 0.002
# Calls before memory is looked at, so that all that is allocated once has been.
CALLS_TO_SETTLE = 20


@dataclass(frozen=True, kw_only=True)
class CallTimes:
    """Times of calls whose inputs are on the device, one after the other.

    Attributes:
        gpu_ms: from the caller's stream to where results can be read there, by events; empty without a GPU.
        wall_ms: until the host knows that they are there.
        host_us: until the call returns, with nothing else in the queue; empty without a GPU.
        device_mib: the most memory of the device in use at once, above what was before the model was loaded: from then
            to the end of the first command to call. None without a GPU, or where the driver does not tell.
    """

    gpu_ms: tuple[float, ...]
    wall_ms: tuple[float, ...]
    host_us: tuple[float, ...]
    device_mib: float | None


class GpuWorker(WorkerProcess):
    """A contender's process; usable in `with`."""

    def __init__(
        self, contender: GpuContender, files: ModelFiles, inputs: Path, *, steps: int, device: str, log: Path
    ) -> None:
        """Start the process; nothing is loaded yet.

        Args:
            contender: a row of the table.
            files: the model.
            inputs: `.npy`, uint8 [N, H, W, 3].
            steps: refinement steps of a call.
            device: `cuda:0` and so on, or `cpu`.
            log: a file for what the process prints.
        """
        checkpoint = "-" if files.checkpoint is None else str(files.checkpoint)
        arguments = [contender.name, str(files.bundle), checkpoint, str(inputs), str(steps), device]
        super().__init__("benchmarks.gpu_worker", arguments, log=log)

    def open(self) -> float:
        """Put the inputs on the device, then load the model; return the seconds that the latter took."""
        return float(self.ask("open")["open_s"])

    def call(self, count: int, results: Path | None = None) -> CallTimes:
        """Call one time that does not count, then so many; images and latents go to a `.npz` where one is named.

        The first time, memory is watched meanwhile, which may disturb the times.
        """
        answer = self.ask(f"call {count}" if results is None else f"call {count} {results}")
        return CallTimes(
            gpu_ms=tuple(answer["gpu_ms"]),
            wall_ms=tuple(answer["wall_ms"]),
            host_us=tuple(answer["host_us"]),
            device_mib=answer["device_mib"],
        )

    def endure(self, count: int) -> Growth:
        """Call so many times and look at the memory before and after."""
        return Growth(**self.ask(f"endure {count}"))


def main(arguments: list[str]) -> None:
    """Serve commands until stdin ends."""
    name, bundle, checkpoint, inputs, steps, device = arguments
    answers = claim_stdout()
    files = ModelFiles(name="", bundle=Path(bundle), checkpoint=None if checkpoint == "-" else Path(checkpoint))
    server = _Server(GPU_CONTENDERS[name], files, Path(inputs), steps=int(steps), device=device)
    with server.stream():
        serve({"open": server.open, "call": server.call, "endure": server.endure}, answers)


class _Server:
    """The contender's side of `GpuWorker`."""

    def __init__(self, contender: GpuContender, files: ModelFiles, inputs: Path, *, steps: int, device: str) -> None:
        self._contender, self._files, self._steps, self._device = contender, files, steps, device
        self._images = np.load(inputs)
        self._on_gpu = device.startswith("cuda")
        self._inverter: Inverter | None = None
        self._watching = ExitStack()
        self._watch = MemoryWatch()

    def stream(self) -> AbstractContextManager[Any]:
        """Return a scope with a stream of its own, as a program has that does more than one thing."""
        return torch.cuda.stream(torch.cuda.Stream(self._device)) if self._on_gpu else nullcontext()

    def open(self, _: str) -> dict[str, Any]:
        config = read_bundle(self._files.bundle).config
        self._target = torch.from_numpy(targets_from_images(self._images, config)).to(self._device)
        if self._on_gpu:
            try:
                monitor = self._watching.enter_context(open_gpu_monitor(self._device))
                self._watch = MemoryWatch(monitor.used_bytes, interval_s=WATCH_INTERVAL_S)
            except BackendUnavailableError as error:
                print(f"the device's memory is not watched: {error}", file=sys.stderr)  # noqa: T201  of the process's log
        self._watching.enter_context(self._watch)
        begin = time.perf_counter()
        self._inverter = self._contender.open(self._files, self._device, len(self._images))
        return {"open_s": time.perf_counter() - begin}

    def call(self, argument: str) -> dict[str, Any]:
        count, _, results = argument.partition(" ")
        samples: list[dict[str, float]] = []
        result = self._timed_call()[0]
        for _ in range(int(count)):
            del result  # as who calls again has done with the last one
            result, times = self._timed_call()
            samples.append(times)
        self._watching.close()
        peak = self._watch.result().peak_device_bytes
        if results:
            assert self._inverter is not None
            read = self._inverter.read(result)
            np.savez(results, images=read.images, latents=read.latents)
        times_by_name = {
            name: [sample[name] for sample in samples if name in sample] for name in ("gpu_ms", "wall_ms", "host_us")
        }
        return {**times_by_name, "device_mib": None if peak is None else peak / BYTES_PER_MIB}

    def endure(self, argument: str) -> dict[str, Any]:
        def look() -> tuple[float, float]:
            gc.collect()
            return self._free_bytes() / BYTES_PER_MIB, read_status_mib("VmRSS")

        for _ in range(CALLS_TO_SETTLE):
            self._timed_call()
        free, resident = look()
        for _ in range(int(argument)):
            self._timed_call()
        free_after, resident_after = look()
        return {
            "calls": int(argument),
            "device_mib": free - free_after if self._on_gpu else None,
            "host_mib": resident_after - resident,
        }

    def _timed_call(self) -> tuple[Any, dict[str, float]]:
        """Invert; return the result, and the times that this device has."""
        assert self._inverter is not None
        if not self._on_gpu:
            begin = time.perf_counter()
            result = self._inverter.invert(self._target, steps=self._steps)
            return result, {"wall_ms": (time.perf_counter() - begin) * 1e3}
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        begin = time.perf_counter()
        result = self._inverter.invert(self._target, steps=self._steps)
        returned = time.perf_counter()
        end.record()
        end.synchronize()
        done = time.perf_counter()
        return result, {
            "gpu_ms": start.elapsed_time(end),
            "wall_ms": (done - begin) * 1e3,
            "host_us": (returned - begin) * 1e6,
        }

    def _free_bytes(self) -> int:
        if not self._on_gpu:
            return 0
        torch.cuda.synchronize()
        return int(torch.cuda.mem_get_info(self._device)[0])


if __name__ == "__main__":
    main(sys.argv[1:])
