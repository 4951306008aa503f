"""Quality over all images for each step count, and the strips that show it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from restyle_deploy.bench.charts import draw_strip
from restyle_deploy.bench.comparison import Difference, difference_of, worst_of
from restyle_deploy.bench.quality import ImageQuality, Quality, measure_quality
from restyle_deploy.model_config import ModelConfig
from restyle_deploy.runtime.images import pool_images, uint8_from_images
from restyle_deploy.runtime.session import InversionResult, Session

STRIPS_FOLDER = "strips"
MAX_QUALITY_BATCH = 8
KEPT_IMAGES_BYTES = 256 * 2**20  # of one batch, every step


@dataclass(frozen=True, kw_only=True)
class StepResults:
    """What the inversions of all images came to at one step count.

    Attributes:
        quality: of the session's images, at the encoder's input size.
        exact_quality: of the exact session's, where there is one.
        difference: of the session from the exact one.
    """

    quality: Quality
    exact_quality: Quality | None
    difference: Difference | None


@dataclass(kw_only=True)
class _Collected:
    """Results of one step count, batch by batch."""

    quality: list[ImageQuality] = field(default_factory=list)
    exact_quality: list[ImageQuality] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)

    def as_results(self) -> StepResults:
        return StepResults(
            quality=Quality(per_image=tuple(self.quality)),
            exact_quality=Quality(per_image=tuple(self.exact_quality)) if self.exact_quality else None,
            difference=worst_of(self.differences) if self.differences else None,
        )


def measure_inversions(
    session: Session,
    targets: NDArray[np.float32],
    names: Sequence[str],
    output: Path,
    *,
    steps: tuple[int, ...],
    exact: Session | None,
    strip_count: int,
    tick: Callable[[int], None],
) -> dict[int, StepResults]:
    """Invert all images, compare each step count's with the targets and with the exact session's; draw the strips.

    Args:
        session: an open session.
        targets: [N, 3, h, w] float32, of the encoder's size.
        names: of the images.
        output: folder of the strips.
        steps: step counts, rising.
        exact: where the session is approximate.
        strip_count: strips are drawn for the first so many images.
        tick: told the refinement steps done.
    """
    config = session.bundle.config
    collected = {count: _Collected() for count in steps}
    batch = quality_batch(config, steps[-1])
    for first in range(0, len(targets), batch):
        part = targets[first : first + batch]
        shown = []
        exact_results = _results_by_step(exact, part, steps, tick) if exact else iter([None] * len(steps))
        for count, result, exact_result in zip(
            steps, _results_by_step(session, part, steps, tick), exact_results, strict=True
        ):
            into = collected[count]
            shown.append(pool_images(result.images, config.input_shape))
            into.quality.extend(measure_quality(shown[-1], part).per_image)
            if exact_result is not None:
                exact_images = pool_images(exact_result.images, config.input_shape)
                into.exact_quality.extend(measure_quality(exact_images, part).per_image)
                into.differences.append(difference_of(result, exact_result))
        for index in range(min(len(part), max(0, strip_count - first))):
            path = output / STRIPS_FOLDER / f"{names[first + index]}.png"
            _draw_strip(part[index], [images[index] for images in shown], steps, path)
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


def _draw_strip(
    target: NDArray[np.float32], images: Sequence[NDArray[np.float32]], steps: tuple[int, ...], path: Path
) -> None:
    """Draw a strip of the input [3, h, w] and the step counts' images [3, h, w]."""
    captions = [f"step {count}" for count in steps]
    draw_strip(uint8_from_images(target), list(zip(captions, uint8_from_images(np.stack(images)), strict=True)), path)
