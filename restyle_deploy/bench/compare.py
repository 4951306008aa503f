"""Two reports side by side: ratios with intervals and a verdict per row, to find what has become slower or worse."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from restyle_deploy.bench.comparable import comparable_metrics, lost_metrics, shared_reference, unlike_environments
from restyle_deploy.bench.figures import MetricFacts
from restyle_deploy.bench.quality_change import QualityChange, lost_quality, quality_changes, worse_quality
from restyle_deploy.bench.report import ConfigurationResult, Report, Row
from restyle_deploy.bench.series import labels_of
from restyle_deploy.bench.stability import LEAST_SAMPLES, MOST_SHIFT
from restyle_deploy.errors import ReportError

RESAMPLES = 2000
INTERVAL_PERCENT = (2.5, 97.5)
# Where none is given: two runs of the same may differ by as much (see `stability`).
USUAL_TOLERANCE = MOST_SHIFT

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
class ComparedCell:
    """One configuration and step count in both reports.

    Attributes:
        configuration, label, steps: which.
        verdict: "slower" and "faster" where the whole interval is on that side of 1; "same" where all of it is within
            the tolerance; else "unclear", as are rows with a `doubt`; "missing" is in the first report alone, "new" in
            the second.
        latency: the ratio; above 1, the second is slower. `None` for missing and new rows.
        relative_to: the library of the reference model that both were measured beside in the same rounds, where they
            were: then `latency` is the ratio of the ratios to it, which a slower day of the machine leaves alone.
        first_ms, second_ms: medians.
        quality: what both counted over the same images.
        failures: why the row does not pass; empty where it does.
        doubt: why the verdict is "unclear"; `None` where it is another.
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
    doubt: str | None = None


def compare_reports(
    first: Report, second: Report, *, fail_above: float | None = None, different_allowed: bool = False, seed: int = 0
) -> list[ComparedCell]:
    """Compare each configuration and step count of two reports.

    Args:
        first: what was.
        second: what is now.
        fail_above: the share by which a row may be slower or worse, such as 0.05; a row fails when its figure is past
            it and the interval does not hold "no change", when it is missing, and when a metric is. `None`: no row
            fails, and `USUAL_TOLERANCE` is that of the verdicts.
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
        metrics=comparable_metrics(first, second),
        lost=lost_metrics(first, second),
        fail_above=fail_above,
        generator=np.random.default_rng(seed),
    )
    cells = [
        _compare_cell(plan, key, row, after[key]) if key in after else _missing_cell(plan, key, row, second)
        for key, row in before.items()
    ]
    return cells + [_one_sided(plan, key, row, "new") for key, row in after.items() if key not in before]


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What the comparison of every cell needs."""

    labels: Mapping[str, str]
    metrics: Sequence[MetricFacts]
    lost: Mapping[str, str]
    fail_above: float | None
    generator: np.random.Generator

    @property
    def tolerance(self) -> float:
        """Up to which rows are called the same."""
        return USUAL_TOLERANCE if self.fail_above is None else self.fail_above


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
    library = shared_reference(first[0], second[0]) if None not in references else None
    if library is None:
        references = [None, None]
    change = _latency_change(rows, references, plan.generator)
    quality = quality_changes(rows[0], rows[1], plan.metrics)
    doubt = _doubt_of_samples(rows, is_relative=library is not None)
    told = change if doubt is None else None
    verdict = "unclear" if told is None else _verdict(told, plan.tolerance)
    if told is not None and verdict == "unclear":
        doubt = f"the interval of the ratio reaches past {plan.tolerance:.1%}; more --repeats narrow it"
    return ComparedCell(
        configuration=key[0],
        label=plan.labels[key[0]],
        steps=key[1],
        verdict=verdict,
        latency=change,
        relative_to=library,
        first_ms=rows[0].latency.median_ms,
        second_ms=rows[1].latency.median_ms,
        quality=quality,
        failures=_failures(plan, rows, told, quality),
        doubt=doubt,
    )


def _doubt_of_samples(rows: Sequence[Row], *, is_relative: bool) -> str | None:
    """Return why the resampled interval of two rows tells nothing; None where it does.

    Resampling takes the calls for independent draws of one distribution. Those of an unstable row are not: they drift,
    or another run would have others. The ratios to a reference model of the same rounds leave that out.
    """
    if min(len(row.latency.samples_ms) for row in rows) < LEAST_SAMPLES:
        return f"fewer than {LEAST_SAMPLES} calls"
    unstable = [which for which, row in zip(("first", "second"), rows, strict=True) if row.latency.unstable]
    if is_relative or not unstable:
        return None
    where = f"the {unstable[0]} report" if len(unstable) == 1 else "both reports"
    return f"its times are unstable in {where}; measure again, or both with --against torch"


def _verdict(change: Change, tolerance: float) -> Verdict:
    if change.low > 1:
        return "slower"
    if change.high < 1:
        return "faster"
    return "same" if change.high <= 1 + tolerance and change.low >= 1 / (1 + tolerance) else "unclear"


def _failures(
    plan: _Plan, rows: Sequence[Row], change: Change | None, quality: Sequence[QualityChange]
) -> tuple[str, ...]:
    """Return why a row does not pass; `change` is None where the times tell nothing."""
    most = plan.fail_above
    if most is None:
        return ()
    is_slower = change is not None and change.low > 1 and change.ratio > 1 + most
    slower = [f"{change.ratio - 1:.1%} slower, allowed are {most:.1%}"] if change is not None and is_slower else []
    lost = lost_quality(rows[0], rows[1], metrics=plan.metrics, lost=plan.lost)
    return (*slower, *worse_quality(quality, most), *lost)


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
