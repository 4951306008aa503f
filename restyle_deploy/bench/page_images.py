"""The page's images: each inversion step by step, and where it differs from its target, as data URIs."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from itertools import islice, zip_longest
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from restyle_deploy.backends.base import EXACT_PRECISION
from restyle_deploy.bench.report import Configuration, Report
from restyle_deploy.bench.series import labels_of
from restyle_deploy.bench.strips import StepImages, has_step_images, read_step_images, resample
from restyle_deploy.bench.tables import count_steps

MAX_IMAGES = 8  # of one configuration
MAX_BYTES = 8 * 2**20  # of all strips
MAX_PIXELS = 256  # larger images are reduced
SMALL_PIXELS = 96  # up to here, pixels are shown as they are, and stored without loss
JPEG_QUALITY = 90
SCALE_PERCENTILE = 99.5  # of all differences; the brightest colour

# From dark to bright in equal steps of lightness, so that the maps are read in grey and by the colour-blind alike.
_ANCHORS = ("#000004", "#320a5e", "#781c6d", "#bc3754", "#ed6925", "#fbb61a", "#fcffa4")


def images_section(report: Report, folder: Path) -> str:
    """Return the strips of some configurations that have images in `folder`, or nothing.

    Shown are one exact configuration for all of them (which `shown_configurations` tells) and each approximate one, of
    at most `MAX_IMAGES` images each: the first image of all, then the second and so on, until the next strip would make
    the section larger than `MAX_BYTES`; at least one strip is shown.
    """
    shown = shown_configurations(report, folder)
    groups = {name: [_reduce(item) for item in islice(read_step_images(folder, name), MAX_IMAGES)] for name in shown}
    if not groups:
        return ""
    scale = _scale([image for images in groups.values() for image in images])
    strips, left_out = _strips_within(groups, scale, MAX_BYTES)
    labels = labels_of([result.configuration for result in report.configurations])
    folded = "".join(
        f"<details{' open' * (index == 0)}><summary>{escape(labels[name])}</summary>{''.join(group)}</details>"
        for index, (name, group) in enumerate(strips.items())
    )
    return (
        '<section id="images"><h2>Images, step by step</h2>'
        f'<p class="faint">{escape(_what_is_shown(report, shown, labels, left_out))}</p>'
        '<input type="checkbox" id="show-maps" checked> <label for="show-maps">show where they differ</label>'
        f'<p class="faint map-scale">Mean absolute difference of the channels: 0 <img class="scale" alt="colour scale" '
        f'src="{_uri(_scale_bar())}"> {100 * scale / 255:.0f}% of the range or more.</p>{folded}</section>'
    )


def shown_configurations(report: Report, folder: Path) -> list[str]:
    """Return the names of the configurations whose images are shown, of those that went well and have images.

    Exact ones compute the same images, up to rounding: one is shown, the decision's if it is exact, else the first. Of
    approximate ones that differ in the batch or the threads alone, the first is. Of configurations that did not go
    well, a former run's pictures may lie in the folder.
    """
    ready = [
        result.configuration
        for result in report.configurations
        if result.status == "ok" and has_step_images(folder, result.configuration.name)
    ]
    exact = [item.name for item in ready if _is_exact(item)]
    chosen = report.decision.configuration if report.decision is not None else None
    shown = [chosen if chosen in exact else exact[0]] if exact else []
    approximate = {replace(item, batch=1, threads=None): item.name for item in reversed(ready) if not _is_exact(item)}
    return [item.name for item in ready if item.name in (*shown, *approximate.values())]


def _is_exact(item: Configuration) -> bool:
    return item.precision == EXACT_PRECISION and not item.preview_steps


def _strips_within(
    groups: Mapping[str, Sequence[StepImages]], scale: float, most_bytes: int
) -> tuple[dict[str, list[str]], int]:
    """Return strips by group until they take so many bytes, at least one, and how many are left out."""
    strips: dict[str, list[str]] = {name: [] for name in groups}
    columns = zip_longest(*([(name, image) for image in images] for name, images in groups.items()))
    queue = [place for column in columns for place in column if place is not None]
    size = 0
    for done, (name, image) in enumerate(queue):
        strip = _strip(image, scale)
        size += len(strip)
        if done and size > most_bytes:
            return {name: group for name, group in strips.items() if group}, len(queue) - done
        strips[name].append(strip)
    return strips, 0


def _what_is_shown(report: Report, shown: Sequence[str], labels: Mapping[str, str], left_out: int) -> str:
    """Return which configurations the images are of, in words."""
    done = [result.configuration for result in report.configurations if result.status == "ok"]
    exact = [labels[item.name] for item in done if _is_exact(item) and item.name in shown]
    approximate = [labels[item.name] for item in done if not _is_exact(item) and item.name in shown]
    words = []
    if exact and sum(map(_is_exact, done)) > 1:
        words.append(f"{exact[0]} stands for all exact configurations: they differ by rounding.")
    words += [f"Approximate: {'; '.join(approximate)}."] if approximate else []
    strips = f"{left_out} more strip{'s' * (left_out != 1)}"
    words += [f"{strips} would make the page too large; their pictures are in images/."] if left_out else []
    return " ".join(words)


def difference_map(image: NDArray[np.uint8], target: NDArray[np.uint8], scale: float) -> Image.Image:
    """Return the mean absolute difference of the channels as a picture of 256 colours.

    Args:
        image, target: uint8 [h, w, 3].
        scale: the difference that has the brightest colour, in levels; above 0.
    """
    difference = _difference(image, target)
    picture = Image.fromarray(np.rint((difference / scale).clip(0, 1) * 255).astype(np.uint8))
    picture.putpalette(_palette().tobytes())
    return picture


def _reduce(images: StepImages) -> StepImages:
    """Return the images at the size that is shown: the target's, or smaller."""
    height, width = images.target.shape[:2]
    factor = min(1.0, MAX_PIXELS / max(height, width))
    shape = (round(height * factor), round(width * factor))
    return StepImages(
        name=images.name,
        target=np.asarray(resample(images.target, shape)),
        steps={count: np.asarray(resample(pixels, shape)) for count, pixels in images.steps.items()},
    )


