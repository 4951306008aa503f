"""Where a run's results go: to the caller's arrays on the host, or to a slot on the device."""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from restyle_deploy.device_array import Array
from restyle_deploy.runtime.arena import part_of
from restyle_deploy.runtime.base import Device
from restyle_deploy.runtime.calls import Call
from restyle_deploy.runtime.results import InversionResult, InversionTimings, check_finite
from restyle_deploy.runtime.slots import Slot

Shapes = Mapping[str, tuple[int, ...]]
"""Of one image's `image` [3, R, R'], `latent` and `current`."""


class Output(Protocol):
    """Takes the results of runs."""

    def put(self, slot: Slot, step: int, first: int, image: Array, latent: Array) -> None:
        """Enqueue the copies of a kept step's results of one run.

        Args:
            slot: of the run.
            step: among those that are kept, counted from 0.
            first: the place of the run's first image among all.
            image, latent: of the run's images, on the device.
        """
        ...

    def put_current(self, slot: Slot, first: int, current: Array) -> None:
        """Enqueue the copy of a run's last images at the encoder's size."""
        ...


class HostResults:
    """Arrays that the caller will own; the slots of the runs deliver to them. Satisfies `Output`."""

    def __init__(self, call: Call, shapes: Shapes) -> None:
        leading = (call.kept, call.count)
        self._call = call
        self._images: NDArray[Any] = np.empty((*leading, *_image_shape(call, shapes)), _image_dtype(call))
        self._latents = np.empty((*leading, *shapes["latent"]), np.float32)
        self._current = np.empty((call.count, *shapes["current"]), np.float32)

    def reserve(self, slot: Slot) -> None:
        """Have memory of a slot for what is put there. Raises `DeviceError` where there is not so much."""
        slot.reserve_downloads(is_pixels=self._call.is_pixels)

    def put(self, slot: Slot, step: int, first: int, image: Array, latent: Array) -> None:
        """See `Output`."""
        count = len(image)
        images = self._images[step, first : first + count]
        latents = self._latents[step, first : first + count]
        if self._call.is_pixels:
            slot.download_pixels(step * count, image, images)
        else:
            slot.download("image", step * count, image, images)
        slot.download("latent", step * count, latent, latents)

    def put_current(self, slot: Slot, first: int, current: Array) -> None:
        """See `Output`."""
        slot.download("current", 0, current, self._current[first : first + len(current)])

    def result(self, timings: InversionTimings | None) -> InversionResult:
        """Return them, once all are delivered; raise `VerificationError` where they are not finite."""
        check_finite(self._latents, self._images, self._current, last=self._call.steps)
        kept = slice(None) if self._call.every_step else 0
        return InversionResult(
            images=self._images[kept], latents=self._latents[kept], current=self._current, timings=timings
        )


class DeviceResults:
    """Arrays of one slot on the device. Satisfies `Output`.

    Attributes:
        arrays: images, latents and current as the caller gets them.
    """

    def __init__(self, device: Device, slot: Slot, call: Call, shapes: Shapes) -> None:
        self._device, self._count, self._is_pixels = device, call.count, call.is_pixels
        rows = (call.kept * call.count,)
        leading = (call.kept, call.count) if call.every_step else rows
        image = (_image_shape(call, shapes), _image_dtype(call))
        latent = (shapes["latent"], "float32")
        self._images, self._latents = slot.result("image", rows, *image), slot.result("latent", rows, *latent)
        self._current = slot.result("current", (call.count,), shapes["current"], "float32")
        self.arrays = (slot.result("image", leading, *image), slot.result("latent", leading, *latent), self._current)

    def put(self, slot: Slot, step: int, first: int, image: Array, latent: Array) -> None:
        """See `Output`."""
        row = step * self._count + first
        images, latents = self._part(self._images, row, image), self._part(self._latents, row, latent)
        if self._is_pixels:
            self._device.pixels_from_images(image, images)
        else:
            self._device.copy(images, image)
        self._device.copy(latents, latent)

    def put_current(self, slot: Slot, first: int, current: Array) -> None:
        """See `Output`."""
        self._device.copy(self._part(self._current, first, current), current)

    @staticmethod
    def _part(rows: Array, first: int, like: Array) -> Array:
        count = like.shape[0]
        return rows if rows.shape[0] == count else part_of(rows, first, first + count)


def _image_shape(call: Call, shapes: Shapes) -> tuple[int, ...]:
    channels, height, width = shapes["image"]
    return (height, width, channels) if call.is_pixels else (channels, height, width)


def _image_dtype(call: Call) -> str:
    return "uint8" if call.is_pixels else "float32"
