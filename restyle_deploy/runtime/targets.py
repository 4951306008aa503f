"""Images of callers -> the encoder's target, checked."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from restyle_deploy.errors import ShapeError
from restyle_deploy.model_config import ModelConfig
from restyle_deploy.runtime.images import normalize_images, resize_image

# Float images are meant in [-1, 1]; resampling overshoots a little, while 0..255 would be far off.
LARGEST_VALUE = 1.5


def targets_from_images(images: NDArray[Any], config: ModelConfig) -> NDArray[np.float32]:
    """Return images as the encoder takes them: float32 [N, 3, h, w] in [-1, 1].

    Args:
        images: see `Session.invert`.
        config: gives the encoder's input size.
    Raises:
        TypeError, ShapeError, ValueError: see `Session.invert`.
    """
    if not isinstance(images, np.ndarray) or images.dtype not in (np.uint8, np.float32):
        got = images.dtype if isinstance(images, np.ndarray) else type(images).__name__
        raise TypeError(f"images: got {got}, expected a NumPy array of uint8 [N,H,W,3] or float32 [N,3,h,w]")
    height, width = config.input_shape
    if images.dtype == np.uint8:
        if images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape[1:3]:
            raise ShapeError(
                f"images: got uint8 {list(images.shape)}, expected [N, H, W, 3]; one image is images[None]"
            )
    elif images.ndim != 4 or images.shape[1:] != (3, height, width):
        raise ShapeError(f"images: got float32 {list(images.shape)}, expected [N, 3, {height}, {width}]")
    if len(images) == 0:
        raise ValueError("images: got none, expected at least one")
    if images.dtype == np.uint8:
        return normalize_images(np.stack([resize_image(image, (height, width)) for image in images]))
    bad = [index for index, image in enumerate(images) if not np.isfinite(image).all()]
    if bad:
        raise ValueError(f"images: NaN or infinity in image {', '.join(map(str, bad))}")
    largest = float(np.abs(images).max())
    if largest > LARGEST_VALUE:
        raise ValueError(
            f"images: float32 values up to {largest:g}, expected [-1, 1]; pass 0..255 as uint8 [N, H, W, 3]"
        )
    return images
