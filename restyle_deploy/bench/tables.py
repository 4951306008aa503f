"""A report's figures as cells, for the terminal, the page and pull requests."""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from restyle_deploy.bench.comparison import Ratio
from restyle_deploy.bench.figures import Aggregate, MetricFacts, StepLatency
from restyle_deploy.bench.quality import worsening_steps
from restyle_deploy.bench.report import Configuration, ConfigurationResult, Report, Row
from restyle_deploy.bench.series import axis_label, labels_of, measured_metrics, missing_note
from restyle_deploy.bench.sweep import LEAST_GROWTH, BatchPoint, next_batch, saturated_batch
from restyle_deploy.short_memory import find_short_memory

UNSTABLE_MARK = "!"
FRONT = "front"  # heads the column that marks the decision's Pareto front
FRONT_MEANING = "beaten by no row in latency, images per second and quality together"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One cell: its text and what it is sorted by (`None` comes last)."""

    text: str
    order: float | str | None


NOTHING = Cell(text="-", order=None)


@dataclass(frozen=True, kw_only=True)
class Table:
    """Headers and rows of equal length; `keys` name the configuration and the steps of each row."""

    headers: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    keys: tuple[tuple[str, int], ...]


def table_of(report: Report) -> Table:
    """Return one row per configuration and step count: latency, throughput, quality, what it was compared with.

    Where the decision has a Pareto front, the last column marks its rows.
    """
    metrics = measured_metrics(report)
    results = [result for result in report.configurations if result.rows]
    has_exact = any(result.exact is not None for result in results)
    has_against = any(result.against is not None for result in results)
    headers = ["configuration", "steps", "median ms", "p95 ms", "images/s", *(axis_label(item) for item in metrics)]
    headers += ["exact/this", "PSNR to exact (dB)", "latent error"] if has_exact else []
    headers += ["reference/this"] if has_against else []
    front = front_of(report)
    headers += [FRONT] if front else []
    labels = labels_of([result.configuration for result in report.configurations])
    rows, keys = [], []
    for result in results:
        for index, row in enumerate(result.rows):
            cells = [word_cell(labels[result.configuration.name]), _number(row.steps, 0), *_times(row)]
            cells += [_mean(row.quality.get(metric.name), metric) for metric in metrics]
            cells += _exact_cells(result, index) if has_exact else []
            cells += _against_cells(result, index) if has_against else []
            cells += [_front_cell((result.configuration.name, row.steps) in front)] if front else []
            rows.append(tuple(cells))
            keys.append((result.configuration.name, row.steps))
    return Table(headers=tuple(headers), rows=tuple(rows), keys=tuple(keys))


def front_of(report: Report) -> frozenset[tuple[str, int]]:
    """Return the rows of the decision's Pareto front, the only one there is: configuration names and steps."""
    rows = {(result.configuration.name, row.steps) for result in report.configurations for row in result.rows}
    return frozenset(rows.intersection(report.decision.pareto if report.decision is not None else ()))


def format_table(report: Report) -> str:
    """Return the table as plain text, with notes of what is unstable, failed, skipped or missing."""
    table = table_of(report)
    lines = [list(table.headers), *([cell.text for cell in row] for row in table.rows)]
    front = [f"{FRONT}: {FRONT_MEANING}"] if front_of(report) else []
    return "\n".join([format_lines(lines), *front, *notes_of(report)])


