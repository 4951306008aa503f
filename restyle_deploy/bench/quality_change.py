"""How the quality of one row has changed between two reports of the same images, and what of that a gate stops."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from restyle_deploy.bench.figures import MetricFacts
from restyle_deploy.bench.quality import bootstrap_interval, least_difference
from restyle_deploy.bench.report import Row


@dataclass(frozen=True, kw_only=True)
class QualityChange:
    """How a metric's mean over the same images has changed.

    Attributes:
        metric: its name.
        first, second: means of the reports.
        low, high: bootstrap interval of the difference second less first, 95 %; resampled by image. `None` for fewer
            than `LEAST_IMAGES` images, of which nothing is called worse.
        is_worse: the whole interval is on the worse side, and the difference is worth showing: half of the metric's
            last decimal at least.
    """

    metric: str
    first: float
    second: float
    low: float | None
    high: float | None
    is_worse: bool


def quality_changes(first: Row, second: Row, metrics: Sequence[MetricFacts]) -> tuple[QualityChange, ...]:
    """Return the changes of the metrics that both rows have a finite value of, for one image at least."""
    changes = [_quality_change(first, second, metric) for metric in metrics]
    return tuple(change for change in changes if change is not None)


def worse_quality(changes: Sequence[QualityChange], most: float) -> list[str]:
    """Return what is worse by more than the share `most` of its former mean."""
    return [
        f"{change.metric} has gone from {change.first:.4g} to {change.second:.4g}"
        for change in changes
        if change.is_worse and abs(change.second - change.first) > most * abs(change.first)
    ]


def lost_quality(first: Row, second: Row, *, metrics: Sequence[MetricFacts], lost: Mapping[str, str]) -> list[str]:
    """Return what the second row no longer says: a metric of other images or another model is not lost.

    Args:
        first, second: rows of the two reports.
        metrics: those that are compared.
        lost: why the second report lacks a metric, by name.
    """
    failures = [f"{name} is lost: {why}" for name, why in lost.items() if _count(first, name)]
    for metric in metrics:
        before, after = _count(first, metric.name), _count(second, metric.name)
        if after < before and (after == 0 or not _may_be_infinite(metric)):
            failures.append(f"{metric.name} is lost: {before - after} of {before} images have no value any more")
    return failures


def _count(row: Row, metric: str) -> int:
    """Return the images that have a finite value of a metric."""
    return sum(value is not None for value in row.per_image.get(metric, ()))


def _may_be_infinite(metric: MetricFacts) -> bool:
    """Whether the best value is infinite, which a report has no number for: an image may have become perfect."""
    return metric.higher_is_better and metric.highest is None


def _quality_change(first: Row, second: Row, metric: MetricFacts) -> QualityChange | None:
    pairs = [
        (one, other)
        for one, other in zip(first.per_image.get(metric.name, ()), second.per_image.get(metric.name, ()), strict=False)
        if one is not None and other is not None
    ]
    if not pairs:
        return None
    values = np.array(pairs)  # [images, 2]
    differences = values[:, 1] - values[:, 0]
    low, high = bootstrap_interval(differences)
    is_worse = False
    if low is not None and high is not None and abs(differences.mean()) >= least_difference(metric.decimals):
        is_worse = high < 0 if metric.higher_is_better else low > 0
    return QualityChange(
        metric=metric.name,
        first=float(values[:, 0].mean()),
        second=float(values[:, 1].mean()),
        low=low,
        high=high,
        is_worse=is_worse,
    )
