"""Sessions on a GPU made up on the host, whose work waits until it is waited for and whose calls are written down."""

import gc
import logging
import tracemalloc
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from restyle_deploy import Session
from restyle_deploy.errors import DeviceError, VerificationError
from restyle_deploy.runtime.images import uint8_from_images
from restyle_deploy.runtime.loop import LOOPS_KEPT
from restyle_deploy.runtime.results import DeviceInversion
from restyle_deploy.runtime.slots import SPARE_SLOTS
from tests import fakes
from tests.fakes import PREVIEW_ERROR, FakeRunner, create_engine_session, create_session, encode, expected_latents
from tests.pictures import picture
from tests.recording import RecordingDevice

ROLES = [(), ("target",), ("preview",), ("target", "preview")]
# With previews only the last step has an image.
WHOLE_CALLS = [
    (roles, every_step)
    for roles in ROLES
    for every_step in (False, True)
    if not {"preview"} & {*roles} or not every_step
]
whole_calls = pytest.mark.parametrize(("roles", "every_step"), WHOLE_CALLS)
combinations = pytest.mark.parametrize("roles", ROLES, ids=lambda roles: "+".join(roles) or "none")

# What a call of images on the device does once its loop is recorded.
REPLAYED = [
    *("external array", "prepare images", "launch"),
    *["copy device to device"] * 3,
    "record",
]


@pytest.fixture
def device() -> RecordingDevice:
    return RecordingDevice()


def targets_of(count: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).uniform(-1, 1, (count, 3, 32, 32)).astype(np.float32)


def names_of(device: RecordingDevice) -> list[str]:
    return [name for name, *_ in device.calls]


def assert_is(found: NDArray[Any], values: NDArray[np.float64]) -> None:
    """Check that each [..., n, m] of `found` is filled with its value."""
    filled = np.broadcast_to(values.reshape(values.shape + (1,) * (found.ndim - values.ndim)), found.shape)
    np.testing.assert_allclose(found, filled, rtol=0, atol=1e-5)


def invert_on(session: Session, device: RecordingDevice, values: NDArray[Any], **options: Any) -> DeviceInversion:
    result = session.invert(device.put(values), **options)
    assert isinstance(result, DeviceInversion)
    return result


# One launch


@whole_calls
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_call_is_one_launch_and_nothing_waits(
    device: RecordingDevice, roles: tuple[str, ...], every_step: bool, steps: int
) -> None:
    session, _ = create_engine_session(roles=roles, device=device)
    for seed in range(4):
        images, targets = device.put(targets_of(2, seed)), targets_of(2, seed)
        device.calls.clear()
        result = session.invert(images, steps=steps, every_step=every_step)
        assert isinstance(result, DeviceInversion)
        assert not result.is_done()
        if seed > 1:  # the first call records, and both slots of the arena have been used
            copies = 2 * (steps - 1) if every_step else 0
            assert names_of(device) == [*REPLAYED[:-1], *["copy device to device"] * copies, "record"]
        errors = PREVIEW_ERROR if "preview" in roles else 0.0
        expected = expected_latents(targets, steps, preview_error=errors)
        assert_is(device.read(result.latents), expected if every_step else expected[-1])
        assert_is(device.read(result.images), (expected if every_step else expected[-1]) / 2)
        assert result.is_done()


@combinations
@pytest.mark.parametrize("capture", [False, True])
def test_nothing_comes_between_the_steps(device: RecordingDevice, roles: tuple[str, ...], capture: bool) -> None:
    """No allocation, synchronisation or copy: in the first call of a recorded loop, and in all of an unrecorded one."""
    session, _ = create_engine_session(roles=roles, device=device, capture=capture)
    for _ in range(1 if capture else 3):
        device.calls.clear()
        session.invert(targets_of(2), steps=4)
        names = names_of(device)
        rendering = ["preview"] * 3 + ["generator"] if "preview" in roles else ["generator"] * 4
        first = names.index("encoder")
        assert names[first : first + 8] == [
            name for pair in zip(["encoder"] * 4, rendering, strict=True) for name in pair
        ]
        assert names[first - 1] == ("target" if "target" in roles else "copy device to device")
        assert device.count()["encoder"] == 4
        assert ("capture" in names) is capture