def format_lines(lines: Sequence[Sequence[str]]) -> str:
    """Return cells in columns: the first flush left, the others flush right."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def notes_of(report: Report) -> list[str]:
    """Return one sentence for each row that is unstable, each configuration without rows or with a metric that failed,
    where a sweep of batches ended, from which step count on the gain cannot be told or is a loss, and the missing
    metrics.
    """
    labels = labels_of([result.configuration for result in report.configurations])
    notes = []
    for result in report.configurations:
        label = labels[result.configuration.name]
        if result.status != "ok":
            notes.append(f"{label}: {result.status}: {result.reason}")
        elif result.reason is not None:
            notes.append(f"{label}: {result.reason}")
        for row in result.rows:
            if row.latency.unstable:
                reason = row.latency.reason or "no reason given"
                notes.append(f"{UNSTABLE_MARK} {label}, {count_steps(row.steps)}: unstable: {reason}")
    missing = missing_note(report)
    return notes + _sweep_notes(report, labels) + _settled_notes(report, labels) + ([missing] if missing else [])


def is_memory_short(result: ConfigurationResult) -> bool:
    """Return whether a configuration failed because it needed more memory than there is."""
    return result.status == "failed" and find_short_memory(result.reason or "") is not None


def _sweep_notes(report: Report, labels: Mapping[str, str]) -> list[str]:
    """Return where batches ceased to bring anything or to fit, of configurations that differ in the batch alone."""
    sweeps: dict[Configuration, dict[int, ConfigurationResult]] = {}
    for result in report.configurations:
        sweeps.setdefault(replace(result.configuration, batch=1), {})[result.configuration.batch] = result
    by_batch = ([results[batch] for batch in sorted(results)] for results in sweeps.values())
    return [note for results in by_batch if (note := _sweep_note(results, labels)) is not None]


def _sweep_note(results: Sequence[ConfigurationResult], labels: Mapping[str, str]) -> str | None:
    """Return how a sweep ended; `results` are by batch, rising."""
    measured = {result.configuration.batch: result for result in results if result.rows}
    if not measured:
        return None
    speeds = [BatchPoint(batch=batch, images_per_s=result.rows[-1].throughput) for batch, result in measured.items()]
    largest = measured[max(measured)]
    label, place = labels[largest.configuration.name], "host" if largest.configuration.device == "cpu" else "device"
    full = saturated_batch(speeds)
    if full is not None and next_batch(speeds, most_batch=sys.maxsize) is None:
        label = labels[measured[full].configuration.name]
        return f"{label}: fills the device; larger batches bring less than {LEAST_GROWTH:.0%} more images/s"
    beyond = [each.configuration.batch for each in results if is_memory_short(each)]
    if beyond and min(beyond) > max(measured):
        return f"{label}: fills the {place}: batch {min(beyond)} needs more memory than there is"
    if largest is results[-1] and _is_swept(largest, results):
        return (
            f"{label}: the sweep ended here, at its largest batch, before images/s ceased to grow; "
            f"go on with --max-batch {2 * largest.configuration.batch}"
        )
    return None


def _is_swept(result: ConfigurationResult, others: Sequence[ConfigurationResult]) -> bool:
    """Return whether a batch was added by a sweep, which counts no quality."""
    return not any(row.quality for row in result.rows) and any(row.quality for each in others for row in each.rows)


def _settled_notes(report: Report, labels: Mapping[str, str]) -> list[str]:
    """Return from which step count on more steps gain too little to be told, or do harm; alike ones together."""
    told: dict[str, list[str]] = {}
    for result in report.configurations:
        worse = worsening_steps(result.gains, report.metrics)
        settled = {name: steps for name, steps in result.settled_at_steps.items() if worse.get(name) != steps}
        for steps_by_metric, words in (
            (settled, "more steps gain less than these images tell from {} on"),
            (worse, "more steps make it worse from {} on"),
        ):
            if text := _list_steps(steps_by_metric, report.metrics):
                told.setdefault(words.format(text), []).append(labels[result.configuration.name])
    return [f"{'; '.join(names)}: {text}" for text, names in told.items()]


def _list_steps(steps: Mapping[str, int], metrics: Sequence[MetricFacts]) -> str:
    """Return "3 steps (LPIPS), 5 steps (SSIM)"."""
    return ", ".join(f"{count_steps(steps[each.name])} ({each.label})" for each in metrics if each.name in steps)


def format_value(value: float | None, metric: MetricFacts) -> str:
    """Return a metric's value with the decimals worth showing; "-" for one that is infinite or missing."""
    return "-" if value is None else f"{value:.{metric.decimals}f}"


def count_steps(steps: int) -> str:
    """Return "1 step", "2 steps" and so on."""
    return f"{steps} step{'s' * (steps != 1)}"


def format_figure(value: float) -> str:
    """Return milliseconds or a rate with as many decimals as are worth showing."""
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


def word_cell(text: str) -> Cell:
    """Return a cell that is sorted by its text."""
    return Cell(text=text, order=text)


def figure_cell(value: float) -> Cell:
    """Return a cell of milliseconds or a rate."""
    return Cell(text=format_figure(value), order=value)


def _front_cell(is_in_front: bool) -> Cell:
    return Cell(text="yes", order=0) if is_in_front else NOTHING


def _times(row: Row) -> list[Cell]:
    return [
        Cell(text=_median(row.latency), order=row.latency.median_ms),
        figure_cell(row.latency.p95_ms),
        figure_cell(row.throughput),
    ]


def _exact_cells(result: ConfigurationResult, index: int) -> list[Cell]:
    """Return what an approximate session gains and costs beside the exact one."""
    if result.exact is None:
        return [NOTHING] * 3
    row = result.exact.rows[index]
    psnr_db, latent_error = row.difference.psnr_db, row.difference.latent_error
    psnr = Cell(text="equal", order=math.inf) if psnr_db is None else _number(psnr_db, 1)
    return [_ratio(row.ratio), psnr, Cell(text=f"{latent_error:.1e}", order=latent_error)]


def _against_cells(result: ConfigurationResult, index: int) -> list[Cell]:
    return [NOTHING if result.against is None else _ratio(result.against.rows[index].ratio)]


def _mean(aggregate: Aggregate | None, metric: MetricFacts) -> Cell:
    if aggregate is None or aggregate.mean is None:
        return NOTHING
    return Cell(text=format_value(aggregate.mean, metric), order=aggregate.mean)


def _median(latency: StepLatency) -> str:
    return f"{UNSTABLE_MARK + ' ' if latency.unstable else ''}{format_figure(latency.median_ms)}"


def _ratio(ratio: Ratio) -> Cell:
    text = f"{ratio.median:.2f} ({ratio.lower_quartile:.2f} to {ratio.upper_quartile:.2f})"
    return Cell(text=text, order=ratio.median)


def _number(value: float, decimals: int) -> Cell:
    return Cell(text=f"{value:.{decimals}f}", order=value)
