"""One contender in a process of its own: its memory is its own, and if it dies, only its row does.

    python -m benchmarks.worker CONTENDER BUNDLE CHECKPOINT|- INPUTS.npy STEPS THREADS|0

Reads commands from stdin and answers each with one line of JSON on stdout: `open`, `call [FILE.npz]`, `memory`. What
the libraries print goes to stderr.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

from benchmarks.contenders import CONTENDERS, Contender, Inverter, ModelFiles, UnavailableError
from benchmarks.memory import read_status_mib
from restyle_deploy.bench.memory import reset_peak
from restyle_deploy.bench.process import cause_of_death, claim_stdout, describe_failure, offer_to_be_killed, shorten
from restyle_deploy.errors import RestyleDeployError


class WorkerError(Exception):
    """A contender could not do what it was asked; the message is what its row says."""


class Worker:
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
        self._log = log
        checkpoint = "-" if files.checkpoint is None else str(files.checkpoint)
        arguments = [contender.name, str(files.bundle), checkpoint, str(inputs), str(steps), str(threads or 0)]
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.worker", *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env={**os.environ, **contender.environment},
            )

    def open(self) -> dict[str, float]:
        """Import the libraries and load the model; return `import_s`, `open_s`, `base_mib` and `peak_mib`.

        `base_mib`: resident with the libraries and without the model; `peak_mib`: while it was loaded.
        """
        return self._ask("open")

    def call(self, results: Path | None = None) -> float:
        """Invert the inputs and return the milliseconds; the images and latents go to a `.npz` where one is named."""
        return float(self._ask("call" if results is None else f"call {results}")["ms"])

    def memory(self) -> dict[str, float]:
        """Return `peak_mib`, of all calls since the opening, and `resident_mib`."""
        return self._ask("memory")

    def close(self) -> None:
        """End the process; safe to call twice."""
        with suppress(OSError):
            self._stream("stdin").close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._stream("stdout").close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _stream(self, name: str) -> IO[str]:
        stream: IO[str] | None = getattr(self._process, name)
        assert stream is not None
        return stream

    def _ask(self, command: str) -> dict[str, float]:
        """Send a command and return the answer; raise `WorkerError` with the reason if there is none."""
        try:
            print(command, file=self._stream("stdin"), flush=True)
            answer = self._stream("stdout").readline()
        except OSError:
            answer = ""
        if not answer:
            self._process.wait()
            raise WorkerError(cause_of_death(self._process.returncode, self._log))
        values: dict[str, Any] = json.loads(answer)
        if "error" in values:
            raise WorkerError(values["error"])
        return values


def main(arguments: list[str]) -> None:
    """Serve commands until stdin ends."""
    name, bundle, checkpoint, inputs, steps, threads = arguments
    answers = claim_stdout()
    offer_to_be_killed()
    files = ModelFiles(name="", bundle=Path(bundle), checkpoint=None if checkpoint == "-" else Path(checkpoint))
    server = _Server(CONTENDERS[name], files, Path(inputs), steps=int(steps), threads=int(threads) or None)
    for line in sys.stdin:
        command, _, argument = line.strip().partition(" ")
        print(json.dumps(_answer(server, command, argument)), file=answers, flush=True)


def _answer(server: _Server, command: str, argument: str) -> dict[str, Any]:
    commands: dict[str, Callable[[str], dict[str, Any]]] = {
        "open": server.open,
        "call": server.call,
        "memory": server.memory,
    }
    try:
        return commands[command](argument)
    except (RestyleDeployError, UnavailableError, ImportError) as error:
        return {"error": shorten(str(error))}
    except (MemoryError, RuntimeError) as error:  # the latter are torch's and its compiler's; the log has the traceback
        return {"error": describe_failure(error)}


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
