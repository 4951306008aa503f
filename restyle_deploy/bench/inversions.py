"""Quality over all images for each step count, and the pictures that show it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from restyle_deploy.bench.comparison import Difference, difference_of, worst_of
from restyle_deploy.bench.metrics import MetricSet
from restyle_deploy.bench.metrics.pixels import saved_pictures
from restyle_deploy.bench.strips import write_step_images
from restyle_deploy.model_config import ModelConfig
from restyle_deploy.runtime.images import pool_images, uint8_from_images
from restyle_deploy.runtime.session import InversionResult, Session

MAX_QUALITY_BATCH = 8
KEPT_IMAGES_BYTES = 256 * 2**20  # of one batch, every step

Values = dict[str, tuple[float, ...]]


@dataclass(frozen=True, kw_only=True)
class StepResults:
    """What the inversions of all images came to at one step count.

    Attributes:
        values: by metric, one per image, of the session's images at the encoder's input size; infinite or NaN as the
            metric says.
        exact_values: of the exact session's, where there is one.
        difference: of the session from the exact one.
    """

    values: Values
    exact_values: Values
    difference: Difference | None


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Which images' steps are written as pictures, and where.

    Attributes:
        folder: where report.json will be.
        configuration: its name.
        names: of all images; the first `count` are written.
        count: of them.
    """

    folder: Path
    configuration: str
    names: tuple[str, ...]
    count: int


@dataclass(kw_only=True)
class _Collected:
    """Results of one step count, batch by batch."""

    values: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    exact_values: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    differences: list[Difference] = field(default_factory=list)

    def as_results(self) -> StepResults:
        return StepResults(
            values={name: tuple(column) for name, column in self.values.items()},
            exact_values={name: tuple(column) for name, column in self.exact_values.items()},
            difference=worst_of(self.differences) if self.differences else None,
        )


def measure_inversions(
    session: Session,
    targets: NDArray[np.float32],
    *,
    steps: tuple[int, ...],
    exact: Session | None,
    metrics: MetricSet,
    pictures: Pictures,
    tick: Callable[[int], None],
) -> dict[int, StepResults]:
    """Invert all images, compare each step count's with the targets and with the exact session's; write pictures.

    Args:
        session: an open session.
        targets: [N, 3, h, w] float32, of the encoder's size.
        steps: step counts, rising.
        exact: where the session is approximate.
        metrics: opened for the encoder's size.
        pictures: which are written.
        tick: told the refinement steps done.
    """
    config = session.bundle.config
    collected = {count: _Collected() for count in steps}
    batch = quality_batch(config, steps[-1])
    for first in range(0, len(targets), batch):
        part = targets[first : first + batch]
        shown = {}
        exact_results = _results_by_step(exact, part, steps, tick) if exact else iter([None] * len(steps))
        for count, result, exact_result in zip(
            steps, _results_by_step(session, part, steps, tick), exact_results, strict=True
        ):
            shown[count] = _compare(collected[count].values, metrics, result, part, config)
            if exact_result is not None:
                _compare(collected[count].exact_values, metrics, exact_result, part, config)
                collected[count].differences.append(difference_of(result, exact_result))
        _write_pictures(pictures, first, part, shown)
    return {count: results.as_results() for count, results in collected.items()}


def count_steps(session: Session, steps: tuple[int, ...]) -> int:
    """Return the refinement steps that `measure_inversions` takes for one image."""
    return sum(steps) if session.describe()["preview_steps"] else steps[-1]


def quality_batch(config: ModelConfig, steps: int) -> int:
    """Return how many images are inverted at once, so that the images of all their steps fit in memory."""
    image_bytes = 3 * config.image_shape[0] * config.image_shape[1] * np.dtype(np.float32).itemsize
    return max(1, min(MAX_QUALITY_BATCH, KEPT_IMAGES_BYTES // (steps * image_bytes)))


def _results_by_step(
    session: Session, targets: NDArray[np.float32], steps: tuple[int, ...], tick: Callable[[int], None]
) -> Iterator[InversionResult]:
    """Yield the last image and latent of each step count: of one inversion, unless only the last step has an image."""
    if session.describe()["preview_steps"]:
        for count in steps:
            yield session.invert(targets, steps=count)
            tick(len(targets) * count)
        return
    result = session.invert(targets, steps=steps[-1], every_step=True)
    tick(len(targets) * steps[-1])
    for count in steps:
        yield InversionResult(images=result.images[count - 1], latents=result.latents[count - 1])


def _compare(
    into: dict[str, list[float]],
    metrics: MetricSet,
    result: InversionResult,
    targets: NDArray[np.float32],
    config: ModelConfig,
) -> NDArray[np.float32]:
    """Add each image's values; return the images at the encoder's size."""
    pooled = pool_images(result.images, config.input_shape)
    pictures = saved_pictures(np.nan_to_num(result.images), config.input_shape)
    for name, values in metrics.measure(pooled, targets, pictures).items():
        into[name].extend(map(float, values))
    return pooled


def _write_pictures(
    pictures: Pictures, first: int, targets: NDArray[np.float32], shown: dict[int, NDArray[np.float32]]
) -> None:
    for index in range(min(len(targets), max(0, pictures.count - first))):
        write_step_images(
            pictures.folder,
            pictures.configuration,
            pictures.names[first + index],
            uint8_from_images(targets[index]),
            {count: uint8_from_images(images[index]) for count, images in shown.items()},
        )
