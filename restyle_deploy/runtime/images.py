"""Image files <-> pixels, as the official code prepares and saves them. Every bad file becomes one `ImageError`."""

import os
import struct
import threading
import unicodedata
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from restyle_deploy.errors import ImageError
from restyle_deploy.files import replace_when_complete

# Upstream's utils/data_utils.py, and two that users have.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".tiff", ".tif", ".webp")
# Decoders that may be tried, whatever the file's name says; others (EPS) start programs.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MAX_PIXELS = 178_956_970

_ORIENTATION_TAG = 0x0112
_TRANSPOSE_BY_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What Pillow's decoders raise for damaged content.
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    EOFError,
    MemoryError,
    struct.error,
    zlib.error,
)
_SILENCE = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class ImageInput:
    """An image file to process.

    Attributes:
        path: where it is read.
        name: file name for outputs that keep the input's name, as upstream's do; unique in the list, whatever the case.
        stem: name without extension, for outputs that get their own; unique likewise.
    """

    path: Path
    name: str
    stem: str


def find_images(paths: Sequence[Path]) -> list[ImageInput]:
    """Return the image files that are meant, in the order given; those of a folder sorted, with its subfolders.

    Files are taken whatever their extension; in folders those with one of `EXTENSIONS` count, in any case, and hidden
    files and folders are passed over. A file that is named twice is taken once. Where two names agree, both are
    preceded by the folders that tell them apart: `a/x.jpg`, `b/x.jpg` become `a_x.jpg`, `b_x.jpg`. Where two stems
    agree, the extension joins them: `x.jpg`, `x.png` have the stems `x_jpg`, `x_png`.

    Raises:
        ImageError: names every path that does not exist and every folder without images.
    """
    problems: list[str] = []
    files: dict[Path, Path] = {}
    for path in paths:
        found = _images_in_folder(path) if path.is_dir() else [path]
        if not path.exists():
            problems.append(f"{path}: no such file or folder")
        elif not found:
            problems.append(f"{path}: no images in this folder ({' '.join(EXTENSIONS)})")
        for file in found:
            files.setdefault(file.resolve(), file)
    if problems:
        raise ImageError("; ".join(problems))
    names = _distinct([_names_with_folders(file) for file in files.values()])
    stems = _distinct([(Path(name).stem, name.replace(".", "_")) for name in names])
    return [
        ImageInput(path=path, name=name, stem=stem)
        for path, name, stem in zip(files.values(), names, stems, strict=True)
    ]


