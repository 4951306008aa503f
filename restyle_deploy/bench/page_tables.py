"""The page's tables and lists, as HTML."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from html import escape

from restyle_deploy.bench.decision import CONFIDENCE, LEAST_CALLS, upper_p95_ms
from restyle_deploy.bench.figures import Gain, MetricFacts
from restyle_deploy.bench.quality import LEAST_IMAGES, gain_per_step, worsening_steps
from restyle_deploy.bench.report import ConfigurationResult, Report
from restyle_deploy.bench.series import axis_label, direction_of, labels_of, measured_metrics, series_of
from restyle_deploy.bench.tables import (
    FRONT,
    FRONT_MEANING,
    NOTHING,
    Cell,
    Table,
    figure_cell,
    format_value,
    front_of,
    notes_of,
    table_of,
    word_cell,
)

_MEBIBYTE = 2**20


def notes_section(report: Report) -> str:
    """Return what the reader has to know beside the figures: unstable rows, failures, missing metrics."""
    items = "".join(f"<li>{escape(note)}</li>" for note in notes_of(report))
    return f'<section id="notes"><h2>Notes</h2><ul>{items}</ul></section>' if items else ""


def results_section(report: Report) -> str:
    """Return the table of all figures; the row that was decided for stands out, and those of the Pareto front do."""
    decision, front = report.decision, front_of(report)
    chosen = (decision.configuration, decision.steps) if decision is not None else None
    classes: dict[tuple[str | None, int | None], str] = dict.fromkeys(front, "front")
    if chosen is not None:
        classes[chosen] = "front chosen" if chosen in front else "chosen"
    note = f'<p class="faint">{FRONT}: {FRONT_MEANING}.</p>' if front else ""
    return _section("results", "Results", note + _html_table(table_of(report), classes=classes))


def latency_section(report: Report) -> str:
    """Return all figures of the latencies, those of exact sessions and reference models included."""
    headers = ["configuration", "steps", "p50 ms", "p90 ms", "p95 ms", "p95 bound ms", "p99 ms", "IQR ms"]
    headers += ["first call ms", "calls"]
    rows = [
        (
            word_cell(line.label),
            _count(point.steps),
            *map(figure_cell, (latency.median_ms, latency.p90_ms, latency.p95_ms, upper_p95_ms(latency.samples_ms))),
            *map(figure_cell, (latency.p99_ms, latency.iqr_ms)),
            _figure_or_nothing(latency.first_call_ms),
            _count(len(latency.samples_ms)),
        )
        for line in series_of(report)
        for point in line.points
        for latency in [point.latency]
    ]
    note = (
        f"Of single calls. The p95's upper bound ({CONFIDENCE:.0%} confidence; of fewer than {LEAST_CALLS} calls, the "
        "slowest one) is what a budget is held against. IQR: interquartile range."
    )
    return _table_section("latency-details", "Latency in detail", headers, rows, note=note, is_folded=True)


def quality_section(report: Report) -> str:
    """Return all figures of each metric, those of exact sessions included."""
    headers = ["configuration", "steps", "metric", "mean", "low", "high", "median", "5th", "95th", "images"]
    rows = [
        (
            word_cell(line.label),
            _count(point.steps),
            word_cell(axis_label(metric)),
            *(_value(getattr(aggregate, name), metric) for name in ("mean", "low", "high", "median", "p5", "p95")),
            _count(aggregate.count),
        )
        for line in series_of(report)
        if line.kind != "reference"  # its quality is that of the exact session
        for point in line.points
        for metric in measured_metrics(report)
        if (aggregate := point.quality.get(metric.name)) is not None
    ]
    note = (
        "Over the images: mean with its 95% bootstrap interval (low, high), median, 5th and 95th percentile; "
        "images are those with a finite value."
    )
    return _table_section("quality-details", "Quality in detail", headers, rows, note=note, is_folded=True)


def stages_section(report: Report) -> str:
    """Return the median time of each stage of a call."""
    labels = _labels(report)
    names = list(dict.fromkeys(name for result in report.configurations for row in result.rows for name in row.stages))
    rows = [
        (
            word_cell(labels[result.configuration.name]),
            _count(row.steps),
            *(figure_cell(row.stages[name]) if name in row.stages else NOTHING for name in names),
        )
        for result in report.configurations
        for row in result.rows
        if row.stages
    ]
    return _table_section(
        "stages", "Stages of a call, median ms", ["configuration", "steps", *names], rows, is_folded=True
    )


def load_section(report: Report) -> str:
    """Return the latency under load."""
    labels = _labels(report)
    headers = ["configuration", "calls/s", "finished/s", "p50 ms", "p90 ms", "p95 ms", "p99 ms", "calls", "dropped"]
    rows = [
        (
            word_cell(labels[result.configuration.name]),
            *map(figure_cell, (point.rate_per_s, point.achieved_per_s)),
            *map(figure_cell, (point.p50_ms, point.p90_ms, point.p95_ms, point.p99_ms)),
            _count(len(point.samples_ms)),
            _count(point.dropped),
        )
        for result in report.configurations
        for point in result.load
    ]
    note = "Calls arrive at random, whether or not the former are done; times are from the intended arrival to the end."
    return _table_section("load", "Latency under load", headers, rows, note=note, is_folded=True)


def gains_section(report: Report) -> str:
    """Return what more steps bring, and from where on they bring less than can be told, or make it worse."""
    labels, metrics = _labels(report), {metric.name: metric for metric in report.metrics}
    worse = {
        result.configuration.name: worsening_steps(result.gains, report.metrics) for result in report.configurations
    }
    rows = [
        (
            word_cell(labels[result.configuration.name]),
            word_cell(metrics[gain.metric].label),
            Cell(text=f"{gain.from_steps} to {gain.to_steps}", order=gain.from_steps),
            _value(gain.gain, metrics[gain.metric]),
            _value(gain.low, metrics[gain.metric]),
            _value(gain.high, metrics[gain.metric]),
            _per_step(gain, metrics[gain.metric]),
            _settled(result, gain.metric),
            _steps_or(worse[result.configuration.name].get(gain.metric), NOTHING),
        )
        for result in report.configurations
        for gain in result.gains
        if gain.metric in metrics
    ]
    headers = ["configuration", "metric", "steps", "improvement", "low", "high", "of a step"]
    headers += ["settled at steps", "worse from steps"]
    note = (
        "An improvement is positive whichever way is better; low and high are its 95% bootstrap interval. Settled: no "
        "later improvement is above its interval's width; worse: more steps are a loss. "
        f"Fewer than {LEAST_IMAGES} images tell neither."
    )
    return _table_section("gains", "What more steps bring", headers, rows, note=note, is_folded=True)


def configurations_section(report: Report) -> str:
    """Return what each configuration's process came to besides its rows."""
    labels = _labels(report)
    headers = ["configuration", "status", "opening ms", "first call ms", "host MiB", "device MiB", "session", "machine"]
    rows = [
        (
            word_cell(labels[result.configuration.name]),
            word_cell(result.status),
            _figure_or_nothing(result.opening_ms),
            _figure_or_nothing(result.rows[0].latency.first_call_ms if result.rows else None),
            _mebibytes(result.memory.peak_host_bytes if result.memory is not None else None),
            _mebibytes(result.memory.peak_device_bytes if result.memory is not None else None),
            word_cell(_flat(result.session)),
            word_cell(_flat(result.machine)),
        )
        for result in report.configurations
    ]
    return _table_section("configurations", "Configurations", headers, rows, wrapped=(6, 7))


