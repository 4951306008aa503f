"""A comparison of two reports as text."""

from collections.abc import Sequence

from restyle_deploy.bench.compare import ComparedCell
from restyle_deploy.bench.figures import MetricFacts
from restyle_deploy.bench.tables import count_steps, format_figure, format_lines


def format_comparison(cells: Sequence[ComparedCell], metrics: Sequence[MetricFacts]) -> str:
    """Return a plain-text table: a line per cell, differences of quality, and the failures below."""
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
    text += [
        f"FAIL {cell.label}, {count_steps(cell.steps)}: {'; '.join(cell.failures)}" for cell in cells if cell.failures
    ]
    return "\n".join(text)


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
