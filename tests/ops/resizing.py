"""Pillow's bilinear resize of 8-bit images in NumPy: what the kernel has to give."""

import numpy as np
from numpy.typing import NDArray

BITS = 22


def resize_as_pillow_12(image: NDArray[np.uint8], shape: tuple[int, int]) -> NDArray[np.uint8]:
    """Return [H, W, 3] resized to `shape` (height, width), along rows first.

    Source: Pillow up to version 12, src/libImaging/Resample.c, for its bilinear filter.
    """
    for axis in (1, 0):
        image = _resize_axis(image, shape[axis], axis)
    return image


def _resize_axis(image: NDArray[np.uint8], out_size: int, axis: int) -> NDArray[np.uint8]:
    lines = np.moveaxis(image, axis, 0).astype(np.int64)
    result = np.empty((out_size, *lines.shape[1:]), np.uint8)
    scale = len(lines) / out_size
    reach = max(scale, 1.0)
    for position in range(out_size):
        center = (position + 0.5) * scale
        first, end = max(int(center - reach + 0.5), 0), min(int(center + reach + 0.5), len(lines))
        heights = np.maximum(1 - np.abs((np.arange(first, end) - center + 0.5) * (1 / reach)), 0)
        weights = (0.5 + heights / sum(heights.tolist()) * (1 << BITS)).astype(np.int64)
        sums = np.tensordot(weights, lines[first:end], axes=1)
        result[position] = np.clip((sums + (1 << (BITS - 1))) >> BITS, 0, 255)
    return np.moveaxis(result, 0, axis)
