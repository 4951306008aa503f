"""A contender in a process of its own: its memory is its own, and if it dies, only its row does.

The process reads commands from stdin and answers each with one line of JSON on stdout. What libraries print goes to
stderr.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, TypeVar

from restyle_deploy.errors import RestyleDeployError

LONGEST_REASON = 200

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
            raise WorkerError(self._cause_of_death())
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

    def _cause_of_death(self) -> str:
        status = self._process.returncode
        if status == -signal.SIGKILL:
            return "the process was killed; most likely it needed more memory than there is"
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        cause = f"signal {-status}" if status < 0 else f"exit status {status}"
        return f"the process died ({cause}): {_shorten(lines[-1]) if lines else 'it said nothing'}"


def claim_stdout() -> IO[str]:
    """Return the real stdout and point file descriptor 1, which libraries print to, at stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def serve(commands: Mapping[str, Command], answers: IO[str]) -> None:
    """Answer the commands on stdin until that ends; a command is its name, and its argument after a space."""
    with suppress(OSError):  # if memory runs out, this process goes and not the one that measures
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    for line in sys.stdin:
        name, _, argument = line.strip().partition(" ")
        print(json.dumps(_answer(commands[name], argument)), file=answers, flush=True)


def _answer(command: Command, argument: str) -> Mapping[str, Any]:
    try:
        return command(argument)
    except MemoryError:
        return {"error": "it needed more memory than there is"}
    except (RestyleDeployError, UnavailableError, ImportError) as error:
        return {"error": _shorten(str(error))}
    except RuntimeError as error:  # torch's and its compiler's; the log has the traceback
        sys.excepthook(type(error), error, error.__traceback__)
        return {"error": _shorten(f"{type(error).__name__}: {error}")}


def _shorten(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= LONGEST_REASON else f"{line[:LONGEST_REASON]}…"
