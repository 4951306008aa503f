"""The benchmark: quality over all images and latency, for each step count."""

import tempfile
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from restyle_deploy.bench.charts import draw_charts, draw_strip
from restyle_deploy.bench.environment import describe_environment
from restyle_deploy.bench.libraries import require_bench_libraries
from restyle_deploy.bench.measure import Latency, measure_interleaved
from restyle_deploy.bench.quality import ImageQuality, Quality, measure_quality
from restyle_deploy.bench.report import (
    BundleFacts,
    NamedQuality,
    Report,
    Row,
    Settings,
    step_latency_from,
    write_report,
)
from restyle_deploy.bundle import Bundle
from restyle_deploy.errors import ReportError
from restyle_deploy.model_config import ModelConfig
from restyle_deploy.runtime.images import normalize_images, pool_images, resize_image, uint8_from_images
from restyle_deploy.runtime.session import Session
from restyle_deploy.verify import check_parity, compare_with_expectation, load_expectation

REPORT_NAME = "report.json"
STRIPS_FOLDER = "strips"
MAX_QUALITY_BATCH = 8
KEPT_IMAGES_BYTES = 256 * 2**20  # of one batch, every step


def run_bench(
    session: Session,
    images: Sequence[tuple[str, NDArray[np.uint8]]],
    output: Path,
    *,
    steps: Sequence[int],
    warmup: int = 2,
    repeats: int = 10,
    progress: Callable[[int, int], None] | None = None,
    strip_count: int = 8,
) -> Report:
    """Measure quality and latency for each step count; write report.json, the charts and the strips.

    Quality is counted over all images at the encoder's input size, where upstream's loss counts it. Latency is that of
    a whole `session.invert` call at batch 1, its input ready in memory as float32, the step counts in turn.

    Args:
        session: an opened bundle.
        images: names and uint8 [H, W, 3] of any size. Names are unique and fit for files, as `ImageInput.stem` is.
        output: folder for `report.json`, `quality-latency.png`, `.svg` and `strips/NAME.png`; created when missing.
        steps: step counts, each at least 1 and given once; sorted here.
        warmup: calls per step count before the measured ones.
        repeats: measured calls per step count.
        progress: told the refinement steps done and their total.
        strip_count: strips are drawn for the first so many images.
    Raises:
        ValueError: no images or step counts, or unusable ones.
        VerificationError: the session does not compute what the reference model does; nothing is measured then.
        ReportError: `output` cannot be written.
        BackendUnavailableError: the `bench` extra is not installed.
    """
    require_bench_libraries()
    steps = _check_steps(steps)
    _check_names([name for name, _ in images])
    _prepare_folder(output)
    parity = compare_with_expectation(session, load_expectation(session.bundle.expectation))
    check_parity(parity, session.bundle.path.name)
    environment = describe_environment()
    created = datetime.now(timezone.utc).isoformat(timespec="seconds")
    targets = _targets_from_images(images, session.bundle.config)
    total = len(targets) * steps[-1] + (warmup + repeats) * sum(steps)
    tick = _counter(progress, total)
    names = [name for name, _ in images]
    qualities = _measure_qualities(session, names, targets, output, steps=steps, strip_count=strip_count, tick=tick)
    latencies = measure_interleaved(
        {count: partial(session.invert, targets[:1], steps=count) for count in steps},
        warmup=warmup,
        repeats=repeats,
        after_call=tick,
    )
    report = Report(
        created=created,
        environment=environment,
        bundle=_facts_of_bundle(session.bundle),
        session=session.describe(),
        parity=parity.as_json(),
        settings=Settings(batch=1, warmup=warmup, repeats=repeats, image_count=len(images), steps=steps),
        rows=tuple(_row(count, latencies[count], qualities[count], names) for count in steps),
    )
    write_report(report, output / REPORT_NAME)
    draw_charts(output / REPORT_NAME, output)
    return report


def _check_steps(steps: Sequence[int]) -> tuple[int, ...]:
    if not steps or min(steps) < 1 or len(set(steps)) < len(steps):
        raise ValueError(f"step counts are {list(steps)}, expected at least one, each 1 or more and given once")
    return tuple(sorted(steps))


def _check_names(names: Sequence[str]) -> None:
    if not names:
        raise ValueError("no images, expected at least one")
    unusable = sorted({name for name in names if Path(f"{name}.png").stem != name or names.count(name) > 1})
    if unusable:
        raise ValueError(f"image names that are not unique file names: {', '.join(map(repr, unusable))}")


def _prepare_folder(output: Path) -> None:
    """Create the folder and try to write to it: better now than after minutes of measuring."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise ReportError(f"{output}: no folder that can be written to: {error.strerror}") from error


def _targets_from_images(images: Sequence[tuple[str, NDArray[np.uint8]]], config: ModelConfig) -> NDArray[np.float32]:
    return normalize_images(np.stack([resize_image(image, config.input_shape) for _, image in images]))


def _counter(progress: Callable[[int, int], None] | None, total: int) -> Callable[[int], None]:
    """Return a function that adds refinement steps and tells `progress` the sum."""
    done = 0

    def add(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    return add


def _measure_qualities(
    session: Session,
    names: Sequence[str],
    targets: NDArray[np.float32],
    output: Path,
    *,
    steps: tuple[int, ...],
    strip_count: int,
    tick: Callable[[int], None],
) -> dict[int, Quality]:
    """Invert all images, compare each step count's images with the targets, and draw the strips."""
    per_image: dict[int, list[ImageQuality]] = {count: [] for count in steps}
    batch = _quality_batch(session.bundle.config, steps[-1])
    for first in range(0, len(targets), batch):
        part = targets[first : first + batch]
        every_step = session.invert(part, steps=steps[-1], every_step=True).images
        pooled = pool_images(every_step[[count - 1 for count in steps]], session.bundle.config.input_shape)
        for count, images in zip(steps, pooled, strict=True):
            per_image[count].extend(measure_quality(images, part).per_image)
        for index in range(first, min(first + len(part), strip_count)):
            path = output / STRIPS_FOLDER / f"{names[index]}.png"
            _draw_strip(targets[index], pooled[:, index - first], steps, path)
        tick(len(part) * steps[-1])
    return {count: Quality(per_image=tuple(images)) for count, images in per_image.items()}


def _quality_batch(config: ModelConfig, steps: int) -> int:
    image_bytes = 3 * config.image_shape[0] * config.image_shape[1] * np.dtype(np.float32).itemsize
    return max(1, min(MAX_QUALITY_BATCH, KEPT_IMAGES_BYTES // (steps * image_bytes)))


def _draw_strip(target: NDArray[np.float32], images: NDArray[np.float32], steps: tuple[int, ...], path: Path) -> None:
    """Draw a strip of the input [3, h, w] and the step counts' images [K, 3, h, w]."""
    captions = [f"step {count}" for count in steps]
    draw_strip(uint8_from_images(target), list(zip(captions, uint8_from_images(images), strict=True)), path)


def _facts_of_bundle(bundle: Bundle) -> BundleFacts:
    return BundleFacts(
        name=bundle.path.resolve().name,
        domain=bundle.config.domain,
        output_size=bundle.config.output_size,
        checkpoint_sha256=bundle.checkpoint_sha256,
    )


def _row(steps: int, latency: Latency, quality: Quality, names: Sequence[str]) -> Row:
    return Row(
        steps=steps,
        latency=step_latency_from(latency),
        quality=quality.mean,
        images=tuple(
            NamedQuality(name=name, quality=image) for name, image in zip(names, quality.per_image, strict=True)
        ),
    )
