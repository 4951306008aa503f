"""The time of each stage from an image file to an image file: decode, preprocess, upload, encoder, generator, download,
encode.
"""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from restyle_deploy.latency import measure_interleaved
from restyle_deploy.runtime.images import load_image, normalize_images, resize_image, save_image, uint8_from_images

# In the order in which an image passes them.
STAGES = ("decode", "preprocess", "upload", "encoder", "generator", "download", "encode")


class Timings(Protocol):
    """What a session tells of one call, in milliseconds; the two graphs' times are of each step."""

    @property
    def upload_ms(self) -> float:
        """From the caller's arrays into the model's."""
        ...

    @property
    def encoder_ms(self) -> Sequence[float]:
        """Of each step."""
        ...

    @property
    def generator_ms(self) -> Sequence[float]:
        """Of each step."""
        ...

    @property
    def download_ms(self) -> float:
        """From the model's arrays into the caller's."""
        ...

    @property
    def total_ms(self) -> float:
        """Of the whole call."""
        ...


def stages_from_timings(timings: Sequence[Timings]) -> dict[str, float]:
    """Return the median milliseconds of the stages inside a session, from several calls.

    Args:
        timings: of warm calls of the same batch and steps, at least one; from a session that was opened for timing, in
            other calls than those whose latency is reported, as events between the graphs cost a little.
    Returns:
        `upload`, `encoder` and `generator` (all steps of a call together), `download`.
    Raises:
        ValueError: there are none.
    """
    if not timings:
        raise ValueError("no timings; open the session with timing_enabled=True")
    return {
        "upload": float(np.median([call.upload_ms for call in timings])),
        "encoder": float(np.median([sum(call.encoder_ms) for call in timings])),
        "generator": float(np.median([sum(call.generator_ms) for call in timings])),
        "download": float(np.median([call.download_ms for call in timings])),
    }


def measure_session_stages(
    invert: Callable[[], Timings | None], *, warmup: int = 1, repeats: int = 5
) -> dict[str, float]:
    """Call and return the stages inside the session, see `stages_from_timings`.

    Args:
        invert: one call, which returns its result's timings.
        warmup: calls before those that count.
        repeats: calls that count.
    Raises:
        ValueError: the session was not opened for timing, or `repeats` is below 1.
    """
    for _ in range(warmup):
        invert()
    found = (invert() for _ in range(repeats))
    return stages_from_timings([timings for timings in found if timings is not None])


def measure_image_stages(
    files: Sequence[Path],
    images: NDArray[np.float32],
    *,
    input_shape: tuple[int, int],
    warmup: int = 1,
    repeats: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Return the median milliseconds of the stages around a session, for as many images as it renders in one call.

    Args:
        files: image files as a user has them; taken in turn if there are fewer than images, and the first ones if more.
        images: [N, 3, R, R'] float32 in about [-1, 1]: a result of the session. Written as PNG to a temporary folder.
        input_shape: height and width of the encoder's input.
        warmup: rounds before those that count.
        repeats: rounds that count.
        clock: seconds, monotonic.
    Returns:
        `decode` (file to 8-bit pixels), `preprocess` (to float32 of the encoder's size), `encode` (float32 to file).
    Raises:
        ValueError: there are no files, or no images.
        ImageError: a file cannot be read.
    """
    if not files or not len(images):
        raise ValueError(f"got {len(files)} files and {len(images)} images, expected at least one of each")
    taken = list(islice(cycle(files), len(images)))
    pixels = [load_image(file) for file in taken]
    with tempfile.TemporaryDirectory(prefix="restyle-deploy-") as folder:
        latencies = measure_interleaved(
            {
                "decode": lambda: [load_image(file) for file in taken],
                "preprocess": lambda: normalize_images(np.stack([resize_image(one, input_shape) for one in pixels])),
                "encode": lambda: _save_images(images, Path(folder)),
            },
            warmup=warmup,
            repeats=repeats,
            clock=clock,
        )
    return {stage: latency.median_ms for stage, latency in latencies.items()}


def ordered_stages(*parts: Mapping[str, float]) -> dict[str, float]:
    """Join the stages of several measurements in the order of `STAGES`."""
    joined = {stage: ms for part in parts for stage, ms in part.items()}
    return {stage: joined[stage] for stage in STAGES if stage in joined}


def _save_images(images: NDArray[np.float32], folder: Path) -> None:
    for index, image in enumerate(uint8_from_images(images)):
        save_image(folder / f"{index}.png", image)
