"""What a caller asks of a session -> a call, checked."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from restyle_deploy.device_array import Array
from restyle_deploy.model_config import ModelConfig
from restyle_deploy.runtime.arena import part_of
from restyle_deploy.runtime.base import Device
from restyle_deploy.runtime.host_device import array_on_host
from restyle_deploy.runtime.results import DeviceInversion, Inversion, InversionResult
from restyle_deploy.runtime.slots import Slot
from restyle_deploy.runtime.targets import check_count, check_images, check_start, stream_from

IMAGE_TYPES = ("float32", "uint8")

FindArray = Callable[[object, int | None], Array | None]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What `Session.invert` takes, unchecked."""

    images: object
    steps: int | None = None
    every_step: bool = False
    max_batch: int | None = None
    image_type: str = "float32"
    start: Inversion | None = None
    stream: object = None


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Checked inputs of N images; each array is NumPy's or on the device.

    Attributes:
        images: uint8 [N, H, W, 3] or float32 [N, 3, h, w].
        latents, current: [N, n_styles, style_dim] and [N, 3, h, w] float32 to start from; None for the average.
    """

    images: Array
    latents: Array | None = None
    current: Array | None = None

    def part(self, first: int, last: int) -> "Inputs":
        """Return those of the images `first` to `last` (exclusive)."""
        if (first, last) == (0, len(self.images)):
            return self
        return Inputs(**{name: part_of(array, first, last) for name, array in self._given().items()})

    def reserve(self, slot: Slot) -> None:
        """Have memory of a slot for what is on the host. Raises `DeviceError` where there is not so much."""
        on_host = self._on_host()
        if on_host:
            upload_bytes = on_host["images"].nbytes if "images" in on_host else 0
            slot.reserve((array.nbytes for array in on_host.values()), upload_bytes=upload_bytes)

    def staged(self, slot: Slot) -> "Inputs":
        """Return them with what is on the host in the slot's pinned memory."""
        on_host = self._on_host()
        return replace(self, **slot.stage(on_host)) if on_host else self

    def _on_host(self) -> dict[str, NDArray[Any]]:
        return {name: array for name, array in self._given().items() if isinstance(array, np.ndarray)}

    def _given(self) -> dict[str, Array]:
        given = {"images": self.images}
        if self.latents is not None and self.current is not None:
            given |= {"latents": self.latents, "current": self.current}
        return given


@dataclass(frozen=True, kw_only=True)
class Call:
    """What is to be done.

    Attributes:
        inputs: of all its images.
        steps: refinement steps.
        every_step: whether each step is kept.
        max_batch: images of one run; more are split.
        is_pixels: whether images are to be uint8 [N, R, R', 3].
        stream: to wait for before, and to let wait afterwards; None for none.
        followed_streams: to let wait afterwards, as the start lies in memory of theirs.
        kept_alive: what images on the device lie in, until they have been read.
    """

    inputs: Inputs
    steps: int
    every_step: bool
    max_batch: int
    is_pixels: bool
    stream: int | None = None
    followed_streams: tuple[int, ...] = ()
    kept_alive: object = None

    @property
    def count(self) -> int:
        """Images."""
        return len(self.inputs.images)

    @property
    def kept(self) -> int:
        """Steps that are kept."""
        return self.steps if self.every_step else 1

    @property
    def is_on_device(self) -> bool:
        """Whether the images are, and so the results will be."""
        return not isinstance(self.inputs.images, np.ndarray)


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What a session takes.

    Attributes:
        config: of the model.
        device: of the session.
        find_array: see `Device.external_array`; asked of whatever is not NumPy's.
        least_batch, max_batch: images of one run.
        steps: of a call that names none.
        has_previews: whether steps but the last have no image.
    """

    config: ModelConfig
    device: Device
    find_array: FindArray
    least_batch: int
    max_batch: int
    steps: int
    has_previews: bool

    def check(self, request: Request) -> Call:
        """Return what is to be done.

        Raises:
            TypeError, ShapeError, ValueError: see `Session.invert`.
        """
        steps = self.steps if request.steps is None else check_count("steps", request.steps)
        max_batch = self.max_batch if request.max_batch is None else check_count("max_batch", request.max_batch)
        if request.every_step and self.has_previews:
            raise ValueError("every_step: with preview_steps only the last step has an image; open a session without")
        if request.image_type not in IMAGE_TYPES:
            raise ValueError(f"image_type is {request.image_type!r}, expected one of {', '.join(IMAGE_TYPES)}")
        stream = None if request.stream is None else self._check_stream(request.stream)
        images = self._find_images(request.images, stream)
        latents, current, streams = self._find_start(request.start, len(images))
        return Call(
            inputs=Inputs(images=images, latents=latents, current=current),
            steps=steps,
            every_step=request.every_step,
            max_batch=max(self.least_batch, min(max_batch, self.max_batch)),
            is_pixels=request.image_type == "uint8",
            stream=stream,
            followed_streams=streams if stream is None else (*streams, stream),
            kept_alive=None if isinstance(images, np.ndarray) else images,
        )

    def _check_stream(self, stream: object) -> int:
        if self.device.is_host:
            raise ValueError("stream: the session is on cpu, which has no streams; leave it out")
        handle = stream_from(stream)
        self.device.check_stream(handle)
        return handle

    def _find_images(self, images: object, stream: int | None) -> Array:
        array: Array | None
        if isinstance(images, np.ndarray):
            array = images
        else:
            array = self.find_array(images, stream)
            if array is None:
                array = array_on_host(images, self.device.name)
        check_images(images if array is None else array, self.config)
        assert array is not None
        return array

    def _find_start(self, start: Inversion | None, count: int) -> tuple[Array | None, Array | None, tuple[int, ...]]:
        """Return latents and current to start from, and the streams in which their memory is used again."""
        if start is None:
            return None, None, ()
        if isinstance(start, InversionResult):
            return *check_start(start.latents, start.current, self.config, count), ()
        if not isinstance(start, DeviceInversion):
            raise TypeError(f"start is a {type(start).__name__}, expected a result of Session.invert")
        device = f"cuda:{start.latents.device_index}"
        if device != self.device.name:
            raise ValueError(f"start: it is on {device}, the session is on {self.device.name}; open both on one device")
        latents, current = self.find_array(start.latents, None), self.find_array(start.current, None)
        assert latents is not None
        streams = () if start.latents.stream == self.device.stream else (start.latents.stream,)
        return *check_start(latents, current, self.config, count), streams
