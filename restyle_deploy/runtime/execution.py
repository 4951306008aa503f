"""The order in which a session's calls go to its device."""

import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TypeVar

import numpy as np

from restyle_deploy.bundle import Bundle
from restyle_deploy.device_array import Array
from restyle_deploy.errors import DeviceError
from restyle_deploy.runtime.arena import LATENTS
from restyle_deploy.runtime.base import Device, Event
from restyle_deploy.runtime.calls import Call, Inputs
from restyle_deploy.runtime.loop import LoadedGraph
from restyle_deploy.runtime.loop_cache import LoopCache
from restyle_deploy.runtime.memory import SessionMemory
from restyle_deploy.runtime.outputs import DeviceResults, HostResults, Output
from restyle_deploy.runtime.results import (
    DeviceInversion,
    Inversion,
    InversionResult,
    InversionTimings,
    PendingInversion,
    sum_timings,
    timings_from,
)
from restyle_deploy.runtime.slots import ARENA_SLOTS, Lease, Slot

LOGGER = logging.getLogger(__name__)

Allocated = TypeVar("Allocated")


class TimedRun:
    """The marks of a run. Its loop's next run may use the same ones, and asks for the times before."""

    def __init__(self, marks: list[Event]) -> None:
        """Take marks as `timings_from` has them."""
        self._marks, self._lock = marks, threading.Lock()
        self._timings: InversionTimings | None = None

    def timings(self) -> InversionTimings:
        """Wait for the run and return its times; each time the same.

        Raises:
            DeviceError: work on the device failed.
        """
        with self._lock:
            if self._timings is None:
                self._marks[-1].wait()
                self._timings = timings_from(self._marks)
            return self._timings


def timings_of(runs: Sequence[TimedRun | None]) -> InversionTimings | None:
    """Return the times of a call's runs, which are waited for; None where they are not timed."""
    return sum_timings([run.timings() for run in runs if run is not None])


class HostRun:
    """A run whose results are on their way to the host.

    Attributes:
        event: reached when the results have arrived.
        timed: of a session that measures.
    """

    def __init__(self, lease: Lease, event: Event, timed: TimedRun | None) -> None:
        self.event, self.timed = event, timed
        self._lease = lease
        self._is_finished = False

    def finish(self) -> None:
        """Wait, bring the results to where the caller gets them, and give the slot back; safe to call twice."""
        if self._is_finished:  # the slot may be another call's by now
            return
        self.event.wait()
        self._lease.slot.deliver()
        self._is_finished = True
        self._lease.end()


