"""All metrics in the order of tables, and the set of them that is measured."""

import logging
from collections.abc import Callable, Mapping
from types import MappingProxyType, TracebackType

import numpy as np
from numpy.typing import NDArray

from restyle_deploy.bench.figures import MetricFacts
from restyle_deploy.bench.metrics.base import Gauge, Metric, MetricOptions, first_line
from restyle_deploy.bench.metrics.dlib_descriptor import DLIB, open_dlib
from restyle_deploy.bench.metrics.identity import IDENTITY, open_identity
from restyle_deploy.bench.metrics.perceptual import LPIPS, open_lpips
from restyle_deploy.bench.metrics.pixels import L2, MSE, PSNR, open_l2, open_mse, open_psnr, saved_pictures
from restyle_deploy.bench.metrics.structure import MS_SSIM, SSIM, open_ms_ssim, open_ssim
from restyle_deploy.errors import MetricError

Opener = Callable[[MetricOptions, tuple[int, int]], Gauge]

_TABLE: tuple[tuple[Metric, Opener], ...] = (
    (MSE, open_mse),
    (L2, open_l2),
    (PSNR, open_psnr),
    (SSIM, open_ssim),
    (MS_SSIM, open_ms_ssim),
    (LPIPS, open_lpips),
    (IDENTITY, open_identity),
    (DLIB, open_dlib),
)
METRICS: tuple[Metric, ...] = tuple(metric for metric, _ in _TABLE)
MAX_BATCH = 8  # images that are compared at once: bounds the memory

# What a metric may fail with on this machine: torch and dlib tell theirs by `RuntimeError`, ONNX Runtime's come as
# `MetricError`. Others are bugs of ours, and pass through.
_FAILURES = (MetricError, RuntimeError, MemoryError, OSError)

_log = logging.getLogger(__name__)


class MetricSet:
    """Metrics that are ready to measure; `open_metrics` makes it.

    One that fails while it measures is dropped from then on, and the others go on: `available`, `missing` and `facts`
    are as of now.
    """

    def __init__(self, gauges: tuple[Gauge, ...], missing: Mapping[str, str], shape: tuple[int, int]) -> None:
        self._gauges = gauges
        self._shape = shape
        self._opened = {gauge.metric.name: gauge.metric for gauge in gauges}
        self._missing = dict(missing)

    @property
    def available(self) -> tuple[Metric, ...]:
        """Metrics that are measured, in the table's order; their source names the files that are used."""
        return tuple(metric for name, metric in self._opened.items() if name not in self._missing)

    @property
    def missing(self) -> Mapping[str, str]:
        """Why each of the others that were asked for is not measured, or not any more, by name."""
        return MappingProxyType(self._missing)

    @property
    def facts(self) -> tuple[MetricFacts, ...]:
        """Available and missing ones in the table's order, as a report describes them."""
        asked = [metric for metric in METRICS if metric.name in self._opened or metric.name in self._missing]
        return tuple(_facts_of(self._opened.get(each.name, each), self._missing.get(each.name)) for each in asked)

    def __enter__(self) -> "MetricSet":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the models; a second time does nothing."""
        self._gauges = ()

    def measure(
        self,
        images: NDArray[np.float32],
        targets: NDArray[np.float32],
        pictures: NDArray[np.float32] | None = None,
    ) -> dict[str, NDArray[np.float64]]:
        """Compare images with their targets, a few at a time.

        Args:
            images: [N, 3, h, w] float32, about [-1, 1], of the size that the set was opened for; N at least 1. Larger
                images: `images.pool_images` first. Those that are not finite get NaN by every metric.
            targets: the same shape, in [-1, 1].
            pictures: the same shape: what `pixels.saved_pictures` made of the full images, where those are larger; None
                where they are `images`.
        Returns:
            By the names of `available`: [N]; infinite where a metric says so, NaN where it is not defined. A metric
            that fails here or has failed before is not among them.
        Raises:
            ValueError: a shape is another, there is no image, or the set is closed.
        """
        if len(self._gauges) != len(self._opened):
            raise ValueError("the metrics are closed")
        if (
            images.shape != targets.shape
            or images.ndim != 4
            or images.shape[1:] != (3, *self._shape)
            or not len(images)
        ):
            raise ValueError(
                f"got images {list(images.shape)} and targets {list(targets.shape)}; "
                f"expected {['N', 3, *self._shape]} for both, N >= 1"
            )
        are_finite = np.array([bool(np.isfinite(image).all()) for image in images])
        finite = np.where(are_finite[:, None, None, None], images, np.float32(0))
        saved = saved_pictures(finite, self._shape) if pictures is None else pictures
        found = {}
        for gauge in self._gauges:
            metric = gauge.metric
            if metric.name in self._missing:
                continue
            try:
                values = _measure_in_batches(gauge, saved if gauge.reads_pictures else finite, targets)
            except _FAILURES as error:
                self._missing[metric.name] = f"it failed while it measured: {_describe(error)}"
                _log.warning("%s is measured no more: %s", metric.label, _describe(error), exc_info=error)
            else:
                found[metric.name] = np.where(are_finite, values, np.nan)
        return found


def open_metrics(options: MetricOptions, shape: tuple[int, int]) -> MetricSet:
    """Open all metrics that can run here; the others are told in `MetricSet.missing`, with what is missing.

    Each one measures one grey image and then two, so that a model that does not fit, or takes one image at a time
    without saying so, is found here and not after an hour.

    Args:
        options: which metrics, and their files.
        shape: (height, width) of the images to compare: the encoder's input size.
    Raises:
        ValueError: a name is not that of a metric.
    """
    known = [metric.name for metric in METRICS]
    unknown = [name for name in options.names or () if name not in known]
    if unknown:
        raise ValueError(f"no metric {', '.join(unknown)}; there are {', '.join(known)}")
    gauges, missing = [], {}
    for metric, opener in _TABLE:
        if options.names is not None and metric.name not in options.names:
            continue
        try:
            gauge = opener(options, shape)
            for count in (1, 2):
                grey = np.zeros((count, 3, *shape), np.float32)
                gauge.measure(grey, grey)
            gauges.append(gauge)
        except _FAILURES as error:
            missing[metric.name] = _describe(error)
            _log.info("%s is not measured: %s", metric.label, missing[metric.name])
    return MetricSet(tuple(gauges), missing, shape)


def _measure_in_batches(gauge: Gauge, images: NDArray[np.float32], targets: NDArray[np.float32]) -> NDArray[np.float64]:
    return np.concatenate(
        [
            gauge.measure(images[first : first + MAX_BATCH], targets[first : first + MAX_BATCH])
            for first in range(0, len(images), MAX_BATCH)
        ]
    )


def _describe(error: Exception) -> str:
    """Return what is missing in one line; of a library's error its kind as well."""
    return str(error) if isinstance(error, MetricError) else f"{type(error).__name__}: {first_line(error)}"


def _facts_of(metric: Metric, missing: str | None) -> MetricFacts:
    return MetricFacts(**vars(metric), missing=missing)
