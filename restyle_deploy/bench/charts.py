"""Charts drawn from report.json alone: quality against latency, and latency under load."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from functools import partial
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from restyle_deploy.bench.decision import judging_metric
from restyle_deploy.bench.figures import MetricFacts
from restyle_deploy.bench.libraries import require_bench_libraries
from restyle_deploy.bench.report import Report, read_report
from restyle_deploy.bench.series import (
    LINEAR_UP_TO,
    Point,
    Series,
    Style,
    absent_metrics,
    axis_label,
    direction_of,
    labels_of,
    measured_metrics,
    series_of,
    style_of,
    unsaid_words,
)
from restyle_deploy.bench.tables import FRONT, FRONT_MEANING, front_of
from restyle_deploy.files import replace_when_complete

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

CHART_NAME = "quality-latency"
LOAD_CHART_NAME = "load"
COLUMNS = 3
PANEL_INCHES = (4.2, 3.7)
HEAD_INCHES = 0.6
LINE_INCHES = 0.17
CHARACTERS_PER_INCH = 14.0
CHART_DPI = 150
NEAR = 0.09  # of the panel's sides
TEXT_COLOUR = "#222222"
FAINT_COLOUR = "#666666"
GRID_COLOUR = "#dddddd"
MAX_STYLED = 10  # further lines are drawn faintly: more cannot be told apart
MARKERS = {"circle": "o", "square": "s", "triangle": "^", "diamond": "D", "down": "v"}


def draw_charts(report_path: Path, output: Path) -> list[Path]:
    """Draw quality against latency, one panel per metric, and latency under load where it was measured.

    Each configuration has a line with one point per step count; so have the reference model and the exact session that
    were measured beside them. Lines differ by colour, marker and dash. Metrics that did not run are named below.

    Args:
        report_path: a report.json; nothing else is read.
        output: folder for `quality-latency.png` and `.svg`, and `load.png` and `.svg`; created when missing.
    Returns:
        The files written.
    Raises:
        ReportError: the report cannot be read.
        BackendUnavailableError: matplotlib is not installed.
    """
    require_bench_libraries()
    report = read_report(report_path)
    files = _save(_quality_figure(report), output / CHART_NAME)
    if any(result.load for result in report.configurations):
        files += _save(_load_figure(report), output / LOAD_CHART_NAME)
    return files


def _save(figure: Figure, path: Path) -> list[Path]:
    files = [path.with_name(f"{path.name}.{suffix}") for suffix in ("png", "svg")]
    for file in files:
        with replace_when_complete(file) as temporary:
            figure.savefig(temporary)
    return files


def _quality_figure(report: Report) -> Figure:
    metrics, lines = measured_metrics(report), series_of(report)
    absent = [metric.label for metric in absent_metrics(report)]
    judged, front = front_metric(report), front_of(report)
    panels = [
        partial(draw_panel, metric=metric, lines=lines, front=front if metric == judged else frozenset())
        for metric in metrics
    ]
    title = f"{report.bundle.name}: quality against latency, by number of steps"
    notes = [
        f"Point: median of {report.settings.repeats} calls, mean of {report.settings.image_count} images; bars: "
        "interquartile range, 95% bootstrap interval. Numbers: steps"
        + (", of the points that are better than all faster ones." if len(lines) > 2 else "."),
        front_note(report) or None,
        f"Not measured (report.json says why): {', '.join(absent)}." if absent else None,
    ]
    return _compose(report, title, labels=[line.label for line in lines], panels=panels, notes=notes)


def _load_figure(report: Report) -> Figure:
    title = f"{report.bundle.name}: latency under load"
    notes = ["Calls arrive at random (Poisson), whether or not the former are done; waiting counts."]
    panels = [partial(_draw_load, report=report, figure=figure) for figure in ("p50_ms", "p99_ms")]
    names = labels_of([result.configuration for result in report.configurations])
    labels = [names[result.configuration.name] for result in report.configurations if result.load]
    return _compose(report, title, labels=labels, panels=panels, notes=notes)


def _compose(
    report: Report,
    title: str,
    *,
    labels: Sequence[str],
    panels: Sequence[Callable[[Axes], None]],
    notes: Sequence[str | None],
) -> Figure:
    """Return a figure of panels in rows, with one legend of the labels and the notes below."""
    from matplotlib.figure import Figure

    rows = max(1, -(-len(panels) // COLUMNS))
    columns = max(1, -(-len(panels) // rows))
    width = max(7.5, columns * PANEL_INCHES[0])
    notes = [*notes, f"{report.environment.cpu}, {report.created[:10]}"]
    text = "\n".join(fill(note, int(width * CHARACTERS_PER_INCH)) for note in notes if note)
    legend_columns = max(1, int(width * 0.85 * CHARACTERS_PER_INCH) // (max(map(len, labels), default=1) + 12))
    legend_rows = -(-min(len(labels), MAX_STYLED + 1) // legend_columns) if len(labels) > 1 else 0
    heights = (
        HEAD_INCHES,
        rows * PANEL_INCHES[1],
        0.1 + LINE_INCHES * 1.35 * legend_rows,
        0.15 + LINE_INCHES * (text.count("\n") + 1),
    )
    figure = Figure(figsize=(width, sum(heights)), dpi=CHART_DPI, layout="constrained")
    head, middle, legend, foot = figure.subfigures(4, 1, height_ratios=heights, squeeze=False)[:, 0]
    configurations = [result.configuration for result in report.configurations]
    head.text(0.5, 0.7, title, ha="center", va="center", fontsize=13, color=TEXT_COLOUR, parse_math=False)
    head.text(0.5, 0.25, unsaid_words(configurations), ha="center", va="center", fontsize=9.5, color=FAINT_COLOUR)
    foot.text(0.5, 0.5, text, ha="center", va="center", fontsize=8.5, color=FAINT_COLOUR)
    for index, draw in enumerate(panels, start=1):
        draw(middle.add_subplot(rows, columns, index))
    if not panels:
        middle.text(0.5, 0.5, "no metric has a finite value", ha="center", color=FAINT_COLOUR)
    handles = {
        label: handle for axes in middle.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    if len(handles) > 1:
        legend.legend(handles.values(), handles.keys(), loc="center", ncols=legend_columns, frameon=False, fontsize=9.5)
    return figure


def front_metric(report: Report) -> MetricFacts | None:
    """Return the metric that the decision's Pareto front was judged by: in its chart, the front is marked.

    `None` where there is no front. Another metric's chart shows another trade-off.
    """
    if report.decision is None or not front_of(report):
        return None
    return judging_metric(report.metrics, report.decision.minimums)


def front_note(report: Report) -> str:
    """Return what the marks of the front mean; nothing where there is none."""
    judged = front_metric(report)
    return "" if judged is None else f"Ringed, for {judged.label}: the {FRONT}, {FRONT_MEANING}."


def draw_panel(
    axes: Axes, metric: MetricFacts, lines: Sequence[Series], *, front: Set[tuple[str, int]] = frozenset()
) -> None:
    """Draw one metric against latency; step counts at which it is infinite or missing have no point.

    Args:
        axes: of the panel.
        metric: of its vertical axis.
        lines: all of the report.
        front: names of lines, and steps, of the points that have a ring.
    """
    shown = {line.name: [point for point in line.points if _mean(point, metric) is not None] for line in lines}
    everything = [point for points in shown.values() for point in points]
    for index, line in enumerate(lines):
        _draw_line(axes, metric, line, shown[line.name], is_faint=index >= MAX_STYLED)
        _draw_rings(axes, metric, [point for point in shown[line.name] if (line.name, point.steps) in front])
    axes.set_title(f"{axis_label(metric)}, {direction_of(metric)}", fontsize=11, color=TEXT_COLOUR)
    axes.set_xlabel("latency of a call, ms", color=TEXT_COLOUR)
    _scale(axes, everything, is_log_allowed=len(lines) > 1)
    _number_points(axes, metric, everything if len(lines) <= 2 else _improving(everything, metric))


def _draw_line(axes: Axes, metric: MetricFacts, line: Series, points: Sequence[Point], *, is_faint: bool) -> None:
    medians = np.array([point.latency.median_ms for point in points])
    means = np.array([_mean(point, metric) for point in points], dtype=float)
    quartiles = np.array([np.percentile(point.latency.samples_ms, (25, 75)) for point in points]).reshape(-1, 2)
    bounds = np.array([_interval(point, metric) for point in points], dtype=float).reshape(-1, 2)
    axes.errorbar(
        medians,
        means,
        xerr=np.abs(quartiles - medians[:, None]).T,
        yerr=np.abs(bounds - means[:, None]).T,
        ecolor="#00000030",
        elinewidth=0.9,
        capsize=1.5,
        label="others" if is_faint else line.label,
        **_strokes(line.style, is_faint=is_faint),
    )


def _draw_rings(axes: Axes, metric: MetricFacts, points: Sequence[Point]) -> None:
    axes.plot(
        [point.latency.median_ms for point in points],
        [_mean(point, metric) or 0.0 for point in points],
        linestyle="none",
        marker="o",
        markersize=10,
        markerfacecolor="none",
        markeredgecolor=TEXT_COLOUR,
        markeredgewidth=1.0,
        zorder=4,
        gid="front",
    )


def _strokes(style: Style, *, is_faint: bool = False) -> dict[str, Any]:
    """Return a style in Matplotlib's words."""
    return {
        "color": "#bbbbbb" if is_faint else style.colour,
        "marker": MARKERS[style.shape],
        "linestyle": (0, style.dash) if style.dash else "-",
        "markersize": 3.5 if is_faint else 6,
        "linewidth": 1.0 if is_faint else 1.6,
        "zorder": 2 if is_faint else 3,
    }