def _scale(images: Sequence[StepImages]) -> float:
    """Return the difference that has the brightest colour, the same in all maps: those are to be compared."""
    differences = [_difference(pixels, image.target) for image in images for pixels in image.steps.values()]
    highest = [float(np.percentile(difference, SCALE_PERCENTILE)) for difference in differences]
    return max([1.0, *highest])


def _difference(image: NDArray[np.uint8], target: NDArray[np.uint8]) -> NDArray[np.float64]:
    mean: NDArray[np.float64] = np.abs(image.astype(np.float64) - target).mean(axis=2)
    return mean


def _strip(images: StepImages, scale: float) -> str:
    """Return the target and the steps in a row, each with its map below."""
    cells = [_figure("input", f"{images.name}, input", images.target)]
    for count, pixels in images.steps.items():
        caption = count_steps(count)
        map_uri = _uri(difference_map(pixels, images.target, scale))
        alt = f"{images.name}, {caption}: difference from the input"
        cells.append(
            _figure(
                caption,
                f"{images.name}, {caption}",
                pixels,
                f'<img class="map{_small(pixels)}" alt="{escape(alt)}" src="{map_uri}">',
            )
        )
    return f'<h3>{escape(images.name)}</h3><div class="strip" tabindex="0">{"".join(cells)}</div>'


def _figure(caption: str, alt: str, pixels: NDArray[np.uint8], below: str = "") -> str:
    picture = f'<img class="picture{_small(pixels)}" alt="{escape(alt)}" src="{_uri(Image.fromarray(pixels))}">'
    return f"<figure><figcaption>{escape(caption)}</figcaption>{picture}{below}</figure>"


def _small(pixels: NDArray[np.uint8]) -> str:
    return " small" if max(pixels.shape[:2]) <= SMALL_PIXELS else ""


def _uri(picture: Image.Image) -> str:
    """Return a data URI: without loss for small pictures and those of a palette, else as JPEG."""
    buffer = io.BytesIO()
    if picture.mode == "P" or max(picture.size) <= SMALL_PIXELS:
        picture.save(buffer, "PNG", optimize=True)
        kind = "png"
    else:
        picture.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _scale_bar() -> Image.Image:
    bar = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    bar.putpalette(_palette().tobytes())
    return bar


def _palette() -> NDArray[np.uint8]:
    """Return 256 colours between the anchors, uint8 [256, 3]."""
    anchors = np.array([[int(colour[first : first + 2], 16) for first in (1, 3, 5)] for colour in _ANCHORS], float)
    places = np.linspace(0, len(anchors) - 1, 256)
    channels = [np.interp(places, np.arange(len(anchors)), anchors[:, channel]) for channel in range(3)]
    palette: NDArray[np.uint8] = np.rint(np.stack(channels, axis=1)).astype(np.uint8)
    return palette
