import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from restyle_deploy.bench.report import read_report
from restyle_deploy.runtime.session import Session
from tests.cli.conftest import Run
from tests.pictures import write_bad_files

QUICK = ("--warmup", 0, "--repeats", 2, "--threads", 1)


def files_in(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}


def test_report_charts_and_strips_are_written(run: Run, toy_bundle: Path, photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    result = run("bench", toy_bundle, photos, "-o", output, "--steps", "1,2,3", *QUICK)
    assert result.exit_code == 0
    assert result.stderr == ""
    table, _, place = result.stdout.rpartition("\n\n")
    assert place == f"report, charts and strips: {output}\n"
    assert [line.split()[0] for line in table.splitlines()[:4]] == ["steps", "1", "2", "3"]
    charts = {"report.json", "quality-latency.png", "quality-latency.svg"}
    assert files_in(output) == charts | {"strips/a.png", "strips/b.png"}
    report = read_report(output / "report.json")
    assert [row.steps for row in report.rows] == [1, 2, 3]
    assert (report.settings.warmup, report.settings.repeats, report.settings.image_count) == (0, 2, 2)
    assert (report.session["backend"], report.session["threads"]) == ("onnxruntime", 1)


def test_json_is_the_report(run: Run, toy_bundle: Path, photos: Path, tmp_path: Path) -> None:
    result = run("bench", toy_bundle, photos, "-o", tmp_path, "--steps", "2,1", "--strips", 1, "--json", *QUICK)
    assert result.exit_code == 0
    assert json.loads(result.stdout) == json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert [row["steps"] for row in json.loads(result.stdout)["rows"]] == [1, 2]
    assert {path.name for path in (tmp_path / "strips").iterdir()} == {"a.png"}


def test_bad_files_are_named_and_the_others_measured(run: Run, toy_bundle: Path, photos: Path, tmp_path: Path) -> None:
    bad = write_bad_files(photos)
    result = run("bench", toy_bundle, photos, "-o", tmp_path / "out", "--steps", "1", *QUICK)
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == len(bad)
    assert all(f"Error: {path}: " in result.stderr for path in bad)
    assert read_report(tmp_path / "out" / "report.json").settings.image_count == 2


def test_no_image_that_can_be_read_is_one_line_more(run: Run, toy_bundle: Path, tmp_path: Path) -> None:
    bad = write_bad_files(tmp_path / "in")
    result = run("bench", toy_bundle, tmp_path / "in", "-o", tmp_path / "out", *QUICK)
    assert (result.exit_code, result.stdout) == (1, "")
    assert len(result.stderr.splitlines()) == len(bad) + 1
    assert result.stderr.endswith("Error: no image could be read; nothing was measured\n")
    assert not (tmp_path / "out").exists()


def test_folder_that_cannot_be_written_is_one_line(run: Run, toy_bundle: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = run("bench", toy_bundle, photos, "-o", tmp_path / "file", *QUICK)
    assert (result.exit_code, result.stdout) == (1, "")
    assert re.fullmatch(r"Error: .*file: no folder that can be written to: .*\n", result.stderr)


def test_missing_extra_is_one_line(
    run: Run, toy_bundle: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run("bench", toy_bundle, photos, "-o", tmp_path / "out", *QUICK)
    assert (result.exit_code, result.stdout) == (1, "")
    assert re.fullmatch(r"Error: .*matplotlib.*pip install 'restyle-deploy\[bench\]'\n", result.stderr)


def test_reference_model_has_columns_of_its_own(run: Run, toy_bundle: Path, photos: Path, tmp_path: Path) -> None:
    result = run("bench", toy_bundle, photos, "-o", tmp_path, "--steps", "1,2", "--against", "torch", *QUICK)
    assert result.exit_code == 0
    assert "torch/this (quartiles)" in result.stdout.splitlines()[0]
    against = read_report(tmp_path / "report.json").against
    assert against is not None
    assert [row.steps for row in against.rows] == [1, 2]


def test_missing_torch_is_one_line(
    run: Run, toy_bundle: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    result = run("bench", toy_bundle, photos, "-o", tmp_path / "out", "--against", "torch", *QUICK)
    assert (result.exit_code, result.stdout) == (1, "")
    assert re.fullmatch(r"Error: .*torch.*pip install 'restyle-deploy\[export\]'\n", result.stderr)
    assert not (tmp_path / "out").exists()


def test_approximate_mode_without_an_engine_is_one_line(
    run: Run, toy_bundle: Path, photos: Path, tmp_path: Path
) -> None:
    result = run("bench", toy_bundle, photos, "-o", tmp_path / "out", "--preview-steps", *QUICK)
    assert (result.exit_code, result.stdout) == (1, "")
    assert re.fullmatch(r"Error: .*restyle-deploy build .*\n", result.stderr)


def test_approximate_mode_is_measured_with_the_exact_one(
    run: Run, toy_bundle: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[dict[str, Any]] = []

    def open_session(bundle: Path, **options: Any) -> Session:
        opened.append(dict(options))
        session = open_plain(bundle, threads=1)
        if options.get("preview_steps"):  # stands for a session that has an engine with previews
            monkeypatch.setattr(session, "describe", lambda: {**Session.describe(session), "preview_steps": True})
        return session

    open_plain = Session.open
    monkeypatch.setattr(Session, "open", open_session)
    result = run("bench", toy_bundle, photos, "-o", tmp_path, "--steps", "1,2", "--preview-steps", *QUICK)
    assert result.exit_code == 0
    assert [options.get("preview_steps", False) for options in opened] == [True, False]
    assert "PSNR to exact (dB)" in result.stdout.splitlines()[0]
    assert read_report(tmp_path / "report.json").exact is not None
