"""The command that makes the GPU's table: without a GPU it says so, and a dry run goes through all of it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from benchmarks import gpu
from benchmarks.gpu_contenders import COMPILED, GPU_CONTENDERS, GpuContender
from benchmarks.gpu_floor import DeviceRates
from benchmarks.gpu_table import COMPILED as COMPILED_ROWS
from benchmarks.gpu_table import UPSTREAM, GpuRow
from restyle_deploy.ops.torch_gpu import why_torch_sees_no_gpu

Measured = list[tuple[str, int, list[str]]]


def run(tmp_path: Path, *arguments: object) -> Result:
    given = ["--work", tmp_path / "work", "-o", tmp_path / "out", *arguments]
    return CliRunner().invoke(gpu.main, [str(argument) for argument in given])


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, project_root: Path) -> Measured:
    """Measure nothing: note model, batch and contenders."""
    noted: Measured = []

    def measure(files: Any, inputs: Any, contenders: Sequence[GpuContender], settings: Any, **_: Any) -> Any:
        noted.append((files.name, len(inputs), [contender.name for contender in contenders]))
        return tuple(
            GpuRow(contender=one.name, label=one.label, precision=one.precision, is_ours=one.is_ours, wall_ms=(5.0,))
            for one in contenders
        )

    monkeypatch.chdir(project_root)
    monkeypatch.setattr(gpu, "measure_gpu_cell", measure)
    monkeypatch.setattr(gpu, "measure_rates", lambda device: DeviceRates(copy_bytes_per_s=1e9, flop_per_s=1e12))
    return noted


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line(tmp_path: Path) -> None:
    result = run(tmp_path)
    assert result.exit_code == 1
    assert result.stderr == f"Error: {why_torch_sees_no_gpu()}: nothing was measured; a dry run is: --device cpu\n"
    assert not (tmp_path / "out").exists()


def test_names_of_rows_that_the_goals_use_are_in_the_table() -> None:
    assert {UPSTREAM, *COMPILED_ROWS} <= GPU_CONTENDERS.keys()
    assert COMPILED == COMPILED_ROWS
    assert [row.name for row in GPU_CONTENDERS.values() if row.is_ours and row.precision == "fp16"] == [
        "pytorch-fp16",
        "pytorch-fp16-compiled",
        "tensorrt-fp16",
        "tensorrt-rtx-fp16",
    ]


def test_who_cannot_run_here_is_a_row_with_the_reason(
    measured: Measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "build_engines", lambda *arguments, **options: {"pytorch-bf16": "no engine for it"})
    result = run(tmp_path, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert measured == [("demo", batch, ["upstream", "onnxruntime-fp32", "pytorch-fp32"]) for batch in (1, 8)]
    content = json.loads((tmp_path / "out" / "dry-run-on-the-cpu" / "report.json").read_text(encoding="utf-8"))
    reasons = {row["contender"]: row["reason"] for row in content["cells"][0]["rows"]}
    assert list(reasons) == list(GPU_CONTENDERS)
    assert reasons["tensorrt-fp16"] == "it does not run on cpu"
    assert reasons["pytorch-bf16"] == "no engine for it"
    assert "0 of 8 goals reached" in result.stderr
    assert content["settings"]["endured_calls"] == gpu.ENDURED_CALLS_OF_DRY_RUN


@pytest.mark.slow
def test_a_dry_run_goes_through_all_of_it(tmp_path: Path, project_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project_root)
    few = ("--batches", "1", "--rounds", "2", "--calls", "1", "--endured-calls", "2", "--steps", "2")
    result = run(tmp_path, "--device", "cpu", "--contenders", "onnxruntime-fp32,pytorch-fp32", *few)
    assert result.exit_code == 0, result.output
    content = json.loads((tmp_path / "out" / "dry-run-on-the-cpu" / "report.json").read_text(encoding="utf-8"))
    (cell,) = content["cells"]
    rows = {row["contender"]: row for row in cell["rows"]}
    assert list(rows) == ["upstream", "onnxruntime-fp32", "pytorch-fp32"]
    for row in rows.values():
        assert row["reason"] is None
        assert len(row["wall_ms"]) == 2
        assert (row["gpu_ms"], row["host_us"], row["device_mib"]) == ([], [], None)
    for name in ("onnxruntime-fp32", "pytorch-fp32"):
        assert rows[name]["difference"]["latent_error"] < 1e-3
    assert rows["pytorch-fp32"]["growth"]["calls"] == 2
    assert cell["floor"]["ms"] > 0
    assert content["rates"]["flop_per_s"] > 0


@pytest.mark.gpu
@pytest.mark.slow
def test_a_run_on_a_gpu_has_all_figures(tmp_path: Path, project_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no NVIDIA GPU")
    monkeypatch.chdir(project_root)
    few = ("--batches", "1,8", "--rounds", "2", "--calls", "3", "--endured-calls", "200")
    names = "upstream-tf32,upstream-kernels,torch-compile-graph,pytorch-fp16"
    result = run(tmp_path, "--contenders", names, *few)
    assert result.exit_code == 0, result.output
    (report,) = (tmp_path / "out").glob("*/report.json")
    for cell in json.loads(report.read_text(encoding="utf-8"))["cells"]:
        for row in cell["rows"]:
            assert row["reason"] is None, row
            assert len(row["gpu_ms"]) == len(row["wall_ms"]) == len(row["host_us"]) == 6
            assert min(row["gpu_ms"]) > 0
            assert row["device_mib"] > 0
        ours = cell["rows"][-1]
        assert ours["difference"]["psnr_db"] > 45
        assert ours["growth"]["device_mib"] <= 0
