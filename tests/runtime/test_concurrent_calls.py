"""Calls that go on while the caller does something else, many threads on one session, and closing it meanwhile."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from restyle_deploy import InversionResult, PendingInversion, Session
from restyle_deploy.errors import ShapeError, VerificationError
from restyle_deploy.runtime.results import DeviceInversion
from tests.fakes import Buffers, create_session, encode, expected_latents
from tests.recording import RecordingDevice
from tests.runtime.recorded import targets_of

THREADS = 16


def device_of(where: str) -> RecordingDevice | None:
    return RecordingDevice() if where == "device" else None


def assert_latents(found: Any, targets: NDArray[np.float32], steps: int) -> None:
    expected = expected_latents(targets, steps)[-1][:, None, None]
    np.testing.assert_allclose(found, np.broadcast_to(expected, found.shape), atol=1e-5)


everywhere = pytest.mark.parametrize("where", ["host", "device"])


# Threads


@everywhere
def test_threads_get_their_own_results(where: str) -> None:
    device = device_of(where)
    session, *_ = create_session(device=device, max_batch=4)
    calls = [(1 + seed % 6, 1 + seed % 4, bool(seed % 3 == 0), seed) for seed in range(8 * THREADS)]

    def invert(call: tuple[int, int, bool, int]) -> InversionResult:
        count, steps, every_step, seed = call
        return session.invert(targets_of(count, seed), steps=steps, every_step=every_step)

    expected = [invert(call) for call in calls]
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(invert, calls))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.images, other.images)
        np.testing.assert_array_equal(one.latents, other.latents)
        np.testing.assert_array_equal(one.current, other.current)


def test_threads_get_their_own_results_on_the_device() -> None:
    device = RecordingDevice()
    session, *_ = create_session(device=device)
    images = [(device.put(targets_of(1 + seed % 3, seed)), 1 + seed % 4) for seed in range(4 * THREADS)]

    def invert(call: tuple[Any, int]) -> NDArray[Any]:
        result = session.invert(call[0], steps=call[1])
        assert isinstance(result, DeviceInversion)
        with result:
            result.wait()
            return device.read(result.latents)

    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(invert, images))
    for seed, (latents, (_, steps)) in enumerate(zip(found, images, strict=True)):
        assert_latents(latents, targets_of(1 + seed % 3, seed), steps)


# Later


@everywhere
@pytest.mark.parametrize("count", [1, 5])
def test_pending_inversion_gives_what_invert_gives(where: str, count: int) -> None:
    session, *_ = create_session(device=device_of(where), max_batch=2)
    expected = session.invert(targets_of(count), steps=3, every_step=True, image_type="uint8")
    images: NDArray[np.float32] = targets_of(count)
    # The annotation is part of the test: who passes NumPy's arrays gets them without asking.
    pending: PendingInversion[InversionResult] = session.invert_async(
        images, steps=3, every_step=True, image_type="uint8"
    )
    result = pending.result()
    assert isinstance(result, InversionResult)
    np.testing.assert_array_equal(result.images, expected.images)
    np.testing.assert_array_equal(result.latents, expected.latents)
    assert pending.is_done()
    assert pending.result() is result


def test_pending_inversion_is_enqueued_at_once() -> None:
    device = RecordingDevice()
    session, *_ = create_session(device=device)
    targets = [targets_of(2, seed) for seed in range(5)]
    pending = [session.invert_async(target, steps=2) for target in targets]
    assert device.count()["wait"] == 0
    assert not any(one.is_done() for one in pending)
    pending[-1].wait()
    assert all(one.is_done() for one in pending)
    for one, target in zip(pending, targets, strict=True):
        assert_latents(one.result().latents, target, 2)


@pytest.mark.parametrize("on_device", [False, True])
def test_streams_can_wait_for_a_pending_inversion(on_device: bool) -> None:
    device = RecordingDevice()
    session, *_ = create_session(device=device)
    pending = session.invert_async(device.put(targets_of(1)) if on_device else targets_of(1), steps=2)
    assert pending.event is not None
    assert not pending.event.is_done()
    device.calls.clear()
    pending.hold(5)
    assert device.calls == [("event holds", 5)]
    with pytest.raises(TypeError, match="stream is a str"):
        pending.hold("5")
    pending.event.wait()
    assert pending.is_done()


def test_no_stream_can_wait_for_a_thread() -> None:
    pending = create_session()[0].invert_async(targets_of(1), steps=2)
    assert pending.event is None
    with pytest.raises(ValueError, match=r"for which no stream can wait; call wait\(\)"):
        pending.hold(5)


def test_times_do_not_hold_up_a_pending_inversion() -> None:
    device = RecordingDevice()
    session, *_ = create_session(device=device, timing_enabled=True)
    session.invert(targets_of(1), steps=2)
    waits = device.count()["wait"]
    first = session.invert_async(targets_of(2, 1), steps=2)
    assert device.count()["wait"] == waits
    assert not first.is_done()
    second = session.invert_async(targets_of(2, 2), steps=2)  # which uses the first one's marks again
    assert first.is_done()
    assert not second.is_done()
    times = [one.result().timings for one in (first, second)]
    assert None not in times
    assert times[0] != times[1]
    for seed, one in enumerate((first, second), start=1):
        assert_latents(one.result().latents, targets_of(2, seed), 2)


def test_pending_inversion_that_is_dropped_spoils_no_later_one() -> None:
    device = RecordingDevice()
    session, *_ = create_session(device=device)
    for seed in range(5):
        session.invert_async(targets_of(2, seed), steps=2)
    assert_latents(session.invert(targets_of(2, 9), steps=2).latents, targets_of(2, 9), 2)


def test_pending_inversion_does_not_wait_for_results_that_were_dropped() -> None:
    device = RecordingDevice()
    session, *_ = create_session(device=device)
    for seed in range(3):
        session.invert(device.put(targets_of(2, seed)), steps=2)
        session.invert(targets_of(2, seed), steps=2)
    session.invert(device.put(targets_of(2, 7)), steps=2)
    waits = device.count()["wait"]
    pending = session.invert_async(targets_of(2, 8), steps=2)
    assert device.count()["wait"] == waits
    assert not pending.is_done()
    assert_latents(pending.result().latents, targets_of(2, 8), 2)


def test_pending_inversion_on_the_device() -> None:
    device = RecordingDevice()
    session, *_ = create_session(device=device, max_batch=2)
    pending = session.invert_async(device.put(targets_of(5)), steps=2)
    assert not pending.is_done()
    result = pending.result()
    assert isinstance(result, DeviceInversion)
    assert result.is_done()
    assert_latents(device.read(result.latents), targets_of(5), 2)


def blocked_session() -> tuple[Session, threading.Event, threading.Event]:
    """Return a session on the host whose first run waits, what lets it go on, and what says that it has begun."""
    may_go_on, has_begun = threading.Event(), threading.Event()

    def wait(buffers: Buffers) -> None:
        has_begun.set()
        assert may_go_on.wait(10)
        encode(buffers)

    return create_session(encoder=wait)[0], may_go_on, has_begun


def test_host_works_in_one_thread_in_order() -> None:
    session, may_go_on, _ = blocked_session()
    pending = [session.invert_async(targets_of(1, seed), steps=2) for seed in range(3)]
    assert not any(one.is_done() for one in pending)
    assert len([thread for thread in threading.enumerate() if thread.name.startswith("restyle-deploy")]) == 1
    may_go_on.set()
    for seed, one in enumerate(pending):
        assert_latents(one.result().latents, targets_of(1, seed), 2)
    session.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("restyle-deploy")]


def test_tensor_of_the_host_is_taken_at_once() -> None:
    torch = pytest.importorskip("torch")
    session, may_go_on, has_begun = blocked_session()
    first = session.invert_async(targets_of(1), steps=2)
    assert has_begun.wait(10)
    asking = ThreadPoolExecutor(1).submit(session.invert_async, torch.from_numpy(targets_of(1, 1)), steps=2)
    try:
        second = asking.result(timeout=5)
    finally:
        may_go_on.set()
    assert_latents(first.result().latents, targets_of(1), 2)
    assert_latents(second.result().latents, targets_of(1, 1), 2)


@everywhere
def test_pending_inversion_raises_what_invert_raises(where: str) -> None:
    def spoil(buffers: Buffers) -> None:
        buffers["latent_out"].fill(np.nan)

    session, *_ = create_session(device=device_of(where), encoder=spoil)
    pending = session.invert_async(targets_of(1), steps=1)
    pending.wait()
    assert pending.is_done()
    for _ in range(2):
        with pytest.raises(VerificationError, match="latent of image 0 is not finite after step 1"):
            pending.result()


@everywhere
def test_what_is_refused_is_refused_at_once(where: str) -> None:
    session, *_ = create_session(device=device_of(where))
    with pytest.raises(ShapeError):
        session.invert_async(np.zeros((1, 3, 5, 5), np.float32))
    with pytest.raises(TypeError, match="unexpected keyword argument 'step'"):
        session.invert_async(targets_of(1), step=5)
    with pytest.raises(ValueError, match="image_type is 'int8', expected one of float32, uint8"):
        session.invert_async(targets_of(1), image_type="int8")


# Closing


def test_closing_waits_for_what_is_in_flight() -> None:
    session, may_go_on, has_begun = blocked_session()
    pending = [session.invert_async(targets_of(1, seed), steps=2) for seed in range(2)]
    assert has_begun.wait(10)
    closing = threading.Thread(target=session.close)
    closing.start()
    closing.join(0.05)
    assert closing.is_alive()
    with pytest.raises(ValueError, match="the session is closed"):
        session.invert_async(targets_of(1))
    may_go_on.set()
    closing.join(10)
    assert not closing.is_alive()
    for seed, one in enumerate(pending):
        assert_latents(one.result().latents, targets_of(1, seed), 2)


def test_result_can_be_had_after_closing() -> None:
    device = RecordingDevice()
    session, *_ = create_session(device=device)
    pending = session.invert_async(targets_of(2), steps=2)
    session.close()
    assert device.pending == 0
    assert pending.is_done()
    assert_latents(pending.result().latents, targets_of(2), 2)
    assert device.open_blocks == []
    assert not device.is_open


@everywhere
def test_closed_session_takes_no_call(where: str) -> None:
    session, encoder, _ = create_session(device=device_of(where))
    session.invert_async(targets_of(1)).wait()
    for _ in range(2):
        session.close()
    for invert in (session.invert, session.invert_async):
        with pytest.raises(ValueError, match="the session is closed"):
            invert(targets_of(1))
    assert encoder.closed == 1