def _number_points(axes: Axes, metric: MetricFacts, points: Sequence[Point]) -> None:
    """Write the step counts at the points, on the free side: where they improve, all others are behind.

    Of neighbours with the same number, only the first has it written.
    """
    from matplotlib.patheffects import withStroke

    offset, alignment = ((-5, 5), "bottom") if metric.higher_is_better else ((-5, -5), "top")
    within_axes = axes.transData + axes.transAxes.inverted()
    written: list[tuple[int, NDArray[np.float64]]] = []
    for point in points:
        place = within_axes.transform((point.latency.median_ms, _mean(point, metric) or 0.0))
        if any(steps == point.steps and np.abs(place - other).max() < NEAR for steps, other in written):
            continue
        written.append((point.steps, place))
        axes.annotate(
            str(point.steps),
            (point.latency.median_ms, _mean(point, metric) or 0.0),
            xytext=offset,
            textcoords="offset points",
            ha="right",
            va=alignment,
            color=TEXT_COLOUR,
            fontweight="bold",
            fontsize=9,
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
        )


def _improving(points: Sequence[Point], metric: MetricFacts) -> list[Point]:
    """Return the points that are better than all that are faster, by the decimals worth showing."""
    improving: list[Point] = []
    for point in sorted(points, key=lambda item: (item.latency.median_ms, -_merit(item, metric))):
        if not improving or _merit(point, metric) > _merit(improving[-1], metric):
            improving.append(point)
    return improving


