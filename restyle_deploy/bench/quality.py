"""Quality over all images: aggregates with bootstrap intervals, and what more steps bring."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from restyle_deploy.bench.figures import Aggregate, Gain, MetricFacts
from restyle_deploy.bench.metrics.base import Metric

RESAMPLES = 5000
CONFIDENCE = 0.95
# Fewer values have no interval: see `bootstrap_interval`.
LEAST_IMAGES = 5
_Z = 1.959963984540054  # standard normal quantile of a two-sided interval of 95 %
_DRAWS_AT_ONCE = 2**20  # bounds the memory: 16 MB


def aggregate(values: Sequence[float | None] | NDArray[np.float64], *, seed: int = 0) -> Aggregate:
    """Summarise a metric's values over the images.

    Args:
        values: one per image; NaN or `None` where there is none, which is left out. Infinite ones (the PSNR of equal
            images) count: figures that they make infinite are `None`.
        seed: of the bootstrap; the same values and seed give the same interval.
    Returns:
        Percentiles are interpolated between images. The interval is that of `bootstrap_interval`; `None` for less than
        `LEAST_IMAGES` images, of which one cannot tell.
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
    """Return the 95 % interval of the mean, by resampling, widened for few values.

    The percentile interval (Efron 1979) of 5000 resamples is too narrow for few values: the resamples scatter by the
    variance with n in the denominator, and 1.96 is the quantile of a known variance. So the distances of its bounds
    from the mean are multiplied by t(n-1)/1.96 * sqrt(n/(n-1)), which keeps its asymmetry: the correction of
    Hesterberg 2015 (arXiv:1411.5279, the "expanded percentile interval"), applied to the distances rather than to
    the percentiles, as resamples of five values reach no percentile that far out. The interval may reach past the
    values, and past a metric's range.

    Simulated, it holds the true mean of 5, 8, 20 values of a normal law 93, 94, 95 times of 100, of a log-normal one
    (sigma 0.5) 91, 91, 93 times, of an exponential one 89, 90, 92 times; the plain percentile interval 82, 87, 91 of a
    normal one. Of four exponential values it is 87 times, and of three the resamples are ten: so less than
    `LEAST_IMAGES` values get none.

    Returns:
        `None` for less than `LEAST_IMAGES` values or infinite ones.
    """
    if len(values) < LEAST_IMAGES or not np.isfinite(values).all():
        return None, None
    random = np.random.default_rng(seed)
    at_once = max(1, _DRAWS_AT_ONCE // len(values))
    means = [
        values[random.integers(len(values), size=(min(at_once, RESAMPLES - first), len(values)))].mean(axis=1)
        for first in range(0, RESAMPLES, at_once)
    ]
    bounds = np.percentile(np.concatenate(means), (50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)))
    low, high = values.mean() + (bounds - values.mean()) * _widening(len(values))
    return float(low), float(high)


def _widening(count: int) -> float:
    """Return t(n-1)/z * sqrt(n/(n-1)) of n >= 5 values; to 0.2 %, by Abramowitz and Stegun 26.7.5."""
    z, freedom = _Z, count - 1
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    quantile = z + sum(term / freedom**power for power, term in enumerate(terms, start=1))
    return float(quantile / z * math.sqrt(count / freedom))


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


def gain_per_step(gain: Gain) -> Gain:
    """Return a gain and its interval divided by the steps that it took: from 5 to 10 steps, by five."""
    steps = gain.to_steps - gain.from_steps
    gained, low, high = (None if value is None else value / steps for value in (gain.gain, gain.low, gain.high))
    return replace(gain, gain=gained, low=low, high=high)


def settled_steps(gains: Iterable[Gain]) -> dict[str, int]:
    """Return, by metric, the step count after which no gain is above the width of its own interval.

    More steps than that bring less than what one can tell from these images; `worsening_steps` says if they do harm. A
    metric is absent where the last gain is above, or where one cannot tell it.
    """
    settled: dict[str, int] = {}
    for gain in sorted(gains, key=lambda gain: gain.from_steps):
        if gain.gain is None or gain.low is None or gain.high is None or gain.gain > gain.high - gain.low:
            settled.pop(gain.metric, None)
        else:
            settled.setdefault(gain.metric, gain.from_steps)
    return settled


def worsening_steps(gains: Iterable[Gain], metrics: Iterable[Metric | MetricFacts]) -> dict[str, int]:
    """Return, by metric, the step count from which on more steps make it worse, where there is one.

    That is where the first gain begins that is a loss by its whole interval, and by what is worth showing (half of the
    last decimal), if no later gain is an improvement by its whole interval.
    """
    decimals = {metric.name: metric.decimals for metric in metrics}
    worse: dict[str, int] = {}
    for gain in sorted(gains, key=lambda gain: gain.from_steps):
        if gain.gain is None or gain.low is None or gain.high is None or gain.metric not in decimals:
            continue
        if abs(gain.gain) < least_difference(decimals[gain.metric]):
            continue
        if gain.low > 0:
            worse.pop(gain.metric, None)
        elif gain.high < 0:
            worse.setdefault(gain.metric, gain.from_steps)
    return worse


def least_difference(decimals: int) -> float:
    """Return the least difference of two means that counts: half of the last decimal shown.

    Two backends' last bits may differ the same way in every image, of which nobody sees anything.
    """
    return 0.5 * 10.0**-decimals


def _as_array(values: Sequence[float | None] | NDArray[np.float64]) -> NDArray[np.float64]:
    return np.array([np.nan if value is None else value for value in values], np.float64)


def _present(values: Sequence[float | None] | NDArray[np.float64]) -> NDArray[np.float64]:
    array = _as_array(values)
    return array[~np.isnan(array)]


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
