import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from restyle_deploy.bench import page_images
from restyle_deploy.bench.page import write_page
from restyle_deploy.bench.page_images import difference_map
from restyle_deploy.bench.report import ConfigurationResult, Report, write_report
from restyle_deploy.bench.series import series_of
from restyle_deploy.bench.strips import write_step_images
from restyle_deploy.errors import ReportError
from tests.bench.reports import write_made_up_images


class Elements(HTMLParser):
    """Collects the tags and attributes, and checks that what is opened is closed."""

    VOID = frozenset({"meta", "link", "input", "img", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def page_of(report: Report, folder: Path) -> str:
    write_report(report, folder / "report.json")
    return write_page(folder / "report.json", folder / "report.html").read_text(encoding="utf-8")


def data_in(page: str) -> dict[str, Any]:
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert match is not None
    content: dict[str, Any] = json.loads(match[1])
    return content


def test_page_is_whole_and_fetches_nothing(report: Report, tmp_path: Path) -> None:
    write_made_up_images(tmp_path, report)
    elements = Elements(page_of(report, tmp_path)).found
    sources = [value for _, attributes in elements for key, value in attributes.items() if key in ("src", "href")]
    assert len(sources) > 60
    assert all(value is not None and value.startswith("data:") for value in sources)
    policy = next(attributes["content"] for _, attributes in elements if "http-equiv" in attributes)
    assert policy is not None
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_chart_has_every_point_and_metric(report: Report, tmp_path: Path) -> None:
    data = data_in(page_of(report, tmp_path))
    assert [metric["name"] for metric in data["metrics"]] == ["mse", "psnr_db", "ssim"]
    lines = series_of(report)
    assert [line["label"] for line in data["series"]] == [line.label for line in lines]
    row = report.configurations[0].rows[1]
    point = data["series"][0]["points"][1]
    assert (point["steps"], point["median"], point["p95"]) == (2, row.latency.median_ms, row.latency.p95_ms)
    quality = row.quality["ssim"]
    assert point["quality"]["ssim"] == {
        name: getattr(quality, name) for name in ("mean", "low", "high", "median", "p5", "p95")
    }
    assert (point["p90"], point["p99"], point["iqr"]) == (row.latency.p90_ms, row.latency.p99_ms, row.latency.iqr_ms)
    assert point["bound"] == max(row.latency.samples_ms)
    assert point["throughput"] == row.throughput
    against = report.configurations[0].against
    assert against is not None
    samples = against.rows[1].latency.samples_ms
    assert data["series"][1]["points"][1]["throughput"] == pytest.approx(1e3 * len(samples) / sum(samples))
    assert data["series"][5]["points"][1]["unstable"] == "the interquartile range is above 10% of the median"
    assert data["decision"] == {"name": "openvino-cpu-fp32-engine-b1", "steps": 5, "budget": 20.0}
    assert data["logarithmic"] is True


def test_front_is_the_decisions_and_of_the_metric_that_it_was_judged_by(report: Report, tmp_path: Path) -> None:
    assert report.decision is not None
    page = page_of(report, tmp_path)
    assert data_in(page)["front"] == {"metric": "ssim", "points": sorted(map(list, report.decision.pareto))}
    assert "Ringed, for SSIM: the front, beaten by no row in latency, images per second and quality together." in page
    results = page.split('id="results"')[1].split("</section>")[0]
    assert results.count('<tr class="front">') == 3
    assert results.count('<tr class="front chosen">') == 1
    assert results.count(">yes</td>") == 4
    without = page_of(replace(report, decision=None), tmp_path)
    assert data_in(without)["front"] is None
    assert "Ringed" not in without
    assert 'class="front"' not in without


def rows_in(page: str, section: str) -> list[list[str]]:
    """Return the cells' texts of a section's table."""
    body = page.split(f'id="{section}"')[1].split("<tbody>")[1].split("</tbody>")[0]
    return [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in body.split("</tr>")[:-1]]


def test_all_figures_of_the_latencies_are_told(report: Report, tmp_path: Path) -> None:
    rows = rows_in(page_of(report, tmp_path), "latency-details")
    lines = series_of(report)
    assert [row[0] for row in rows] == [line.label for line in lines for _ in line.points]
    latency = report.configurations[0].rows[2].latency
    bound_ms = max(latency.samples_ms)  # twenty calls have no better one
    times = (latency.median_ms, latency.p90_ms, latency.p95_ms, bound_ms, latency.p99_ms, latency.iqr_ms)
    assert rows[2][1:] == ["3", *(f"{time:.2f}" for time in times), f"{latency.first_call_ms:.2f}", "20"]


def test_gains_are_told_of_a_step_and_where_they_become_losses(report: Report, tmp_path: Path) -> None:
    first = report.configurations[0]
    gains = tuple(
        replace(gain, gain=-0.05, low=-0.06, high=-0.04) if (gain.metric, gain.from_steps) == ("ssim", 5) else gain
        for gain in first.gains
    )
    rows = rows_in(page_of(replace(report, configurations=(replace(first, gains=gains),)), tmp_path), "gains")
    assert [row[3:] for row in rows if row[1:3] == ["SSIM", "5 to 10"]] == [
        ["-0.050", "-0.060", "-0.040", "-0.0100", "5", "5"]
    ]
    assert {row[-1] for row in rows if row[1] == "MSE"} == {"-"}


def test_where_a_metric_settles_is_told_or_that_one_cannot_tell(report: Report, tmp_path: Path) -> None:
    first = report.configurations[0]
    few = replace(
        report.configurations[1],
        gains=tuple(replace(gain, low=None, high=None) for gain in first.gains),
        settled_at_steps={},
    )
    rows = rows_in(page_of(replace(report, configurations=(first, few)), tmp_path), "gains")
    assert {(row[0], row[1], row[-2]) for row in rows} == {
        ("onnxruntime", "MSE", "not yet"),
        ("onnxruntime", "PSNR (dB)", "5"),
        ("onnxruntime", "SSIM", "5"),
        *(("onnxruntime, plain", metric, "cannot be told") for metric in ("MSE", "PSNR (dB)", "SSIM")),
    }


def test_all_figures_of_the_metrics_are_told(report: Report, tmp_path: Path) -> None:
    rows = rows_in(page_of(report, tmp_path), "quality-details")
    assert len(rows) == 6 * 5 * 3
    quality = report.configurations[0].rows[1].quality["psnr_db"]
    figures = (quality.mean, quality.low, quality.high, quality.median, quality.p5, quality.p95)
    assert rows[4] == ["onnxruntime", "2", "PSNR (dB)", *(f"{figure:.2f}" for figure in figures), "12"]


def test_sections_say_everything_that_was_measured(report: Report, tmp_path: Path) -> None:
    page = page_of(report, tmp_path)
    sections = re.findall(r'<section id="([a-z-]+)">', page)
    assert sections == [
        *("chart-section", "notes", "results", "latency-details", "quality-details", "stages", "load", "gains"),
        *("configurations", "metrics", "environment"),
    ]
    assert page.count('<tr class="front chosen">') == 1
    for words in ("<td", "412", "performance", "Wang et al. 2004", "Some CPU", "LPIPS (no weights of the backbone"):
        assert words in page


def test_empty_sections_are_left_out(report: Report, tmp_path: Path) -> None:
    result = report.configurations[1]
    rows = tuple(replace(row, stages={}) for row in result.rows)
    plain = replace(
        report,
        configurations=(replace(result, rows=rows, gains=(), settled_at_steps={}, load=()),),
        metrics=report.metrics[:3],
        decision=None,
    )
    page = page_of(plain, tmp_path)
    sections = re.findall(r'<section id="([a-z-]+)">', page)
    assert sections == [
        *("chart-section", "results", "latency-details", "quality-details"),
        *("configurations", "metrics", "environment"),
    ]
    assert '<div class="decision">' not in page
    assert data_in(page)["decision"] is None


def test_names_cannot_break_the_page(report: Report, tmp_path: Path) -> None:
    name = '</script><b>&"'
    odd = replace(report, bundle=replace(report.bundle, name=name))
    labelled = replace(odd.configurations[2], reason=name, status="failed")
    odd = replace(odd, configurations=(*odd.configurations[:2], labelled))
    metric = replace(report.metrics[0], label=name)
    page = page_of(replace(odd, metrics=(metric, *report.metrics[1:])), tmp_path)
    Elements(page)
    assert "<b>" not in page
    assert data_in(page)["metrics"][0]["label"] == name


def test_difference_maps_are_dark_where_equal_and_bright_where_not() -> None:
    target = np.zeros((4, 4, 3), np.uint8)
    image = target.copy()
    image[0, 0] = 100
    image[0, 1] = 50
    picture = np.asarray(difference_map(image, target, 100.0).convert("RGB")).astype(int)
    assert tuple(picture[0, 0]) == (252, 255, 164)
    assert tuple(picture[3, 3]) == (0, 0, 4)
    assert picture[3, 3].sum() < picture[0, 1].sum() < picture[0, 0].sum()


def test_images_are_reduced_and_limited(report: Report, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    name = report.configurations[0].configuration.name
    for index in range(9):
        write_step_images(tmp_path, name, f"image-{index}", noise, {1: noise[::2, ::2]})
    page = page_of(report, tmp_path)
    assert page.count("<figure>") == 8 * 2
    assert page.count('class="picture"') == 8 * 2
    assert len(page.split('id="images"')[1].split("</section>")[0]) < 3_000_000


def shown_in(page: str) -> list[str]:
    """Return the labels of the configurations whose images are shown."""
    return re.findall(r"<summary>(.*?)</summary>", page.split('id="images"')[1].split("</section>")[0])


def test_images_are_of_one_exact_configuration_and_each_approximate_one(report: Report, tmp_path: Path) -> None:
    write_made_up_images(tmp_path, report)
    page = page_of(report, tmp_path)
    assert shown_in(page) == ["openvino", "openvino, bf16", "openvino, preview steps"]
    assert "openvino stands for all exact configurations: they differ by rounding. Approximate: openvino, bf16;" in page
    assert shown_in(page_of(replace(report, decision=None), tmp_path))[0] == "onnxruntime"


def test_batches_of_an_approximate_configuration_are_shown_once(report: Report, tmp_path: Path) -> None:
    first = report.configurations[4]
    larger = [replace(first, configuration=replace(first.configuration, batch=batch)) for batch in (2, 4)]
    more = replace(report, configurations=(*report.configurations, *larger))
    write_made_up_images(tmp_path, more, count=1)
    assert shown_in(page_of(more, tmp_path)) == ["openvino", "openvino, bf16", "openvino, preview steps"]


def test_size_of_a_page_is_bounded(report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dozen approximate configurations of noise, which no file format makes smaller."""
    first = report.configurations[4]
    configurations = [replace(first.configuration, batch=1, device=f"cuda:{index}") for index in range(12)]
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for index in range(3):
        for item in configurations:
            write_step_images(tmp_path, item.name, f"image-{index}", noise, {1: noise // 2, 5: noise // 3})
    many = replace(report, configurations=tuple(replace(first, configuration=item) for item in configurations))
    whole = page_of(many, tmp_path)
    assert whole.count("<h3>") == 36
    most = len(whole.split('id="images"')[1]) // 2
    monkeypatch.setattr(page_images, "MAX_BYTES", most)
    page = page_of(many, tmp_path)
    assert sum(map(len, re.findall(r"<h3>.*?</div>", page))) <= most
    shown = page.count("<h3>")
    assert 12 <= shown < 36
    assert f"{36 - shown} more strips would make the page too large; their pictures are in images/." in page
    assert page.count("<h3>image-0</h3>") == 12  # the first image of all comes first
    monkeypatch.setattr(page_images, "MAX_BYTES", 1)
    assert page_of(many, tmp_path).count("<h3>") == 1


def test_pictures_of_a_former_run_are_not_shown_for_what_was_skipped(report: Report, tmp_path: Path) -> None:
    first = report.configurations[0]
    write_made_up_images(tmp_path, replace(report, configurations=(first,)), count=1)
    skipped = ConfigurationResult(configuration=first.configuration, status="skipped", reason="no time")
    assert 'id="images"' in page_of(report, tmp_path)
    page = page_of(replace(report, configurations=(skipped, *report.configurations[1:]), decision=None), tmp_path)
    assert 'id="images"' not in page


def test_names_of_images_cannot_break_the_page(report: Report, tmp_path: Path) -> None:
    pixels = np.zeros((8, 8, 3), np.uint8)
    write_step_images(tmp_path, report.configurations[0].configuration.name, '"><b>&', pixels, {1: pixels})
    page = page_of(report, tmp_path)
    Elements(page)
    assert "<b>" not in page
    assert "&quot;&gt;&lt;b&gt;&amp;, 1 step" in page


def test_load_tells_of_how_many_calls_its_percentiles_are(report: Report, tmp_path: Path) -> None:
    result = next(result for result in report.configurations if result.load)
    assert f'<td data-order="{len(result.load[0].samples_ms)}">' in page_of(report, tmp_path).split('id="load"')[1]


def test_damaged_image_is_named(report: Report, tmp_path: Path) -> None:
    write_made_up_images(tmp_path, report, count=1)
    name = report.configurations[3].configuration.name
    (tmp_path / "images" / name / "portrait-00" / "step-2.png").write_bytes(b"no image")
    with pytest.raises(ReportError, match=r"step-2\.png: cannot be read as an image"):
        page_of(report, tmp_path)


def test_no_report_no_page(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="cannot be read"):
        write_page(tmp_path / "report.json", tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_nothing_that_fits_is_said(report: Report, tmp_path: Path) -> None:
    assert report.decision is not None
    none = replace(report.decision, configuration=None, steps=None, reason="the fastest takes 30 ms")
    assert "No configuration fits.</strong><p>the fastest takes 30 ms" in page_of(
        replace(report, decision=none), tmp_path
    )