def _merit(point: Point, metric: MetricFacts) -> float:
    mean = round(_mean(point, metric) or 0.0, metric.decimals)
    return mean if metric.higher_is_better else -mean


def _scale(axes: Axes, points: Sequence[Point], *, is_log_allowed: bool) -> None:
    medians = [point.latency.median_ms for point in points]
    if is_log_allowed and max(medians) > LINEAR_UP_TO * min(medians):
        axes.set_xscale("log")
        axes.set_xlim(min(medians) / 1.3, max(medians) * 1.3)
        _use_plain_ticks(axes.xaxis, max(medians) / min(medians))
    else:
        # A bar that one disturbed call stretched may leave the frame; the points must not be squeezed for it.
        axes.set_xlim(
            0,
            max(
                1.15 * median + min(point.latency.iqr_ms, median) for median, point in zip(medians, points, strict=True)
            ),
        )
    axes.margins(y=0.12)
    _decorate(axes)


def _use_plain_ticks(axis: Axis, ratio: float) -> None:
    """Write the ticks of a logarithmic axis as plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if ratio < 300 else (1.0,), numticks=20))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _decorate(axes: Axes) -> None:
    axes.grid(visible=True, color=GRID_COLOUR, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_load(axes: Axes, report: Report, figure: str) -> None:
    """Draw one figure of the latency against the rate of arrivals; styles are those of the other chart."""
    labels = labels_of([result.configuration for result in report.configurations])
    styles = {line.name: line.style for line in series_of(report)}
    for index, result in enumerate(report.configurations):
        if result.load:
            name = result.configuration.name
            rates = [point.rate_per_s for point in result.load]
            times = [getattr(point, figure) for point in result.load]
            axes.plot(rates, times, label=labels[name], **_strokes(styles.get(name, style_of(index))))
    everything = [getattr(point, figure) for result in report.configurations for point in result.load]
    axes.set_yscale("log")
    _use_plain_ticks(axes.yaxis, max(everything) / min(everything))
    axes.set_title(f"{figure.removesuffix('_ms')} from arrival to end, ms", fontsize=11, color=TEXT_COLOUR)
    axes.set_xlabel("arrivals per second", color=TEXT_COLOUR)
    axes.set_xlim(left=0)
    _decorate(axes)


def _mean(point: Point, metric: MetricFacts) -> float | None:
    aggregate = point.quality.get(metric.name)
    return aggregate.mean if aggregate is not None else None


def _interval(point: Point, metric: MetricFacts) -> tuple[float | None, float | None]:
    """Return the bounds of the mean; the mean itself where there are none."""
    aggregate = point.quality[metric.name]
    return (
        aggregate.mean if aggregate.low is None else aggregate.low,
        aggregate.mean if aggregate.high is None else aggregate.high,
    )
