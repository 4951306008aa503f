"""A contender of the speed table on the CPU, in a process of its own.

    python -m benchmarks.worker CONTENDER BUNDLE CHECKPOINT|- INPUTS.npy STEPS THREADS|0

Its commands: `open`, `call [FILE.npz]`, `memory`; see `benchmarks.processes`.
"""

from __future__ import annotations

import importlib
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.contenders import CONTENDERS, Contender, Inverter, ModelFiles
from benchmarks.memory import read_status_mib
from benchmarks.processes import WorkerError as WorkerError  # of `Worker`
from benchmarks.processes import WorkerProcess, serve
from restyle_deploy.bench.memory import reset_peak
from restyle_deploy.bench.process import claim_stdout


class Worker(WorkerProcess):
    """A contender's process; usable in `with`."""

    def __init__(
        self, contender: Contender, files: ModelFiles, inputs: Path, *, steps: int, threads: int | None, log: Path
    ) -> None:
        """Start the process; nothing is loaded yet.

        Args:
            contender: a row of the table.
            files: the model.
            inputs: `.npy`, uint8 [N, H, W, 3].
            steps: refinement steps of a call.
            threads: of a run; None leaves the choice to the library.
            log: a file for what the process prints.
        """
        self.contender = contender
        checkpoint = "-" if files.checkpoint is None else str(files.checkpoint)
        arguments = [contender.name, str(files.bundle), checkpoint, str(inputs), str(steps), str(threads or 0)]
        super().__init__("benchmarks.worker", arguments, log=log, environment=contender.environment)

    def open(self) -> dict[str, float]:
        """Import the libraries and load the model; return `import_s`, `open_s`, `base_mib` and `peak_mib`.

        `base_mib`: resident with the libraries and without the model; `peak_mib`: while it was loaded.
        """
        return self.ask("open")

    def call(self, results: Path | None = None) -> float:
        """Invert the inputs and return the milliseconds; the images and latents go to a `.npz` where one is named."""
        return float(self.ask("call" if results is None else f"call {results}")["ms"])

    def memory(self) -> dict[str, float]:
        """Return `peak_mib`, of all calls since the opening, and `resident_mib`."""
        return self.ask("memory")


def main(arguments: list[str]) -> None:
    """Serve commands until stdin ends."""
    name, bundle, checkpoint, inputs, steps, threads = arguments
    answers = claim_stdout()
    files = ModelFiles(name="", bundle=Path(bundle), checkpoint=None if checkpoint == "-" else Path(checkpoint))
    server = _Server(CONTENDERS[name], files, Path(inputs), steps=int(steps), threads=int(threads) or None)
    serve({"open": server.open, "call": server.call, "memory": server.memory}, answers)


class _Server:
    """The contender's side of `Worker`."""

    def __init__(
        self, contender: Contender, files: ModelFiles, inputs: Path, *, steps: int, threads: int | None
    ) -> None:
        self._contender, self._files, self._steps, self._threads = contender, files, steps, threads
        self._images = np.load(inputs)
        self._inverter: Inverter | None = None

    def open(self, _: str) -> dict[str, Any]:
        begin = time.perf_counter()
        for library in self._contender.libraries:
            importlib.import_module(library)
        imported = time.perf_counter()
        base = read_status_mib("VmRSS")
        self._inverter = self._contender.open(self._files, self._threads)
        ready = time.perf_counter()
        peak = read_status_mib("VmHWM")
        reset_peak()
        return {"import_s": imported - begin, "open_s": ready - imported, "base_mib": base, "peak_mib": peak}

    def call(self, results: str) -> dict[str, Any]:
        assert self._inverter is not None
        begin = time.perf_counter()
        result = self._inverter.invert(self._images, steps=self._steps)
        ms = (time.perf_counter() - begin) * 1e3
        if results:
            np.savez(results, images=result.images, latents=result.latents)
        return {"ms": ms}

    def memory(self, _: str) -> dict[str, Any]:
        return {"peak_mib": read_status_mib("VmHWM"), "resident_mib": read_status_mib("VmRSS")}


if __name__ == "__main__":
    main(sys.argv[1:])
