"""Sessions on a GPU made up on the host, whose work waits until it is waited for and whose calls are written down."""

import logging
from typing import Any

import numpy as np
import pytest

from restyle_deploy.errors import VerificationError
from restyle_deploy.runtime.images import uint8_from_images
from restyle_deploy.runtime.results import DeviceInversion
from tests.fakes import PREVIEW_ERROR, create_engine_session, create_session, encode, expected_latents
from tests.recording import RecordingDevice
from tests.runtime.recorded import assert_is, invert_on, targets_of

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
            assert device.names == [*REPLAYED[:-1], *["copy device to device"] * copies, "record"]
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
        names = device.names
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
    assert device.names == [
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
