"""A process that measures: what it does with its output and its memory, and how its end is told."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import IO

from restyle_deploy.short_memory import find_short_memory

LONGEST_REASON = 200
OUT_OF_MEMORY = "it needed more memory than there is"


def claim_stdout() -> IO[str]:
    """Return the real stdout and point file descriptor 1, which libraries print to, at stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def offer_to_be_killed() -> None:
    """Ask Linux to end this process, and not the one that started it, if memory runs out."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")


def cause_of_death(status: int, log: Path) -> str:
    """Return why a process ended without an answer.

    Args:
        status: its exit status; negative for a signal.
        log: what it printed.
    """
    if status == -getattr(signal, "SIGKILL", 0) and status:  # Windows has none
        return "the process was killed; most likely it needed more memory than there is"
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    cause = f"signal {-status}" if status < 0 else f"exit status {status}"
    return f"the process died ({cause}): {shorten(lines[-1]) if lines else 'it said nothing'}"


def describe_failure(error: BaseException) -> str:
    """Return one line on an exception; the traceback goes to stderr where the message alone may not do."""
    if isinstance(error, MemoryError):
        return OUT_OF_MEMORY
    sys.excepthook(type(error), error, error.__traceback__)
    return shorten(f"{type(error).__name__}: {error}")


def shorten(text: str) -> str:
    """Return a text as one line of bearable length; words that tell that memory is short are not lost."""
    line = " ".join(text.split())
    if len(line) <= LONGEST_REASON:
        return line
    cut, telling = line[:LONGEST_REASON], find_short_memory(line)
    return f"{cut}…" if telling is None or find_short_memory(cut) else f"{cut}… {telling}…"
