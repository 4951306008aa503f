"""A configuration in a process of its own: what comes back, and how it fails."""

import io
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from restyle_deploy.bench import worker
from restyle_deploy.bench.job import Job, plain_metric_options, write_job
from restyle_deploy.bench.metrics import MetricOptions
from restyle_deploy.bench.report import Configuration, Part, read_part, write_part
from restyle_deploy.bench.worker import main, run_job, skipped_part
from restyle_deploy.errors import BackendUnavailableError, BuildError

Executable = Callable[[str], None]

ON_POSIX = pytest.mark.skipif(os.name != "posix", reason="a shell script stands for the process")


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """A job for a bundle that there is not."""
    np.save(tmp_path / "targets.npy", np.random.default_rng(0).uniform(-1, 1, (2, 3, 32, 32)).astype(np.float32))
    return Job(
        bundle=str(tmp_path / "absent"),
        configuration=Configuration(backend="onnxruntime", plan="plain", threads=1),
        steps=(1, 2),
        warmup=0,
        repeats=2,
        targets=str(tmp_path / "targets.npy"),
        names=("a", "b"),
        files=(),
        output=str(tmp_path / "out"),
        picture_count=1,
        metrics=plain_metric_options(MetricOptions(names=("mse",))),
    )


def run(job: Job, tmp_path: Path, **options: object) -> Part:
    (tmp_path / "cells").mkdir(exist_ok=True)
    return run_job(job, "key", part=tmp_path / "cells" / "one.json", log=tmp_path / "cells" / "one.log", **options)  # type: ignore[arg-type]


def test_configuration_is_measured_in_its_process(job: Job, toy_bundle: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    part = run(replace(job, bundle=str(toy_bundle)), tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert (part.key, part.result.status, part.result.reason) == ("key", "ok", None)
    assert [row.steps for row in part.result.rows] == [1, 2]
    assert [metric.name for metric in part.metrics] == ["mse"]
    assert seen[-1] == (2 * 2 + 2 * (1 + 2), 2 * 2 + 2 * (1 + 2))
    assert read_part(tmp_path / "cells" / "one.json") == part
    assert {path.name for path in (tmp_path / "cells").iterdir()} == {"one.json", "one.log"}
    assert (tmp_path / "out" / "images" / job.configuration.name / "a" / "step-2.png").is_file()


def test_error_of_the_process_is_its_rows_reason(job: Job, tmp_path: Path) -> None:
    part = run(job, tmp_path)
    assert part.result.status == "failed"
    assert "absent: no bundle" in str(part.result.reason)


@ON_POSIX
@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("kill -9 $$", "the process was killed; most likely it needed more memory than there is"),
        ("echo 'a library: bad' >&2; kill -11 $$", "the process died (signal 11): a library: bad"),
        ("exit 3", "the process died (exit status 3): it said nothing"),
    ],
)
def test_process_that_dies_is_a_row(job: Job, tmp_path: Path, executable: Executable, script: str, reason: str) -> None:
    executable(script)
    part = run(job, tmp_path)
    assert (part.result.status, part.result.reason) == ("failed", reason)
    assert part.result.configuration == job.configuration


@ON_POSIX
def test_part_of_a_former_run_does_not_stand_for_one_that_died(
    job: Job, tmp_path: Path, executable: Executable
) -> None:
    (tmp_path / "cells").mkdir()
    write_part(skipped_part(job, "key", "former"), tmp_path / "cells" / "one.json")
    executable("exit 3")
    assert "exit status 3" in str(run(job, tmp_path).result.reason)


@ON_POSIX
def test_process_is_ended_when_its_time_is_over(job: Job, tmp_path: Path, executable: Executable) -> None:
    executable("exec sleep 60")
    part = run(job, tmp_path, seconds=0.2)
    assert part.result.status == "skipped"
    assert part.result.reason == "the time budget ran out while it was measured"


@ON_POSIX
def test_part_that_is_complete_counts_though_the_time_is_over(job: Job, tmp_path: Path, executable: Executable) -> None:
    write_part(skipped_part(job, "key", "written in time"), tmp_path / "whole.json")
    executable(f"cp {tmp_path}/whole.json {tmp_path}/cells/one.json; exec sleep 60")
    assert run(job, tmp_path, seconds=0.5).result.reason == "written in time"


@ON_POSIX
def test_what_else_is_printed_is_no_progress(job: Job, tmp_path: Path, executable: Executable) -> None:
    executable("echo 'a library: hello'; printf '\\377\\n'; echo 1 9; echo; exit 3")
    seen: list[tuple[int, int]] = []
    part = run(job, tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 9)]
    assert "exit status 3" in str(part.result.reason)


@ON_POSIX
def test_interruption_ends_the_process(job: Job, tmp_path: Path, executable: Executable) -> None:
    executable(f"echo $$ > {tmp_path}/pid; echo 1 9; exec sleep 60")

    def interrupt(done: int, total: int) -> None:
        assert (done, total) == (1, 9)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(job, tmp_path, progress=interrupt)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert not (tmp_path / "cells" / "one.job").exists()


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (BackendUnavailableError("needs openvino"), "skipped", "needs openvino"),
        (BuildError("the backend refuses\nthe graph"), "failed", "the backend refuses the graph"),
        (MemoryError(), "failed", "it needed more memory than there is"),
        (RuntimeError("CUDA error: out of memory"), "failed", "RuntimeError: CUDA error: out of memory"),
    ],
)
def test_failure_is_written_as_a_part(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, status: str, reason: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(worker, "measure_configuration", fail)
    monkeypatch.setattr(worker, "claim_stdout", io.StringIO)
    monkeypatch.setattr(worker, "offer_to_be_killed", lambda: None)
    write_job(job, tmp_path / "one.job")
    main([str(tmp_path / "one.job"), str(tmp_path / "one.json"), "key"])
    result = read_part(tmp_path / "one.json").result
    assert (result.status, result.reason, result.rows) == (status, reason, ())
