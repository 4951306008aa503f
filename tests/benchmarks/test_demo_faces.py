from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.contenders import ModelFiles
from benchmarks.demo_faces import CPU_BACKENDS, OPTIONS, choose_configurations, measure, prepare_bundle
from benchmarks.models import NeedsEngine
from restyle_deploy.backends import load_backend
from restyle_deploy.backends.base import Backend
from restyle_deploy.bench.report import read_report
from restyle_deploy.bundle import read_bundle
from restyle_deploy.errors import BackendUnavailableError
from tests.bench.made_up import FakeProcesses
from tests.bundles import add_engine


def test_all_backends_of_the_cpu_are_kept_in_one_report(
    toy_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processes = FakeProcesses()
    monkeypatch.setattr("restyle_deploy.bench.schedule.run_job", processes.run_job)
    images = [(f"face{index}", np.full((32, 32, 3), index, np.uint8)) for index in range(2)]
    options = replace(OPTIONS, steps=(1, 2))
    report = measure(images, bundle=toy_bundle, work=tmp_path / "work", results=tmp_path / "results", options=options)
    assert read_report(tmp_path / "results" / "demo-faces.json") == report
    assert {path.name for path in (tmp_path / "results").iterdir()} == {"demo-faces.json", "demo-faces.png"}
    assert CPU_BACKENDS == ("onnxruntime", "openvino", "pytorch")
    measured = [job.configuration for job in processes.jobs]
    assert [one.backend for one in measured if one.precision == "fp32"] == list(CPU_BACKENDS)
    assert "pytorch-cpu-bf16-plain-b1" in {one.name for one in measured}
    assert not (tmp_path / "work" / "images").exists()  # no portrait is kept


def test_engines_are_built_into_a_copy_and_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted: set[tuple[str, str]] = set()

    def build(files: ModelFiles, contenders: Sequence[NeedsEngine], threads: int, progress: object) -> None:
        assert (files.bundle / "manifest.json").is_file()
        wanted.update(row.engine for row in contenders if row.engine)
        add_engine(files.bundle)

    monkeypatch.setattr("benchmarks.demo_faces.build_engines", build)
    bundle = prepare_bundle(tmp_path)
    assert bundle == tmp_path / "demo-faces"
    assert wanted >= {("onnxruntime", "fp32"), ("openvino", "fp32"), ("openvino", "bf16"), ("openvino", "mixed")}
    plans = {(one.backend, one.precision): one.plan for one in choose_configurations(read_bundle(bundle))}
    assert plans["onnxruntime", "fp32"] == "engine"
    assert plans["openvino", "fp32"] == "plain"


def test_backend_that_is_not_installed_keeps_its_row(toy_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> Backend:
        if name == "openvino":
            raise BackendUnavailableError("no openvino here")
        return load_backend(name)

    monkeypatch.setattr("benchmarks.demo_faces.load_backend", load)
    chosen = choose_configurations(read_bundle(toy_bundle))
    assert [one.backend for one in chosen if one.precision == "fp32"] == list(CPU_BACKENDS)
    assert [one.precision for one in chosen if one.backend == "openvino"] == ["fp32"]
