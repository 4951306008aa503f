"""What a session is like after something has failed: nothing is lost, nothing is held, and the next call is right."""

import gc
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from restyle_deploy import DeviceInversion, PendingInversion, Session
from restyle_deploy.device_array import DeviceArray
from restyle_deploy.errors import DeviceError
from restyle_deploy.runtime.execution import HostRun
from tests.fakes import Buffers, create_session, encode, expected_latents
from tests.recording import RecordingDevice
from tests.runtime.recorded import assert_is, targets_of

# What a driver refuses, if it has to.
MAY_FAIL = {"allocate", "allocate pinned", "prepare images", "pixels from images", "record", "launch", "external array"}
MAY_FAIL |= {"copy host to device", "copy device to host", "copy device to device", "wait for stream", "hold stream"}


class FailingDevice(RecordingDevice):
    """Refuses one of the calls to come; `calls_left` counts down to it."""

    calls_left = -1

    def note(self, name: str, *details: Any) -> None:
        if name in MAY_FAIL:
            self.calls_left -= 1
            if self.calls_left == -1:
                raise DeviceError(f"made up: {name}")
        super().note(name, *details)


@contextmanager
def without_collection() -> Iterator[None]:
    """Leave what is in cycles where it is, as between two collections."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def latents_of(device: RecordingDevice, result: Any) -> NDArray[Any]:
    return device.read(result.latents) if isinstance(result, DeviceInversion) else result.latents


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("image_type", ["float32", "uint8"])
def test_any_call_of_the_device_may_fail(on_device: bool, later: bool, image_type: str) -> None:
    device = FailingDevice()
    session, *_ = create_session(device=device, max_batch=2)
    other, after = targets_of(3, 1), targets_of(3, 2)
    images: Any = device.put(other) if on_device else other
    failed = 0
    for calls_left in range(200):
        start = session.invert(images, steps=1)
        device.calls_left = calls_left
        try:
            options: dict[str, Any] = {"steps": 2 + calls_left % 9, "image_type": image_type, "every_step": True}
            options |= {"start": start, "stream": 5}
            result = session.invert_async(images, **options).result() if later else session.invert(images, **options)
        except DeviceError:
            failed += 1
        else:
            assert_is(latents_of(device, result), expected_latents(other, options["steps"] + 1)[1:])
            if device.calls_left >= 0:
                break
        device.calls_left = -1
        result = session.invert(images, steps=1)
        assert_is(latents_of(device, session.invert(after, steps=2)), expected_latents(after, 2)[-1])
        assert_is(latents_of(device, result), expected_latents(other, 1)[-1])
    device.calls_left = -1
    assert 15 < failed < 200
    del images, result, start, options
    session.close()
    gc.collect()
    assert not device.is_open
    assert [block for block in device.open_blocks if block.nbytes != other.nbytes] == []


def test_closing_goes_on_though_the_device_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise DeviceError("made up: an earlier launch failed")

    device = RecordingDevice()
    session, *runners = create_session(device=device)
    session.invert(targets_of(1), steps=1, every_step=True)
    monkeypatch.setattr(device, "synchronize", fail)
    monkeypatch.setattr(runners[0], "close", fail)
    with pytest.raises(DeviceError, match="an earlier launch failed"):
        session.close()
    session.close()
    assert runners[1].closed == 1
    assert device.open_blocks == []
    assert not device.is_open


def test_graph_that_cannot_be_bound_leaves_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> None:
        raise RuntimeError("made up: no such batch")

    device = RecordingDevice()
    session, _, generator = create_session(device=device, max_batch=2)
    monkeypatch.setattr(generator, "bind", refuse)
    opened = []
    for _ in range(3):
        with pytest.raises(RuntimeError, match="no such batch"):
            session.invert(device.put(targets_of(1)), steps=2, every_step=True)
        opened.append(len(device.open_blocks))
    assert np.diff(opened).tolist() == [1, 1]  # what this test puts there
    session.close()


@pytest.mark.parametrize("lacking", ["pinned", "device"])
def test_memory_that_lacks_for_one_call_is_there_for_the_next(lacking: str) -> None:
    device = RecordingDevice()
    session, *_ = create_session(device=device, max_batch=1)
    photo = np.zeros((1, 300, 400, 3), np.uint8)
    device.memory_left = 1000 if lacking == "pinned" else photo.nbytes + 1000
    with pytest.raises(DeviceError, match="bytes are asked for"):
        session.invert(photo, steps=1)
    device.memory_left = 1000
    for seed in range(3):
        targets = targets_of(1, seed)
        assert_is(session.invert(targets, steps=2).latents, expected_latents(targets, 2)[-1])
    device.memory_left = None
    assert np.isfinite(session.invert(photo, steps=1).latents).all()
    session.close()


# What is kept


class Noted:
    """What an array lies in, which tells when it goes."""

    def __init__(self, gone: list[bool]) -> None:
        self._gone = gone

    def __del__(self) -> None:
        self._gone.append(True)


def test_images_of_a_call_that_failed_are_kept_until_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare_once(source: Any, target: Any) -> None:
        if device.count()["prepare images"]:
            raise DeviceError("made up")
        prepare_images(source, target)

    device = RecordingDevice()
    session, *_ = create_session(device=device, max_batch=1)
    array, gone = device.put(targets_of(2)), list[bool]()
    prepare_images = device.prepare_images
    monkeypatch.setattr(device, "prepare_images", prepare_once)
    images = DeviceArray(address=array.address, shape=array.shape, dtype=array.dtype, owner=Noted(gone))
    with pytest.raises(DeviceError, match="made up"):
        session.invert(images, steps=1)
    del images
    gc.collect()
    assert not gone
    device.execute()
    session.close()
    gc.collect()
    assert gone


def test_what_was_exported_is_kept_until_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory may belong to what the protocol handed out rather than to the object that was passed."""
    device = RecordingDevice()
    session, *_ = create_session(device=device)
    array, gone = device.put(targets_of(1)), list[bool]()

    def export(*_: object, **__: object) -> DeviceArray:
        return DeviceArray(address=array.address, shape=array.shape, dtype=array.dtype, owner=Noted(gone))

    monkeypatch.setattr(device, "external_array", export)
    session.invert(object(), steps=1)
    gc.collect()
    assert not gone
    device.execute()
    session.invert(targets_of(1), steps=1)
    gc.collect()
    assert gone
    session.close()