def metrics_section(report: Report) -> str:
    """Return how each metric is defined, and why one is missing."""
    rows = [
        (
            word_cell(axis_label(metric)),
            word_cell(direction_of(metric)),
            word_cell(_range(metric)),
            word_cell(metric.definition),
            word_cell(metric.source),
            word_cell(metric.missing or ""),
        )
        for metric in report.metrics
    ]
    headers = ["metric", "direction", "range", "definition", "source", "missing"]
    return _table_section("metrics", "Metrics", headers, rows, wrapped=(3, 4, 5))


def environment_section(report: Report) -> str:
    """Return the machine, its software and what was measured, fact by fact."""
    facts = {
        **{f"bundle {key}": value for key, value in asdict(report.bundle).items()},
        **asdict(report.environment),
        **{key: value for key, value in asdict(report.settings).items() if key != "image_names"},
        "created": report.created,
    }
    rows = [(word_cell(key.replace("_", " ")), word_cell(_text(value))) for key, value in facts.items()]
    return _table_section("environment", "Environment", ["fact", "value"], rows, wrapped=(1,))


def _labels(report: Report) -> dict[str, str]:
    return labels_of([result.configuration for result in report.configurations])


def _table_section(
    name: str,
    title: str,
    headers: Sequence[str],
    rows: Sequence[tuple[Cell, ...]],
    *,
    wrapped: Sequence[int] = (),
    note: str = "",
    is_folded: bool = False,
) -> str:
    """Return a section with a table, which the reader may have to unfold, or nothing without rows."""
    if not rows:
        return ""
    table = _html_table(Table(headers=tuple(headers), rows=tuple(rows), keys=()), wrapped=wrapped)
    content = (f'<p class="faint">{escape(note)}</p>' if note else "") + table
    if is_folded:
        content = f"<details><summary>{len(rows)} rows</summary>{content}</details>"
    return _section(name, title, content)


