"""What sessions allocate and give back, and how they split sets, on a GPU made up on the host."""

import gc
import tracemalloc
from collections import deque

import numpy as np
import pytest

from restyle_deploy.errors import DeviceError
from restyle_deploy.runtime.loop_cache import IDLE_RUNS, RECORDINGS_KEPT
from restyle_deploy.runtime.results import DeviceInversion
from restyle_deploy.runtime.slots import LEASES_REMEMBERED, Lease, Slot
from tests import fakes
from tests.fakes import FakeRunner, create_engine_session, create_session, expected_latents
from tests.pictures import picture
from tests.recording import RecordingDevice
from tests.runtime.recorded import assert_is, invert_on, targets_of


@pytest.fixture
def device() -> RecordingDevice:
    return RecordingDevice()


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


def test_recordings_are_bounded_and_steps_share_what_is_kept(device: RecordingDevice) -> None:
    session, encoder, _ = create_session(device=device)
    device.calls.clear()
    for steps in range(1, RECORDINGS_KEPT + 4):
        for _ in range(2):
            result = session.invert(targets_of(1), steps=steps, every_step=True)
        assert_is(result.latents, expected_latents(targets_of(1), steps))
        assert session._execution.loops.recordings == min(steps, RECORDINGS_KEPT)
    assert device.count()["capture"] == RECORDINGS_KEPT
    assert not {"close replay", "synchronize"} & device.count().keys()
    assert len(encoder.bound) == RECORDINGS_KEPT + 3  # each step once, whatever the number of steps
    session.close()
    assert device.open_blocks == []
    assert device.count()["close replay"] == RECORDINGS_KEPT
    assert encoder.closed == 1


