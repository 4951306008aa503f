"""How the kernels of images.cu are launched. Plain numbers, no GPU library.

Their parameters are the input pointer, then `Launch.scalars` as int32, then the output pointer:

    prepare_images:      source, in_height, in_width, out_height, out_width, target
    pixels_from_images:  images, count, pixels, y
"""

import functools
import math
from collections.abc import Mapping
from types import MappingProxyType

from restyle_deploy.ops.kernels.launches import GRID_LIMITS, INT32_LIMIT, Launch

IMAGES = "images"
PREPARE_IMAGES = "prepare_images"
PIXELS_FROM_IMAGES = "pixels_from_images"
IMAGE_INSTANTIATIONS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {IMAGES: (f"{PREPARE_IMAGES}<false>", f"{PREPARE_IMAGES}<true>", PIXELS_FROM_IMAGES)}
)

# images.cu holds the same numbers; a test compares the two.
PREPARE_COLUMNS = 32
PREPARE_ROWS = 8
PIXELS_THREADS = 256
PIXELS_VECTOR = 4
CHANNELS = 3


@functools.lru_cache(maxsize=64)
def launch_prepare_images(source: tuple[int, ...], target: tuple[int, ...], *, pillow: int) -> Launch:
    """Choose how uint8 images are resized and brought to [-1, 1].

    Args:
        source: [N, H, W, 3] of the uint8 images.
        target: [N, 3, h, w] of the float32 result.
        pillow: the major version whose results are wanted. From 13 on, images whose height is reduced by much are
            filtered along columns first, which changes some values by a level; before, always along rows.
    Raises:
        ValueError: other shapes, an empty one, or one that is too large for the kernel.
    """
    for shape in (source, target):
        _check_sizes(PREPARE_IMAGES, shape, "four", is_right=len(shape) == 4)
    batch, in_height, in_width, channels = source
    out_batch, out_channels, out_height, out_width = target
    if (channels, out_channels) != (CHANNELS, CHANNELS) or batch != out_batch:
        raise ValueError(
            f"{PREPARE_IMAGES}: got {list(source)} and {list(target)}, expected [N, H, W, 3] and [N, 3, h, w]"
        )
    # As measured on Pillow 13.0; pull request 9549 there.
    columns_first = pillow >= 13 and out_height < in_height and in_height - out_height > 2 * (in_width - out_width)
    grid = (math.ceil(out_width / PREPARE_COLUMNS), math.ceil(out_height / PREPARE_ROWS), batch)
    if any(size > limit for size, limit in zip(grid, GRID_LIMITS, strict=True)):
        raise ValueError(f"{PREPARE_IMAGES}: {list(target)} needs a grid of {grid}, a GPU takes {GRID_LIMITS}")
    return Launch(
        kernel=IMAGES,
        expression=f"{PREPARE_IMAGES}<{str(columns_first).lower()}>",
        grid=grid,
        block=(PREPARE_COLUMNS, PREPARE_ROWS, 1),
        scalars=(in_height, in_width, out_height, out_width),
        out_shape=(batch, CHANNELS, out_height, out_width),
    )


@functools.lru_cache(maxsize=64)
def launch_pixels_from_images(images: tuple[int, ...]) -> Launch:
    """Choose how images in [-1, 1] become bytes.

    Args:
        images: [..., 3, H, W] of the float32 images.
    Raises:
        ValueError: another shape, an empty one, or one that is too large for the kernel.
    """
    _check_sizes(PIXELS_FROM_IMAGES, images, "at least three", is_right=len(images) >= 3)
    *leading, channels, height, width = images
    if channels != CHANNELS:
        raise ValueError(f"{PIXELS_FROM_IMAGES}: got {list(images)}, expected [..., 3, H, W]")
    count = math.prod(leading)
    items = count * height * width // PIXELS_VECTOR
    return Launch(
        kernel=IMAGES,
        expression=PIXELS_FROM_IMAGES,
        grid=(min(max(1, math.ceil(items / PIXELS_THREADS)), GRID_LIMITS[0]), 1, 1),
        block=(PIXELS_THREADS, 1, 1),
        scalars=(count, height * width),
        out_shape=(count, height, width, CHANNELS),
    )


def _check_sizes(kernel: str, shape: tuple[int, ...], axes: str, *, is_right: bool) -> None:
    if not is_right or min(shape) < 1:
        raise ValueError(f"{kernel}: got shape {list(shape)}, expected {axes} axes, each at least 1")
    if math.prod(shape[-3:]) > INT32_LIMIT:
        raise ValueError(f"{kernel}: got shape {list(shape)}, expected fewer than 2^31 values of one image")