def _section(name: str, title: str, content: str) -> str:
    return f'<section id="{name}"><h2>{escape(title)}</h2>{content}</section>'


def _html_table(
    table: Table, *, classes: Mapping[tuple[str | None, int | None], str] | None = None, wrapped: Sequence[int] = ()
) -> str:
    """Return a table that the script makes sortable; words are flush left where any column is wrapped.

    Args:
        table: headers and rows.
        classes: of rows, by their key.
        wrapped: columns of long text.
    """
    head = "".join(f'<th scope="col">{escape(header)}</th>' for header in table.headers)
    body = []
    for index, row in enumerate(table.rows):
        kind = (classes or {}).get(table.keys[index]) if table.keys else None
        mark = "" if kind is None else f' class="{kind}"'
        cells = "".join(_html_cell(cell, is_wrapped=column in wrapped) for column, cell in enumerate(row))
        body.append(f"<tr{mark}>{cells}</tr>")
    words = " words" if wrapped else ""
    return (
        f'<div class="scroll" tabindex="0"><table class="sortable{words}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _html_cell(cell: Cell, *, is_wrapped: bool) -> str:
    order = "" if cell.order is None else f' data-order="{escape(_order(cell.order))}"'
    kind = ' class="wrap"' if is_wrapped else ""
    return f"<td{kind}{order}>{escape(cell.text)}</td>"


def _order(order: float | str) -> str:
    """Return what JavaScript's `Number` reads."""
    return "Infinity" if order == float("inf") else str(order)


def _count(value: int) -> Cell:
    return Cell(text=str(value), order=value)


def _figure_or_nothing(value: float | None) -> Cell:
    return NOTHING if value is None else figure_cell(value)


def _mebibytes(size: int | None) -> Cell:
    return NOTHING if size is None else Cell(text=f"{size / _MEBIBYTE:.0f}", order=size)


def _value(value: float | None, metric: MetricFacts) -> Cell:
    return Cell(text=format_value(value, metric), order=value)


def _steps_or(steps: int | None, otherwise: Cell) -> Cell:
    return otherwise if steps is None else _count(steps)


def _settled(result: ConfigurationResult, metric: str) -> Cell:
    """Return the steps at which a metric is settled; without them, whether it is not yet, or one cannot tell."""
    steps = result.settled_at_steps.get(metric)
    if steps is not None:
        return _count(steps)
    last = max((gain for gain in result.gains if gain.metric == metric), key=lambda gain: gain.to_steps)
    return Cell(text="cannot be told" if last.low is None else "not yet", order=None)


def _per_step(gain: Gain, metric: MetricFacts) -> Cell:
    """Return an improvement divided by its steps, with a decimal more: it is smaller."""
    return _value(gain_per_step(gain).gain, replace(metric, decimals=metric.decimals + 1))


def _range(metric: MetricFacts) -> str:
    if metric.lowest is None and metric.highest is None:
        return "any"
    if metric.highest is None:
        return f"{metric.lowest:g} and above"
    return f"up to {metric.highest:g}" if metric.lowest is None else f"{metric.lowest:g} to {metric.highest:g}"


def _flat(facts: Mapping[str, object] | None) -> str:
    return "" if facts is None else "; ".join(f"{key.replace('_', ' ')} {_text(item)}" for key, item in facts.items())


def _text(value: object) -> str:
    """Return a fact as it is read."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items()) or "none"
    if isinstance(value, Iterable) and not isinstance(value, str):
        return ", ".join(map(_text, value)) or "none"
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else str(value)
