"""Images that a caller has on the device, results that stay there, streams, and starts from former results."""

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from restyle_deploy import InversionResult, Session
from restyle_deploy.device_array import DeviceArray
from restyle_deploy.errors import ShapeError
from restyle_deploy.runtime.results import DeviceInversion
from tests.fakes import create_session, expected_latents
from tests.pictures import picture
from tests.recording import RecordingDevice
from tests.runtime.recorded import invert_on, targets_of


@pytest.fixture
def device() -> RecordingDevice:
    return RecordingDevice()


@pytest.fixture
def session(device: RecordingDevice) -> Session:
    return create_session(device=device)[0]


def latents_of(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.broadcast_to(values[:, None, None], (len(values), 10, 4))


# Images


@pytest.mark.parametrize("size", [(40, 50), (200, 16), (32, 32), (1, 1)])
def test_pixels_are_resized_on_the_device(session: Session, device: RecordingDevice, size: tuple[int, int]) -> None:
    pixels = np.stack([picture(seed, *size) for seed in range(2)])
    found = invert_on(session, device, pixels, steps=2)
    np.testing.assert_array_equal(device.read(found.latents), create_session()[0].invert(pixels, steps=2).latents)
    assert device.count()["prepare images"] == 1


WRONG: list[tuple[Callable[[RecordingDevice], Any], type[Exception], str]] = [
    (lambda device: device.put(np.zeros((1, 3, 5, 5), np.float32)), ShapeError, r"got float32 \[1, 3, 5, 5\]"),
    (lambda device: device.put(np.zeros((8, 8, 3), np.uint8)), ShapeError, r"got uint8 \[8, 8, 3\]"),
    (lambda device: device.put(np.zeros((1, 3, 32, 32))), TypeError, "got float64, expected a NumPy array"),
    (lambda device: device.put(np.zeros((0, 3, 32, 32), np.float32)), ValueError, "got none, expected at least one"),
    (lambda device: [1, 2], TypeError, "got list, expected a NumPy array .* on the session's device"),
]


@pytest.mark.parametrize(("create", "error", "message"), WRONG)
def test_other_arrays_are_refused(
    session: Session,
    device: RecordingDevice,
    create: Callable[[RecordingDevice], Any],
    error: type[Exception],
    message: str,
) -> None:
    images = create(device)
    device.calls.clear()
    with pytest.raises(error, match=message):
        session.invert(images)
    assert device.count().keys() <= {"external array"}


def test_values_on_the_device_are_not_looked_at(session: Session, device: RecordingDevice) -> None:
    inversion = invert_on(session, device, np.full((1, 3, 32, 32), np.nan, np.float32), steps=1)
    assert np.isnan(device.read(inversion.latents)).all()


def test_images_are_kept_until_they_are_read(session: Session, device: RecordingDevice) -> None:
    class Owner:
        def __del__(self) -> None:
            gone.append(True)

    gone: list[bool] = []
    array = device.put(targets_of(1))
    images = DeviceArray(address=array.address, shape=array.shape, dtype=array.dtype, owner=Owner())
    session.invert(images, steps=1)
    del images
    gc.collect()
    session.invert(array, steps=1)
    assert not gone
    device.execute()
    session.invert(array, steps=1)
    assert gone


# Results


def test_results_stay_until_they_are_dropped(session: Session, device: RecordingDevice) -> None:
    expected, results = [], []
    for seed in range(5):
        expected.append(expected_latents(targets_of(2, seed), 2)[-1])
        results.append(invert_on(session, device, targets_of(2, seed), steps=2))
    for values, result in zip(expected, results, strict=True):
        np.testing.assert_allclose(device.read(result.latents), latents_of(values), atol=1e-5)
        np.testing.assert_allclose(device.read(result.current)[:, 0, 0, 0], values / 2, atol=1e-5)
    assert len({result.images.address for result in results}) == 5
    addresses = {result.images.address for result in results}
    results.clear()
    del result
    assert invert_on(session, device, targets_of(2), steps=2).images.address in addresses


def test_array_that_was_taken_out_keeps_the_memory(session: Session, device: RecordingDevice) -> None:
    result = invert_on(session, device, targets_of(2), steps=2)
    latents = result.latents.part(1, 2)
    address = result.latents.address
    result.close()
    result.close()
    for name in ("images", "latents", "current"):
        with pytest.raises(ValueError, match="the inversion is closed; its arrays are to be taken before"):
            getattr(result, name)
    others = [invert_on(session, device, targets_of(2, seed), steps=2) for seed in range(1, 4)]
    assert address not in {other.latents.address for other in others}
    np.testing.assert_allclose(device.read(latents), latents_of(expected_latents(targets_of(2), 2)[-1][1:]), atol=1e-5)
    del latents
    assert invert_on(session, device, targets_of(2), steps=2).latents.address == address


def test_result_may_be_used_in_with(session: Session, device: RecordingDevice) -> None:
    with invert_on(session, device, targets_of(1), steps=2) as result:
        assert not result.is_done()
        result.wait()
        assert result.is_done()
        assert device.pending == 0
    with pytest.raises(ValueError, match="closed"):
        result.images  # noqa: B018


def test_arrays_say_when_they_are_complete(session: Session, device: RecordingDevice) -> None:
    result = invert_on(session, device, targets_of(1), steps=2)
    device.calls.clear()
    result.images.hold(5)
    assert device.calls == [("event holds", 5)]


def test_results_outlive_the_session(session: Session, device: RecordingDevice) -> None:
    result = invert_on(session, device, targets_of(1), steps=2)
    session.close()
    assert result.is_done()
    np.testing.assert_allclose(
        device.read(result.latents), latents_of(expected_latents(targets_of(1), 2)[-1]), atol=1e-5
    )
    assert device.is_open
    del result
    assert not device.is_open


# Streams


class Stream:
    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, 5


@pytest.mark.parametrize("stream", [5, np.int64(5), Stream(), 0])
@pytest.mark.parametrize("on_device", [False, True])
def test_stream_is_waited_for_and_waits(
    session: Session, device: RecordingDevice, stream: Any, on_device: bool
) -> None:
    handle = 0 if stream == 0 else 5
    images: Any = device.put(targets_of(1)) if on_device else targets_of(1)
    session.invert(images, steps=2)
    device.calls.clear()
    session.invert(images, steps=2, stream=stream)
    calls = device.calls
    waits, holds = calls.index(("wait for stream", handle)), calls.index(("hold stream", handle))
    assert waits < calls.index(("prepare images",)) < calls.index(("launch", 6)) < holds
    assert not [call for call in calls[holds:] if call[0].startswith("copy")]


class Malformed:
    def __init__(self, answer: object) -> None:
        self.answer = answer

    def __cuda_stream__(self) -> object:
        return self.answer


@pytest.mark.parametrize("stream", ["5", 5.0, True, object()])
def test_other_streams_are_refused(session: Session, stream: Any) -> None:
    with pytest.raises(TypeError, match=f"stream is a {type(stream).__name__}, expected a handle .* __cuda_stream__"):
        session.invert(targets_of(1), stream=stream)


@pytest.mark.parametrize("answer", [None, 5, (0,), (0, 5, 1), ("0", 5), (0, "5"), (0, None)])
def test_malformed_protocol_is_named(session: Session, answer: object) -> None:
    message = r"^stream: the __cuda_stream__ of a Malformed gives .*, expected two whole numbers: version and handle"
    with pytest.raises(TypeError, match=message):
        session.invert(targets_of(1), stream=Malformed(answer))


@pytest.mark.parametrize("stream", [-1, 2**64, 2**70, Malformed((0, -1)), np.int64(-2)])
def test_numbers_that_are_no_handle_are_refused(session: Session, stream: Any) -> None:
    with pytest.raises(ValueError, match=r"^stream is -?\d+, expected a handle: 0 to 2\*\*64 - 1"):
        session.invert(targets_of(1), stream=stream)


@pytest.mark.parametrize("later", [False, True])
def test_streams_that_the_device_does_not_know_are_refused(
    session: Session, device: RecordingDevice, later: bool
) -> None:
    device.unknown_streams.add(12345)
    device.calls.clear()
    with pytest.raises(ValueError, match=r"^stream: "):
        (session.invert_async if later else session.invert)(targets_of(1), stream=12345)
    assert device.calls == []


def test_host_has_no_streams() -> None:
    with pytest.raises(ValueError, match="stream: the session is on cpu, which has no streams; leave it out"):
        create_session()[0].invert(targets_of(1), stream=0)


# Starts


@pytest.mark.parametrize("images_on_device", [False, True])
@pytest.mark.parametrize("start_on_device", [False, True])
@pytest.mark.parametrize("every_step", [False, True])
@pytest.mark.parametrize("max_batch", [2, 8])
def test_start_goes_on_where_the_former_result_ended(
    device: RecordingDevice, images_on_device: bool, start_on_device: bool, every_step: bool, max_batch: int
) -> None:
    session, *_ = create_session(device=device, max_batch=max_batch)
    targets = targets_of(3)
    expected = latents_of(expected_latents(targets, 5)[-1])
    for _ in range(2):
        first: Any = device.put(targets) if start_on_device else targets
        start = session.invert(first, steps=2, every_step=every_step)
        second: Any = device.put(targets) if images_on_device else targets
        result = session.invert(second, steps=3, start=start)
        latents = device.read(result.latents) if isinstance(result, DeviceInversion) else result.latents
        np.testing.assert_allclose(latents, expected, atol=1e-5)


@pytest.mark.parametrize("every_step", [False, True])
def test_start_on_the_host(every_step: bool) -> None:
    session, *_ = create_session()
    targets = targets_of(3)
    start = session.invert(targets, steps=2, every_step=every_step)
    found = session.invert(targets, steps=3, start=start, max_batch=2)
    np.testing.assert_allclose(found.latents, latents_of(expected_latents(targets, 5)[-1]), atol=1e-5)
    np.testing.assert_array_equal(
        session.invert(targets, steps=3).latents, create_session()[0].invert(targets, steps=3).latents
    )


def test_start_of_another_session_orders_the_streams(session: Session, device: RecordingDevice) -> None:
    other = RecordingDevice()
    other.stream = 99
    start = invert_on(create_session(device=other)[0], other, targets_of(1), steps=2)
    start = DeviceInversion(
        [DeviceArray(**{**vars(array), "stream": 99}) for array in (start.images, start.latents, start.current)],
        start._lease,  # type: ignore[arg-type]
        start.event,
    )
    start.wait()
    device.calls.clear()
    found = session.invert(targets_of(1), steps=3, start=start)
    np.testing.assert_allclose(found.latents, latents_of(expected_latents(targets_of(1), 5)[-1]), atol=1e-5)
    assert device.count()["external array"] == 2
    names = device.names
    assert ("hold stream", 99) in device.calls
    assert names.index("hold stream") > names.index("prepare images")


def result_of(count: int = 1, **changes: Any) -> InversionResult:
    arrays = {
        "images": np.zeros((count, 3, 64, 64), np.float32),
        "latents": np.zeros((count, 10, 4), np.float32),
        "current": np.zeros((count, 3, 32, 32), np.float32),
    }
    return InversionResult(**{**arrays, **changes})


WRONG_STARTS: list[tuple[Any, type[Exception], str]] = [
    ("before", TypeError, "start is a str, expected a result of Session.invert"),
    (result_of(current=None), ValueError, "start: it has no current image; pass a result of Session.invert"),
    (result_of(2), ShapeError, r"start: its latents are float32 \[2, 10, 4\], expected float32 \[1, 10, 4\]: "),
    (
        result_of(current=np.zeros((1, 3, 16, 16), np.float32)),
        ShapeError,
        r"its current are float32 \[1, 3, 16, 16\], expected float32 \[1, 3, 32, 32\]: .* of a model of the same sizes",
    ),
    (result_of(latents=np.zeros((1, 10, 4))), ShapeError, r"its latents are float64 \[1, 10, 4\]"),
    (result_of(latents=np.full((1, 10, 4), np.nan, np.float32)), ValueError, "start: NaN or infinity in its latents"),
    (
        result_of(current=np.full((1, 3, 32, 32), np.inf, np.float32)),
        ValueError,
        "start: NaN or infinity in its current",
    ),
]


@pytest.mark.parametrize(("start", "error", "message"), WRONG_STARTS)
def test_other_starts_are_refused(start: Any, error: type[Exception], message: str) -> None:
    session, encoder, _ = create_session()
    with pytest.raises(error, match=message):
        session.invert(targets_of(1), start=start)
    assert not encoder.ran


def test_start_on_a_device_is_refused_on_the_host(session: Session, device: RecordingDevice) -> None:
    start = invert_on(session, device, targets_of(1), steps=1)
    with pytest.raises(ValueError, match="start: it is on cuda:0, the session is on cpu; open both on one device"):
        create_session()[0].invert(targets_of(1), start=start)