def test_images_of_the_host_go_up_once_and_results_come_down_once(device: RecordingDevice) -> None:
    session, *_ = create_session(device=device)
    for _ in range(4):
        device.calls.clear()
        session.invert(targets_of(2), steps=3)
    assert names_of(device) == [
        *("copy host to device", "prepare images", "launch"),
        *["copy device to host"] * 3,
        *("record", "wait"),
    ]


@whole_calls
def test_ways_to_run_give_the_same_bits(roles: tuple[str, ...], every_step: bool) -> None:
    results = []
    for way in ("host", "recorded", "unrecorded", "refused", "not capturable"):
        device = None if way == "host" else RecordingDevice()
        session, runners = create_engine_session(roles=roles, device=device, capture=way != "unrecorded")
        if device is not None:
            device.refused = 1 if way == "refused" else 0
        runners["generator"].is_capturable = way != "not capturable"
        for _ in range(3):
            result = session.invert(targets_of(3), steps=3, every_step=every_step)
        results.append(result)
        if device is not None:
            assert device.count()["launch"] == (2 if way == "recorded" else 0)
    for result in results[1:]:
        np.testing.assert_array_equal(result.images, results[0].images)
        np.testing.assert_array_equal(result.latents, results[0].latents)
        np.testing.assert_array_equal(result.current, results[0].current)


def test_refused_recording_is_told_once(device: RecordingDevice, caplog: pytest.LogCaptureFixture) -> None:
    session, *_ = create_session(device=device)
    device.refused = 1
    with caplog.at_level(logging.WARNING):
        for steps in (2, 2, 3, 3):
            session.invert(targets_of(1), steps=steps)
    assert [record.message for record in caplog.records] == [
        "the loop cannot be recorded (made up: it cannot be recorded); its runs are launched one by one"
    ]
    assert device.count()["capture"] == 1


# Memory


def test_all_memory_is_allocated_at_opening(device: RecordingDevice) -> None:
    session, *_ = create_session(device=device, max_batch=3)
    assert device.count()["allocate"] == 1
    assert device.count()["allocate pinned"] == 2 + 1  # the average's way up
    device.calls.clear()
    for seed in range(6):
        session.invert(targets_of(3, seed), steps=2)
        session.invert(np.stack([picture(seed, 64, 64)]), steps=1, image_type="uint8")
        invert_on(session, device, targets_of(2, seed), steps=2)
        invert_on(session, device, targets_of(3, seed), steps=3, image_type="uint8")
    assert device.count()["allocate"] == device.count()["allocate pinned"] == 0
    assert device.count()["synchronize"] == 0


def test_many_calls_allocate_nothing(device: RecordingDevice) -> None:
    session, *runners = create_session(device=device)
    images = device.put(targets_of(1))
    previous: DeviceInversion | None = None
    for call in range(300):
        if call == 10:
            device.execute()
            device.calls.clear()
            blocks = len(device.open_blocks)
            tracemalloc.start()
            before = tracemalloc.get_traced_memory()[0]
        result = session.invert(images, steps=2, start=previous)
        assert isinstance(result, DeviceInversion)
        previous = result
        if call % 7 == 0:
            previous.wait()
        device.calls[:] = [call for call in device.calls if call[0].startswith(("allocate", "free", "synchronize"))]
    device.execute()
    for runner in runners:
        runner.ran.clear()
    gc.collect()  # which empties the interpreter's own stores too
    after = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert device.calls == []
    assert len(device.open_blocks) == blocks
    assert after - before < result.images.nbytes  # of one of 290 results