# Inversions that were pending


@pytest.mark.parametrize("asked", [False, True])
def test_pending_inversion_that_is_dropped_gives_its_slot_back_at_once(asked: bool) -> None:
    device = RecordingDevice()
    session, *_ = create_session(device=device, max_batch=2)
    images = device.put(targets_of(2))
    with without_collection():
        for _ in range(2):
            session.invert_async(images, steps=2).wait()
        device.calls.clear()
        for _ in range(6):
            for given in (images, targets_of(2)):
                pending = session.invert_async(given, steps=2)
                if asked:
                    pending.result()
                del pending
        assert not {"allocate", "allocate pinned"} & {*device.names}
        session.close()
        assert not device.is_open


def test_results_are_not_held_by_a_slot_that_is_free() -> None:
    device = RecordingDevice()
    session, *_ = create_session(device=device)
    session.invert_async(targets_of(2), steps=2)
    free = [*session._execution._memory.slots._free, *session._execution._memory.slots._returned]
    assert [slot._deliveries for slot in free] == [[], []]
    session.close()


def test_finishing_a_run_twice_leaves_the_next_one_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the wait for a result is interrupted and then repeated."""
    finished: list[HostRun] = []
    finish = HostRun.finish

    def note(run: HostRun) -> None:
        finished.append(run)
        finish(run)

    monkeypatch.setattr(HostRun, "finish", note)
    session: Session = create_session(device=RecordingDevice())[0]
    session.invert(targets_of(2, 1), steps=2)
    pending: PendingInversion[Any] = session.invert_async(targets_of(2, 2), steps=2)
    finish(finished[0])
    assert_is(pending.result().latents, expected_latents(targets_of(2, 2), 2)[-1])
    session.close()


def test_pending_inversion_that_failed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> bool:
        raise DeviceError("made up: an earlier launch failed")

    session, *_ = create_session(device=RecordingDevice())
    for name in ("is_done", "wait"):
        monkeypatch.setattr("tests.recording.RecordedEvent." + name, fail)
    pending = session.invert_async(targets_of(1), steps=1)
    for ask in (pending.is_done, pending.result):
        with pytest.raises(DeviceError, match="an earlier launch failed"):
            ask()
    assert pending.is_done()  # as its outcome is known
    session.close()


def test_question_that_fails_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> bool:
        raise DeviceError("made up: not while others capture")

    session, *_ = create_session(device=RecordingDevice())
    monkeypatch.setattr("tests.recording.RecordedEvent.is_done", fail)
    pending = session.invert_async(targets_of(1), steps=2)
    with pytest.raises(DeviceError, match="not while others capture"):
        pending.is_done()
    monkeypatch.undo()
    assert_is(pending.result().latents, expected_latents(targets_of(1), 2)[-1])
    session.close()


def test_work_that_no_thread_takes_does_not_hold_up_closing() -> None:
    ran: list[bool] = []

    def note(buffers: Buffers) -> None:
        ran.append(True)
        encode(buffers)

    session, *_ = create_session(encoder=note)
    session.invert_async(targets_of(1), steps=1).wait()
    worker = session._calls._worker
    assert worker is not None
    worker.shutdown()  # as the interpreter does at its end
    with pytest.raises(RuntimeError, match="cannot schedule new futures"):
        session.invert_async(targets_of(1), steps=1)
    assert session._calls._count == 0
    session.close()
    assert ran == [True]


# Sessions that nobody closes


@pytest.mark.parametrize("where", ["host", "device"])
def test_dropped_session_warns_and_frees(where: str) -> None:
    device = RecordingDevice() if where == "device" else None
    session, encoder, _ = create_session(device=device)
    session.invert(targets_of(1), steps=1)
    session.invert_async(targets_of(1), steps=1).wait()
    holder = [session]
    del session
    with pytest.warns(ResourceWarning, match=r"the session on the bundle made-up was not closed; .* Session\.open"):
        holder.clear()
    assert encoder.closed == 1
    if device is not None:
        assert device.open_blocks == []
        assert not device.is_open


def test_closed_session_does_not_warn(recwarn: pytest.WarningsRecorder) -> None:
    gc.collect()
    recwarn.clear()  # of what earlier tests have left to the collector
    session, *_ = create_session()
    session.close()
    del session
    gc.collect()
    assert list(recwarn) == []


def test_session_dropped_in_its_own_thread_is_closed_there() -> None:
    """The thread that works for a session may be the one that collects it."""
    session, encoder, _ = create_session()
    session.invert_async(targets_of(1), steps=1).wait()
    worker, holder = session._calls._worker, [session]
    assert worker is not None
    del session
    with pytest.warns(ResourceWarning, match="was not closed"):
        worker.submit(holder.clear).result(10)
    assert encoder.closed == 1


def test_session_that_could_not_be_opened_does_not_warn(recwarn: pytest.WarningsRecorder) -> None:
    gc.collect()
    recwarn.clear()  # as above
    device = RecordingDevice()
    device.memory_left = 0
    with pytest.raises(DeviceError):
        create_session(device=device)
    gc.collect()
    assert list(recwarn) == []


@pytest.mark.parametrize("closed", [False, True])
def test_interpreter_ends_quietly_with_an_open_session(closed: bool, project_root: Path) -> None:
    script = f"""
from tests.fakes import create_session
from tests.runtime.recorded import targets_of
session, *_ = create_session()
session.invert_async(targets_of(1), steps=2).result()
if {closed}:
    session.close()
"""
    done = subprocess.run(
        [sys.executable, "-W", "always::ResourceWarning", "-c", script],
        capture_output=True,
        text=True,
        cwd=project_root,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