@pytest.mark.parametrize("kinds", [RECORDINGS_KEPT + 1, 3 * RECORDINGS_KEPT])
@pytest.mark.parametrize("on_device", [False, True])
def test_kinds_in_rotation_are_recorded_once(device: RecordingDevice, kinds: int, on_device: bool) -> None:
    session, encoder, _ = create_session(device=device, max_batch=2)
    images = [device.put(targets_of(count)) if on_device else targets_of(count) for count in (1, 2)]

    def once() -> None:
        for kind in range(kinds):
            session.invert(images[kind % 2], steps=1 + kind // 4, every_step=bool(kind // 2 % 2))

    for _ in range(2):
        once()
    device.calls.clear()
    bound = len(encoder.bound)
    for _ in range(2):
        once()
    counts = device.count()
    assert counts["launch"] == 2 * RECORDINGS_KEPT
    assert not {"capture", "close replay", "synchronize", "allocate", "allocate pinned", "free"} & counts.keys()
    assert len(encoder.bound) == bound


def test_recording_that_is_idle_gives_way(device: RecordingDevice) -> None:
    session, *_ = create_session(device=device)
    for steps in range(1, RECORDINGS_KEPT + 1):
        session.invert(targets_of(1), steps=steps)
    for _ in range(IDLE_RUNS // RECORDINGS_KEPT - 1):
        for steps in range(2, RECORDINGS_KEPT + 2):
            session.invert(targets_of(1), steps=steps)
    assert device.count()["capture"] == RECORDINGS_KEPT
    for _ in range(2 * RECORDINGS_KEPT):
        session.invert(targets_of(1), steps=RECORDINGS_KEPT + 1)
    assert device.count()["capture"] == RECORDINGS_KEPT + 1
    assert device.count()["close replay"] == 1
    device.calls.clear()
    for steps in range(2, RECORDINGS_KEPT + 2):
        assert_is(session.invert(targets_of(1), steps=steps).latents, expected_latents(targets_of(1), steps)[-1])
    assert device.count()["launch"] == RECORDINGS_KEPT
    session.invert(targets_of(1), steps=1)  # it goes run by run, as the others are all in use
    assert device.count()["capture"] == 0


@pytest.mark.parametrize("max_batch", [6, 8])
def test_partial_batches_are_filled_up_to_few_sizes(device: RecordingDevice, max_batch: int) -> None:
    session, encoder, _ = create_session(device=device, max_batch=max_batch)
    for _ in range(2):
        for count in range(1, max_batch + 1):
            targets = targets_of(count, count)
            for result in (session.invert(targets, steps=2), invert_on(session, device, targets, steps=2)):
                assert len(result.images) == count
                latents = device.read(result.latents) if isinstance(result, DeviceInversion) else result.latents
                assert_is(latents, expected_latents(targets, 2)[-1])
    assert {len(bound["target"]) for bound in encoder.bound} == {1, 2, 4, max_batch}
    assert device.count()["capture"] == 4


def test_partial_batches_of_the_host_and_of_graphs_for_one_image_are_not_filled_up(device: RecordingDevice) -> None:
    host, encoder, _ = create_session()
    host.invert(targets_of(3), steps=1)
    assert {len(bound["target"]) for bound in encoder.bound} == {3}
    session, runners = create_engine_session(batch=1, device=device)
    session.invert(targets_of(3), steps=1)
    device.execute()
    assert len(runners["encoder"].ran) == 3


def test_loops_of_one_batch_share_what_is_bound(device: RecordingDevice) -> None:
    session, encoder, _ = create_session(device=device)
    for steps in (1, 2, 3, 5, 10):
        session.invert(targets_of(2), steps=steps)
    assert len(encoder.bound) == 2
    session.invert(targets_of(3), steps=2)
    assert len(encoder.bound) == 4


@pytest.mark.parametrize("on_device", [False, True])
def test_idle_steps_give_their_memory_to_those_that_are_asked_for(device: RecordingDevice, on_device: bool) -> None:
    session, *_ = create_session(device=device, max_batch=4)
    given = {count: device.put(targets_of(count)) if on_device else targets_of(count) for count in (1, 2, 4)}

    def invert(count: int, steps: int) -> None:
        result = session.invert(given[count], steps=steps, every_step=True)
        latents = device.read(result.latents) if isinstance(result, DeviceInversion) else result.latents
        assert_is(latents, expected_latents(targets_of(count), steps))

    invert(4, 4)
    invert(1, 12)
    device.memory_left = 0
    for _ in range(2):
        for arguments in ((2, 3), (4, 4), (1, 12)):  # each fits into what the others had
            invert(*arguments)
    before = session._execution.loops.recordings
    for more in (0, 10_500_000):  # too little for the results, and for the steps alone
        device.memory_left += more
        with pytest.raises(DeviceError, match="bytes are asked for"):
            invert(4, 40)
        assert session._execution.loops.recordings < before
        invert(4, 4)


@pytest.mark.parametrize("idle", ["steps", "slots"])
def test_idle_memory_is_given_to_results_on_the_device(
    device: RecordingDevice, idle: str, caplog: pytest.LogCaptureFixture
) -> None:
    session, *_ = create_session(device=device, max_batch=4)
    count = 8 if idle == "steps" else 20
    images = device.put(targets_of(count))
    if idle == "steps":
        for batch in (1, 2, 4):
            session.invert(targets_of(batch), steps=4 // batch, every_step=True)
    else:
        held = [invert_on(session, device, targets_of(7), steps=1) for _ in range(4)]
        held.clear()
    device.memory_left = 0
    result = session.invert(images, steps=2)
    assert isinstance(result, DeviceInversion)
    assert_is(device.read(result.latents), expected_latents(targets_of(count), 2)[-1])
    (record,) = caplog.records
    assert record.message.endswith("; what no call uses is given back, and is bound anew when it is needed")
    session.close()


@pytest.mark.parametrize("image_type", ["float32", "uint8"])
def test_idle_memory_is_given_to_results_on_their_way_to_the_host(device: RecordingDevice, image_type: str) -> None:
    session, *_ = create_session(device=device, max_batch=4)
    for count in (1, 2, 4):
        session.invert(targets_of(count), steps=12, every_step=True)
    if image_type == "uint8":  # so that nothing but the pixels' own memory is lacking
        session.invert(targets_of(4), steps=13, every_step=True)
    device.memory_left = 0
    for _ in range(3):
        result = session.invert(targets_of(4), steps=13, every_step=True, image_type=image_type)
        assert_is(result.latents, expected_latents(targets_of(4), 13))
    session.close()
    assert device.open_blocks == []


@pytest.mark.parametrize("image_type", ["float32", "uint8"])
def test_idle_memory_is_given_to_large_photos_and_comes_back(device: RecordingDevice, image_type: str) -> None:
    session, *_ = create_session(device=device, max_batch=1)
    photo, images = picture(0, 300, 400)[None], device.put(targets_of(7))
    expected = create_session()[0].invert(photo, steps=2, image_type=image_type)
    session.invert(targets_of(1), steps=20, every_step=True)
    device.memory_left = 0
    np.testing.assert_array_equal(session.invert(photo, steps=2, image_type=image_type).images, expected.images)
    device.memory_left = 0  # from now on each has what the other one had
    for _ in range(3):
        result = session.invert(images, steps=2)
        assert isinstance(result, DeviceInversion)
        assert_is(device.read(result.latents), expected_latents(targets_of(7), 2)[-1])
        del result
        found = session.invert(photo, steps=2, image_type=image_type)
        np.testing.assert_array_equal(found.images, expected.images)
        for _ in range(3):  # in both slots of the arena
            assert_is(session.invert(targets_of(2), steps=1).latents, expected_latents(targets_of(2), 1)[-1])
    session.close()


def test_slot_that_is_leased_as_it_comes_back_is_in_use(
    device: RecordingDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread may lease it before the one that gives it back goes on."""

    class LeasedAtOnce(deque[Slot]):
        def append(self, slot: Slot) -> None:
            super().append(slot)
            leases.append(slots.lease(1))

    session, *_ = create_session(device=device)
    slots, leases = session._execution._memory.slots, list[Lease]()
    with monkeypatch.context() as patch:
        patch.setattr(slots, "_returned", LeasedAtOnce())
        slots.lease(1).end()
    assert [*slots._out.values()] == [lease.slot for lease in leases] != []
    leases.clear()
    assert not slots._out
    session.close()


def test_pending_calls_keep_as_many_slots_as_they_use(device: RecordingDevice) -> None:
    session, *_ = create_session(device=device)
    images = device.put(targets_of(1))

    def once(count: int) -> None:
        pending = [session.invert_async(targets_of(1), steps=1) for _ in range(count)]
        results = [session.invert(images, steps=1) for _ in range(count)]
        for one in pending:
            one.result()
        results.clear()

    for _ in range(2):
        once(8)
    device.calls.clear()
    for _ in range(3):
        once(8)
    assert not {"allocate", "allocate pinned", "free"} & device.count().keys()
    blocks = len(device.open_blocks)
    for _ in range(2 * LEASES_REMEMBERED):  # then they go
        once(1)
    session.invert(images, steps=1)
    assert len(device.open_blocks) < blocks / 2


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
    assert {len(bound["target"]) for bound in encoder.bound} == {
        max_batch,
        7 % max_batch or max_batch if max_batch < 7 else 8,  # one that is left; seven are filled up
    }


def test_split_set_has_two_runs_on_their_way(device: RecordingDevice) -> None:
    session, *_ = create_session(device=device, max_batch=1)
    session.invert(targets_of(1), steps=1)
    device.calls.clear()
    session.invert(targets_of(4), steps=1)
    order = [name for name in device.names if name in ("launch", "wait")]
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
    assert {len(bound["target"]) for bound in encoder.bound} == {4}


def test_filling_a_batch_up_takes_few_copies(device: RecordingDevice) -> None:
    session, encoder, _ = create_session(device=device, batches=(8, 8))
    copies = []
    for count in (8, 8, 7, 5, 3, 1):  # the first one is not recorded
        device.calls.clear()
        result = invert_on(session, device, targets_of(count), steps=1)
        copies.append(device.count()["copy device to device"])
        assert_is(device.read(result.latents), expected_latents(targets_of(count), 1)[-1])
        filled = encoder.bound[0]["target"][count - 1 :]
        np.testing.assert_array_equal(filled, np.broadcast_to(targets_of(count)[-1:], filled.shape))
    assert np.diff(copies[1:]).tolist() == [1, 1, 1, 0]
    session.close()
