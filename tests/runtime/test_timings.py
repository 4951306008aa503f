"""Times that a session takes of its own work."""

import time

import numpy as np
import pytest
from numpy.typing import NDArray

from restyle_deploy.runtime.results import DeviceInversion, InversionTimings
from tests.fakes import Buffers, create_engine_session, create_session, encode, generate
from tests.recording import RecordingDevice

ENCODER_S, GENERATOR_S = 0.004, 0.008


def targets_of(count: int) -> NDArray[np.float32]:
    return np.zeros((count, 3, 32, 32), np.float32)


def encode_slowly(buffers: Buffers) -> None:
    time.sleep(ENCODER_S)
    encode(buffers)


def generate_slowly(buffers: Buffers) -> None:
    time.sleep(GENERATOR_S)
    generate(buffers)


def check(timings: InversionTimings | None, *, steps: int, runs: int = 1) -> None:
    assert timings is not None
    assert len(timings.encoder_ms) == len(timings.generator_ms) == steps
    assert min(timings.encoder_ms) >= 1e3 * ENCODER_S * runs
    assert min(timings.generator_ms) >= 1e3 * GENERATOR_S * runs
    assert min(timings.generator_ms) > min(timings.encoder_ms)
    parts = (timings.upload_ms, *timings.encoder_ms, *timings.generator_ms, timings.download_ms)
    assert min(parts) >= 0
    assert sum(parts) == pytest.approx(timings.total_ms)


@pytest.mark.parametrize("where", ["host", "device"])
@pytest.mark.parametrize("capture", [False, True])
def test_each_pass_is_timed(where: str, capture: bool) -> None:
    device = RecordingDevice() if where == "device" else None
    session, *_ = create_session(
        device=device, encoder=encode_slowly, generator=generate_slowly, timing_enabled=True, capture=capture
    )
    totals = set()
    for _ in range(3):
        result = session.invert(targets_of(2), steps=2)
        check(result.timings, steps=2)
        totals.add(result.timings)
    assert len(totals) == 3


def test_times_of_split_sets_are_sums() -> None:
    session, *_ = create_session(encoder=encode_slowly, generator=generate_slowly, timing_enabled=True, max_batch=1)
    check(session.invert(targets_of(3), steps=2, every_step=True).timings, steps=2, runs=3)


def test_times_of_results_on_the_device() -> None:
    device = RecordingDevice()
    session, *_ = create_session(device=device, encoder=encode_slowly, generator=generate_slowly, timing_enabled=True)
    for _ in range(2):
        result = session.invert(device.put(targets_of(1)), steps=2)
        assert isinstance(result, DeviceInversion)
        assert not result.is_done()  # who asks for times waits
        check(result.timings, steps=2)
        assert result.is_done()
    assert session.invert_async(device.put(targets_of(1)), steps=2).result().timings is not None


def test_what_is_computed_once_counts_to_the_first_encoder_pass() -> None:
    session, runners = create_engine_session(roles=("target", "preview"), timing_enabled=True)

    def describe(_: Buffers) -> None:
        time.sleep(0.02)

    runners["target"].compute = describe
    timings = session.invert(targets_of(1), steps=3).timings
    assert timings is not None
    assert timings.encoder_ms[0] >= 20 > max(timings.encoder_ms[1:])
    assert len(timings.generator_ms) == 3


@pytest.mark.parametrize("where", ["host", "device"])
def test_no_times_unless_asked(where: str) -> None:
    device = RecordingDevice() if where == "device" else None
    session, *_ = create_session(device=device)
    assert session.invert(targets_of(1), steps=2).timings is None
    if device is not None:
        assert device.count()["record timing"] == 0
