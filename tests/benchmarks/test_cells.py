"""A cell: who takes turns with whom, and what a failure leaves."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks import cells
from benchmarks.cells import CellSettings, measure_cell
from benchmarks.contenders import CONTENDERS, ModelFiles
from benchmarks.worker import WorkerError
from restyle_deploy.runtime.session import Session
from restyle_deploy.verify import create_inputs

SETTINGS = CellSettings(steps=2, threads=1, rounds=3, fewest_rounds=2, seconds=60, memory_mib=24000)
MS = {"upstream": 100.0, "torch": 50.0, "onnxruntime-plain": 20.0, "openvino-plain": 10.0}


class FakeWorker:
    """Answers at once; `calls` is the order of all calls of all workers."""

    calls: list[str]
    living: set[str]
    failing: dict[str, str]
    most_living: int

    def __init__(self, contender: Any, files: Any, inputs: Path, **_: Any) -> None:
        self.name = contender.name
        FakeWorker.living.add(self.name)
        FakeWorker.most_living = max(FakeWorker.most_living, len(FakeWorker.living))

    def open(self) -> dict[str, float]:
        if FakeWorker.failing.get(self.name) == "open":
            raise WorkerError("cannot be opened")
        return {"import_s": 0.1, "open_s": 0.2, "base_mib": 10.0, "peak_mib": 100.0}

    def call(self, results: Path | None = None) -> float:
        FakeWorker.calls.append(self.name)
        if results is not None:
            value = {"torch": 0.0, "openvino-plain": 0.25}.get(self.name, 0.125)
            np.savez(results, images=np.full((1, 3, 4, 4), value, np.float32), latents=np.full((1, 2, 3), value))
        elif FakeWorker.failing.get(self.name) == "call":
            raise WorkerError("died")
        return MS[self.name]

    def memory(self) -> dict[str, float]:
        return {"peak_mib": 200.0, "resident_mib": 120.0}

    def close(self) -> None:
        FakeWorker.living.discard(self.name)


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> type[FakeWorker]:
    FakeWorker.calls, FakeWorker.living, FakeWorker.failing, FakeWorker.most_living = [], set(), {}, 0
    monkeypatch.setattr(cells, "Worker", FakeWorker)
    return FakeWorker


def measure(tmp_path: Path, **changes: Any) -> Any:
    from dataclasses import replace

    contenders = [CONTENDERS[name] for name in ("onnxruntime-plain", "openvino-plain")]
    files = ModelFiles(name="made-up", bundle=tmp_path)
    images = np.zeros((1, 4, 4, 3), np.uint8)
    return measure_cell(files, images, contenders, replace(SETTINGS, **changes))


def test_all_take_turns_and_another_begins(workers: type[FakeWorker], tmp_path: Path) -> None:
    rows = measure(tmp_path)
    assert [row.contender for row in rows] == ["upstream", "torch", "onnxruntime-plain", "openvino-plain"]
    names = list(MS)
    assert workers.calls == names + names + names[1:] + names[:1] + names[2:] + names[:2]
    assert workers.living == set()
    assert [row.ratio.median for row in rows] == [1, 2, 5, 10]
    assert [len(row.samples_ms) for row in rows] == [3, 3, 3, 3]
    assert rows[0].difference.latent_error == 0.125
    assert rows[1].difference is None  # the reference itself
    assert rows[3].difference.psnr_db == pytest.approx(20 * np.log10(2 / 0.25))
    assert (rows[3].open_s, rows[3].open_peak_mib, rows[3].run_peak_mib) == (0.2, 100, 200)


def test_what_does_not_fit_is_measured_in_groups(workers: type[FakeWorker], tmp_path: Path) -> None:
    rows = measure(tmp_path, memory_mib=600)
    assert workers.most_living == 3
    assert [len(row.samples_ms) for row in rows] == [6, 3, 3, 3]
    assert [row.ratio.median for row in rows] == [1, 2, 5, 10]


def test_time_that_is_up_leaves_the_fewest_rounds(workers: type[FakeWorker], tmp_path: Path) -> None:
    assert [len(row.samples_ms) for row in measure(tmp_path, seconds=0)] == [2, 2, 2, 2]


@pytest.mark.parametrize(("when", "reason"), [("open", "cannot be opened"), ("call", "died")])
def test_failure_is_a_row_that_says_so(workers: type[FakeWorker], tmp_path: Path, when: str, reason: str) -> None:
    workers.failing = {"onnxruntime-plain": when}
    rows = measure(tmp_path)
    assert [row.reason for row in rows] == [None, None, reason, None]
    assert rows[2].median_ms is None
    assert rows[3].ratio.median == 10


def test_without_the_baseline_there_are_times_and_no_ratios(workers: type[FakeWorker], tmp_path: Path) -> None:
    workers.failing = {"upstream": "open"}
    rows = measure(tmp_path)
    assert [row.ratio for row in rows] == [None] * 4
    assert rows[3].median_ms == 10


def test_without_the_reference_there_is_no_quality(workers: type[FakeWorker], tmp_path: Path) -> None:
    workers.failing = {"torch": "open"}
    assert [row.difference for row in measure(tmp_path)] == [None] * 4


@pytest.mark.slow
def test_toy_model_in_real_processes(toy_files: ModelFiles) -> None:
    with Session.open(toy_files.bundle, threads=1) as session:
        images = create_inputs(session.config)
    told: list[str] = []
    contenders = [CONTENDERS[name] for name in ("onnxruntime-plain", "onnxruntime")]
    rows = {row.contender: row for row in measure_cell(toy_files, images, contenders, SETTINGS, progress=told.append)}
    for name in ("upstream", "onnxruntime-plain"):
        assert rows[name].reason is None
        difference = rows[name].difference
        assert difference is not None
        assert difference.latent_error <= 1e-4
    assert rows["onnxruntime"].reason == "the bundle has no engine for it"
    assert rows["torch"].median_ms
    assert "ONNX Runtime, exported graphs: opening" in told


def test_rows_compare_only_what_was_saved(tmp_path: Path) -> None:
    assert cells._difference(tmp_path / "a.npz", tmp_path / "absent.npz") is None
    assert cells._difference(tmp_path / "a.npz", None) is None


def test_no_memory_is_known_before_the_first_call() -> None:
    failed: Any = SimpleNamespace(reason="died", memory={})
    assert cells._fits_another([failed], memory_mib=1)
