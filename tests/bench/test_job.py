import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from restyle_deploy.bench.job import Job, key_of, plain_metric_options, read_job, write_job
from restyle_deploy.bench.metrics import MetricOptions
from restyle_deploy.bench.report import Configuration
from restyle_deploy.errors import ReportError


def make_job(**changes: Any) -> Job:
    values = {
        "bundle": "bundle",
        "configuration": Configuration(backend="openvino", precision="bf16", threads=2),
        "steps": (1, 2),
        "warmup": None,
        "repeats": 3,
        "targets": "targets.npy",
        "names": ("a", "b"),
        "files": ("a.png", "b.png"),
        "output": "out",
        "picture_count": 1,
    }
    return Job(**{**values, **changes})


OPTIONS = MetricOptions(
    names=("mse", "lpips"), lpips_backbone=Path("alexnet.pth"), identity_size=(112, 112), identity_mean=(0.5, 0.5, 0.5)
)


@pytest.mark.parametrize("options", [MetricOptions(), OPTIONS, None])
def test_what_is_written_is_read(tmp_path: Path, options: MetricOptions | None) -> None:
    metrics = None if options is None else plain_metric_options(options)
    job = make_job(metrics=metrics, against="torch", load_shares=(0.5, 0.9), load_rates=(12.0,))
    write_job(job, tmp_path / "one.job")
    found = read_job(tmp_path / "one.job")
    assert found == job
    assert found.metric_options == options


def test_incomplete_job_is_named(tmp_path: Path) -> None:
    (tmp_path / "one.job").write_text(json.dumps({"bundle": "bundle"}))
    with pytest.raises(ReportError, match=r"one\.job: not a complete job: .*configuration is missing"):
        read_job(tmp_path / "one.job")


@pytest.mark.parametrize(
    "change",
    [
        {"configuration": Configuration(backend="openvino")},
        {"steps": (1,)},
        {"warmup": 3},
        {"repeats": 4},
        {"names": ("a", "c")},
        {"picture_count": 2},
        {"metrics": None},
        {"against": "torch"},
        {"load_shares": (0.5,)},
        {"load_rates": (0.5,)},
    ],
)
def test_results_of_another_job_have_another_key(change: dict[str, Any]) -> None:
    assert key_of(make_job(**change), {}) != key_of(make_job(), {})


def test_what_lies_around_a_job_is_in_its_key() -> None:
    assert key_of(make_job(), {"targets": "1"}) != key_of(make_job(), {"targets": "2"})


def test_places_are_not_in_the_key() -> None:
    moved = replace(make_job(), bundle="other", targets="x.npy", output="else", files=())
    assert key_of(moved, {}) == key_of(make_job(), {})
