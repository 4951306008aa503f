"""The command that makes the speed table."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from benchmarks import cpu
from benchmarks.cells import Row
from benchmarks.contenders import Contender
from restyle_deploy.bench.comparison import Ratio

Measured = list[tuple[str, int, list[str]]]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, project_root: Path, rows: tuple[Row, ...]) -> Measured:
    """Measure nothing: note model, batch and contenders."""
    noted: Measured = []

    def measure_cell(files: Any, inputs: Any, contenders: Sequence[Contender], settings: Any, **_: Any) -> Any:
        noted.append((files.name, len(inputs), [contender.name for contender in contenders]))
        return rows

    monkeypatch.chdir(project_root)
    monkeypatch.setattr(cpu, "measure_cell", measure_cell)
    overhead = Ratio(median=1.0, lower_quartile=1.0, upper_quartile=1.0)
    monkeypatch.setattr(cpu, "measure_loop_overhead", lambda *arguments, **options: overhead)
    return noted


def run(tmp_path: Path, *arguments: object) -> Result:
    given = ["--work", tmp_path / "work", "-o", tmp_path / "out", "--no-build", *arguments]
    return CliRunner().invoke(cpu.main, [str(argument) for argument in given])


def test_without_the_golden_directory_the_demo_is_measured(measured: Measured, tmp_path: Path) -> None:
    result = run(tmp_path, "--contenders", "openvino-plain")
    assert result.exit_code == 0
    assert result.stderr.startswith("no --golden directory: only the demo model is measured\n")
    assert measured == [("demo", batch, ["upstream", "torch", "openvino-plain"]) for batch in (1, 4)]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"cpu.json", "cpu.md", "cpu.png"}
    content = json.loads((tmp_path / "out" / "cpu.json").read_text(encoding="utf-8"))
    assert [(cell["model"], cell["batch"]) for cell in content["cells"]] == [("demo", 1), ("demo", 4)]
    assert content["loop_overhead"]["median"] == 1
    assert content["settings"]["threads"] >= 1
    assert (tmp_path / "out" / "cpu.md").read_text(encoding="utf-8") + "\n" == result.stdout


def test_resuming_keeps_the_cells(measured: Measured, tmp_path: Path) -> None:
    assert run(tmp_path, "--contenders", "openvino-plain", "--batches", "1").exit_code == 0
    measured.clear()
    assert run(tmp_path, "--contenders", "openvino-plain", "--resume").exit_code == 0
    assert [batch for _, batch, _ in measured] == [4]
    content = json.loads((tmp_path / "out" / "cpu.json").read_text(encoding="utf-8"))
    assert [cell["batch"] for cell in content["cells"]] == [1, 4]


def test_figures_of_other_conditions_are_neither_mixed_nor_lost(measured: Measured, tmp_path: Path) -> None:
    assert run(tmp_path, "--contenders", "openvino-plain", "--batches", "1").exit_code == 0
    path = tmp_path / "out" / "cpu.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["environment"]["packages"]["openvino"] = "1.0"
    path.write_text(json.dumps(content), encoding="utf-8")
    measured.clear()
    result = run(tmp_path, "--contenders", "openvino-plain", "--resume", "--steps", "3")
    assert result.exit_code == 2
    assert "cannot be resumed: other steps, version of openvino; leave out --resume" in " ".join(result.stderr.split())
    assert measured == []
    assert json.loads(path.read_text(encoding="utf-8")) == content


def test_engine_that_cannot_be_built_is_a_row_that_says_so(
    measured: Measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "build_engines", lambda *arguments: {"openvino": "no such processor"})
    result = run(tmp_path, "--build", "--contenders", "openvino,onnxruntime", "--batches", "1")
    assert result.exit_code == 0
    assert measured == [("demo", 1, ["upstream", "torch", "onnxruntime"])]
    content = json.loads((tmp_path / "out" / "cpu.json").read_text(encoding="utf-8"))
    reasons = {row["contender"]: row["reason"] for row in content["cells"][0]["rows"]}
    assert reasons["openvino"] == "no such processor"


def test_golden_models_alone_need_the_directory(measured: Measured, tmp_path: Path) -> None:
    result = run(tmp_path, "--models", "256,1024")
    assert result.exit_code == 2
    assert "name it: --golden DIRECTORY" in result.stderr
    assert measured == []


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--models", "demo,2048"), "2048: expected some of demo,256,512,1024"),
        (("--contenders", "jax"), "jax: expected some of upstream,"),
        (("--batches", "one"), "'one' is no list of whole numbers"),
        (("--batches", "0"), "each batch is at least 1"),
    ],
)
def test_wrong_usage(measured: Measured, tmp_path: Path, arguments: tuple[str, str], reason: str) -> None:
    result = run(tmp_path, *arguments)
    assert result.exit_code == 2
    assert reason in " ".join(result.stderr.split())
