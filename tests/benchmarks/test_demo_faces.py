from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.demo_faces import CPU_BACKENDS, OPTIONS, measure
from restyle_deploy.bench.report import read_report
from tests.bench.made_up import FakeProcesses


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
    assert [job.configuration.backend for job in processes.jobs] == list(CPU_BACKENDS)
    assert not (tmp_path / "work" / "images").exists()  # no portrait is kept
