import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from restyle_deploy.bench import environment
from restyle_deploy.bench.environment import describe_environment
from restyle_deploy.processor import describe_processor
from tests.bench.fakes import FakeNvml


def test_this_machine_is_described() -> None:
    found = describe_environment()
    assert found.python == platform.python_version()
    assert found.packages["numpy"] == np.__version__
    assert found.cpu == describe_processor()
    assert 1 <= found.usable_cores <= found.logical_cores
    assert found.memory_bytes is not None
    assert found.memory_bytes > 2**28


def test_what_a_platform_lacks_is_left_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "getloadavg", raising=False)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(environment, "PACKAGES", ("no-such-package",))
    monkeypatch.setitem(sys.modules, "psutil", None)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    found = describe_environment()
    assert (found.memory_bytes, found.gpus) == (None, ())
    assert found.load_average is None
    assert found.usable_cores == found.logical_cores
    assert found.packages == {}


def test_gpus_are_described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml("0000:01:00.0"))
    assert [gpu.name for gpu in describe_environment().gpus] == ["GPU at 0000:01:00.0"]


def test_commit_is_that_of_the_checkout(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        return subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True, text=True
        ).stdout.strip()

    assert environment._read_commit(tmp_path) is None  # no checkout
    git("init", "--quiet")
    assert environment._read_commit(tmp_path) is None  # no commit
    (tmp_path / "file").write_text("a")
    git("add", "file")
    git("commit", "--quiet", "-m", "first")
    git("tag", "v1")
    commit = git("rev-parse", "HEAD")
    assert environment._read_commit(tmp_path) == commit
    (tmp_path / "file").write_text("b")
    assert environment._read_commit(tmp_path) == f"{commit}-dirty"


def test_commit_is_left_open_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".git").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment._read_commit(tmp_path) is None
