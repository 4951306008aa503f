"""The GPU's table without a GPU: the floor, the rows' figures, the goals, and what is written."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks.gpu_floor import DeviceRates, floor_of, measure_rates
from benchmarks.gpu_table import (
    GpuCell,
    GpuRow,
    GpuTable,
    Growth,
    format_gpu_table,
    verdicts_of,
    write_gpu_table,
)
from benchmarks.operators import Layer
from benchmarks.verdicts import format_verdict
from restyle_deploy.bench.comparison import Difference
from restyle_deploy.bench.environment import describe_environment

RATES = DeviceRates(copy_bytes_per_s=1e9, flop_per_s=1e12)
GOOD = Difference(psnr_db=50.0, latent_error=0.01)
LAYERS = (
    Layer(products=5e9, weights=1e3, activations=1e3),  # 10 ms of arithmetic
    Layer(products=1e3, weights=1e6, activations=4e6),  # 10 ms of traffic
)


def row(contender: str, ms: float, **changes: Any) -> GpuRow:
    facts: dict[str, Any] = {
        "contender": contender,
        "label": f"{contender} label",
        "precision": "fp16",
        "is_ours": contender.startswith(("pytorch", "tensorrt")),
        "gpu_ms": (ms, ms + 1, ms - 1),
        "wall_ms": (ms + 0.1,) * 3,
        "host_us": (80.0, 90.0, 100.0),
        "device_mib": 500.0,
        "open_s": 1.5,
        "difference": GOOD,
        **changes,
    }
    return GpuRow(**facts)


@pytest.fixture
def cell() -> GpuCell:
    growth = Growth(calls=10_000, device_mib=0.0, host_mib=0.5)
    rows = (
        row("upstream", 800, precision="fp32", difference=None),
        row("torch-compile", 130),
        row("torch-compile-graph", 120),
        row("pytorch-fp32", 200, precision="fp32", difference=Difference(psnr_db=None, latent_error=1e-5)),
        row("pytorch-fp16", 75, growth=growth),
        row("tensorrt-fp16", 60, difference=Difference(psnr_db=40.0, latent_error=0.01)),
        GpuRow(contender="onnxruntime", label="ORT", precision="fp32", is_ours=False, reason="no | provider"),
    )
    return GpuCell(model="1024", output_size=1024, batch=1, floor=floor_of(LAYERS, RATES, batch=1, steps=1), rows=rows)


@pytest.fixture
def table(cell: GpuCell) -> GpuTable:
    demo = replace(cell, model="demo", output_size=64, batch=8, rows=cell.rows[:2])
    return GpuTable(
        created="2026-01-02T03:04:05+00:00",
        environment=describe_environment(),
        device={"GPU": "NVIDIA H100 80GB", "driver": "1.2"},
        rates=RATES,
        settings={"steps": 5},
        cells=(demo, cell),
    )


def test_the_floor_is_the_longer_of_arithmetic_and_traffic_layer_by_layer() -> None:
    floor = floor_of(LAYERS, RATES, batch=1, steps=5)
    assert floor.flop == pytest.approx(5 * 2 * (5e9 + 1e3))
    assert floor.bytes_moved == 5 * 2 * (2e3 + 5e6)
    assert floor.ms == pytest.approx(5 * (10 + 10))
    assert floor.arithmetic_ms == pytest.approx(50, rel=1e-5)
    assert floor.traffic_ms == pytest.approx(50, rel=1e-3)


def test_a_batch_moves_the_weights_once() -> None:
    floor = floor_of(LAYERS, RATES, batch=8, steps=1)
    assert floor.flop == pytest.approx(8 * 2 * (5e9 + 1e3))
    assert floor.bytes_moved == 2 * (1e3 + 8e3 + 1e6 + 32e6)
    assert floor.ms == pytest.approx(80 + 66)


def test_rates_are_those_of_a_product_and_of_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import gpu_floor

    seconds = iter([0.5, 0.25])
    monkeypatch.setattr(gpu_floor, "_fastest", lambda run, device, runs: (run(), next(seconds))[1])
    rates = measure_rates("cpu")
    assert rates.copy_bytes_per_s == gpu_floor.CPU_COPY_BYTES / 0.5
    assert rates.flop_per_s == 2 * gpu_floor.CPU_MATRIX_SIZE**3 / 0.25


def test_medians_are_of_the_gpu_and_without_one_of_the_wall() -> None:
    assert row("pytorch-fp16", 75).median_ms == 75
    assert row("pytorch-fp16", 75, gpu_ms=()).median_ms == 75.1
    assert math.isinf(row("pytorch-fp16", 75, gpu_ms=(), wall_ms=()).median_ms)


def test_goals_are_those_of_the_fastest_of_ours_that_is_good(cell: GpuCell) -> None:
    assert cell.goal_row is not None
    assert cell.goal_row.contender == "pytorch-fp16"
    where = "1024 px, batch 1, fp16 (pytorch-fp16 label)"
    assert [format_verdict(verdict) for verdict in verdicts_of([cell])] == [
        f"pass: {where}: latent error: 0.01, goal at most 0.02",
        f"pass: {where}: PSNR of the last image: 50 dB, goal at least 45 dB",
        f"pass: {where}: times upstream's arithmetic, eager float32: 10.67, goal at least 10",
        f"pass: {where}: times torch.compile in fp16: 1.6, goal at least 1.5",
        f"pass: {where}: of the floor: 3.75, goal at most 4",
        f"pass: {where}: host time of a call: 90 µs, goal at most 100 µs",
        f"pass: {where}: growth of the device's memory in 10000 calls: 0 MiB, goal at most 0 MiB",
        f"pass: {where}: growth of the host's memory in 10000 calls: 0.5 MiB, goal at most 4 MiB",
    ]


def test_without_a_good_one_the_fastest_shows_what_it_lacks(cell: GpuCell) -> None:
    rows = tuple(each for each in cell.rows if each.contender != "pytorch-fp16")
    verdicts = verdicts_of([replace(cell, rows=rows)])
    assert "tensorrt-fp16 label" in verdicts[0].goal
    assert [verdict.is_reached for verdict in verdicts] == [True, False, True, True, True, True, False, False]


@pytest.mark.parametrize("change", [{"model": "512"}, {"batch": 8}, {"rows": ()}])
def test_a_goal_that_was_not_measured_is_not_reached(cell: GpuCell, change: dict[str, Any]) -> None:
    verdicts = verdicts_of([replace(cell, **change)])
    assert len(verdicts) == 8
    assert all(verdict.figure is None and not verdict.is_reached for verdict in verdicts)


def test_equal_images_have_the_best_quality(cell: GpuCell) -> None:
    equal = row("pytorch-fp16", 50, difference=Difference(psnr_db=None, latent_error=0.0))
    assert equal.is_good
    assert verdicts_of([replace(cell, rows=(equal,))])[1].is_reached


def test_the_table_says_what_was_measured(table: GpuTable) -> None:
    text = format_gpu_table(table)
    assert "### 1024 px, batch 1\n\nFloor 20 ms: 10 GFLOP alone take 10 ms, 10 MiB alone 10 ms." in text
    assert "### Demo model, 64 px, batch 8" in text
    assert "| pytorch-fp16 label | 75.000 | 75.100 | 90 | 13.3 | 10.67 | 3.75 | 50.0 | 1.0e-02 | 500 | 1.5 |" in text
    assert "| upstream label | 800.000 | 800.100 | 90 | 1.2 | 1.00 | 40.00 | reference | reference | 500 |" in text
    assert "| pytorch-fp32 label | 200.000 | 200.100 | 90 | 5.0 | 4.00 | 10.00 | equal | 1.0e-05 | 500 | 1.5 |" in text
    assert "| ORT | – | – | – | – | – | – | – | – | – | no / provider |" in text
    assert "After 10000 calls, pytorch-fp16 label held 0.00 MiB of the device and 0.50 MiB of the host more" in text
    assert "- pass: 1024 px, batch 1, fp16" in text


def test_files_are_written_in_the_devices_folder(table: GpuTable, tmp_path: Path) -> None:
    files = write_gpu_table(table, tmp_path)
    assert [file.relative_to(tmp_path).as_posix() for file in files] == [
        f"nvidia-h100-80gb/{name}" for name in ("report.json", "report.md", "chart.png")
    ]
    content = json.loads(files[0].read_text(encoding="utf-8"))
    assert content["format_version"] == 1
    assert content["cells"][1]["rows"][4]["gpu_ms"] == [75.0, 76.0, 74.0]
    assert content["cells"][1]["rows"][6]["reason"] == "no | provider"
    assert [verdict["reached"] for verdict in content["verdicts"]] == [True] * 8
    assert files[1].read_text(encoding="utf-8") == format_gpu_table(table)
    with Image.open(files[2]) as picture:
        assert picture.width > 800


def test_json_has_no_infinity(table: GpuTable, cell: GpuCell, tmp_path: Path) -> None:
    equal = row("pytorch-fp16", 50, difference=Difference(psnr_db=None, latent_error=0.0))
    files = write_gpu_table(replace(table, cells=(replace(cell, rows=(equal,)),)), tmp_path)
    content = json.loads(files[0].read_text(encoding="utf-8"))
    assert content["verdicts"][1] == {**content["verdicts"][1], "figure": None, "reached": True}
