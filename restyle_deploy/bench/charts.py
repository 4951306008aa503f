"""Pictures: quality against latency, drawn from report.json alone, and strips that show an inversion step by step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from restyle_deploy.bench.libraries import require_bench_libraries
from restyle_deploy.bench.quality import METRICS, Metric
from restyle_deploy.bench.report import Report, Row, read_report
from restyle_deploy.files import replace_when_complete

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CHART_NAME = "quality-latency"
CHART_INCHES = (12.0, 4.6)
CHART_DPI = 150
LINE_COLOUR = "#0072B2"  # Okabe and Ito's blue: safe for colour-blind readers, dark enough in grey
TEXT_COLOUR = "#222222"
FAINT_COLOUR = "#666666"

STRIP_CELL_PIXELS = 192
STRIP_GAP_PIXELS = 8
STRIP_CAPTION_PIXELS = 26
STRIP_FONT_PIXELS = 16


def draw_charts(report_path: Path, output: Path) -> list[Path]:
    """Draw quality against latency, one labelled point per step count and one panel per metric.

    Args:
        report_path: a report.json; nothing else is read.
        output: folder for `quality-latency.png` and `.svg`; created when missing.
    Returns:
        The files written.
    Raises:
        ReportError: the report cannot be read.
        BackendUnavailableError: matplotlib is not installed.
    """
    require_bench_libraries()
    from matplotlib.figure import Figure

    report = read_report(report_path)
    figure = Figure(figsize=CHART_INCHES, dpi=CHART_DPI, layout="constrained")
    figure.suptitle(_title(report), fontsize=13, color=TEXT_COLOUR)
    panels = figure.subplots(1, len(METRICS))
    for axes, metric in zip(panels, METRICS, strict=True):
        _draw_panel(axes, metric, report.rows)
    figure.supxlabel(_caption(report), fontsize=8.5, color=FAINT_COLOUR)
    files = [output / f"{CHART_NAME}.{suffix}" for suffix in ("png", "svg")]
    for file in files:
        with replace_when_complete(file) as temporary:
            figure.savefig(temporary)
    return files


def draw_strip(target: NDArray[np.uint8], images: Sequence[tuple[str, NDArray[np.uint8]]], path: Path) -> None:
    """Draw the input and then the steps in a row, each under its caption and all of one size.

    Pixels are repeated a whole number of times where images are small, so that the strip shows nothing the model did
    not render; images of another size than the target's are resampled to it.

    Args:
        target: uint8 [H, W, 3], the encoder's input.
        images: captions and images, uint8 [h, w, 3].
        path: a PNG file to write.
    """
    factor = -(-STRIP_CELL_PIXELS // min(target.shape[:2]))
    height, width = target.shape[0] * factor, target.shape[1] * factor
    cells = [("input", target), *images]
    size = (
        len(cells) * (width + STRIP_GAP_PIXELS) + STRIP_GAP_PIXELS,
        height + STRIP_CAPTION_PIXELS + STRIP_GAP_PIXELS,
    )
    strip = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(strip)
    font = ImageFont.load_default(STRIP_FONT_PIXELS)
    for index, (caption, pixels) in enumerate(cells):
        left = STRIP_GAP_PIXELS + index * (width + STRIP_GAP_PIXELS)
        draw.text((left + width / 2, STRIP_CAPTION_PIXELS / 2), caption, fill=TEXT_COLOUR, font=font, anchor="mm")
        strip.paste(_enlarge(pixels, target.shape[:2], factor), (left, STRIP_CAPTION_PIXELS))
    with replace_when_complete(path) as temporary:
        strip.save(temporary)


def _enlarge(pixels: NDArray[np.uint8], shape: tuple[int, ...], factor: int) -> Image.Image:
    image = Image.fromarray(pixels)
    if pixels.shape[:2] != shape:
        image = image.resize((shape[1], shape[0]), Image.Resampling.BICUBIC)
    return image.resize((shape[1] * factor, shape[0] * factor), Image.Resampling.NEAREST)


def _draw_panel(axes: Axes, metric: Metric, rows: Sequence[Row]) -> None:
    """Draw one metric against latency; step counts at which it is infinite have no point."""
    from matplotlib.patheffects import withStroke

    shown = [row for row in rows if getattr(row.quality, metric.name) is not None]
    medians = np.array([row.latency.median_ms for row in shown])
    values = [getattr(row.quality, metric.name) for row in shown]
    quartiles = np.array([np.percentile(row.latency.samples_ms, (25, 75)) for row in shown]).reshape(-1, 2)
    axes.errorbar(
        medians,
        values,
        xerr=np.abs(quartiles - medians[:, None]).T,
        marker="o",
        markersize=7,
        linewidth=1.6,
        capsize=3.5,
        color=LINE_COLOUR,
        ecolor=TEXT_COLOUR,
        elinewidth=1.2,
    )
    # Curves that fall flatten out above their tangents, those that rise below: the free side is to the right.
    offset, alignment = ((6, -6), "top") if metric.higher_is_better else ((6, 6), "bottom")
    for row, value in zip(shown, values, strict=True):
        unit = "" if row is not shown[-1] else " step" if row.steps == 1 else " steps"
        axes.annotate(
            f"{row.steps}{unit}",
            (row.latency.median_ms, value),
            xytext=offset,
            textcoords="offset points",
            va=alignment,
            color=TEXT_COLOUR,
            fontweight="bold",
            fontsize=10,
            path_effects=[withStroke(linewidth=3, foreground="white")],
        )
    direction = "higher is better" if metric.higher_is_better else "lower is better"
    axes.set_title(f"{metric.label}, {direction}", fontsize=11, color=TEXT_COLOUR)
    axes.set_xlabel("latency per image, ms", color=TEXT_COLOUR)
    # A bar that one disturbed call stretched may leave the frame; the points must not be squeezed for it.
    axes.set_xlim(0, max(1.25 * row.latency.median_ms + min(row.latency.iqr_ms, row.latency.median_ms) for row in rows))
    axes.margins(y=0.15)
    axes.grid(visible=True, color="#dddddd", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)


def _title(report: Report) -> str:
    where = " on ".join(str(report.session[key]) for key in ("backend", "device") if key in report.session)
    return f"{report.bundle.name}: quality against latency, by number of steps ({where})"


def _caption(report: Report) -> str:
    environment, settings = report.environment, report.settings
    return (
        f"Point: median of {settings.repeats} calls at batch {settings.batch}; bar: interquartile "
        f"range. Quality: mean of {settings.image_count} images. {environment.cpu}, {report.created[:10]}"
    )
