"""A contender in a process of its own: what it answers, and how it fails."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks.contenders import CONTENDERS, ModelFiles
from benchmarks.worker import Worker, WorkerError
from restyle_deploy.runtime.session import Session
from restyle_deploy.verify import create_inputs

STEPS = 2


@pytest.fixture
def inputs(toy_bundle: Path, tmp_path: Path) -> Path:
    with Session.open(toy_bundle, threads=1) as session:
        np.save(tmp_path / "inputs.npy", create_inputs(session.config))
    return tmp_path / "inputs.npy"


@pytest.fixture
def worker(toy_files: ModelFiles, inputs: Path, tmp_path: Path) -> Iterator[Worker]:
    contender = CONTENDERS["onnxruntime-plain"]
    with Worker(contender, toy_files, inputs, steps=STEPS, threads=1, log=tmp_path / "log") as worker:
        yield worker


def test_results_are_the_sessions(worker: Worker, toy_files: ModelFiles, inputs: Path, tmp_path: Path) -> None:
    opening = worker.open()
    assert opening.keys() == {"import_s", "open_s", "base_mib", "peak_mib"}
    assert min(opening["import_s"], opening["open_s"]) > 0
    assert worker.call(tmp_path / "results.npz") > 0
    assert worker.call() > 0
    assert worker.memory().keys() == {"peak_mib", "resident_mib"}
    with Session.open(toy_files.bundle, threads=1) as session:
        expected = session.invert(np.load(inputs), steps=STEPS)
    with np.load(tmp_path / "results.npz") as found:
        np.testing.assert_allclose(found["images"], expected.images, rtol=0, atol=1e-5)
        np.testing.assert_allclose(found["latents"], expected.latents, rtol=0, atol=1e-5)


def test_contender_that_cannot_run_says_why(toy_files: ModelFiles, inputs: Path, tmp_path: Path) -> None:
    with (
        Worker(CONTENDERS["onnxruntime"], toy_files, inputs, steps=STEPS, threads=1, log=tmp_path / "log") as worker,
        pytest.raises(WorkerError, match="the bundle has no engine for it"),
    ):
        worker.open()


def test_error_of_the_package_is_one_line(inputs: Path, tmp_path: Path) -> None:
    files = ModelFiles(name="absent", bundle=tmp_path / "absent")
    contender = CONTENDERS["onnxruntime-plain"]
    with (
        Worker(contender, files, inputs, steps=STEPS, threads=1, log=tmp_path / "log") as worker,
        pytest.raises(WorkerError, match="no bundle"),
    ):
        worker.open()


@pytest.mark.parametrize(
    ("number", "reason"), [(signal.SIGKILL, "more memory than there is"), (signal.SIGSEGV, r"died \(signal 11\)")]
)
def test_process_that_dies_is_told(worker: Worker, number: int, reason: str) -> None:
    worker.open()
    os.kill(worker._process.pid, number)
    with pytest.raises(WorkerError, match=reason):
        worker.call()


def test_bug_shows_the_last_line_of_the_log(toy_files: ModelFiles, tmp_path: Path) -> None:
    contender = CONTENDERS["onnxruntime-plain"]
    absent = tmp_path / "absent.npy"
    with (
        Worker(contender, toy_files, absent, steps=STEPS, threads=1, log=tmp_path / "log") as worker,
        pytest.raises(WorkerError, match=r"exit status 1\): FileNotFoundError"),
    ):
        worker.open()


def test_closing_twice_is_safe(worker: Worker) -> None:
    worker.close()
    worker.close()
    assert worker._process.returncode == 0
