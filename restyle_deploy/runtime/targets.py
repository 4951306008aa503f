"""What callers give, checked: images, and where the loop starts."""

import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from restyle_deploy.device_array import Array, DeviceArray
from restyle_deploy.errors import ShapeError
from restyle_deploy.model_config import ModelConfig
from restyle_deploy.runtime.images import normalize_images, resize_image

# Float images are meant in [-1, 1]; resampling overshoots a little, while 0..255 would be far off.
LARGEST_VALUE = 1.5
LARGEST_HANDLE = 2**64 - 1


def targets_from_images(images: NDArray[Any], config: ModelConfig) -> NDArray[np.float32]:
    """Return images as the encoder takes them: float32 [N, 3, h, w] in [-1, 1].

    Args:
        images: NumPy's; see `Session.invert`.
        config: gives the encoder's input size.
    Raises:
        TypeError, ShapeError, ValueError: see `Session.invert`.
    """
    check_images(images, config)
    if images.dtype == np.uint8:
        return normalize_images(np.stack([resize_image(image, config.input_shape) for image in images]))
    return images


def check_images(images: Any, config: ModelConfig) -> None:
    """Refuse what is no array of images that the encoder can take.

    Args:
        images: NumPy's or on a device; of the latter no value is looked at.
        config: gives the encoder's input size.
    Raises:
        TypeError, ShapeError, ValueError: see `Session.invert`.
    """
    if not isinstance(images, (np.ndarray, DeviceArray)) or images.dtype not in (np.uint8, np.float32):
        got = images.dtype if isinstance(images, (np.ndarray, DeviceArray)) else type(images).__name__
        raise TypeError(
            f"images: got {got}, expected a NumPy array of uint8 [N,H,W,3] or float32 [N,3,h,w], "
            "or such an array on the session's device"
        )
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
    if isinstance(images, np.ndarray) and images.dtype == np.float32:
        _check_values(images)


def check_count(name: str, value: Any) -> int:
    """Return a whole number of at least 1; raise `TypeError` or `ValueError` for another value."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} is a {type(value).__name__}, expected a whole number")
    if value < 1:
        raise ValueError(f"{name} is {value}, expected at least 1")
    return int(value)  # a NumPy integer of 8 bits overflows when doubled


def check_start(latents: Array, current: Array | None, config: ModelConfig, count: int) -> tuple[Array, Array]:
    """Return where the loop starts: latents [N, n_styles, style_dim] and images [N, 3, h, w]; of all steps the last.

    Args:
        latents, current: of the previous result, NumPy's or on the device.
        config: of the model that goes on.
        count: images.
    Raises:
        ValueError: the result has no current image, or a value that is not finite.
        ShapeError: it is of so many other images, or of another model's sizes.
    """
    if current is None:
        raise ValueError("start: it has no current image; pass a result of Session.invert")
    if latents.ndim == 4:
        latents = _last_step(latents)
    expected: Sequence[tuple[str, Array, tuple[int, ...]]] = (
        ("latents", latents, (count, config.n_styles, config.style_dim)),
        ("current", current, (count, 3, *config.input_shape)),
    )
    for name, array, shape in expected:
        if array.shape != shape or array.dtype != np.float32:
            raise ShapeError(
                f"start: its {name} are {array.dtype} {list(array.shape)}, expected float32 {list(shape)}: "
                "a result of as many images, of a model of the same sizes"
            )
        if isinstance(array, np.ndarray) and not np.isfinite(array).all():
            raise ValueError(f"start: NaN or infinity in its {name}")
    return latents, current


def stream_from(stream: Any) -> int:
    """Return a stream's handle.

    Args:
        stream: the handle, or an object with `__cuda_stream__`.
    Raises:
        TypeError: it is neither, or its `__cuda_stream__` does not keep to the protocol.
        ValueError: no handle is such a number.
    """
    if hasattr(stream, "__cuda_stream__"):
        answer = stream.__cuda_stream__()
        try:
            version, handle = answer
            _, stream = operator.index(version), operator.index(handle)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"stream: the __cuda_stream__ of a {type(stream).__name__} gives {answer!r}, "
                "expected two whole numbers: version and handle"
            ) from error
    if isinstance(stream, bool) or not isinstance(stream, (int, np.integer)):
        raise TypeError(
            f"stream is a {type(stream).__name__}, expected a handle as a whole number, or an object that has "
            "__cuda_stream__; torch's: torch.cuda.current_stream().cuda_stream"
        )
    if not 0 <= stream <= LARGEST_HANDLE:
        raise ValueError(f"stream is {stream}, expected a handle: 0 to 2**64 - 1")
    return int(stream)


def _check_values(images: NDArray[np.float32]) -> None:
    bad = [index for index, image in enumerate(images) if not np.isfinite(image).all()]
    if bad:
        raise ValueError(f"images: NaN or infinity in image {', '.join(map(str, bad))}")
    largest = max(float(np.abs(image).max()) for image in images)
    if largest > LARGEST_VALUE:
        raise ValueError(
            f"images: float32 values up to {largest:g}, expected [-1, 1]; pass 0..255 as uint8 [N, H, W, 3]"
        )


def _last_step(latents: Array) -> Array:
    last: Array = latents[-1] if isinstance(latents, np.ndarray) else latents.part(len(latents) - 1, len(latents))
    return replace(last, shape=last.shape[1:]) if isinstance(last, DeviceArray) else last