class Execution:
    """Memory and loops of a session on its device. Threads may share it: one enqueues at a time.

    Attributes:
        loops: that are bound and recorded.
    """

    def __init__(
        self,
        bundle: Bundle,
        graphs: Mapping[str, LoadedGraph],
        device: Device,
        *,
        least_batch: int,
        max_batch: int,
        timing_enabled: bool = False,
        capture: bool = True,
    ) -> None:
        """Allocate.

        Args:
            bundle: gives the average.
            graphs, device: what runs, and where; owned from now on, and closed after an error.
            least_batch, max_batch: images of one run; one of fewer is filled up. On a GPU other numbers are filled up
                to a power of two, or the most, so that few graphs are bound and recorded.
            timing_enabled: whether to take times; each run is then waited for before the next one is enqueued.
            capture: whether to record loops.
        Raises:
            DeviceError: there is not so much memory.
        """
        self._device, self._least_batch, self._max_batch = device, least_batch, max_batch
        self._timing_enabled = timing_enabled
        self._last_timed: TimedRun | None = None
        # Graphs of one image run once for each, and the host has few to wait for: there, more images only take time.
        self._has_few_batches = not device.is_host and all(graph.takes_batches for graph in graphs.values())
        self._runners = [graph.runner for graph in graphs.values()]
        records = {role: graph.record for role, graph in graphs.items()}
        try:
            self._memory = SessionMemory(bundle, records, device, max_batch=max_batch)
        except BaseException:
            self._close_runners()
            device.close()
            raise
        self.loops = LoopCache(device, self._memory.state, graphs, timing_enabled=timing_enabled, capture=capture)
        self._lock = threading.Lock()
        self._in_flight: deque[tuple[Event, object]] = deque()
        self._is_closed = False

    def find_array(self, source: object, stream: int | None) -> Array | None:
        """Return a caller's array as the device sees it; see `Device.external_array`."""
        if self._device.is_host:  # nothing is enqueued: whoever asks need not wait for the run that goes on
            return self._device.external_array(source, stream=stream)
        with self._lock:
            return self._device.external_array(source, stream=stream)

    def invert_to_host(self, call: Call) -> InversionResult:
        """Run a call and wait; the caller owns the results. One run is enqueued while another one is finished."""
        results = HostResults(call, self._memory.shapes)
        runs: deque[HostRun] = deque()
        timed = []
        for first in range(0, call.count, call.max_batch):
            if len(runs) == ARENA_SLOTS:
                runs.popleft().finish()
            runs.append(self._start_host_run(call, first, results))
            timed.append(runs[-1].timed)
        for run in runs:
            run.finish()
        return results.result(timings_of(timed))

    def invert_on_device(self, call: Call) -> DeviceInversion:
        """Enqueue a call whose images are on the device, and return its results, which are there too."""

        def reserve(slot: Slot) -> DeviceResults:
            call.inputs.reserve(slot)
            return self._device_results(slot, call)

        with self._lock:
            lease, results = self._lease(call.count * call.kept, reserve)
        inputs = call.inputs.staged(lease.slot)
        timed = []
        with self._lock, self._device.unaffected_by_captures():
            for first in range(0, call.count, call.max_batch):
                last = min(first + call.max_batch, call.count)
                timed.append(self._enqueue(call, inputs.part(first, last), first, lease.slot, results))
            event = lease.slot.event
            assert event is not None
        return DeviceInversion(results.arrays, lease, event, measure=lambda: timings_of(timed))

    def start(self, call: Call) -> PendingInversion[Inversion]:
        """Enqueue a call of one run, or one whose images are on the device, and return what waits for it."""
        if call.is_on_device:
            inversion = self.invert_on_device(call)
            return PendingInversion(is_done=inversion.is_done, finish=inversion.waited, event=inversion.event)
        results = HostResults(call, self._memory.shapes)
        run = self._start_host_run(call, 0, results)

        def finish() -> InversionResult:
            run.finish()
            return results.result(timings_of([run.timed]))

        return PendingInversion(is_done=run.event.is_done, finish=finish, event=run.event)

    def close(self) -> None:
        """Wait for what is in flight, and release all but what results on the device lie in. Safe to call twice."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            with ExitStack() as closing:  # all of them, though a device that has failed refuses each
                for release in (self._memory.close, self._close_runners, self.loops.close, self._in_flight.clear):
                    closing.callback(release)
                self._device.synchronize()

    def _start_host_run(self, call: Call, first: int, results: HostResults) -> HostRun:
        """Enqueue the run of a call that begins with image `first`."""
        last = min(first + call.max_batch, call.count)
        given = call.inputs.part(first, last)

        def reserve(slot: Slot) -> None:
            given.reserve(slot)
            results.reserve(slot)

        with self._lock:
            lease, _ = self._lease((last - first) * call.kept, reserve)
        inputs = given.staged(lease.slot)
        with self._lock, self._device.unaffected_by_captures():
            timed = self._enqueue(call, inputs, first, lease.slot, results)
            assert lease.slot.event is not None
            return HostRun(lease, lease.slot.event, timed)

    def _lease(self, rows: int, reserve: Callable[[Slot], Allocated]) -> tuple[Lease, Allocated]:
        """Lease a slot for results of so many rows, and return it with what `reserve` gives, which allocates in it."""
        lease = self._memory.slots.lease(rows)
        try:
            return lease, self._with_room_for(lambda: reserve(lease.slot))
        except DeviceError:
            lease.end()
            self._memory.slots.close_free()  # else a smaller call would get this slot, which cannot have its memory
            raise

    def _with_room_for(self, allocate: Callable[[], Allocated]) -> Allocated:
        """Return what `allocate` returns; where memory lacks, all that is idle goes back, and it is called again.

        Nothing of a run may have been enqueued or bound. What other calls have leased stays.

        Raises:
            DeviceError: there is no memory even so.
        """
        try:
            return allocate()
        except DeviceError as error:
            # As text: a handler may keep what it is given, and an error keeps the slot that its frames refer to.
            LOGGER.warning("%s; what no call uses is given back, and is bound anew when it is needed", str(error))
            self._memory.slots.close_free()
            self.loops.close()
            return allocate()

    def _batch_of(self, count: int) -> int:
        """Return the batch size that so many images run in."""
        batch = max(self._least_batch, count)
        if not self._has_few_batches:
            return batch
        return min(1 << (batch - 1).bit_length(), self._max_batch)

    def _enqueue(self, call: Call, inputs: Inputs, first: int, slot: Slot, output: Output) -> TimedRun | None:
        """Enqueue one run; with timing, return what gives its times."""
        device, state, count = self._device, self._memory.state, len(inputs.images)
        batch = self._batch_of(count)
        loop = self._with_room_for(
            lambda: self.loops.loop(
                batch=batch, steps=call.steps, every_step=call.every_step, from_average=inputs.latents is None
            )
        )
        timed = self._timing_enabled
        if self._last_timed is not None:
            last, self._last_timed = self._last_timed, None
            last.timings()
        try:
            if call.stream is not None and not call.is_on_device:  # else the queue waits since the array was found
                device.wait_for_stream(call.stream)
            marks = [device.record(timing=True)] if timed else []
            self._set_target(inputs.images, slot, batch)
            self._set_start(inputs, batch)
            marks += [device.record(timing=True)] if timed else []
            marks += loop.run()
            for step, (image, latent) in enumerate(loop.results(count)):
                output.put(slot, step, first, image, latent)
            output.put_current(slot, first, state.part("current", 0, count))
            for stream in call.followed_streams:
                device.hold_stream(stream)
        finally:
            end = slot.event = device.record(timing=timed)
            self._keep_alive(end, call.kept_alive)
        self.loops.record(loop)
        if timed:
            self._last_timed = TimedRun([*marks, end])
        return self._last_timed

    def _set_target(self, images: Array, slot: Slot, batch: int) -> None:
        """Enqueue the images' way into the state; of fewer than the batch the last one fills the rest."""
        state, count = self._memory.state, len(images)
        source = slot.upload(images) if isinstance(images, np.ndarray) else images
        self._device.prepare_images(source, state.part("target", 0, count))
        self._fill("target", count, batch)

    def _set_start(self, inputs: Inputs, batch: int) -> None:
        """Enqueue where the loop starts, if it is given; else the loop takes the average."""
        count = len(inputs.images)
        for name, given in ((LATENTS[0], inputs.latents), ("current", inputs.current)):
            if given is not None:
                self._device.copy(self._memory.state.part(name, 0, count), given)
                self._fill(name, count, batch)

    def _fill(self, name: str, count: int, batch: int) -> None:
        """Enqueue the copies of the last of `count` images to the rest of the batch: each copies all that are there."""
        part, last, filled = self._memory.state.part, count - 1, count
        while filled < batch:
            copied = min(filled - last, batch - filled)
            self._device.copy(part(name, filled, filled + copied), part(name, last, last + copied))
            filled += copied

    def _device_results(self, slot: Slot, call: Call) -> DeviceResults:
        """Return a slot's arrays for the results of a call; the same as for the last call like this."""
        key = (call.count, call.kept, call.every_step, call.is_pixels)
        if slot.views is None or slot.views[0] != key:
            slot.views = (key, DeviceResults(self._device, slot, call, self._memory.shapes))
        return slot.views[1]

    def _keep_alive(self, event: Event, kept: object) -> None:
        """Hold what a caller's array lies in until it has been read; let go of what has been."""
        while self._in_flight and self._in_flight[0][0].is_done():
            self._in_flight.popleft()
        if kept is not None:
            self._in_flight.append((event, kept))

    def _close_runners(self) -> None:
        with self._device.unaffected_by_captures(), ExitStack() as closing:
            for runner in self._runners:
                closing.callback(runner.close)
