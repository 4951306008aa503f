"""The page's images: each inversion step by step, and where it differs from its target, as data URIs."""

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from restyle_deploy.bench.report import Report
from restyle_deploy.bench.series import labels_of
from restyle_deploy.bench.strips import StepImages, read_step_images, resample
from restyle_deploy.bench.tables import count_steps

MAX_IMAGES = 8  # of one configuration
MAX_PIXELS = 256  # larger images are reduced
SMALL_PIXELS = 96  # up to here, pixels are shown as they are, and stored without loss
JPEG_QUALITY = 90
SCALE_PERCENTILE = 99.5  # of all differences; the brightest colour

# From dark to bright in equal steps of lightness, so that the maps are read in grey and by the colour-blind alike.
_ANCHORS = ("#000004", "#320a5e", "#781c6d", "#bc3754", "#ed6925", "#fbb61a", "#fcffa4")


def images_section(report: Report, folder: Path) -> str:
    """Return the strips of the configurations that went well and have images in `folder`, or nothing.

    Of the others, a former run's pictures may lie there.
    """
    labels = labels_of([result.configuration for result in report.configurations])
    groups = []
    for result in (result for result in report.configurations if result.status == "ok"):
        name = result.configuration.name
        images = [_reduce(item) for item in list(read_step_images(folder, name))[:MAX_IMAGES]]
        if images:
            groups.append((labels[name], images))
    if not groups:
        return ""
    scale = _scale([image for _, images in groups for image in images])
    strips = "".join(
        f"<details{' open' * (index == 0)}><summary>{escape(label)}</summary>"
        f"{''.join(_strip(image, scale) for image in images)}</details>"
        for index, (label, images) in enumerate(groups)
    )
    return (
        '<section id="images"><h2>Images, step by step</h2>'
        '<input type="checkbox" id="show-maps" checked> <label for="show-maps">show where they differ</label>'
        f'<p class="faint map-scale">Mean absolute difference of the channels: 0 <img class="scale" alt="colour scale" '
        f'src="{_uri(_scale_bar())}"> {100 * scale / 255:.0f}% of the range or more.</p>{strips}</section>'
    )


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
