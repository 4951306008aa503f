"""The files of the speed table."""

import json
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.cells import CellSettings, Row
from benchmarks.tables import Cell, SpeedTable, format_markdown, write_table
from restyle_deploy.bench.comparison import Ratio
from restyle_deploy.bench.environment import describe_environment


@pytest.fixture
def table(rows: tuple[Row, ...]) -> SpeedTable:
    cells = [
        Cell(model=model, output_size=size, batch=batch, weight_mib=80, activation_mib=20, rows=rows)
        for model, size in (("demo", 64), ("256", 256))
        for batch in (1, 4)
    ]
    return SpeedTable(
        created="2026-01-02T03:04:05+00:00",
        environment=describe_environment(),
        settings=CellSettings(steps=5, threads=2, rounds=3, fewest_rounds=3, seconds=1.0, memory_mib=1000.0),
        cells=tuple(cells),
        loop_overhead=Ratio(median=1.02, lower_quartile=1.0, upper_quartile=1.04),
    )


def test_markdown_has_a_section_per_cell(table: SpeedTable) -> None:
    text = format_markdown(table)
    assert [line for line in text.splitlines() if line.startswith("###")] == [
        "### Demo model, 64 px, batch 1",
        "### Demo model, 64 px, batch 4",
        "### 256 px, batch 1",
        "### 256 px, batch 4",
    ]
    assert "Bound: 80 MiB of weights and 20 MiB of activations per image." in text
    assert "takes 1.02 times the sum of its ONNX Runtime runs (quartiles 1.00 to 1.04)" in text


def test_cells_of_a_row(table: SpeedTable) -> None:
    lines = format_markdown(table).splitlines()
    assert "| upstream label | 201 | 1 | 0.25 | 150 | 125 | 1.25 | 100.0 | 1.0e-06 |" in lines  # of 80 + 20 MiB
    assert "| upstream label | 201 | 1 | 0.25 | 150 | 125 | 0.78 | 100.0 | 1.0e-06 |" in lines  # of 80 + 4 x 20 MiB
    assert "| torch label | 101 | 2.00 (1.90–2.10) | 0.25 | 150 | 125 | 1.25 | reference | reference |" in lines
    approximate = "10.00 (9.50–10.50) | 0.25 | 150 | 125 | 1.25 | 31.5 | 2.0e-02 |"
    assert f"| onnxruntime-preview label (approximate) | 21.0 | {approximate}" in lines
    assert "| bf16 (approximate) | – | – | – | – | – | – | – | no bf16 / here |" in lines


def test_files_are_written(table: SpeedTable, tmp_path: Path) -> None:
    files = write_table(table, tmp_path / "new")
    assert [file.name for file in files] == ["cpu.json", "cpu.md", "cpu.png"]
    content = json.loads(files[0].read_text(encoding="utf-8"))
    assert content["format_version"] == 1
    assert content["environment"]["cpu"] == table.environment.cpu
    assert content["cells"][0]["rows"][1]["samples_ms"] == [100.0, 101.0, 102.0]
    assert content["cells"][0]["rows"][3]["reason"] == "no bf16 | here"
    assert files[1].read_text(encoding="utf-8") == format_markdown(table)
    with Image.open(files[2]) as picture:
        assert picture.width > 800


def test_a_table_in_the_making_is_written(table: SpeedTable, tmp_path: Path) -> None:
    from dataclasses import replace

    write_table(replace(table, cells=table.cells[:1], loop_overhead=None), tmp_path)
    assert "The loop:" not in (tmp_path / "cpu.md").read_text(encoding="utf-8")
