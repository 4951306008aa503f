import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from numpy.typing import NDArray
from PIL import Image

from restyle_deploy.bench.charts import draw_charts, draw_panel, front_metric
from restyle_deploy.bench.report import ConfigurationResult, Report, write_report
from restyle_deploy.bench.series import series_of
from restyle_deploy.bench.tables import front_of
from restyle_deploy.errors import BackendUnavailableError, ReportError
from tests.bench.reports import made_up_report


def draw(report: Report, folder: Path) -> list[Path]:
    write_report(report, folder / "report.json")
    return draw_charts(folder / "report.json", folder / "out")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The charts of the whole report."""
    return draw(made_up_report(), tmp_path_factory.mktemp("charts"))


def pixels_of(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def numbers_in(report: Report, metric_index: int) -> list[tuple[str, float]]:
    axes = Figure(figsize=(4, 4)).subplots()
    draw_panel(axes, report.metrics[metric_index], series_of(report))
    return [(note.get_text(), note.xy[0]) for note in axes.texts if isinstance(note, Annotation)]


def without_quality(result: ConfigurationResult) -> ConfigurationResult:
    rows = tuple(replace(row, quality={}, per_image={}) for row in result.rows)
    return replace(result, rows=rows, exact=None)


def test_charts_come_from_the_file_alone(drawn: list[Path]) -> None:
    names = ["quality-latency.png", "quality-latency.svg", "load.png", "load.svg"]
    assert [file.name for file in drawn] == names
    assert sorted(drawn[0].parent.iterdir()) == sorted(drawn)
    picture = pixels_of(drawn[0])
    assert picture.shape[1] >= 1600
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 100
    assert ElementTree.parse(drawn[1]).getroot().tag.endswith("svg")


def test_every_line_is_in_the_legend_and_the_missing_metric_in_the_note(report: Report, drawn: list[Path]) -> None:
    text = drawn[1].read_text()
    assert all(f"<!-- {line.label} -->" in text for line in series_of(report))
    assert "Not measured (report.json says why): LPIPS." in text
    assert "<!-- demo-faces: quality against latency" in text
    assert "<!-- cpu, fp32, batch 1, where not said otherwise -->" in text
    assert "Some CPU, 2026-01-02" in text


def test_nothing_is_drawn_beyond_the_picture(drawn: list[Path]) -> None:
    for picture in map(pixels_of, drawn[::2]):
        border = np.concatenate(
            [picture[:3].reshape(-1, 3), picture[-3:].reshape(-1, 3), picture[:, -3:].reshape(-1, 3)]
        )
        assert (border == 255).all()


def test_without_load_there_is_one_chart(report: Report, tmp_path: Path) -> None:
    quiet = replace(report, configurations=report.configurations[1:2])
    assert [file.name for file in draw(quiet, tmp_path)] == ["quality-latency.png", "quality-latency.svg"]


def test_points_of_one_line_are_all_numbered_where_they_lie(report: Report) -> None:
    alone = replace(report, configurations=report.configurations[1:2])
    rows = report.configurations[1].rows
    assert numbers_in(alone, 2) == [(str(row.steps), row.latency.median_ms) for row in rows]


def test_of_many_lines_only_the_front_is_numbered(report: Report) -> None:
    numbered = numbers_in(report, 2)
    assert [text for text, _ in numbered] == ["1", "2", "3", "5", "10", "10"]
    fastest = report.configurations[4].rows
    assert [place for _, place in numbered[:5]] == [row.latency.median_ms for row in fastest]


def rings_in(report: Report, metric_index: int) -> set[tuple[float, float]]:
    axes = Figure(figsize=(4, 4)).subplots()
    metric, judged = report.metrics[metric_index], front_metric(report)
    front = front_of(report) if metric == judged else frozenset()
    draw_panel(axes, metric, series_of(report), front=front)
    places = [np.asarray(line.get_xydata(), float) for line in axes.lines if line.get_gid() == "front"]
    return {(float(x), float(y)) for place in places for x, y in place}


def test_front_of_the_decision_is_ringed_where_it_was_judged(report: Report) -> None:
    assert report.decision is not None
    assert front_metric(report) == report.metrics[2]
    points = {
        (row.latency.median_ms, row.quality["ssim"].mean)
        for result in report.configurations
        for row in result.rows
        if (result.configuration.name, row.steps) in report.decision.pareto
    }
    assert rings_in(report, 2) == points
    assert len(points) == 4
    assert rings_in(report, 0) == set()
    assert front_metric(replace(report, decision=None)) is None


def test_rings_are_explained(report: Report, drawn: list[Path], tmp_path: Path) -> None:
    text = drawn[1].read_text()
    assert "Ringed, for SSIM: the front, beaten by no row" in text
    assert text.count('<g id="front">') > 0
    assert "Ringed" not in draw(replace(report, decision=None), tmp_path)[1].read_text()


@pytest.mark.parametrize(("count", "scale"), [(8, "log"), (1, "log")])
def test_far_lines_share_a_logarithmic_axis(report: Report, count: int, scale: str) -> None:
    axes = Figure().subplots()
    draw_panel(axes, report.metrics[0], series_of(replace(report, configurations=report.configurations[:count])))
    assert axes.get_xscale() == scale


def test_one_line_has_a_linear_axis(report: Report) -> None:
    axes = Figure().subplots()
    draw_panel(axes, report.metrics[0], series_of(replace(report, configurations=report.configurations[1:2])))
    assert axes.get_xscale() == "linear"
    assert axes.get_xlim()[0] == 0


def test_more_lines_than_can_be_told_apart_are_drawn_faintly(report: Report, tmp_path: Path) -> None:
    first = report.configurations[1]
    many = [replace(first, configuration=replace(first.configuration, threads=count + 1)) for count in range(14)]
    text = draw(replace(report, configurations=tuple(many)), tmp_path)[1].read_text()
    assert text.count("<!-- others -->") == 1
    assert "<!-- onnxruntime, 10 threads -->" in text
    assert "<!-- onnxruntime, 11 threads -->" not in text


def test_without_any_metric_the_chart_says_so(report: Report, tmp_path: Path) -> None:
    bare = replace(report, configurations=tuple(map(without_quality, report.configurations)))
    text = draw(bare, tmp_path)[1].read_text()
    assert "no metric has a finite value" in text


def test_name_of_a_bundle_is_no_formula(report: Report, tmp_path: Path) -> None:
    assert draw(replace(report, bundle=replace(report.bundle, name=r"a$\frac$b")), tmp_path)


def test_one_step_count_is_drawn(report: Report, tmp_path: Path) -> None:
    result = report.configurations[1]
    short = replace(report, configurations=(replace(result, rows=result.rows[:1]),))
    assert draw(short, tmp_path)[0].is_file()


def test_no_report_no_chart(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="cannot be read"):
        draw_charts(tmp_path / "report.json", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_library_is_named(report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(BackendUnavailableError, match="matplotlib"):
        draw(report, tmp_path)
