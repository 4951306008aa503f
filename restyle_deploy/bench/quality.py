"""Quality over all images: aggregates with bootstrap intervals, and what more steps bring."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from restyle_deploy.bench.figures import Aggregate, Gain, MetricFacts
from restyle_deploy.bench.metrics.base import Metric

RESAMPLES = 5000
CONFIDENCE = 0.95
_DRAWS_AT_ONCE = 2**20  # bounds the memory: 16 MB


def aggregate(values: Sequence[float | None] | NDArray[np.float64], *, seed: int = 0) -> Aggregate:
    """Summarise a metric's values over the images.

    Args:
        values: one per image; NaN or `None` where there is none, which is left out. Infinite ones (the PSNR of equal
            images) count: figures that they make infinite are `None`.
        seed: of the bootstrap; the same values and seed give the same interval.
    Returns:
        Percentiles are interpolated between images. The interval is the percentile bootstrap's (Efron 1979) of 5000
        resamples, 95 %; `None` for less than two images, of which one cannot tell.
    """
    present = _present(values)
    if not len(present):
        return Aggregate(mean=None, median=None, p5=None, p95=None, low=None, high=None, count=0)
    with np.errstate(invalid="ignore"):  # between a finite and an infinite value there is none to interpolate
        p5, median, p95 = np.percentile(present, (5, 50, 95))
    low, high = bootstrap_interval(present, seed=seed)
    return Aggregate(
        mean=_finite(present.mean()),
        median=_finite(median),
        p5=_finite(p5),
        p95=_finite(p95),
        low=low,
        high=high,
        count=int(np.isfinite(present).sum()),
    )


def bootstrap_interval(values: NDArray[np.float64], *, seed: int = 0) -> tuple[float | None, float | None]:
    """Return the 95 % interval of the mean, by resampling; `None` for less than two values or infinite ones."""
    if len(values) < 2 or not np.isfinite(values).all():
        return None, None
    random = np.random.default_rng(seed)
    at_once = max(1, _DRAWS_AT_ONCE // len(values))
    means = [
        values[random.integers(len(values), size=(min(at_once, RESAMPLES - first), len(values)))].mean(axis=1)
        for first in range(0, RESAMPLES, at_once)
    ]
    low, high = np.percentile(np.concatenate(means), (50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)))
    return float(low), float(high)


def gain_between(
    before: Sequence[float | None] | NDArray[np.float64],
    after: Sequence[float | None] | NDArray[np.float64],
    *,
    metric: Metric | MetricFacts,
    from_steps: int,
    to_steps: int,
    seed: int = 0,
) -> Gain:
    """Return what more steps bring: image by image, positive where it is an improvement, with its interval.

    Args:
        before, after: values of the same images in the same order, as for `aggregate`; an image without a value in one
            of them is left out. From infinite to infinite there is no gain.
        metric: says which direction is an improvement.
        from_steps, to_steps: neighbouring step counts.
        seed: of the bootstrap.
    """
    first, second = _as_array(before), _as_array(after)
    with np.errstate(invalid="ignore"):
        difference = np.where(first == second, 0.0, second - first)
    improvements = _present(difference if metric.higher_is_better else -difference)
    low, high = bootstrap_interval(improvements, seed=seed)
    return Gain(
        metric=metric.name,
        from_steps=from_steps,
        to_steps=to_steps,
        gain=_finite(improvements.mean()) if len(improvements) else None,
        low=low,
        high=high,
    )


def gains_of(
    per_image: Mapping[int, Mapping[str, Sequence[float | None]]], metrics: Iterable[Metric | MetricFacts]
) -> tuple[Gain, ...]:
    """Return the gains between neighbouring step counts, metric by metric.

    Args:
        per_image: values by step count and metric, as in the rows of a report.
        metrics: those to look at; one without values at two neighbouring step counts is passed over.
    """
    steps = sorted(per_image)
    return tuple(
        gain_between(
            per_image[first][metric.name],
            per_image[second][metric.name],
            metric=metric,
            from_steps=first,
            to_steps=second,
        )
        for metric in metrics
        for first, second in zip(steps, steps[1:], strict=False)
        if metric.name in per_image[first] and metric.name in per_image[second]
    )


def settled_steps(gains: Iterable[Gain]) -> dict[str, int]:
    """Return, by metric, the first step count from which the next gain is not above the width of its own interval.

    More steps than that bring less than what one can tell from these images. A metric is absent where every gain is
    above, or cannot be told.
    """
    settled: dict[str, int] = {}
    for gain in sorted(gains, key=lambda gain: gain.from_steps):
        if gain.gain is None or gain.low is None or gain.high is None:
            continue
        if gain.gain <= gain.high - gain.low:
            settled.setdefault(gain.metric, gain.from_steps)
    return settled


def _as_array(values: Sequence[float | None] | NDArray[np.float64]) -> NDArray[np.float64]:
    return np.array([np.nan if value is None else value for value in values], np.float64)


def _present(values: Sequence[float | None] | NDArray[np.float64]) -> NDArray[np.float64]:
    array = _as_array(values)
    return array[~np.isnan(array)]


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
