import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from restyle_deploy.bench.report import (
    Configuration,
    Part,
    Report,
    read_part,
    read_report,
    write_part,
    write_report,
)
from restyle_deploy.bench.schema import report_schema, write_schema
from restyle_deploy.errors import ReportError


def strict_json(path: Path) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    return content


def test_round_trip(report: Report, tmp_path: Path) -> None:
    write_report(report, tmp_path / "report.json")
    assert read_report(tmp_path / "report.json") == report


def test_round_trip_of_a_part(report: Report, tmp_path: Path) -> None:
    part = Part(key="of what it depends on", metrics=report.metrics, result=report.configurations[4])
    write_part(part, tmp_path / "part.json")
    assert read_part(tmp_path / "part.json") == part


def test_part_is_no_report(report: Report, tmp_path: Path) -> None:
    write_part(Part(key="", metrics=(), result=report.configurations[0]), tmp_path / "part.json")
    with pytest.raises(ReportError, match=r"not a complete report: report\.created is missing"):
        read_report(tmp_path / "part.json")


def test_configurations_have_names_fit_for_files() -> None:
    plain = Configuration(backend="onnxruntime")
    assert plain.name == "onnxruntime-cpu-fp32-engine-b1"
    full = Configuration(
        backend="tensorrt", device="cuda:1", precision="fp16", plan="plain", preview_steps=True, batch=8, threads=2
    )
    assert full.name == "tensorrt-cuda1-fp16-plain-preview-b8-t2"
    assert Configuration(backend="onnxruntime", device="../x").name == "onnxruntime-x-fp32-engine-b1"


def test_published_schema_is_that_of_the_code(project_root: Path, tmp_path: Path) -> None:
    write_schema(tmp_path / "schema.json")
    published = project_root / "docs" / "report.schema.json"
    assert published.read_text() == (tmp_path / "schema.json").read_text(), (
        "the format has changed: python -m restyle_deploy.bench.schema docs/report.schema.json"
    )


def test_written_report_meets_the_schema(report: Report, tmp_path: Path) -> None:
    write_report(report, tmp_path / "report.json")
    jsonschema.Draft202012Validator.check_schema(report_schema())
    jsonschema.validate(strict_json(tmp_path / "report.json"), report_schema())


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("configurations", 0, "status"), "well"),
        (("configurations", 0, "rows", 0, "latency", "median_ms"), "fast"),
        (("decision", "pareto", 0), ["openvino-cpu-fp32-engine-b1"]),
        (("format_version",), 1),
        (("environment", "cpu"), None),
    ],
)
def test_schema_and_reader_refuse_the_same(
    report: Report, tmp_path: Path, path: tuple[str | int, ...], value: object
) -> None:
    write_report(report, tmp_path / "report.json")
    content = strict_json(tmp_path / "report.json")
    place: Any = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(content, report_schema())
    (tmp_path / "report.json").write_text(json.dumps(content))
    with pytest.raises(ReportError):
        read_report(tmp_path / "report.json")


def test_failed_write_leaves_the_former_file(report: Report, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_report(report, path)
    before = path.read_text()
    broken = replace(report.configurations[0], machine={"temperature": float("nan")})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_report(replace(report, configurations=(broken,)), path)
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


@pytest.mark.parametrize("content", ["[]", "{}", '{"format_version": 1}', '{"format_version": "2"}'])
def test_unknown_format_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(ReportError, match="format_version is .*, expected 2; make the report anew"):
        read_report(tmp_path / "report.json")


def test_all_gaps_are_named_at_once(report: Report, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_report(report, path)
    content = strict_json(path)
    rows = content["configurations"][0]["rows"]
    del content["bundle"]["domain"], rows[1]["latency"]["samples_ms"]
    rows[0]["quality"]["mse"] = 3
    rows[0]["steps"] = True
    rows[2]["latency"]["median_ms"] = "fast"
    rows[3]["per_image"] = {"mse": ["good"]}
    content["configurations"][1]["configuration"]["plan"] = "secret"
    content["settings"]["steps"] = "1,2,5"
    content["environment"]["packages"] = []
    content["decision"]["pareto"] = [["one"]]
    path.write_text(json.dumps(content))
    with pytest.raises(ReportError, match="not a complete report") as raised:
        read_report(path)
    for problem in (
        "report.bundle.domain is missing",
        "report.configurations[0].rows[1].latency.samples_ms is missing",
        "report.configurations[0].rows[0].quality.mse is int, not an object",
        "report.configurations[0].rows[0].steps is bool, not int",
        "report.configurations[0].rows[2].latency.median_ms is str, not number",
        "report.configurations[0].rows[3].per_image.mse[0] is str, not number",
        "report.configurations[1].configuration.plan is 'secret', not one of engine, plain",
        "report.settings.steps is str, not list",
        "report.environment.packages is list, not dict",
        "report.decision.pareto[0] has 1 entries, not 2",
    ):
        assert problem in str(raised.value)


def _drop_configurations(content: dict[str, Any]) -> None:
    content["configurations"] = []


def _repeat_configuration(content: dict[str, Any]) -> None:
    content["configurations"].append(content["configurations"][0])


def _drop_rows(content: dict[str, Any]) -> None:
    content["configurations"][0] |= {"rows": [], "against": None}


def _drop_reason(content: dict[str, Any]) -> None:
    content["configurations"][6]["reason"] = None


def _drop_samples(content: dict[str, Any]) -> None:
    content["configurations"][0]["rows"][0]["latency"]["samples_ms"] = []


def _reverse_rows(content: dict[str, Any]) -> None:
    content["configurations"][1]["rows"].reverse()


def _shorten_reference(content: dict[str, Any]) -> None:
    del content["configurations"][0]["against"]["rows"][0]


def _drop_image(content: dict[str, Any]) -> None:
    content["configurations"][0]["rows"][0]["per_image"]["mse"].pop()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_drop_configurations, "no configurations"),
        (_repeat_configuration, "onnxruntime-cpu-fp32-engine-b1 is there twice"),
        (_drop_rows, "onnxruntime-cpu-fp32-engine-b1 has no rows"),
        (_drop_reason, "onnxruntime-cuda0-fp32-engine-b1 is failed and gives no reason"),
        (_drop_samples, "onnxruntime-cpu-fp32-engine-b1, 1 steps: no samples_ms"),
        (_reverse_rows, r"step counts are \[10, 5, 3, 2, 1\], expected them rising"),
        (_shorten_reference, "against has other step counts than the rows"),
        (_drop_image, r"per_image has \[11, 12\] values, expected 12"),
    ],
)
def test_contradictions_are_refused(
    report: Report, tmp_path: Path, change: Callable[[dict[str, Any]], None], words: str
) -> None:
    path = tmp_path / "report.json"
    write_report(report, path)
    content = strict_json(path)
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ReportError, match=words):
        read_report(path)
