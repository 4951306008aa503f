"""Two reports side by side: ratios with intervals and a verdict per row, to find what has become slower or worse."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from restyle_deploy.bench.figures import MetricFacts
from restyle_deploy.bench.report import ConfigurationResult, Report, Row
from restyle_deploy.bench.series import labels_of
from restyle_deploy.bench.stability import LEAST_SAMPLES
from restyle_deploy.errors import ReportError

RESAMPLES = 2000
INTERVAL_PERCENT = (2.5, 97.5)
# What figures depend on besides the software, whose versions are what one compares.
SAME_MACHINE = ("platform", "cpu", "logical_cores", "usable_cores", "governor", "gpus")
SAME_BUNDLE = ("name", "domain", "output_size", "checkpoint_sha256")

_Key = tuple[str, int]  # a configuration's name, and its step count
_Place = tuple[ConfigurationResult, int]  # a configuration, and the index of its row

Verdict = Literal["faster", "same", "slower", "unclear", "missing", "new"]


@dataclass(frozen=True, kw_only=True)
class Change:
    """A figure of the second report over that of the first, with its bootstrap interval, 95 %."""

    ratio: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class QualityChange:
    """How a metric's mean over the same images has changed.

    Attributes:
        metric: its name.
        first, second: means of the reports.
        low, high: bootstrap interval of the difference second less first, 95 %; resampled by image.
        is_worse: the whole interval is on the worse side.
    """

    metric: str
    first: float
    second: float
    low: float
    high: float
    is_worse: bool


@dataclass(frozen=True, kw_only=True)
class ComparedCell:
    """One configuration and step count in both reports.

    Attributes:
        configuration, label, steps: which.
        verdict: "slower" and "faster" where the whole interval is on that side of 1; else "same", or "unclear" where
            the interval reaches past the tolerance, or there were fewer than `LEAST_SAMPLES` calls, whose interval
            tells nothing; "missing" is in the first report alone, "new" in the second.
        latency: the ratio; above 1, the second is slower. `None` for missing and new rows.
        relative_to: the library of the reference model that both were measured beside in the same rounds, where they
            were: then `latency` is the ratio of the ratios to it, which a slower day of the machine leaves alone.
        first_ms, second_ms: medians.
        quality: what both counted over the same images.
        failures: why the row does not pass; empty where it does.
    """

    configuration: str
    label: str
    steps: int
    verdict: Verdict
    latency: Change | None
    relative_to: str | None
    first_ms: float | None
    second_ms: float | None
    quality: tuple[QualityChange, ...]
    failures: tuple[str, ...]


def compare_reports(
    first: Report, second: Report, *, fail_above: float | None = None, different_allowed: bool = False, seed: int = 0
) -> list[ComparedCell]:
    """Compare each configuration and step count of two reports.

    Args:
        first: what was.
        second: what is now.
        fail_above: the share by which a row may be slower or worse, such as 0.05; a row fails when its figure is past
            it and the interval does not hold "no change". `None`: no row fails.
        different_allowed: compare reports of unlike machines or bundles.
        seed: of the resampling.
    Raises:
        ReportError: machine or bundle differ (all differences are named), or no row is in both.
    """
    differences = unlike_environments(first, second)
    if differences and not different_allowed:
        raise ReportError(
            f"the reports are not alike: {'; '.join(differences)}; "
            "measure both on one machine, or give --allow-different-environments"
        )
    before, after = _rows_by_cell(first), _rows_by_cell(second)
    if not before.keys() & after.keys():
        raise ReportError("the reports have no configuration and step count in common; nothing can be compared")
    plan = _Plan(
        labels=labels_of([result.configuration for report in (first, second) for result in report.configurations]),
        metrics=_comparable_metrics(first, second),
        fail_above=fail_above,
        generator=np.random.default_rng(seed),
    )
    cells = [
        _compare_cell(plan, key, row, after[key]) if key in after else _missing_cell(plan, key, row, second)
        for key, row in before.items()
    ]
    return cells + [_one_sided(plan, key, row, "new") for key, row in after.items() if key not in before]


def unlike_environments(first: Report, second: Report) -> list[str]:
    """Return each fact of machine and bundle that differs, with both values."""
    pairs: list[tuple[str, object, object, tuple[str, ...]]] = [
        ("", first.environment, second.environment, SAME_MACHINE),
        ("bundle ", first.bundle, second.bundle, SAME_BUNDLE),
    ]
    return [
        f"{kind}{name} {getattr(one, name)!s} and {getattr(other, name)!s}"
        for kind, one, other, names in pairs
        for name in names
        if getattr(one, name) != getattr(other, name)
    ]


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What the comparison of every cell needs."""

    labels: Mapping[str, str]
    metrics: Sequence[MetricFacts]
    fail_above: float | None
    generator: np.random.Generator


def _rows_by_cell(report: Report) -> dict[_Key, _Place]:
    """Return configuration and index of the row by name and step count."""
    return {
        (result.configuration.name, row.steps): (result, index)
        for result in report.configurations
        for index, row in enumerate(result.rows)
    }


def _reason(report: Report, name: str) -> str:
    """Return what became of a configuration that lacks a row."""
    for result in report.configurations:
        if result.configuration.name == name:
            return f"{result.status}: {result.reason}" if result.status != "ok" else "not measured at this step count"
    return "not measured"


def _missing_cell(plan: _Plan, key: _Key, place: _Place, second: Report) -> ComparedCell:
    """Return the cell of a row that only the first report has; it fails, for what crashes is not fast."""
    cell = _one_sided(plan, key, place, "missing")
    failures = (f"missing in the second report ({_reason(second, key[0])})",) if plan.fail_above is not None else ()
    return replace(cell, failures=failures)


