"""Image files <-> pixels, as the official code prepares and saves them. Every bad file becomes one `ImageError`."""

import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from restyle_deploy.errors import ImageError
from restyle_deploy.files import replace_when_complete

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


def pool_images(images: NDArray[np.float32], shape: tuple[int, int]) -> NDArray[np.float32]:
    """Return block means: [..., H, W] float32 -> [..., h, w], as the loop pools an image for its next step.

    Raises:
        ValueError: H and W are no whole multiples of `shape` (h, w).
    """
    height, width = images.shape[-2:]
    if height % shape[0] or width % shape[1]:
        raise ValueError(f"images of {height}x{width} pixels are no whole multiple of {shape[0]}x{shape[1]}")
    blocks = images.reshape(*images.shape[:-2], shape[0], height // shape[0], shape[1], width // shape[1])
    pooled: NDArray[np.float32] = blocks.mean(axis=(-3, -1), dtype=np.float32)
    return pooled


def uint8_from_images(images: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return finite [..., 3, H, W] in [-1, 1] as contiguous [..., H, W, 3] in 0..255; clipped, then truncated.

    Source: upstream utils/common.py, tensor2im.
    """
    scaled = np.clip((images + np.float32(1)) / np.float32(2), 0, 1) * np.float32(255)
    return np.ascontiguousarray(np.moveaxis(scaled.astype(np.uint8), -3, -1))


def check_extension(path: Path) -> None:
    """Raise `ImageError` unless images can be written under the path's extension."""
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise ImageError(f"{path}: cannot write images with the extension {path.suffix!r}; use one of .png, .jpg")


def save_image(path: Path, image: NDArray[np.uint8]) -> None:
    """Write [H, W, 3] in the format of the path's extension; the file appears once it is complete.

    Args:
        path: missing parent folders are created.
        image: 8-bit RGB.
    Raises:
        ImageError: the extension is not one that can be written.
        OSError: the file cannot be written.
    """
    check_extension(path)
    with replace_when_complete(path) as temporary:
        Image.fromarray(image).save(temporary)


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