def test_photos_larger_than_the_arena_take_memory_once(device: RecordingDevice) -> None:
    session, *_ = create_session(device=device)
    photos = np.stack([picture(seed, 300, 400) for seed in range(8)])
    host, *_ = create_session()
    expected = host.invert(photos, steps=2)
    for _ in range(5):
        found = session.invert(photos, steps=2)
        np.testing.assert_array_equal(found.images, expected.images)
        np.testing.assert_array_equal(found.latents, expected.latents)
    large = [call for call in device.calls[3:] if call[0].startswith("allocate") and call[1] >= photos.nbytes]
    assert sorted(name for name, _ in large) == ["allocate", "allocate pinned"]


def test_loops_are_bounded_and_give_back_what_they_keep(device: RecordingDevice) -> None:
    session, encoder, _ = create_session(device=device)
    blocks = len(device.open_blocks)
    for steps in range(1, LOOPS_KEPT + 4):
        for _ in range(2):
            result = session.invert(targets_of(1), steps=steps, every_step=True)
        assert_is(result.latents, expected_latents(targets_of(1), steps))
        assert len(session._execution.loops) == min(steps, LOOPS_KEPT)
    assert device.count()["close replay"] == 3
    kept = len(device.open_blocks) - blocks
    assert kept <= LOOPS_KEPT + 3 * (SPARE_SLOTS + 1)  # those of loops, and of slots: staged, uploaded and arrived
    session.close()
    assert device.open_blocks == []
    assert device.count()["close replay"] == device.count()["capture"] == LOOPS_KEPT + 3
    assert encoder.closed == 1


def test_loops_of_one_batch_share_what_is_bound(device: RecordingDevice) -> None:
    session, encoder, _ = create_session(device=device)
    for steps in (1, 2, 3, 5, 10):
        session.invert(targets_of(2), steps=steps)
    assert len(encoder.bound) == 2
    session.invert(targets_of(3), steps=2)
    assert len(encoder.bound) == 4


def test_least_recently_used_loop_goes(device: RecordingDevice) -> None:
    session, *_ = create_session(device=device)
    for steps in range(1, LOOPS_KEPT + 1):
        session.invert(targets_of(1), steps=steps)
    session.invert(targets_of(1), steps=1)
    session.invert(targets_of(1), steps=LOOPS_KEPT + 1)  # takes the place of two steps
    device.calls.clear()
    session.invert(targets_of(1), steps=1)
    assert device.count()["capture"] == 0
    session.invert(targets_of(1), steps=2)
    assert device.count()["capture"] == 1


@pytest.mark.parametrize("held", [False, True])
def test_opening_and_closing_many_times_leaves_nothing(held: bool) -> None:
    for _ in range(200):
        device = RecordingDevice()
        session, *_ = create_session(device=device, max_batch=1)
        session.invert(targets_of(1), steps=1)
        result = session.invert(device.put(targets_of(1)), steps=2, every_step=True)
        device.open_blocks = [block for block in device.open_blocks if block.nbytes != targets_of(1).nbytes]
        if not held:
            del result
        session.close()
        session.close()
        if held:
            assert device.is_open
            del result
        assert device.open_blocks == []
        assert not device.is_open


