"""Contenders of the GPU's table in processes of their own, on the CPU and with stand-ins for torch's events."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from benchmarks import gpu_cells, gpu_worker
from benchmarks.contenders import ModelFiles
from benchmarks.gpu_cells import GpuSettings, measure_gpu_cell
from benchmarks.gpu_contenders import GPU_CONTENDERS, TorchInverter
from benchmarks.gpu_table import Growth
from benchmarks.gpu_worker import CallTimes
from benchmarks.processes import WorkerError
from benchmarks.upstream_arithmetic import UpstreamArithmetic
from restyle_deploy.bench.memory import MemoryWatch
from restyle_deploy.runtime.results import InversionResult
from tests.toy import toy_model

SETTINGS = GpuSettings(device="cpu", steps=2, rounds=3, calls=2, endured_calls=7)
IMAGES = np.zeros((1, 32, 32, 3), np.uint8)


class StandInWorker:
    """A worker whose times are made up; `answers` gives what the contender computes, or how it fails."""

    answers: dict[str, Any] = {}
    log: list[tuple[str, str]] = []

    def __init__(self, contender: Any, files: Any, inputs: Path, **_: Any) -> None:
        self.name = contender.name

    def open(self) -> float:
        self.log.append((self.name, "open"))
        if self.answers[self.name] is None:
            raise WorkerError("it cannot be opened")
        return 0.5

    def call(self, count: int, results: Path | None = None) -> CallTimes:
        self.log.append((self.name, "call"))
        if results is not None:
            np.savez(results, images=self.answers[self.name], latents=np.zeros((1, 2, 3), np.float32))
        elif self.name == "onnxruntime-fp32":
            raise WorkerError("it died")
        ms = {"upstream": 10.0, "pytorch-fp16": 3.0, "pytorch-fp32": 2.0}[self.name] if results is None else 1.0
        return CallTimes(gpu_ms=(ms,) * count, wall_ms=(ms,) * count, host_us=(50.0,) * count, device_mib=100.0)

    def endure(self, count: int) -> Growth:
        self.log.append((self.name, "endure"))
        return Growth(calls=count, device_mib=0.0, host_mib=0.0)

    def close(self) -> None:
        self.log.append((self.name, "close"))


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> Callable[..., type[StandInWorker]]:
    def prepare(**answers: Any) -> type[StandInWorker]:
        named = {name.replace("_", "-"): answer for name, answer in answers.items()}
        worker = type("Worker", (StandInWorker,), {"answers": named, "log": []})
        monkeypatch.setattr(gpu_cells, "GpuWorker", worker)
        return worker

    return prepare


def image(value: float) -> NDArray[np.float32]:
    return np.full((1, 3, 4, 4), value, np.float32)


def measure(*names: str) -> dict[str, Any]:
    contenders = [GPU_CONTENDERS[name] for name in names]
    rows = measure_gpu_cell(ModelFiles(name="toy", bundle=Path("toy")), IMAGES, contenders, SETTINGS)
    return {row.contender: row for row in rows}


def test_rows_have_times_and_the_difference_from_the_baseline(stand_ins: Callable[..., type[StandInWorker]]) -> None:
    worker = stand_ins(upstream=image(0), pytorch_fp32=image(0), pytorch_fp16=image(0.02))
    rows = measure("pytorch-fp16", "pytorch-fp32")
    assert list(rows) == ["upstream", "pytorch-fp32", "pytorch-fp16"]
    assert rows["upstream"].difference is None
    assert rows["pytorch-fp32"].difference.psnr_db is None
    assert rows["pytorch-fp16"].difference.psnr_db == pytest.approx(40)
    assert rows["pytorch-fp16"].gpu_ms == (3.0,) * 6  # the warm-up does not count
    assert rows["pytorch-fp16"].growth == Growth(calls=7, device_mib=0.0, host_mib=0.0)  # rather than the faster fp32
    assert rows["pytorch-fp32"].growth is None
    turns = [name for name, what in worker.log if what == "call"][3:]
    names = ["upstream", "pytorch-fp32", "pytorch-fp16"]
    assert turns == [*names, *names[1:], names[0], names[2], *names[:2]]


def test_who_fails_is_a_row_with_the_reason(stand_ins: Callable[..., type[StandInWorker]]) -> None:
    worker = stand_ins(upstream=image(0), onnxruntime_fp32=image(0), pytorch_fp32=None, pytorch_fp16=image(np.nan))
    rows = measure("onnxruntime-fp32", "pytorch-fp32", "pytorch-fp16")
    assert {name: row.reason for name, row in rows.items()} == {
        "upstream": None,
        "onnxruntime-fp32": "it died",
        "pytorch-fp32": "it cannot be opened",
        "pytorch-fp16": "its results are not finite",
    }
    assert len(rows["upstream"].gpu_ms) == 6
    for name in rows:
        assert (name, "close") in worker.log


def test_float32_that_is_wrong_is_not_timed(
    stand_ins: Callable[..., type[StandInWorker]], monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_ins(upstream=image(0), pytorch_fp32=image(0))
    monkeypatch.setattr(gpu_cells, "EXACT_ERROR", -1.0)
    assert measure("pytorch-fp32")["pytorch-fp32"].reason == "wrong: latents 0.0e+00 off, not -1e+00"


def test_without_a_baseline_there_is_no_difference(stand_ins: Callable[..., type[StandInWorker]]) -> None:
    stand_ins(upstream=None, pytorch_fp32=image(0))
    rows = measure("pytorch-fp32")
    assert rows["upstream"].reason == "it cannot be opened"
    assert rows["pytorch-fp32"].difference is None
    assert rows["pytorch-fp32"].gpu_ms


def test_upstreams_loop_is_the_models() -> None:
    model = UpstreamArithmetic.from_model(toy_model())
    target = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    inverter = TorchInverter(model, model.average_image(), dtype=torch.float32)
    found = inverter.read(inverter.invert(target, steps=3))
    expected = model.invert(target, steps=3)[-1]
    np.testing.assert_allclose(found.images, expected.image.numpy(), rtol=0, atol=1e-5)
    np.testing.assert_allclose(found.latents, expected.latent.numpy(), rtol=0, atol=1e-5)


class StandInEvent:
    """An event of a GPU that is always 4 ms after the one before."""

    count = 0

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing
        self.turn = -1

    def record(self) -> None:
        StandInEvent.count += 1
        self.turn = StandInEvent.count

    def synchronize(self) -> None:
        assert self.turn > 0

    def elapsed_time(self, end: "StandInEvent") -> float:
        return 4.0 * (end.turn - self.turn)


class StandInInverter:
    """Notes its calls; keeps no result."""

    def __init__(self) -> None:
        self.calls = 0

    def invert(self, target: torch.Tensor, *, steps: int) -> int:
        self.calls += 1
        return self.calls

    def read(self, result: int) -> InversionResult:
        filled = np.full((1, 1), result, np.float32)
        return InversionResult(images=filled, latents=filled)


@pytest.fixture
def server(toy_files: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> gpu_worker._Server:
    """The worker's side, with stand-ins for events, and for the memory that is free: 1 MiB less at each look."""
    np.save(tmp_path / "inputs.npy", IMAGES)
    server = gpu_worker._Server(
        GPU_CONTENDERS["pytorch-fp32"], toy_files, tmp_path / "inputs.npy", steps=2, device="cpu"
    )
    server._watch = MemoryWatch(iter(range(0, 1000 * 2**20, 2**20)).__next__, interval_s=60)
    server._watching.enter_context(server._watch)
    free = iter(range(1000 * 2**20, 0, -(2**20)))
    monkeypatch.setattr(torch.cuda, "Event", StandInEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (next(free), 0))
    server._on_gpu, server._inverter, server._target = True, StandInInverter(), torch.zeros(1)
    return server


def test_calls_on_a_gpu_are_timed_by_events(server: gpu_worker._Server, tmp_path: Path) -> None:
    answer = server.call(f"3 {tmp_path / 'results.npz'}")
    assert answer["gpu_ms"] == [4.0] * 3
    assert len(answer["wall_ms"]) == len(answer["host_us"]) == 3
    assert all(host <= 1e3 * wall for host, wall in zip(answer["host_us"], answer["wall_ms"], strict=True))
    assert answer["device_mib"] == 1  # at the end of the calls
    assert server.call("1")["device_mib"] == 1  # calls that are timed are not watched
    with np.load(tmp_path / "results.npz") as results:
        assert results["images"].item() == 4  # of the last call; the first one does not count


def test_memory_is_watched_after_it_has_settled(server: gpu_worker._Server) -> None:
    answer = server.endure("5")
    assert (answer["calls"], answer["device_mib"]) == (5, 1)
    assert isinstance(server._inverter, StandInInverter)
    assert server._inverter.calls == gpu_worker.CALLS_TO_SETTLE + 5
