"""A comparison of two reports as text, and what is to be known of it."""

from collections import Counter
from collections.abc import Sequence

from restyle_deploy.bench.comparable import (
    notes_of_environments,
    notes_of_quality,
    notes_of_references,
    unlike_environments,
)
from restyle_deploy.bench.compare import ComparedCell
from restyle_deploy.bench.figures import MetricFacts
from restyle_deploy.bench.quality import LEAST_IMAGES
from restyle_deploy.bench.report import Report
from restyle_deploy.bench.stability import LEAST_SAMPLES
from restyle_deploy.bench.tables import count_steps, format_figure, format_lines


def format_comparison(cells: Sequence[ComparedCell], metrics: Sequence[MetricFacts]) -> str:
    """Return a plain-text table: a line per cell, differences of quality, and below why rows are unclear, or fail."""
    compared = {change.metric for cell in cells for change in cell.quality}
    shown = [metric for metric in metrics if metric.name in compared]
    labels = [f"{metric.label} change" for metric in shown]
    lines = [["configuration", "steps", "first ms", "second ms", "ratio (95% interval)", *labels, "verdict"]]
    text = [format_lines([*lines, *(_line(cell, shown) for cell in cells)])]
    libraries = {cell.relative_to for cell in cells if cell.relative_to is not None}
    if libraries:
        text.append(f"* of the ratios to {', '.join(sorted(libraries))}, measured in the same rounds of each report")
    if any(change.is_worse for cell in cells for change in cell.quality):
        text.append("! worse: the whole interval of the change is on that side")
    doubts = Counter(cell.doubt for cell in cells if cell.doubt is not None)
    text += [f"UNCLEAR {_count_rows(count)}, neither passed nor failed: {doubt}" for doubt, count in doubts.items()]
    text += [
        f"FAIL {cell.label}, {count_steps(cell.steps)}: {'; '.join(cell.failures)}" for cell in cells if cell.failures
    ]
    return "\n".join(text)


def notes_of_pair(first: Report, second: Report) -> list[str]:
    """Return what a reader of the comparison has to know: times not to be relied on, what is not compared."""
    rows = [[row for result in report.configurations for row in result.rows] for report in (first, second)]
    unstable = [sum(row.latency.unstable for row in of_report) for of_report in rows]
    few = any(len(row.latency.samples_ms) < LEAST_SAMPLES for of_report in rows for row in of_report)
    unlike = unlike_environments(first, second)
    notes = [f"compared all the same, though not alike: {'; '.join(unlike)}"] if unlike else []
    notes += notes_of_environments(first, second)
    notes += notes_of_references(first, second)
    if any(unstable):
        notes.append(f"unstable times: {unstable[0]} rows of the first report, {unstable[1]} of the second")
    if few:
        notes.append(f"rows of fewer than {LEAST_SAMPLES} calls are unclear; bench --repeats 20 tells more")
    if min(report.settings.image_count for report in (first, second)) < LEAST_IMAGES:
        notes.append(f"no quality is called worse: of fewer than {LEAST_IMAGES} images one cannot tell")
    return notes + notes_of_quality(first, second)


def _count_rows(count: int) -> str:
    return f"{count} row{'s' * (count != 1)}"


def _line(cell: ComparedCell, metrics: Sequence[MetricFacts]) -> list[str]:
    times = ["-" if value is None else format_figure(value) for value in (cell.first_ms, cell.second_ms)]
    ratio = "-"
    if cell.latency is not None:
        ratio = f"{cell.latency.ratio:.3f} ({cell.latency.low:.3f} to {cell.latency.high:.3f})"
        ratio += "*" if cell.relative_to is not None else ""
    changes = {change.metric: change for change in cell.quality}
    quality = []
    for metric in metrics:
        change = changes.get(metric.name)
        mark = "!" if change is not None and change.is_worse else ""
        text = "-" if change is None else f"{change.second - change.first:+.{metric.decimals}f}{mark}"
        quality.append(text)
    return [cell.label, str(cell.steps), *times, ratio, *quality, cell.verdict]
