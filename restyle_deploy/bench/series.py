"""The lines of a chart: what each configuration of a report came to, how it is called and how it is drawn."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from restyle_deploy.backends.base import EXACT_PRECISION
from restyle_deploy.bench.figures import Aggregate, MetricFacts, StepLatency
from restyle_deploy.bench.load import sustained_rate
from restyle_deploy.bench.report import Configuration, ConfigurationResult, Report

# Far apart for every kind of colour blindness (at least 18 in CIELAB under simulation) and on white paper (contrast 3).
COLOURS = ("#0072B2", "#D55E00", "#332288", "#CC79A7", "#1A1A1A", "#7A3E00", "#004D40")
REFERENCE_COLOUR = "#767676"
# Shapes and dashes tell lines apart in grey too. The lengths differ, so that lines of one colour differ as well.
SHAPES = ("circle", "square", "triangle", "diamond", "down")
DASHES: tuple[tuple[int, ...], ...] = ((), (6, 3), (2, 2), (8, 3, 2, 3))
LINEAR_UP_TO = 12.0  # longest over shortest latency; beyond, several lines need a logarithmic axis

_OPTIONS = tuple(field.name for field in fields(Configuration) if field.name != "backend")
_DEFAULTS = {field.name: field.default for field in fields(Configuration)}

Kind = Literal["configuration", "exact", "reference"]


@dataclass(frozen=True, kw_only=True)
class Style:
    """How a line is drawn: colour as #rrggbb, one of `SHAPES`, and lengths of dashes and gaps (none: solid)."""

    colour: str
    shape: str
    dash: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Point:
    """One step count of a line; throughput is in images per second, the report's where it has one."""

    steps: int
    latency: StepLatency
    throughput: float
    quality: Mapping[str, Aggregate]


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a chart.

    Attributes:
        name: unique within the report.
        label: for the legend.
        kind: a configuration; the exact session beside it; or the reference model.
        batch: images of one call.
        style: how it is drawn.
        points: by steps, rising.
    """

    name: str
    label: str
    kind: Kind
    batch: int
    style: Style
    points: tuple[Point, ...]


def series_of(report: Report) -> list[Series]:
    """Return a line for each configuration that has rows, for the exact sessions beside them and the reference model.

    An exact session that the report has as a configuration of its own has no second line, and the reference model has
    one line for each size of batch.
    """
    labels = labels_of([result.configuration for result in report.configurations])
    lines: list[Series] = []
    for index, (name, label, kind, batch, points) in enumerate(_lines(report, labels)):
        style = style_of(index, is_reference=kind == "reference")
        lines.append(Series(name=name, label=label, kind=kind, batch=batch, style=style, points=points))
    return lines


def style_of(index: int, *, is_reference: bool = False) -> Style:
    """Return the style of the index-th line; styles repeat after 140."""
    return Style(
        colour=REFERENCE_COLOUR if is_reference else COLOURS[index % len(COLOURS)],
        shape=SHAPES[index % len(SHAPES)],
        dash=DASHES[index % len(DASHES)],
    )


def labels_of(configurations: Sequence[Configuration]) -> dict[str, str]:
    """Return a short label by configuration name: the backend, and where the configuration leaves the defaults.

    What all of them have in common is left out: see `unsaid_words`.
    """
    varying = [name for name in _OPTIONS if len({getattr(item, name) for item in configurations}) > 1]
    return {item.name: ", ".join([item.backend, *_words(item, varying, _DEFAULTS)]) for item in configurations}


def unsaid_words(configurations: Sequence[Configuration]) -> str:
    """Return what the labels of `labels_of` leave unsaid, in words."""
    values = {name: {getattr(item, name) for item in configurations} for name in _OPTIONS}
    unsaid = [name for name in _OPTIONS if len(values[name]) == 1 or _DEFAULTS[name] in values[name]]
    if not configurations:
        return ""
    common: dict[str, Any] = {
        name: next(iter(values[name])) if len(values[name]) == 1 else _DEFAULTS[name] for name in unsaid
    }
    words = ", ".join(_words(replace(configurations[0], **common), unsaid, {"plan": "engine"}))
    return words if all(len(values[name]) == 1 for name in unsaid) else f"{words}, where not said otherwise"


def measured_metrics(report: Report) -> list[MetricFacts]:
    """Return the metrics that ran and have at least one finite mean."""
    with_figures = {
        name
        for result in report.configurations
        for row in result.rows
        for name, aggregate in row.quality.items()
        if aggregate.mean is not None
    }
    return [metric for metric in report.metrics if metric.missing is None and metric.name in with_figures]


def absent_metrics(report: Report) -> list[MetricFacts]:
    """Return the metrics that `measured_metrics` leaves out."""
    measured = measured_metrics(report)
    return [metric for metric in report.metrics if metric not in measured]


def missing_note(report: Report) -> str | None:
    """Return a sentence that names the metrics without figures and why, or `None` if all have them."""
    absent = [f"{metric.label} ({metric.missing or 'no finite value'})" for metric in absent_metrics(report)]
    return f"Not shown: {'; '.join(absent)}." if absent else None


def axis_label(metric: MetricFacts) -> str:
    """Return the metric's label, with its unit unless the label has it."""
    return metric.label if not metric.unit or f"({metric.unit})" in metric.label else f"{metric.label} ({metric.unit})"