def _one_sided(plan: _Plan, key: _Key, place: _Place, verdict: Literal["missing", "new"]) -> ComparedCell:
    result, index = place
    median_ms = result.rows[index].latency.median_ms
    return ComparedCell(
        configuration=key[0],
        label=plan.labels[key[0]],
        steps=key[1],
        verdict=verdict,
        latency=None,
        relative_to=None,
        first_ms=median_ms if verdict == "missing" else None,
        second_ms=median_ms if verdict == "new" else None,
        quality=(),
        failures=(),
    )


def _compare_cell(plan: _Plan, key: _Key, first: _Place, second: _Place) -> ComparedCell:
    rows = [result.rows[index] for result, index in (first, second)]
    references = [_reference_samples(*first), _reference_samples(*second)]
    library = _shared_library(first[0], second[0]) if None not in references else None
    if library is None:
        references = [None, None]
    change = _latency_change(rows, references, plan.generator)
    changes = [_quality_change(rows[0], rows[1], metric, plan.generator) for metric in plan.metrics]
    quality = tuple(item for item in changes if item is not None)
    is_told = min(len(row.latency.samples_ms) for row in rows) >= LEAST_SAMPLES
    return ComparedCell(
        configuration=key[0],
        label=plan.labels[key[0]],
        steps=key[1],
        verdict=_verdict(change, plan.fail_above) if is_told else "unclear",
        latency=change,
        relative_to=library,
        first_ms=rows[0].latency.median_ms,
        second_ms=rows[1].latency.median_ms,
        quality=quality,
        failures=_failures(change if is_told else None, quality, plan.fail_above),
    )


def _verdict(change: Change, fail_above: float | None) -> Verdict:
    if change.low > 1:
        return "slower"
    if change.high < 1:
        return "faster"
    tolerance = fail_above if fail_above is not None else np.inf
    return "unclear" if change.high > 1 + tolerance else "same"


def _failures(change: Change | None, quality: Sequence[QualityChange], fail_above: float | None) -> tuple[str, ...]:
    if fail_above is None:
        return ()
    failures = []
    if change is not None and change.low > 1 and change.ratio > 1 + fail_above:
        failures.append(f"{change.ratio - 1:.1%} slower, allowed are {fail_above:.1%}")
    for item in quality:
        if item.is_worse and abs(item.second - item.first) > fail_above * abs(item.first):
            failures.append(f"{item.metric} has gone from {item.first:.4g} to {item.second:.4g}")
    return tuple(failures)


def _shared_library(first: ConfigurationResult, second: ConfigurationResult) -> str | None:
    """Return the reference model's library where both were measured beside the same one."""
    libraries = {None if item.against is None else str(item.against.reference["library"]) for item in (first, second)}
    return libraries.pop() if len(libraries) == 1 else None


def _reference_samples(result: ConfigurationResult, index: int) -> tuple[float, ...] | None:
    """Return the reference model's times, one for each of the row's, if it was measured in the same rounds."""
    if result.against is None:
        return None
    samples = result.against.rows[index].latency.samples_ms
    return samples if len(samples) == len(result.rows[index].latency.samples_ms) else None


def _latency_change(
    rows: Sequence[Row], references: Sequence[tuple[float, ...] | None], generator: np.random.Generator
) -> Change:
    """Return the ratio of the medians; beside a reference model, of the medians of the rounds' ratios to it."""
    samples = []
    for row, reference in zip(rows, references, strict=True):
        times = np.array(row.latency.samples_ms)
        samples.append(times if reference is None else times / np.array(reference))
    before, after = (_resampled_medians(values, generator) for values in samples)
    low, high = np.percentile(after / before, INTERVAL_PERCENT)
    ratio = float(np.median(samples[1]) / np.median(samples[0]))
    return Change(ratio=ratio, low=float(low), high=float(high))


def _resampled_medians(values: NDArray[np.float64], generator: np.random.Generator) -> NDArray[np.float64]:
    """Return the medians of resampled sets: [RESAMPLES]."""
    medians: NDArray[np.float64] = np.median(generator.choice(values, (RESAMPLES, len(values))), axis=1)
    return medians


def _comparable_metrics(first: Report, second: Report) -> list[MetricFacts]:
    """Return the metrics that both counted over the same images."""
    if first.settings.image_names != second.settings.image_names:
        return []
    ran = {metric.name for metric in first.metrics if metric.missing is None}
    return [metric for metric in second.metrics if metric.missing is None and metric.name in ran]


def _quality_change(
    first: Row, second: Row, metric: MetricFacts, generator: np.random.Generator
) -> QualityChange | None:
    """Compare a metric image by image; `None` unless both rows have a finite value for at least one image."""
    pairs = [
        (one, other)
        for one, other in zip(first.per_image.get(metric.name, ()), second.per_image.get(metric.name, ()), strict=False)
        if one is not None and other is not None
    ]
    if not pairs:
        return None
    values = np.array(pairs)  # [images, 2]
    differences = values[:, 1] - values[:, 0]
    means = generator.choice(differences, (RESAMPLES, len(differences))).mean(axis=1)
    low, high = (float(bound) for bound in np.percentile(means, INTERVAL_PERCENT))
    return QualityChange(
        metric=metric.name,
        first=float(values[:, 0].mean()),
        second=float(values[:, 1].mean()),
        low=low,
        high=high,
        is_worse=high < 0 if metric.higher_is_better else low > 0,
    )
