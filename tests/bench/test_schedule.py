"""One configuration after the other: what is taken from a former run, what is left out, and what a sweep adds."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from restyle_deploy.bench import schedule
from restyle_deploy.bench.job import Job
from restyle_deploy.bench.metrics import MetricOptions
from restyle_deploy.bench.report import Configuration, Part
from restyle_deploy.bench.schedule import BenchOptions, Jobs, measure_all
from restyle_deploy.bench.strips import write_step_images
from restyle_deploy.bundle import MANIFEST, Bundle
from restyle_deploy.engines import DamagedEngine
from tests.bench.made_up import INPUT_SIZE, FakeProcesses, failed_part
from tests.bench.reports import made_up_environment

ONE, TWO, THREE = (Configuration(backend=name, plan="plain") for name in ("onnxruntime", "openvino", "pytorch"))
IMAGES = [(f"photo{index}", np.full((20, 30, 3), 100 * index, np.uint8)) for index in range(3)]

Measure = Callable[..., tuple[list[Part], bool]]


@pytest.fixture
def measure(bundle: Bundle, processes: FakeProcesses, tmp_path: Path) -> Measure:
    """Run a schedule with made-up processes."""

    def measure(
        *configurations: Configuration,
        images: Any = IMAGES,
        environment: Any = None,
        damaged_engines: tuple[DamagedEngine, ...] = (),
        **changes: Any,
    ) -> tuple[list[Part], bool]:
        options = BenchOptions(**{"steps": (2, 1), **changes})
        (tmp_path / "out" / "cells").mkdir(parents=True, exist_ok=True)
        jobs = Jobs(
            replace(bundle, damaged_engines=damaged_engines),
            images,
            tmp_path / "out",
            options,
            environment=environment or made_up_environment(),
            files=(),
            folder=tmp_path,
        )
        return measure_all(jobs, configurations, options, lambda name, done, total: None)

    return measure


def statuses(parts: list[Part]) -> list[tuple[str, str]]:
    return [(part.result.configuration.name, part.result.status) for part in parts]


def test_configurations_are_measured_in_their_order(measure: Measure, processes: FakeProcesses, tmp_path: Path) -> None:
    parts, is_interrupted = measure(ONE, TWO)
    assert statuses(parts) == [(ONE.name, "ok"), (TWO.name, "ok")]
    assert not is_interrupted
    assert processes.names == [ONE.name, TWO.name]
    job = processes.jobs[0]
    assert (job.steps, job.names, job.output) == ((1, 2), ("photo0", "photo1", "photo2"), str(tmp_path / "out"))
    assert np.load(job.targets).shape == (3, 3, INPUT_SIZE, INPUT_SIZE)
    assert processes.seconds == [None, None]


def test_finished_parts_are_taken_on_resume(measure: Measure, processes: FakeProcesses) -> None:
    first, _ = measure(ONE)
    second, _ = measure(ONE, TWO, resume=True)
    assert processes.names == [ONE.name, TWO.name]
    assert second[0] == first[0]
    measure(ONE)
    assert processes.names == [ONE.name, TWO.name, ONE.name]


def test_failed_part_is_measured_again(measure: Measure, processes: FakeProcesses) -> None:
    processes.outcomes[ONE.name] = failed_part
    parts, _ = measure(ONE, TWO)
    assert statuses(parts) == [(ONE.name, "failed"), (TWO.name, "ok")]
    processes.outcomes.clear()
    parts, _ = measure(ONE, TWO, resume=True)
    assert statuses(parts) == [(ONE.name, "ok"), (TWO.name, "ok")]
    assert processes.names == [ONE.name, TWO.name, ONE.name]


def test_part_whose_metric_failed_is_measured_again(measure: Measure, processes: FakeProcesses) -> None:
    def without_lpips(job: Job, key: str) -> Part:
        part = processes.measured(job, key)
        return replace(part, result=replace(part.result, reason="LPIPS: it failed while it measured: no memory"))

    processes.outcomes[ONE.name] = without_lpips
    parts, _ = measure(ONE)
    assert statuses(parts) == [(ONE.name, "ok")]
    processes.outcomes.clear()
    parts, _ = measure(ONE, resume=True)
    assert parts[0].result.reason is None
    assert processes.names == [ONE.name, ONE.name]


def test_damaged_part_is_measured_again(measure: Measure, processes: FakeProcesses, tmp_path: Path) -> None:
    measure(ONE)
    (tmp_path / "out" / "cells" / f"{ONE.name}.json").write_text("{")
    measure(ONE, resume=True)
    assert processes.names == [ONE.name, ONE.name]


def test_part_of_another_benchmark_is_not_taken(
    measure: Measure, processes: FakeProcesses, bundle: Bundle, tmp_path: Path
) -> None:
    measure(ONE)
    (tmp_path / "alexnet.pth").write_bytes(b"weights")
    weights = MetricOptions(lpips_backbone=tmp_path / "alexnet.pth")
    newer = replace(made_up_environment(), packages={"numpy": "2.0.0", "onnxruntime": "1.24.0"})
    others: list[dict[str, Any]] = [
        {"images": [(name, image + 1) for name, image in IMAGES]},
        {"repeats": 5},
        {"environment": newer},
        {"metrics": weights},
    ]
    for count, change in enumerate(others, start=2):
        measure(ONE, resume=True, **change)
        assert len(processes.jobs) == count
    (tmp_path / "alexnet.pth").write_bytes(b"others")
    measure(ONE, resume=True, metrics=weights)
    (bundle.path / MANIFEST).write_text('{"engines": []}')
    measure(ONE, resume=True, metrics=weights)
    assert len(processes.jobs) == 7
    busier = replace(made_up_environment(), load_average=(2.0, 2.0, 2.0))
    measure(ONE, resume=True, metrics=weights, environment=busier)
    assert len(processes.jobs) == 7


def test_part_is_not_taken_when_a_metrics_file_has_changed(
    measure: Measure, processes: FakeProcesses, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    (tmp_path / "face.onnx").write_bytes(b"model")
    again: dict[str, Any] = {"resume": True, "metrics": MetricOptions(identity_model=tmp_path / "face.onnx")}
    measure(ONE, **again)
    (tmp_path / "face.json").write_text('{"channels": "bgr"}')
    measure(ONE, **again)
    assert len(processes.jobs) == 2
    (tmp_path / "torch" / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "torch" / "hub" / "checkpoints" / "alexnet-owt-7be5be79.pth").write_bytes(b"weights")
    measure(ONE, **again)
    measure(ONE, **again)
    assert len(processes.jobs) == 3


def test_pictures_of_a_former_run_are_removed(measure: Measure, tmp_path: Path) -> None:
    pixels = np.zeros((4, 4, 3), np.uint8)
    write_step_images(tmp_path / "out", ONE.name, "former", pixels, {9: pixels})
    measure(ONE, picture_count=1)
    assert [path.name for path in (tmp_path / "out" / "images" / ONE.name).iterdir()] == ["photo0"]
    measure(ONE, picture_count=1, resume=True)
    assert (tmp_path / "out" / "images" / ONE.name / "photo0").is_dir()


def test_interruption_keeps_what_is_finished(measure: Measure, processes: FakeProcesses) -> None:
    processes.outcomes[TWO.name] = KeyboardInterrupt()
    parts, is_interrupted = measure(ONE, TWO, THREE)
    assert is_interrupted
    assert statuses(parts) == [(ONE.name, "ok"), (TWO.name, "skipped"), (THREE.name, "skipped")]
    assert "interrupted while" in str(parts[1].result.reason)
    processes.outcomes.clear()
    parts, is_interrupted = measure(ONE, TWO, THREE, resume=True)
    assert (is_interrupted, [status for _, status in statuses(parts)]) == (False, ["ok"] * 3)
    assert processes.names == [ONE.name, TWO.name, TWO.name, THREE.name]


def test_what_a_former_run_finished_is_reported_after_an_interruption(
    measure: Measure, processes: FakeProcesses
) -> None:
    first, _ = measure(ONE, THREE)
    processes.outcomes[TWO.name] = KeyboardInterrupt()
    parts, is_interrupted = measure(ONE, TWO, THREE, replace(THREE, batch=2), resume=True)
    assert is_interrupted
    assert [part.result.status for part in parts] == ["ok", "skipped", "ok", "skipped"]
    assert parts[2] == first[1]
    assert parts[3].result.reason == "the bench was interrupted before"
    parts, _ = measure(ONE, TWO, THREE)  # not asked to go on: what is there is another run's
    assert statuses(parts) == [(ONE.name, "ok"), (TWO.name, "skipped"), (THREE.name, "skipped")]


def test_parts_of_trees_with_other_changes_are_not_taken(
    measure: Measure, processes: FakeProcesses, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "package" / "ops" / "one.py"
    source.parent.mkdir(parents=True)
    monkeypatch.setattr(schedule, "PACKAGE", tmp_path / "package")
    changed = replace(made_up_environment(), commit="0123abcd-dirty")
    counts: list[int] = []
    for text in ("first", "first", "second"):
        source.write_text(text)
        (source.parent / "__pycache__").mkdir(exist_ok=True)
        (source.parent / "__pycache__" / "one.pyc").write_text(f"{len(counts)}")
        measure(ONE, resume=True, environment=changed)
        counts.append(len(processes.jobs))
    assert counts == [1, 1, 2]
    source.rename(source.with_name("two.py"))
    measure(ONE, resume=True, environment=changed)
    assert len(processes.jobs) == 3


def test_source_of_a_commit_is_not_read(measure: Measure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "_hash_of_source", None)
    measure(ONE, environment=replace(made_up_environment(), commit="0123abcd"))


def test_time_budget_ends_the_bench(
    measure: Measure, processes: FakeProcesses, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter([0.0, 1.0, 50.0, 120.0])
    monkeypatch.setattr("time.monotonic", lambda: next(now))
    parts, _ = measure(ONE, TWO, THREE, time_budget_s=60.0)
    assert statuses(parts) == [(ONE.name, "ok"), (TWO.name, "ok"), (THREE.name, "skipped")]
    assert parts[2].result.reason == "the time budget of 60 s was spent"
    assert processes.seconds == [59.0, 10.0]


def test_finished_parts_are_taken_when_the_time_is_over(
    measure: Measure, processes: FakeProcesses, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter([0.0, 1.0, 0.0, 100.0])
    monkeypatch.setattr("time.monotonic", lambda: next(now))
    measure(ONE, time_budget_s=60.0)
    parts, _ = measure(ONE, time_budget_s=60.0, resume=True)
    assert statuses(parts) == [(ONE.name, "ok")]


def test_plan_without_an_engine_is_skipped(measure: Measure, processes: FakeProcesses, bundle: Bundle) -> None:
    parts, _ = measure(replace(ONE, plan="engine"), ONE)
    assert [part.result.status for part in parts] == ["skipped", "ok"]
    assert parts[0].result.reason == (
        f"the bundle has no engine for it; run: restyle-deploy build {bundle.path} --backend onnxruntime"
    )
    assert processes.names == [ONE.name]


def test_damaged_engine_is_left_to_its_process(measure: Measure, processes: FakeProcesses) -> None:
    damaged = DamagedEngine(key=("onnxruntime", "cpu", "fp32"), name="onnxruntime-cpu-fp32", reason="no hash")
    measure(replace(ONE, plan="engine"), damaged_engines=(damaged,))
    assert processes.names == ["onnxruntime-cpu-fp32-engine-b1"]


def test_sweep_doubles_batches_until_nothing_grows(measure: Measure, processes: FakeProcesses) -> None:
    processes.images_per_s = {1: 100.0, 2: 180.0, 4: 181.0, 8: 182.0}
    parts, _ = measure(ONE, sweeps=True, against="torch", load_shares=(0.5,), load_rates=(12.0,))
    assert [part.result.configuration.batch for part in parts] == [1, 2, 4, 8]
    whole, *swept = processes.jobs
    assert (whole.steps, whole.against, whole.load_shares) == ((1, 2), "torch", (0.5,))
    assert [job.load_rates for job in processes.jobs] == [(12.0,), (), (), ()]
    assert whole.metrics is not None
    for job in swept:
        assert (job.steps, job.metrics, job.against, job.load_shares, job.picture_count) == ((2,), None, None, (), 0)


def test_sweep_ends_where_a_batch_does_not_fit(measure: Measure, processes: FakeProcesses) -> None:
    processes.images_per_s = {1: 100.0, 2: 200.0}
    processes.outcomes["onnxruntime-cpu-fp32-plain-b4"] = failed_part
    parts, _ = measure(ONE, TWO, sweeps=True, most_batch=2)
    assert [part.result.configuration.batch for part in parts] == [1, 2, 1, 2]
    parts, _ = measure(ONE, sweeps=True)
    assert statuses(parts)[-1] == ("onnxruntime-cpu-fp32-plain-b4", "failed")
    assert len(parts) == 3


def test_sweep_measures_no_configuration_twice(measure: Measure, processes: FakeProcesses) -> None:
    processes.images_per_s = {batch: 100.0 * batch for batch in (1, 2, 4, 8, 16)}
    measure(ONE, replace(ONE, batch=4), sweeps=True, most_batch=16)
    assert [job.configuration.batch for job in processes.jobs] == [1, 2, 4, 8, 16]
    assert [job.metrics is None for job in processes.jobs] == [False, True, False, True, True]


def test_sweep_of_a_failed_configuration_does_not_begin(measure: Measure, processes: FakeProcesses) -> None:
    processes.outcomes[ONE.name] = failed_part
    assert len(measure(ONE, sweeps=True)[0]) == 1
