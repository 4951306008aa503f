"""The command `restyle-deploy report`: all that is drawn from a report, without bundle and images."""

import re
import sys
from pathlib import Path

import pytest

from restyle_deploy.bench.report import write_report
from tests.bench.reports import made_up_report, write_made_up_images
from tests.cli.conftest import Run

DRAWN = ["quality-latency.png", "quality-latency.svg", "load.png", "load.svg", "report.html", "report.md"]


@pytest.fixture
def report(tmp_path: Path) -> Path:
    """The file of a made-up report, alone in its folder."""
    write_report(made_up_report(), tmp_path / "in" / "report.json")
    return tmp_path / "in" / "report.json"


def test_everything_is_drawn_from_the_file_alone(run: Run, report: Path, tmp_path: Path) -> None:
    result = run("report", report, "-o", tmp_path / "out")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [str(tmp_path / "out" / name) for name in DRAWN]
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(DRAWN)
    assert [path.name for path in report.parent.iterdir()] == ["report.json"]
    assert 'id="images"' not in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_without_a_folder_it_is_drawn_beside_the_report_with_its_images(run: Run, report: Path) -> None:
    write_made_up_images(report.parent, made_up_report(), count=1)
    assert run("report", report).exit_code == 0
    assert {path.name for path in report.parent.iterdir()} == {*DRAWN, "report.json", "images"}
    assert 'id="images"' in (report.parent / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "cannot be read: No such file"),
        ("{", "not a JSON file"),
        ('{"format_version": 99}', "format_version is 99, expected"),
        ('{"format_version": 2}', "not a complete report: report.created is missing"),
    ],
)
def test_no_report_is_one_line(run: Run, tmp_path: Path, content: str | None, reason: str) -> None:
    path = tmp_path / "report.json"
    if content is not None:
        path.write_text(content)
    result = run("report", path, "-o", tmp_path / "out")
    assert (result.exit_code, result.stdout) == (1, "")
    assert re.fullmatch(rf"Error: {path}: {reason}.*\n", result.stderr)
    assert not (tmp_path / "out").exists()


def test_folder_that_cannot_be_written_is_one_line(run: Run, report: Path) -> None:
    result = run("report", report, "-o", report)
    assert (result.exit_code, result.stdout) == (1, "")
    assert re.fullmatch(r"Error: .*report\.json: no folder that can be written to: .*\n", result.stderr)


def test_missing_library_is_one_line(run: Run, report: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run("report", report)
    assert (result.exit_code, result.stdout) == (1, "")
    assert re.fullmatch(r"Error: .*matplotlib.*pip install 'restyle-deploy\[bench\]'\n", result.stderr)