def load_image(path: Path, *, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Read an image file as 8-bit RGB, turned as its EXIF orientation says.

    The colours are those stored: alpha is dropped and not blended, as upstream does, and so is a palette's. Grey of 16
    bits is scaled; for 32 bits and floating point see `_scale_to_uint8`. CMYK is taken as Adobe writes it (inverted in
    JPEG files) and turned into RGB without its colour profile. Of several frames the first is taken. Several threads
    may call it; they take turns.

    Args:
        path: a file of one of `FORMATS`; its name does not matter.
        max_pixels: refuse images with more, before they are decoded; `PIL.Image.MAX_IMAGE_PIXELS` limits as well.
    Returns:
        [H, W, 3], owned by the caller.
    Raises:
        ImageError: the file cannot be read, is empty, is no image, is damaged, or is too large; one line with the path.
    """
    try:
        with _silenced(), Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise ImageError(
                    f"{path}: {image.width} x {image.height} pixels, at most {max_pixels} in all are accepted"
                )
            image.load()
            transpose = _TRANSPOSE_BY_ORIENTATION.get(_orientation(image))
            upright = image if transpose is None else image.transpose(transpose)
            return _rgb_from_image(upright)
    except Image.DecompressionBombError as error:
        raise ImageError(f"{path}: too large, {_first_line(error)}") from error
    except _DECODER_ERRORS as error:
        raise ImageError(f"{path}: {_reason(path, error)}") from error


def load_images(
    inputs: Sequence[ImageInput], shape: tuple[int, int]
) -> tuple[list[tuple[str, NDArray[np.uint8]]], list[str]]:
    """Return (stem, [H, W, 3] resized to `shape`) of the files that can be read, and the reason of each that cannot."""
    loaded, failures = [], []
    for image_input in inputs:
        try:
            loaded.append((image_input.stem, resize_image(load_image(image_input.path), shape)))
        except ImageError as error:
            failures.append(str(error))
    return loaded, failures


def resize_image(image: NDArray[np.uint8], shape: tuple[int, int]) -> NDArray[np.uint8]:
    """Resize [H, W, 3] to exactly `shape` (height, width), without a crop; return `image` itself if it fits.

    Source: torchvision's `Resize` of a PIL image, which upstream's transforms use: bilinear, antialiased.
    """
    if image.shape[:2] == shape:
        return image
    height, width = shape
    return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def normalize_images(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return [N, H, W, 3] in 0..255 as contiguous float32 [N, 3, H, W] in [-1, 1].

    Source: torchvision's `ToTensor` and `Normalize(0.5, 0.5)`, in their order and to the bit.
    """
    normalized = np.ascontiguousarray(images.transpose(0, 3, 1, 2), dtype=np.float32)
    normalized /= np.float32(255)
    normalized -= np.float32(0.5)
    normalized /= np.float32(0.5)
    return normalized


def uint8_from_images(images: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return finite [..., 3, H, W] in [-1, 1] as contiguous [..., H, W, 3] in 0..255; clipped, then truncated.

    Source: upstream utils/common.py, tensor2im.
    """
    scaled = np.clip((images + np.float32(1)) / np.float32(2), 0, 1) * np.float32(255)
    return np.ascontiguousarray(np.moveaxis(scaled.astype(np.uint8), -3, -1))


def save_image(path: Path, image: NDArray[np.uint8], *, size: tuple[int, int] | None = None) -> None:
    """Write [H, W, 3] in the format of the path's extension; the file appears once it is complete.

    Args:
        path: missing parent folders are created.
        image: 8-bit RGB.
        size: (height, width) to resize to, as upstream's `--resize_outputs` does (bicubic).
    Raises:
        ImageError: the extension is not one that can be written.
        OSError: the file cannot be written.
    """
    extensions = Image.registered_extensions()
    if extensions.get(path.suffix.lower()) not in Image.SAVE:
        raise ImageError(f"{path}: cannot write images with the extension {path.suffix!r}; use one of .png, .jpg")
    picture = Image.fromarray(image)
    if size is not None:
        picture = picture.resize((size[1], size[0]), Image.Resampling.BICUBIC)
    with replace_when_complete(path) as temporary:
        picture.save(temporary)


def _images_in_folder(folder: Path) -> list[Path]:
    found: list[Path] = []
    for directory, subfolders, names in os.walk(folder):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        candidates = (Path(directory, name) for name in names if not name.startswith("."))
        found += [path for path in candidates if path.suffix.lower() in EXTENSIONS and path.is_file()]
    return sorted(found, key=os.fspath)


def _names_with_folders(file: Path) -> list[str]:
    """Return the file's name after none, one, two... of its folders: `x.jpg`, `b_x.jpg`, `a_b_x.jpg`."""
    absolute = Path(os.path.abspath(file))
    parts = absolute.relative_to(absolute.anchor).parts
    return ["_".join(parts[-count:]) for count in range(1, len(parts) + 1)]


def _distinct(candidates: Sequence[Sequence[str]]) -> list[str]:
    """Return for each item its first candidate that no other item has.

    Items whose candidates agree to the last one (upper and lower case do not count) are numbered.
    """
    levels = [0] * len(candidates)
    while True:
        labels = [names[level] for names, level in zip(candidates, levels, strict=True)]
        groups: dict[str, list[int]] = {}
        for i, label in enumerate(labels):
            groups.setdefault(_caseless(label), []).append(i)
        separable = [group for group in groups.values() if len({_caseless(candidates[i][-1]) for i in group}) > 1]
        if not separable:
            return _numbered(labels)
        for i in (i for group in separable for i in group):
            levels[i] = min(levels[i] + 1, len(candidates[i]) - 1)


def _numbered(labels: Sequence[str]) -> list[str]:
    taken = set(map(_caseless, labels))
    seen: set[str] = set()
    result: list[str] = []
    for label in labels:
        name, number = label, 1
        while _caseless(name) in seen or (number > 1 and _caseless(name) in taken):
            number += 1
            name = f"{Path(label).stem}_{number}{Path(label).suffix}"
        seen.add(_caseless(name))
        result.append(name)
    return result


def _caseless(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


@contextmanager
def _silenced() -> Iterator[None]:
    # Pillow warns of large images and odd metadata. A process has one set of filters: one thread at a time changes it.
    with _SILENCE, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of a decoded image; 1 (upright) when there is none or it cannot be read."""
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    except _DECODER_ERRORS:
        return 1
    return orientation if isinstance(orientation, int) else 1


def _rgb_from_image(image: Image.Image) -> NDArray[np.uint8]:
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        grey = _scale_to_uint8(np.asarray(image))
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode == "P":
        image = image.convert("RGBA")
    return np.array(image.convert("RGB"))


def _scale_to_uint8(values: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Bring grey values of more than 8 bits to 0..255, rounded.

    White is 65535 for whole numbers, and for floating point the least of 1, 255 and 65535 that no value exceeds.
    Values beyond, or below 0, have no agreed white: they are stretched from their least to their greatest.
    """
    pixels = values.astype(np.float64)
    least, greatest = float(pixels.min()), float(pixels.max())
    if not np.isfinite([least, greatest]).all():
        raise ValueError("NaN or infinity among its pixels")
    whites = (1.0, 255.0, 65535.0) if values.dtype.kind == "f" else (65535.0,)
    white = next((white for white in whites if greatest <= white), None)
    if white is None or least < 0:
        pixels, white = pixels - least, max(greatest - least, 1e-300)
    return np.rint(pixels * (255 / white)).astype(np.uint8)


def _reason(path: Path, error: BaseException) -> str:
    if isinstance(error, UnidentifiedImageError):
        empty = path.stat().st_size == 0
        return "empty file" if empty else f"not an image, or damaged at its beginning (known: {', '.join(FORMATS)})"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"cannot be decoded, {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
