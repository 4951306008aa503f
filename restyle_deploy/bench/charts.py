"""Pictures: quality against latency, drawn from report.json alone, and strips that show an inversion step by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from restyle_deploy.backends.base import EXACT_PRECISION
from restyle_deploy.bench.libraries import require_bench_libraries
from restyle_deploy.bench.measure import StepLatency
from restyle_deploy.bench.quality import METRICS, ImageQuality, Metric
from restyle_deploy.bench.report import Report, read_report
from restyle_deploy.files import replace_when_complete

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CHART_NAME = "quality-latency"
CHART_INCHES = (12.0, 4.6)
CHART_DPI = 150
LEGEND_ANCHOR = (0.5, 0.955)
LINE_COLOUR = "#0072B2"  # Okabe and Ito's blue: safe for colour-blind readers, dark enough in grey
OTHER_COLOUR = "#D55E00"  # vermilion, of the same set
TEXT_COLOUR = "#222222"
FAINT_COLOUR = "#666666"
LINEAR_UP_TO = 30.0  # longest over shortest latency; beyond, several lines need a logarithmic axis

STRIP_CELL_PIXELS = 192
STRIP_GAP_PIXELS = 8
STRIP_CAPTION_PIXELS = 26
STRIP_FONT_PIXELS = 16


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of the chart; lines differ by marker and dash too, for those who print in grey.

    Attributes:
        label: for the legend.
        points: step count, latency and quality of each point.
        colour, marker, dash: as Matplotlib takes them.
    """

    label: str
    points: tuple[tuple[int, StepLatency, ImageQuality], ...]
    colour: str = LINE_COLOUR
    marker: str = "o"
    dash: str = "-"


def draw_charts(report_path: Path, output: Path) -> list[Path]:
    """Draw quality against latency, one labelled point per step count and one panel per metric.

    What else was measured in the same rounds has a line of its own: the exact session beside an approximate one, and
    the reference model.

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
    lines = series_of(report)
    figure = Figure(figsize=CHART_INCHES, dpi=CHART_DPI, layout="constrained")
    # The legend has a line of its own below the title; the layout does not know of it.
    figure.suptitle(_title(report) + ("\n " if len(lines) > 1 else ""), fontsize=13, color=TEXT_COLOUR)
    panels = figure.subplots(1, len(METRICS))
    for axes, metric in zip(panels, METRICS, strict=True):
        _draw_panel(axes, metric, lines)
    if len(lines) > 1:
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="upper center", bbox_to_anchor=LEGEND_ANCHOR, ncols=len(lines), frameon=False
        )
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


def series_of(report: Report) -> list[Series]:
    """Return the lines of a report: what was measured, the exact session, the reference model."""
    measured = tuple((row.steps, row.latency, row.quality) for row in report.rows)
    exact = measured
    lines = []
    if report.exact is None:
        lines.append(Series(label="this session", points=measured))
    else:
        exact = tuple((row.steps, row.latency, row.quality) for row in report.exact.rows)
        lines.append(Series(label=_approximation(report), points=measured, colour=OTHER_COLOUR, marker="s", dash="--"))
        lines.append(Series(label="exact (float32)", points=exact))
    if report.against is not None:
        reference = tuple(
            (row.steps, row.latency, quality) for row, (_, _, quality) in zip(report.against.rows, exact, strict=True)
        )
        name = report.against.reference["library"]
        ratios = [row.ratio.median for row in report.against.rows]
        label = f"{name}: {min(ratios):.1f} to {max(ratios):.1f} times as long"
        lines.append(Series(label=label, points=reference, colour=FAINT_COLOUR, marker="^", dash=":"))
    return lines


def _approximation(report: Report) -> str:
    """Return what the session approximates, and at what cost."""
    assert report.exact is not None
    modes = [str(report.session["precision"])] if report.session["precision"] != EXACT_PRECISION else []
    modes += ["preview steps"] if report.session["preview_steps"] else []
    psnr_db = [row.difference.psnr_db for row in report.exact.rows if row.difference.psnr_db is not None]
    image = f"{min(psnr_db):.1f} dB" if psnr_db else "equal images"
    latent_error = max(row.difference.latent_error for row in report.exact.rows)
    return f"{' and '.join(modes)}: at worst {image} from exact, latents {latent_error:.1e}"


def _draw_panel(axes: Axes, metric: Metric, lines: Sequence[Series]) -> None:
    """Draw one metric against latency; step counts at which it is infinite have no point."""
    for line in lines:
        _draw_line(axes, metric, line)
    latencies = [latency for line in lines for _, latency, _ in line.points]
    direction = "higher is better" if metric.higher_is_better else "lower is better"
    axes.set_title(f"{metric.label}, {direction}", fontsize=11, color=TEXT_COLOUR)
    axes.set_xlabel("latency per image, ms", color=TEXT_COLOUR)
    medians = [latency.median_ms for latency in latencies]
    if max(medians) > LINEAR_UP_TO * min(medians) and len(lines) > 1:
        axes.set_xscale("log")
        axes.set_xlim(min(medians) / 1.25, max(medians) * 1.5)
    else:
        # A bar that one disturbed call stretched may leave the frame; the points must not be squeezed for it.
        axes.set_xlim(
            0, max(1.25 * latency.median_ms + min(latency.iqr_ms, latency.median_ms) for latency in latencies)
        )
    axes.margins(y=0.15)
    axes.grid(visible=True, color="#dddddd", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_line(axes: Axes, metric: Metric, line: Series) -> None:
    """Draw one line of a panel, each point with its step count."""
    from matplotlib.patheffects import withStroke

    shown = [
        (steps, latency, getattr(quality, metric.name))
        for steps, latency, quality in line.points
        if getattr(quality, metric.name) is not None
    ]
    medians = np.array([latency.median_ms for _, latency, _ in shown])
    quartiles = np.array([np.percentile(latency.samples_ms, (25, 75)) for _, latency, _ in shown]).reshape(-1, 2)
    axes.errorbar(
        medians,
        [value for _, _, value in shown],
        xerr=np.abs(quartiles - medians[:, None]).T,
        marker=line.marker,
        linestyle=line.dash,
        markersize=7,
        linewidth=1.6,
        capsize=3.5,
        color=line.colour,
        ecolor=TEXT_COLOUR,
        elinewidth=1.2,
        label=line.label,
    )
    # Curves that fall flatten out above their tangents, those that rise below: the free side is to the right.
    offset, alignment = ((6, -6), "top") if metric.higher_is_better else ((6, 6), "bottom")
    for index, (steps, latency, value) in enumerate(shown, start=1):
        unit = "" if index < len(shown) else " step" if steps == 1 else " steps"
        axes.annotate(
            f"{steps}{unit}",
            (latency.median_ms, value),
            xytext=offset,
            textcoords="offset points",
            va=alignment,
            color=TEXT_COLOUR,
            fontweight="bold",
            fontsize=10,
            path_effects=[withStroke(linewidth=3, foreground="white")],
        )


def _title(report: Report) -> str:
    where = " on ".join(str(report.session[key]) for key in ("backend", "device") if key in report.session)
    return f"{report.bundle.name}: quality against latency, by number of steps ({where})"


def _caption(report: Report) -> str:
    environment, settings = report.environment, report.settings
    return (
        f"Point: median of {settings.repeats} calls at batch {settings.batch}; bar: interquartile "
        f"range. Quality: mean of {settings.image_count} images. {environment.cpu}, {report.created[:10]}"
    )
