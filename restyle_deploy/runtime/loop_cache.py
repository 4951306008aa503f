"""Loops that are kept for the calls to come: graphs bound by batch size, and recordings by kind of call."""

import logging
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import ExitStack

from restyle_deploy.errors import DeviceError
from restyle_deploy.runtime.arena import State
from restyle_deploy.runtime.base import Device
from restyle_deploy.runtime.loop import BoundGraphs, Kind, LoadedGraph, Loop

LOGGER = logging.getLogger(__name__)

# Recordings kept; further kinds of calls go run by run.
RECORDINGS_KEPT = 32
# Runs of the session in which a recording has not been used before another kind takes its place: so there is one such
# change in eight runs at most, however many kinds take turns. A set that is split counts once for each of its runs.
IDLE_RUNS = 8 * RECORDINGS_KEPT
# Batch sizes kept bound on the host, where a library keeps working memory, or a compiled graph, for each: one for full
# batches, one for what remains. On a GPU all are kept: batches are filled up to one of a few sizes there or, of graphs
# that take one image, are any number of images up to the session's `max_batch`.
HOST_BATCHES_KEPT = 2


class LoopCache:
    """The graphs of a session bound by batch size, and the recordings of loops over them, by kind.

    A kind is recorded when it is first called, as long as there is room; after that it takes the place of a recording
    that has been idle for long, or goes run by run. So no order of calls makes recordings come and go all the time.
    """

    def __init__(
        self,
        device: Device,
        state: State,
        graphs: Mapping[str, LoadedGraph],
        *,
        timing_enabled: bool = False,
        capture: bool = True,
    ) -> None:
        """Start empty.

        Args:
            device, state, graphs: see `BoundGraphs`.
            timing_enabled: whether the loops put marks between their runs.
            capture: whether to record the loops that can be recorded.
        """
        self._device, self._state, self._graphs = device, state, graphs
        self._timing_enabled = timing_enabled
        self._is_recording = capture and not device.is_host  # where a replay is not quicker
        self._runs = 0
        self._bound: OrderedDict[int, BoundGraphs] = OrderedDict()
        self._recorded: OrderedDict[Kind, Loop] = OrderedDict()

    @property
    def batches(self) -> tuple[int, ...]:
        """Batch sizes that are bound, the least recently used one first."""
        return tuple(self._bound)

    @property
    def recordings(self) -> int:
        """Recordings that are kept."""
        return len(self._recorded)

    def loop(self, *, batch: int, steps: int, every_step: bool, from_average: bool) -> Loop:
        """Return a loop for one run; its graphs are bound now if they are not.

        Raises:
            DeviceError: there is no memory for the steps that are kept, or for what a library binds.
        """
        self._runs += 1
        kind = (batch, steps, every_step, from_average)
        loop = self._recorded.get(kind)
        if loop is None:
            loop = self._bind(kind)
        else:
            self._recorded.move_to_end(kind)
        loop.last_run = self._runs
        return loop

    def record(self, loop: Loop) -> None:
        """Record a loop that has run, if it is not yet and there is room; where that is refused, none is any more."""
        if loop.is_recorded or not self._is_recording:
            return
        if not all(graph.runner.is_capturable for graph in self._graphs.values()):  # some know only once they have run
            self._is_recording = False
            return
        if not self._has_room():
            return
        try:
            loop.record()
        except DeviceError as error:
            self._is_recording = False
            LOGGER.warning("the loop cannot be recorded (%s); its runs are launched one by one", error)
        else:
            self._recorded[loop.kind] = loop

    def close(self) -> None:
        """Wait, and release all recordings and all that is bound; safe to call twice, and `loop` binds anew."""
        with ExitStack() as closing:
            while self._bound:
                closing.callback(self._bound.popitem()[1].close)
            while self._recorded:
                closing.callback(self._recorded.popitem()[1].close)
            if not self._device.is_host:
                self._device.synchronize()  # runs may be in the queue, and go with what they are bound to

    def _bind(self, kind: Kind) -> Loop:
        batch, *_ = kind
        graphs = self._bound.get(batch)
        if graphs is None:
            while self._device.is_host and len(self._bound) >= HOST_BATCHES_KEPT:
                self._bound.popitem(last=False)[1].close()
            graphs = self._bound[batch] = BoundGraphs(self._device, self._state, self._graphs, batch=batch)
        self._bound.move_to_end(batch)
        return Loop(self._device, graphs, kind, timing=self._timing_enabled)

    def _has_room(self) -> bool:
        """Whether one more may be recorded; makes room where a recording has been idle for long."""
        if len(self._recorded) < RECORDINGS_KEPT:
            return True
        oldest = next(iter(self._recorded.values()))
        if self._runs - oldest.last_run < IDLE_RUNS:
            return False
        del self._recorded[oldest.kind]
        oldest.close()
        return True
