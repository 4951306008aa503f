import json
from dataclasses import replace
from pathlib import Path

import pytest

from restyle_deploy.bench.compare import USUAL_TOLERANCE
from restyle_deploy.bench.quality import LEAST_IMAGES
from restyle_deploy.bench.report import Report, write_report
from restyle_deploy.bench.stability import LEAST_SAMPLES
from tests.bench.reports import made_up_report
from tests.cli.conftest import Run


@pytest.fixture(scope="module")
def report() -> Report:
    return made_up_report()


@pytest.fixture
def pair(report: Report, tmp_path: Path) -> tuple[Path, Path]:
    """A report, and one in which the fourth configuration takes a tenth longer."""
    result = report.configurations[3]
    rows = tuple(
        replace(
            row,
            latency=replace(row.latency, samples_ms=tuple(1.1 * sample for sample in row.latency.samples_ms)),
        )
        for row in result.rows
    )
    results = (*report.configurations[:3], replace(result, rows=rows), *report.configurations[4:])
    write_report(report, tmp_path / "a.json")
    write_report(replace(report, configurations=results), tmp_path / "b.json")
    return tmp_path / "a.json", tmp_path / "b.json"


@pytest.mark.parametrize(("tolerance", "exit_code"), [("5%", 1), ("5", 1), ("15%", 0)])
def test_exit_code_is_that_of_a_gate(run: Run, pair: tuple[Path, Path], tolerance: str, exit_code: int) -> None:
    result = run("compare", *pair, "--fail-above", tolerance)
    assert result.exit_code == exit_code
    assert result.stdout.count("FAIL openvino, ") == 5 * exit_code


def test_without_a_tolerance_nothing_fails(run: Run, pair: tuple[Path, Path]) -> None:
    result = run("compare", *pair)
    assert result.exit_code == 0
    assert result.stdout.count("slower") == 5


def test_json_has_every_cell(run: Run, pair: tuple[Path, Path]) -> None:
    result = run("compare", *pair, "--fail-above", "5%", "--json")
    assert result.exit_code == 1
    cells = json.loads(result.stdout)
    assert len(cells) == 30
    assert cells[15]["latency"]["ratio"] == pytest.approx(1.1)
    assert cells[15]["failures"] == ["10.0% slower, allowed are 5.0%"]


def test_unlike_machines_are_refused_unless_allowed(run: Run, report: Report, pair: tuple[Path, Path]) -> None:
    write_report(replace(report, environment=replace(report.environment, cpu="Another CPU")), pair[1])
    refused = run("compare", *pair)
    assert refused.exit_code == 1
    assert refused.stderr.startswith("Error: the reports are not alike: cpu Some CPU and Another CPU; ")
    assert run("compare", *pair, "--allow-different-environments").exit_code == 0


@pytest.mark.parametrize("value", ["fast", "-5%", "nan", "inf"])
def test_other_tolerances_are_wrong_usage(run: Run, pair: tuple[Path, Path], value: str) -> None:
    result = run("compare", *pair, f"--fail-above={value}")
    assert result.exit_code == 2
    assert "is no percentage such as 5%" in result.stderr


def test_missing_report_is_named(run: Run, pair: tuple[Path, Path], tmp_path: Path) -> None:
    result = run("compare", tmp_path / "absent.json", pair[1])
    assert result.exit_code == 1
    assert "absent.json: cannot be read: No such file" in result.stderr


def test_rows_of_which_nothing_can_be_said_are_told(run: Run, pair: tuple[Path, Path]) -> None:
    result = run("compare", *pair, "--fail-above", "15%")
    assert result.exit_code == 0
    assert "UNCLEAR 3 rows, neither passed nor failed: its times are unstable in both reports" in result.stdout
    cells = json.loads(run("compare", *pair, "--json").stdout)
    assert [cell["doubt"] is not None for cell in cells] == [cell["verdict"] == "unclear" for cell in cells]


def test_help_tells_verdicts_and_what_fails(run: Run) -> None:
    text = " ".join(run("compare", "--help").stdout.split())
    for words in (
        f"all of it is within the tolerance (--fail-above, else {USUAL_TOLERANCE * 100:g} %)",
        f"fewer than {LEAST_SAMPLES} calls",
        "An unclear row does not fail, and has not passed",
        f"Of fewer than {LEAST_IMAGES} images no quality is called worse",
    ):
        assert words in text
