"""The report as one HTML file that needs nothing else: an interactive chart, tables that sort, images step by step."""

import json
from collections.abc import Mapping
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

import numpy as np

from restyle_deploy.bench.charts import front_metric, front_note
from restyle_deploy.bench.decision import upper_p95_ms
from restyle_deploy.bench.page_images import images_section
from restyle_deploy.bench.page_tables import (
    configurations_section,
    environment_section,
    gains_section,
    latency_section,
    load_section,
    metrics_section,
    notes_section,
    quality_section,
    results_section,
    stages_section,
)
from restyle_deploy.bench.report import Report, read_report
from restyle_deploy.bench.series import (
    LINEAR_UP_TO,
    Point,
    Series,
    axis_label,
    labels_of,
    measured_metrics,
    series_of,
    unsaid_words,
)
from restyle_deploy.bench.tables import count_steps, front_of
from restyle_deploy.files import replace_when_complete

PAGE_NAME = "report.html"

_ASSETS = files("restyle_deploy.bench") / "assets"
_SCRIPTS = ("chart.js", "tables.js")


def write_page(report_path: Path, output: Path) -> Path:
    """Write the page of a report; it fetches nothing, and its policy forbids it to.

    Args:
        report_path: report.json. Images are taken from the folder `images` beside it, as
            `strips.write_step_images` writes them, if there is one.
        output: the HTML file.
    Returns:
        `output`.
    Raises:
        ReportError: the report or an image cannot be read.
    """
    page = page_from_report(read_report(report_path), report_path.parent)
    with replace_when_complete(output) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return output


def page_from_report(report: Report, images: Path) -> str:
    """Return the page; `images` is the folder that holds the folder of images."""
    configurations = [result.configuration for result in report.configurations]
    sections = [
        notes_section(report),
        results_section(report),
        images_section(report, images),
        latency_section(report),
        quality_section(report),
        stages_section(report),
        load_section(report),
        gains_section(report),
        configurations_section(report),
        metrics_section(report),
        environment_section(report),
    ]
    return Template(_read("page.html")).substitute(
        title=escape(f"{report.bundle.name}: quality and latency"),
        subtitle=escape(
            f"{report.environment.cpu}, {report.created[:10]}; {unsaid_words(configurations)}; "
            f"{report.settings.image_count} image{'s' * (report.settings.image_count != 1)}"
        ),
        style=_read("page.css"),
        script="\n".join(_read(name) for name in _SCRIPTS),
        data=_json(_chart_data(report)),
        decision=_decision(report),
        caption=escape(
            f"Point: median of {report.settings.repeats} calls, mean over the images; bars: interquartile range (of "
            "the p95: to its upper bound, which a budget is held against) and "
            f"95% bootstrap interval. Numbers: steps. {front_note(report)} Point at a mark, or use the arrow keys, for "
            "its figures."
        ),
        sections="\n".join(section for section in sections if section),
    )


def _read(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")


def _json(content: Mapping[str, object]) -> str:
    """Return JSON that may stand inside a script element: no end of the element can occur in it."""
    return json.dumps(content, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _chart_data(report: Report) -> dict[str, object]:
    """Return what the chart is drawn from."""
    lines = series_of(report)
    medians = [point.latency.median_ms for line in lines for point in line.points]
    decision, judged = report.decision, front_metric(report)
    return {
        "metrics": [
            {
                "name": metric.name,
                "label": axis_label(metric),
                "decimals": metric.decimals,
                "higher": metric.higher_is_better,
            }
            for metric in measured_metrics(report)
        ],
        "series": [_line_data(line) for line in lines],
        "decision": decision
        and {"name": decision.configuration, "steps": decision.steps, "budget": decision.budget_ms},
        "front": judged and {"metric": judged.name, "points": sorted(front_of(report))},
        "logarithmic": bool(medians) and max(medians) > LINEAR_UP_TO * min(medians),
    }


def _line_data(line: Series) -> dict[str, object]:
    return {
        "name": line.name,
        "label": line.label,
        "batch": line.batch,
        "colour": line.style.colour,
        "shape": line.style.shape,
        "dash": line.style.dash,
        "points": [_point_data(point) for point in line.points],
    }


def _point_data(point: Point) -> dict[str, object]:
    latency = point.latency
    return {
        "steps": point.steps,
        "median": latency.median_ms,
        "p90": latency.p90_ms,
        "p95": latency.p95_ms,
        "p99": latency.p99_ms,
        "bound": upper_p95_ms(latency.samples_ms),
        "iqr": latency.iqr_ms,
        "quartiles": np.percentile(latency.samples_ms, (25, 75)).tolist(),
        "throughput": point.throughput,
        "unstable": (latency.reason or "no reason given") if latency.unstable else None,
        "quality": {
            name: {key: getattr(aggregate, key) for key in ("mean", "low", "high", "median", "p5", "p95")}
            for name, aggregate in point.quality.items()
            if aggregate.mean is not None
        },
    }


def _decision(report: Report) -> str:
    """Return the box that says what to deploy, if that was decided."""
    decision = report.decision
    if decision is None:
        return ""
    if decision.configuration is None:
        return f'<div class="decision"><strong>No configuration fits.</strong><p>{escape(decision.reason)}</p></div>'
    labels = labels_of([result.configuration for result in report.configurations])
    label = labels.get(decision.configuration, decision.configuration)
    head = f"{label}: {count_steps(decision.steps or 0)}"
    return f'<div class="decision"><strong>{escape(head)}</strong><p>{escape(decision.reason)}</p></div>'