def direction_of(metric: MetricFacts) -> str:
    """Return which way is better, in words."""
    return "higher is better" if metric.higher_is_better else "lower is better"


def _words(item: Configuration, names: Sequence[str], unsaid: Mapping[str, object]) -> list[str]:
    """Return the named fields in words, but for those with a value that goes without saying."""
    words = {
        "device": item.device,
        "precision": item.precision,
        "plan": item.plan,
        "preview_steps": "preview steps" if item.preview_steps else "",
        "batch": f"batch {item.batch}",
        "threads": "" if item.threads is None else f"{item.threads} thread{'s' * (item.threads > 1)}",
    }
    return [words[name] for name in names if words[name] and getattr(item, name) != unsaid.get(name)]


def _lines(report: Report, labels: Mapping[str, str]) -> Iterator[tuple[str, str, Kind, int, tuple[Point, ...]]]:
    """Yield name, label, kind, batch and points of each line."""
    present = {result.configuration.name for result in report.configurations if result.rows}
    references: set[int] = set()
    for result in report.configurations:
        item = result.configuration
        if result.rows:
            points = tuple(
                Point(steps=row.steps, latency=row.latency, throughput=row.throughput, quality=row.quality)
                for row in result.rows
            )
            yield item.name, labels[item.name], "configuration", item.batch, points
        exact = replace(item, precision=EXACT_PRECISION, preview_steps=False)
        if result.exact is not None and exact.name not in present:
            points = tuple(
                Point(
                    steps=row.steps,
                    latency=row.latency,
                    throughput=_throughput(row.latency, item.batch),
                    quality=row.quality,
                )
                for row in result.exact.rows
            )
            yield f"{item.name} exact", f"{labels[item.name]}: exact session", "exact", item.batch, points
        if result.against is not None and item.batch not in references:
            references.add(item.batch)
            yield _reference_line(result)


def _reference_line(result: ConfigurationResult) -> tuple[str, str, Kind, int, tuple[Point, ...]]:
    """Return the reference model's line, whose quality is that of the exact session."""
    assert result.against is not None
    library, batch = str(result.against.reference["library"]), result.configuration.batch
    exact = [row.quality for row in (result.exact.rows if result.exact is not None else result.rows)]
    points = tuple(
        Point(steps=row.steps, latency=row.latency, throughput=_throughput(row.latency, batch), quality=quality)
        for row, quality in zip(result.against.rows, exact, strict=True)
    )
    label = f"{library} (reference)" + (f", batch {batch}" if batch > 1 else "")
    return f"{library} b{batch}", label, "reference", batch, points


def _throughput(latency: StepLatency, batch: int) -> float:
    """Return images per second, as `Row.throughput` has them."""
    return batch * sustained_rate(latency.samples_ms)
