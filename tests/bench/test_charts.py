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

from restyle_deploy.bench import charts
from restyle_deploy.bench.charts import draw_charts, draw_strip
from restyle_deploy.bench.quality import METRICS, ImageQuality, Metric
from restyle_deploy.bench.report import Report, write_report
from restyle_deploy.errors import BackendUnavailableError, ReportError


def pixels_of(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def plain_image(colour: tuple[int, int, int], shape: tuple[int, int] = (16, 16)) -> NDArray[np.uint8]:
    return np.full((*shape, 3), colour, np.uint8)


def test_charts_come_from_the_file_alone(report: Report, tmp_path: Path) -> None:
    write_report(report, tmp_path / "report.json")
    files = draw_charts(tmp_path / "report.json", tmp_path / "out")
    assert [file.name for file in files] == ["quality-latency.png", "quality-latency.svg"]
    assert sorted((tmp_path / "out").iterdir()) == sorted(files)
    picture = pixels_of(files[0])
    assert picture.shape[1] >= 1600
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 10
    assert ElementTree.parse(files[1]).getroot().tag.endswith("svg")


@pytest.mark.parametrize(
    ("metric", "labels"),
    # PSNR has no point at five steps, where it is infinite.
    list(zip(METRICS, (["1", "2", "5 steps"], ["1", "2 steps"], ["1", "2", "5 steps"]), strict=True)),
)
def test_every_point_is_labelled_where_it_lies(report: Report, metric: Metric, labels: list[str]) -> None:
    axes = Figure().subplots()
    charts._draw_panel(axes, metric, charts.series_of(report))
    notes = [text for text in axes.texts if isinstance(text, Annotation)]
    assert [note.get_text() for note in notes] == labels
    assert [note.xy for note in notes] == [
        (row.latency.median_ms, getattr(row.quality, metric.name)) for row in report.rows[: len(labels)]
    ]


def test_everything_measured_has_a_line_of_its_own(report_against: Report, tmp_path: Path) -> None:
    write_report(report_against, tmp_path / "report.json")
    lines = charts.series_of(report_against)
    assert [line.label for line in lines] == [
        "bf16 and preview steps: at worst 41.0 dB from exact, latents 5.0e-02",
        "exact (float32)",
        "torch: 10.0 to 10.0 times as long",
    ]
    assert len({(line.marker, line.dash) for line in lines}) == 3
    assert [latency.median_ms for _, latency, _ in lines[2].points] == [100, 200, 500]
    _, svg = draw_charts(tmp_path / "report.json", tmp_path)
    assert all(f"<!-- {line.label} -->" in svg.read_text() for line in lines)


def test_far_lines_share_a_logarithmic_axis(report_against: Report, report: Report) -> None:
    for shown, scale in ((report_against, "log"), (report, "linear")):
        axes = Figure().subplots()
        charts._draw_panel(axes, METRICS[0], charts.series_of(shown))
        assert axes.get_xscale() == scale


def test_svg_names_the_bundle_and_the_machine(report: Report, tmp_path: Path) -> None:
    write_report(report, tmp_path / "report.json")
    _, svg = draw_charts(tmp_path / "report.json", tmp_path)
    assert "<!-- demo-faces: quality" in svg.read_text()
    assert "Some CPU, 2026-01-02 -->" in svg.read_text()


def test_metric_that_is_infinite_everywhere_has_an_empty_panel(report: Report, tmp_path: Path) -> None:
    exact = ImageQuality(mse=0.0, psnr_db=None, ssim=1.0)
    rows = tuple(replace(row, quality=exact) for row in report.rows)
    write_report(replace(report, rows=rows), tmp_path / "report.json")
    assert draw_charts(tmp_path / "report.json", tmp_path)[0].is_file()


def test_one_step_count_is_drawn(report: Report, tmp_path: Path) -> None:
    write_report(replace(report, rows=report.rows[:1]), tmp_path / "report.json")
    assert draw_charts(tmp_path / "report.json", tmp_path)[0].is_file()


def test_no_report_no_chart(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="cannot be read"):
        draw_charts(tmp_path / "report.json", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_library_is_named(report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_report(report, tmp_path / "report.json")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(BackendUnavailableError, match="matplotlib"):
        draw_charts(tmp_path / "report.json", tmp_path)


def test_strip_shows_each_pixel_enlarged(tmp_path: Path) -> None:
    red, green = plain_image((200, 0, 0)), plain_image((0, 200, 0))
    red[0, 0] = 255
    draw_strip(red, [("step 1", green), ("step 2", red)], tmp_path / "strip.png")
    strip = pixels_of(tmp_path / "strip.png")
    assert [(strip == colour).all(axis=2).sum() for colour in ((200, 0, 0), (0, 200, 0))] == [2 * 255 * 144, 256 * 144]


def test_strip_has_captions(tmp_path: Path) -> None:
    white = plain_image((255, 255, 255))
    draw_strip(white, [("step 1", white)], tmp_path / "strip.png")
    strip = pixels_of(tmp_path / "strip.png")
    dark = strip.max(axis=2) < 128
    assert dark[:26, :200].any()
    assert dark[:26, 200:].any()
    assert not dark[26:].any()


@pytest.mark.parametrize("shape", [(192, 256), (1024, 1024), (50, 70)])
def test_images_of_another_size_take_the_cell_of_the_target(tmp_path: Path, shape: tuple[int, int]) -> None:
    red = plain_image((200, 0, 0), shape)
    draw_strip(plain_image((0, 0, 0), (192, 256)), [("step 1", red)], tmp_path / "strip.png")
    assert (pixels_of(tmp_path / "strip.png") == (200, 0, 0)).all(axis=2).sum() == 192 * 256
