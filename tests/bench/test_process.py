import signal
import subprocess
import sys
from pathlib import Path

import pytest

from restyle_deploy.bench.process import cause_of_death, describe_failure, shorten
from restyle_deploy.runtime.device import REMEDY
from restyle_deploy.short_memory import find_short_memory

CLAIM = """
import os
from restyle_deploy.bench.process import claim_stdout, offer_to_be_killed
answers = claim_stdout()
offer_to_be_killed()
os.write(1, b"noise of a library\\n")
print("noise of Python")
print("answer", file=answers, flush=True)
"""


@pytest.mark.parametrize(
    ("status", "log", "cause"),
    [
        (-signal.SIGKILL, "whatever", "the process was killed; most likely it needed more memory than there is"),
        (-signal.SIGSEGV, "", f"the process died (signal {int(signal.SIGSEGV)}): it said nothing"),
        (1, "Traceback\n  file\nKeyError: 'x'\n\n", "the process died (exit status 1): KeyError: 'x'"),
        (3, "\xff", "the process died (exit status 3): \ufffd"),
    ],
)
def test_end_of_a_process_is_told(tmp_path: Path, status: int, log: str, cause: str) -> None:
    (tmp_path / "log").write_bytes(log.encode("latin-1"))
    assert cause_of_death(status, tmp_path / "log") == cause


def test_end_of_a_process_is_told_without_the_signals_of_posix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(signal, "SIGKILL")
    (tmp_path / "log").write_text("KeyError: 'x'")
    for status in (0, 1):
        assert cause_of_death(status, tmp_path / "log") == f"the process died (exit status {status}): KeyError: 'x'"


def test_failure_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert describe_failure(MemoryError()) == "it needed more memory than there is"
    assert capsys.readouterr().err == ""
    assert describe_failure(RuntimeError("CUDA out of\nmemory")) == "RuntimeError: CUDA out of memory"
    assert "RuntimeError" in capsys.readouterr().err


def test_long_text_is_cut() -> None:
    assert shorten(" a\n  b ") == "a b"
    assert len(shorten("x" * 1000)) == 201


def test_long_text_keeps_the_words_that_tell_of_memory() -> None:
    """ONNX Runtime names a node and a line of its source before it says what it lacks."""
    for before in range(150, 400, 7):
        cut = shorten(f"{'x' * before} Failed to allocate memory for requested buffer of size 4; {'y' * 400}")
        assert find_short_memory(cut) == "allocate memory"
        assert len(cut) <= 201 + len(" allocate memory…")
    assert find_short_memory(shorten(f"{'x' * 400} launch failed; {REMEDY}")) is None


def test_answers_are_apart_from_what_libraries_print() -> None:
    done = subprocess.run([sys.executable, "-c", CLAIM], capture_output=True, text=True, check=True)
    assert done.stdout == "answer\n"
    assert done.stderr.splitlines() == ["noise of a library", "noise of Python"]