@pytest.mark.parametrize("free", [0, 300_000])
def test_memory_that_lacks_closes_what_is_open(
    device: RecordingDevice, free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    device.memory_left = free
    runners: list[FakeRunner] = []

    def note(runner: FakeRunner) -> FakeRunner:
        runners.append(runner)
        return runner

    monkeypatch.setattr(fakes, "FakeRunner", lambda *args, **options: note(FakeRunner(*args, **options)))
    with pytest.raises(DeviceError, match="bytes are asked for"):
        create_session(device=device, max_batch=1)
    assert [runner.closed for runner in runners] == [1, 1]
    assert device.open_blocks == []
    assert not device.is_open


# Batches


@pytest.mark.parametrize("every_step", [False, True])
@pytest.mark.parametrize("max_batch", [1, 2, 3, 8])
@pytest.mark.parametrize("on_device", [False, True])
def test_split_sets_equal_the_whole(device: RecordingDevice, every_step: bool, max_batch: int, on_device: bool) -> None:
    session, encoder, _ = create_session(device=device, max_batch=max_batch)
    targets = targets_of(7)
    for _ in range(2):
        device.calls.clear()
        expected = expected_latents(targets, 3)
        if on_device:
            found = invert_on(session, device, targets, steps=3, every_step=every_step)
            images, latents, current = (device.read(array) for array in (found.images, found.latents, found.current))
        else:
            result = session.invert(targets, steps=3, every_step=every_step)
            assert result.current is not None
            images, latents, current = result.images, result.latents, result.current
        assert_is(latents, expected if every_step else expected[-1])
        assert_is(images, (expected if every_step else expected[-1]) / 2)
        assert_is(current, expected[-1] / 2)
    assert device.count()["launch"] == -(-7 // max_batch)
    assert {len(bound["target"]) for bound in encoder.bound} == {min(7, max_batch), 7 % max_batch or min(7, max_batch)}


def test_split_set_has_two_runs_on_their_way(device: RecordingDevice) -> None:
    session, *_ = create_session(device=device, max_batch=1)
    session.invert(targets_of(1), steps=1)
    device.calls.clear()
    session.invert(targets_of(4), steps=1)
    order = [name for name in names_of(device) if name in ("launch", "wait")]
    assert order == ["launch", "launch", "wait", "launch", "wait", "launch", "wait", "wait"]


@pytest.mark.parametrize("on_device", [False, True])
def test_runs_of_too_few_images_are_filled_up(device: RecordingDevice, on_device: bool) -> None:
    session, encoder, _ = create_session(device=device, batches=(3, 4))
    targets = targets_of(6)
    for _ in range(2):
        start = session.invert(targets[:2], steps=1)
        if on_device:
            found = device.read(invert_on(session, device, targets, steps=2).latents)
            warm = device.read(invert_on(session, device, targets[:2], steps=1, start=start).latents)
        else:
            found = session.invert(targets, steps=2).latents
            warm = session.invert(targets[:2], steps=1, start=start).latents
        assert_is(found, expected_latents(targets, 2)[-1])
        assert_is(warm, expected_latents(targets[:2], 2)[-1])
    assert {len(bound["target"]) for bound in encoder.bound} == {3, 4}


# Values


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("every_step", [False, True])
def test_pixels_are_those_that_upstream_saves(device: RecordingDevice, every_step: bool, on_device: bool) -> None:
    session, *_ = create_session(device=device, max_batch=2)
    targets = targets_of(3)
    expected = uint8_from_images(session.invert(targets, steps=3, every_step=every_step).images)
    if on_device:
        inversion = invert_on(session, device, targets, steps=3, every_step=every_step, image_type="uint8")
        found = device.read(inversion.images)
    else:
        found = session.invert(targets, steps=3, every_step=every_step, image_type="uint8").images
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("image_type", ["float32", "uint8"])
def test_results_on_the_host_are_checked(device: RecordingDevice, image_type: str) -> None:
    def spoil(buffers: Any) -> None:
        encode(buffers)
        buffers["latent_out"][1] = np.nan

    session, *_ = create_session(device=device, encoder=spoil)
    with pytest.raises(VerificationError, match="the latent of image 1 is not finite after step 2"):
        session.invert(targets_of(2), steps=2, image_type=image_type)
    inversion = invert_on(session, device, targets_of(2), steps=2)
    assert np.isnan(device.read(inversion.latents)[1]).all()


def test_current_tells_where_pixels_cannot() -> None:
    def spoil(buffers: Any) -> None:
        for name in ("image", "current"):
            buffers[name][:] = [[[[np.nan]]], [[[0.0]]]]

    session, *_ = create_session(generator=spoil, encoder=lambda buffers: buffers["latent_out"].fill(0))
    with pytest.raises(VerificationError, match="the image of image 0 is not finite after step 3"):
        session.invert(targets_of(2), steps=3, image_type="uint8")
