"""A contender in a process of its own: its memory is its own, and if it dies, only its row does.

The process reads commands from stdin and answers each with one line of JSON on stdout. What libraries print goes to
stderr.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, TypeVar

from restyle_deploy.bench.process import cause_of_death, describe_failure, offer_to_be_killed, shorten
from restyle_deploy.errors import RestyleDeployError

Command = Callable[[str], Mapping[str, Any]]
Process = TypeVar("Process", bound="WorkerProcess")


class UnavailableError(Exception):
    """A contender cannot take part; the message is what its row says."""


class WorkerError(Exception):
    """A contender could not do what it was asked; the message is what its row says."""


class WorkerProcess:
    """A process that answers commands; usable in `with`."""

    def __init__(
        self, module: str, arguments: Sequence[str], *, log: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        """Start the process.

        Args:
            module: run by this interpreter; it calls `serve`.
            arguments: of the module.
            log: a file for what the process prints.
            environment: variables of the process, beside ours.
        """
        self._log = log
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env={**os.environ, **(environment or {})},
            )

    def ask(self, command: str) -> dict[str, Any]:
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

    def __enter__(self: Process) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _stream(self, name: str) -> IO[str]:
        stream: IO[str] | None = getattr(self._process, name)
        assert stream is not None
        return stream


def serve(commands: Mapping[str, Command], answers: IO[str]) -> None:
    """Answer the commands on stdin until that ends; a command is its name, and its argument after a space."""
    offer_to_be_killed()
    for line in sys.stdin:
        name, _, argument = line.strip().partition(" ")
        print(json.dumps(_answer(commands[name], argument)), file=answers, flush=True)


def _answer(command: Command, argument: str) -> Mapping[str, Any]:
    try:
        return command(argument)
    except (RestyleDeployError, UnavailableError, ImportError) as error:
        return {"error": shorten(str(error))}
    except (MemoryError, RuntimeError) as error:  # the latter are torch's and its compiler's; the log has the traceback
        return {"error": describe_failure(error)}
