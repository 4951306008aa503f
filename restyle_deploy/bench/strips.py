"""Pictures of an inversion step by step: a strip to look at, and the single images that the page is made from."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from restyle_deploy.errors import ReportError
from restyle_deploy.files import replace_when_complete

IMAGES_FOLDER = "images"
STRIPS_FOLDER = "strips"
CELL_PIXELS = 192
GAP_PIXELS = 8
CAPTION_PIXELS = 26
FONT_PIXELS = 16
TEXT_COLOUR = "#222222"

_TARGET = "target"
_STEP = "step-"


@dataclass(frozen=True, kw_only=True)
class StepImages:
    """One image's inversion: the target, uint8 [h, w, 3], and the image after each step count, uint8 [H, W, 3]."""

    name: str
    target: NDArray[np.uint8]
    steps: Mapping[int, NDArray[np.uint8]]


def write_step_images(
    folder: Path,
    configuration: str,
    image: str,
    target: NDArray[np.uint8],
    steps: Mapping[int, NDArray[np.uint8]],
) -> None:
    """Write FOLDER/images/CONFIGURATION/IMAGE/target.png and step-1.png, step-2.png, ...

    Args:
        folder: where report.json is.
        configuration: `Configuration.name`.
        image: its name, usable as a folder's.
        target: uint8 [h, w, 3], the encoder's input.
        steps: by step count, uint8 [H, W, 3].
    """
    place = folder / IMAGES_FOLDER / configuration / image
    named = {_TARGET: target, **{f"{_STEP}{count}": pixels for count, pixels in steps.items()}}
    for name, pixels in named.items():
        with replace_when_complete(place / f"{name}.png") as temporary:
            Image.fromarray(pixels).save(temporary)


def read_step_images(folder: Path, configuration: str) -> Iterator[StepImages]:
    """Yield what `write_step_images` wrote for a configuration, by the images' names; nothing if there is nothing.

    Raises:
        ReportError: a file is no image.
    """
    for image in _image_folders(folder, configuration):
        steps = {int(path.stem[len(_STEP) :]): path for path in image.glob(f"{_STEP}*.png") if _has_number(path)}
        yield StepImages(
            name=image.name,
            target=_read(image / f"{_TARGET}.png"),
            steps={count: _read(steps[count]) for count in sorted(steps)},
        )


def has_step_images(folder: Path, configuration: str) -> bool:
    """Return whether `read_step_images` would yield anything."""
    return bool(_image_folders(folder, configuration))


def draw_strips(folder: Path, configuration: str) -> list[Path]:
    """Draw FOLDER/strips/IMAGE.png for each image that `write_step_images` wrote for a configuration; return them."""
    drawn = []
    for images in read_step_images(folder, configuration):
        drawn.append(folder / STRIPS_FOLDER / f"{images.name}.png")
        draw_strip(images.target, [(f"step {count}", pixels) for count, pixels in images.steps.items()], drawn[-1])
    return drawn


def draw_strip(target: NDArray[np.uint8], images: Sequence[tuple[str, NDArray[np.uint8]]], path: Path) -> None:
    """Draw the input and then the steps in a row, each under its caption and all of one size.

    Pixels are repeated a whole number of times where images are small, so that the strip shows nothing the model did
    not render; images of another size than the target's are resampled to it.

    Args:
        target: uint8 [H, W, 3], the encoder's input.
        images: captions and images, uint8 [h, w, 3].
        path: a PNG file to write.
    """
    factor = -(-CELL_PIXELS // min(target.shape[:2]))
    height, width = target.shape[0] * factor, target.shape[1] * factor
    cells = [("input", target), *images]
    size = (len(cells) * (width + GAP_PIXELS) + GAP_PIXELS, height + CAPTION_PIXELS + GAP_PIXELS)
    strip = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(strip)
    font = ImageFont.load_default(FONT_PIXELS)
    for index, (caption, pixels) in enumerate(cells):
        left = GAP_PIXELS + index * (width + GAP_PIXELS)
        draw.text((left + width / 2, CAPTION_PIXELS / 2), caption, fill=TEXT_COLOUR, font=font, anchor="mm")
        strip.paste(_enlarge(pixels, target.shape[:2], factor), (left, CAPTION_PIXELS))
    with replace_when_complete(path) as temporary:
        strip.save(temporary)


def resample(pixels: NDArray[np.uint8], shape: tuple[int, ...]) -> Image.Image:
    """Return the image at [H, W]: as it is, or resampled."""
    image = Image.fromarray(pixels)
    if pixels.shape[:2] != tuple(shape):
        image = image.resize((shape[1], shape[0]), Image.Resampling.BICUBIC)
    return image


def _image_folders(folder: Path, configuration: str) -> list[Path]:
    place = folder / IMAGES_FOLDER / configuration
    found = sorted(place.iterdir()) if place.is_dir() else []
    return [image for image in found if (image / f"{_TARGET}.png").is_file()]


def _enlarge(pixels: NDArray[np.uint8], shape: tuple[int, ...], factor: int) -> Image.Image:
    return resample(pixels, shape).resize((shape[1] * factor, shape[0] * factor), Image.Resampling.NEAREST)


def _has_number(path: Path) -> bool:
    return path.stem[len(_STEP) :].isdecimal()


def _read(path: Path) -> NDArray[np.uint8]:
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except OSError as error:
        raise ReportError(f"{path}: cannot be read as an image: {error}") from error
