"""A report, a bundle and sessions, all made up."""

from collections.abc import Callable
from pathlib import Path

import pytest

from restyle_deploy.bench.report import Report
from restyle_deploy.bundle import Bundle
from tests.bench.made_up import FakeProcesses, FakeSession, made_up_bundle
from tests.bench.reports import made_up_report


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """A bundle of 16 px that has no graphs; see `FakeSession`."""
    return made_up_bundle(tmp_path / "made-up")


@pytest.fixture
def session(bundle: Bundle) -> FakeSession:
    return FakeSession(bundle)


@pytest.fixture
def approximate(bundle: Bundle) -> FakeSession:
    """A session that renders all steps but the last in small, and is off by 0.01."""
    return FakeSession(bundle, preview_steps=True, offset=0.01)


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> FakeProcesses:
    """Stands for the processes that measure: configurations come out at once, with made-up figures."""
    fake = FakeProcesses()
    monkeypatch.setattr("restyle_deploy.bench.schedule.run_job", fake.run_job)
    return fake


@pytest.fixture
def executable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let a shell script stand for the interpreter of the processes that are started."""

    def replace_executable(script: str) -> None:
        path = tmp_path / "interpreter"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr("sys.executable", str(path))

    return replace_executable


@pytest.fixture
def report() -> Report:
    """See `tests.bench.reports`: six configurations that ran, one that failed, one that was skipped."""
    return made_up_report()
