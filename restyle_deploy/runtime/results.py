"""What an inversion gives: on the host, on the device, or later."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from types import TracebackType
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from restyle_deploy.device_array import Array, DeviceArray
from restyle_deploy.errors import VerificationError
from restyle_deploy.runtime.base import Event
from restyle_deploy.runtime.slots import Lease
from restyle_deploy.runtime.targets import stream_from

Result = TypeVar("Result", covariant=True)


@dataclass(frozen=True, kw_only=True)
class InversionTimings:
    """Milliseconds of one call, by the device's clock; of a set that was split, the sums over its runs.

    Attributes:
        upload_ms: images to the device, resized and normalised; and the start.
        encoder_ms, generator_ms: of each step. What is computed once per image counts to the first encoder pass; a
            preview counts as a generator pass.
        download_ms: results to pinned memory, or to where the caller reads them on the device.
        total_ms: from the first to the last of them. Copies between the caller's and pinned memory are not in it.
    """

    upload_ms: float
    encoder_ms: tuple[float, ...]
    generator_ms: tuple[float, ...]
    download_ms: float
    total_ms: float


@dataclass(frozen=True, kw_only=True)
class InversionResult:
    """The result of an inversion, owned by the caller.

    Attributes:
        images: [N, 3, R, R'] float32 in about [-1, 1], not clipped, or [N, R, R', 3] uint8 in 0..255; with every_step
            [steps, N, ...].
        latents: [N, n_styles, style_dim] float32; [steps, N, n_styles, style_dim] with every_step.
        current: [N, 3, h, w] float32: the last image at the encoder's size, from which a further step goes on. None
            where whoever made this did not keep it; `Session.invert` always does.
        timings: of a session with `timing_enabled`.
    """

    images: NDArray[Any]
    latents: NDArray[np.float32]
    current: NDArray[np.float32] | None = None
    timings: InversionTimings | None = None


class DeviceInversion:
    """The result of an inversion in the memory of a GPU, perhaps still being computed. Safe to close twice.

    Attributes:
        event: reached when it is computed.

    Its arrays are views of a slot of the session, which goes to a later call once this, its arrays and whatever was
    made of them (by DLPack or `__cuda_array_interface__`) are gone; closing the session does not take the memory away.
    That orders nothing in time: who still reads in another stream when dropping them passes that stream to the next
    call (`stream`), or waits. DLPack and `stream` order what is read after the call. Values are not checked: a model
    that gives NaN shows in the arrays alone.
    """

    def __init__(
        self,
        arrays: Sequence[Array],
        lease: Lease,
        event: Event,
        *,
        measure: Callable[[], InversionTimings | None] = lambda: None,
    ) -> None:
        """Take images, latents and current, which own the slot from the moment on in which they are asked for.

        Args:
            arrays: the three.
            lease: of the slot that they lie in.
            event: reached when they are computed.
            measure: waits and returns the times, which are None in a session that takes none.
        """
        self._arrays: Sequence[Array] | None = arrays
        self._lease: Lease | None = lease
        self.event, self._measure = event, measure

    @property
    def timings(self) -> InversionTimings | None:
        """Times, of a session with `timing_enabled`: the calling thread waits until it is computed.

        Raises:
            DeviceError: work on the device failed.
        """
        return self._measure()

    @property
    def images(self) -> DeviceArray:
        """See `InversionResult`."""
        return self._array(0)

    @property
    def latents(self) -> DeviceArray:
        """See `InversionResult`."""
        return self._array(1)

    @property
    def current(self) -> DeviceArray:
        """See `InversionResult`."""
        return self._array(2)

    def is_done(self) -> bool:
        """Whether it is computed; does not wait."""
        return self.event.is_done()

    def wait(self) -> None:
        """Let the calling thread wait until it is computed.

        Raises:
            DeviceError: work on the device failed.
        """
        self.event.wait()

    def waited(self) -> "DeviceInversion":
        """Return this once it is computed; see `wait`."""
        self.wait()
        return self

    def close(self) -> None:
        """Let go of the arrays: the memory serves a later call once no array that was taken out is left."""
        self._arrays, self._lease = None, None

    def __enter__(self) -> "DeviceInversion":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _array(self, index: int) -> DeviceArray:
        if self._arrays is None:
            raise ValueError("the inversion is closed; its arrays are to be taken before")
        array = self._arrays[index]
        assert isinstance(array, DeviceArray)
        return replace(array, owner=self._lease, ready=self.event)


Inversion = InversionResult | DeviceInversion


class PendingInversion(Generic[Result]):
    """An inversion that goes on while the caller does something else. Any thread may ask.

    Attributes:
        event: a mark in the session's stream on a GPU, reached when the results are there: for images of the host, in
            memory that `result` copies them from. None where a thread of the session does the work.
    """

    def __init__(
        self, *, is_done: Callable[[], bool], finish: Callable[[], Result], event: Event | None = None
    ) -> None:
        """Take what asks; what waits, and returns or raises, which is called once; and the event, if there is one."""
        self.event = event
        self._ask = is_done
        self._finish: Callable[[], Result] | None = finish
        self._lock = threading.Lock()
        self._outcome: Result | BaseException | None = None

    def is_done(self) -> bool:
        """Whether it has ended, well or not; does not wait.

        Raises:
            DeviceError: the device does not say, mostly as work on it failed; `result` waits, and tells.
        """
        return self._outcome is not None or self._ask()

    def hold(self, stream: object) -> None:
        """Let later work of a stream wait until it has ended; the calling thread goes on.

        Args:
            stream: of the session's GPU, a handle or an object with `__cuda_stream__`.
        Raises:
            TypeError, ValueError: it is no stream; or there is no event, and only `wait` waits.
            DeviceError: the device refuses.
        """
        if self.event is None:
            raise ValueError("a thread of the session does this work, for which no stream can wait; call wait()")
        self.event.hold(stream_from(stream))

    def wait(self) -> None:
        """Wait until it has ended, well or not."""
        with self._lock:
            if self._finish is None:
                return
            try:
                self._outcome = self._finish()
            except Exception as error:  # kept for `result`, which raises it
                self._outcome = error
            self._finish = None  # what it holds is done with

    def result(self) -> Result:
        """Wait and return what `Session.invert` returns, or raise what it raises; each time the same."""
        self.wait()
        assert self._outcome is not None
        if isinstance(self._outcome, BaseException):
            raise self._outcome
        return self._outcome


def timings_from(marks: Sequence[Event]) -> InversionTimings:
    """Return the times of one run, whose last mark is reached.

    Args:
        marks: at its begin, after the upload, after each pass of encoder and generator in turn, and at its end.
    """
    upload, *passes, download = [later.elapsed_ms(earlier) for earlier, later in pairwise(marks)]
    return InversionTimings(
        upload_ms=upload,
        encoder_ms=tuple(passes[0::2]),
        generator_ms=tuple(passes[1::2]),
        download_ms=download,
        total_ms=marks[-1].elapsed_ms(marks[0]),
    )


def sum_timings(parts: Sequence[InversionTimings]) -> InversionTimings | None:
    """Return the sums over the runs of one call; None for no run that was timed."""
    if not parts:
        return None
    return InversionTimings(
        upload_ms=sum(part.upload_ms for part in parts),
        encoder_ms=tuple(map(sum, zip(*(part.encoder_ms for part in parts), strict=True))),
        generator_ms=tuple(map(sum, zip(*(part.generator_ms for part in parts), strict=True))),
        download_ms=sum(part.download_ms for part in parts),
        total_ms=sum(part.total_ms for part in parts),
    )


def check_finite(
    latents: NDArray[np.float32], images: NDArray[Any], current: NDArray[np.float32], *, last: int
) -> None:
    """Raise `VerificationError` at the first step that is not finite.

    Args:
        latents, images: [kept, N, ...] of the steps up to `last`; of images in uint8, the last step's `current` tells.
        current: [N, 3, h, w].
        last: the last step, counted from 1.
    """
    rendered = images if images.dtype == np.float32 else [None] * (len(latents) - 1) + [current]
    for step, results in enumerate(zip(latents, rendered, strict=True), start=last - len(latents) + 1):
        for name, array in zip(("latent", "image"), results, strict=True):
            if array is None:
                continue
            finite = np.isfinite(array).reshape(len(array), -1).all(axis=1)  # [N]
            if not finite.all():
                raise VerificationError(
                    f"the {name} of image {int(np.argmin(finite))} is not finite after step {step}; "
                    "check the model: restyle-deploy verify BUNDLE"
                )
