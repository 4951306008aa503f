import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from restyle_deploy.bench.report import Report, format_table, read_report, write_report
from restyle_deploy.errors import ReportError


def strict_json(path: Path) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    return content


def test_round_trip(report: Report, tmp_path: Path) -> None:
    write_report(report, tmp_path / "report.json")
    assert read_report(tmp_path / "report.json") == report


def test_round_trip_of_all_that_may_be_compared(report_against: Report, tmp_path: Path) -> None:
    write_report(report_against, tmp_path / "report.json")
    assert read_report(tmp_path / "report.json") == report_against


@pytest.mark.parametrize("name", ["demo-faces.json", "demo-photos.json"])
def test_reports_of_before_there_were_comparisons_are_read(name: str, project_root: Path) -> None:
    report = read_report(project_root / "benchmarks" / "results" / name)
    assert (report.against, report.exact) == (None, None)


def test_comparison_of_other_step_counts_is_refused(report_against: Report, tmp_path: Path) -> None:
    assert report_against.against is not None
    shorter = replace(report_against.against, rows=report_against.against.rows[:1])
    write_report(replace(report_against, against=shorter), tmp_path / "report.json")
    with pytest.raises(ReportError, match=r"report\.against has other step counts"):
        read_report(tmp_path / "report.json")


def test_file_is_plain_json_with_the_documented_fields(report: Report, tmp_path: Path) -> None:
    write_report(report, tmp_path / "report.json")
    content = strict_json(tmp_path / "report.json")
    assert content["format_version"] == 1
    assert content["rows"][2]["quality"]["psnr_db"] is None
    assert content["rows"][1]["latency"]["unstable"] is True
    assert content["rows"][0]["latency"]["warmup_ms"] == [99.0]
    assert content["rows"][0]["images"][1]["name"] == "second"
    assert content["session"]["threads"] == 2


def test_failed_write_leaves_the_former_file(report: Report, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_report(report, path)
    before = path.read_text()
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_report(replace(report, session={"temperature": float("nan")}), path)
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=r"absent\.json: cannot be read: No such file"):
        read_report(tmp_path / "absent.json")


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe"])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "report.json").write_bytes(content)
    with pytest.raises(ReportError, match=r"report\.json: not a JSON file"):
        read_report(tmp_path / "report.json")


@pytest.mark.parametrize("content", ["[]", "{}", '{"format_version": 2}', '{"format_version": "1"}'])
def test_unknown_format_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(ReportError, match="format_version is .*, expected 1"):
        read_report(tmp_path / "report.json")


def test_all_gaps_are_named_at_once(report: Report, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_report(report, path)
    content = strict_json(path)
    del content["bundle"]["domain"], content["rows"][1]["latency"]["samples_ms"]
    content["rows"][0]["quality"] = 3
    content["rows"][0]["steps"] = True
    content["rows"][2]["latency"]["median_ms"] = "fast"
    content["settings"]["steps"] = "1,2,5"
    content["environment"]["packages"] = []
    path.write_text(json.dumps(content))
    with pytest.raises(ReportError, match="not a complete report") as raised:
        read_report(path)
    for problem in (
        "report.bundle.domain is missing",
        "report.rows[1].latency.samples_ms is missing",
        "report.rows[0].quality is int, not an object",
        "report.rows[0].steps is bool, not int",
        "report.rows[2].latency.median_ms is str, not number",
        "report.settings.steps is str, not list",
        "report.environment.packages is list, not dict",
    ):
        assert problem in str(raised.value)


def _drop_rows(content: dict[str, Any]) -> None:
    content["rows"] = []


def _drop_samples(content: dict[str, Any]) -> None:
    content["rows"][0]["latency"]["samples_ms"] = []


@pytest.mark.parametrize("change", [_drop_rows, _drop_samples])
def test_report_without_measurements_is_refused(
    report: Report, tmp_path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    path = tmp_path / "report.json"
    write_report(report, path)
    content = strict_json(path)
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ReportError, match="no rows, or a row without samples_ms"):
        read_report(path)


def test_table(report: Report) -> None:
    assert format_table(report).splitlines() == [
        "steps  median ms  p95 ms  relative     MSE  PSNR (dB)   SSIM",
        "    1      10.00   10.09     x1.00  0.0800      21.00  0.550",
        "    2    ! 20.00   23.60     x2.00  0.0400      22.00  0.600",
        "    5      50.00   50.45     x5.00  0.0080   infinite  0.875",
        "! unstable: interquartile range above 10% of the median",
    ]


def test_table_of_stable_rows_has_no_note(report: Report) -> None:
    assert len(format_table(replace(report, rows=report.rows[:1])).splitlines()) == 2


def test_table_of_all_that_may_be_compared(report_against: Report) -> None:
    header, first, *_ = format_table(report_against).splitlines()
    assert header.split("SSIM")[1].split("  ") == [
        "",
        "exact ms",
        "exact/this (quartiles)",
        "PSNR to exact (dB)",
        "latent error",
        "torch ms",
        "torch/this (quartiles)",
    ]
    assert first.split("0.550")[1].split() == [
        *("20.00", "2.00", "(1.88", "to", "2.12)", "41.0", "1.0e-02"),
        *("100.00", "10.00", "(9.88", "to", "10.12)"),
    ]
