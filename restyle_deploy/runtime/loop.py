"""Graphs that are loaded, and loops over them on the session's state: bound once, recorded once, and replayed."""

import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from restyle_deploy.backends.base import Backend, Runner, RunnerOptions
from restyle_deploy.bundle import GraphRecord
from restyle_deploy.device_array import Array
from restyle_deploy.errors import DeviceError
from restyle_deploy.runtime.arena import LATENTS, Arrays, State, part_of, place_arrays
from restyle_deploy.runtime.base import Device, Event, Replay
from restyle_deploy.tensors import BATCH

LOGGER = logging.getLogger(__name__)

Run = Callable[[], None]
NO_WEIGHTS: Mapping[str, Path] = MappingProxyType({})

# Loops kept, each with its recording.
LOOPS_KEPT = 8
# Batch sizes kept bound on the host, where a library keeps working memory, or a compiled graph, for each: one for full
# batches, one for what remains.
HOST_BATCHES_KEPT = 2


@dataclass(frozen=True, kw_only=True)
class LoadedGraph:
    """A graph and its runner, which the session owns."""

    record: GraphRecord
    runner: Runner

    def bind(self, buffers: Mapping[str, Array]) -> list[Run]:
        """Bind those of the buffers that the graph names: one run, or one per image for a graph that takes one image.

        Args:
            buffers: by name; their first axis is the batch.
        """
        specs = self.record.inputs + self.record.outputs
        named = {spec.name: buffers[spec.name] for spec in specs}
        if specs[0].shape[0] == BATCH:
            return [self.runner.bind(named)]
        count = len(named[specs[0].name])
        return [
            self.runner.bind({name: part_of(array, index, index + 1) for name, array in named.items()})
            for index in range(count)
        ]


def load_graphs(
    module: Backend,
    records: Mapping[str, GraphRecord],
    options: RunnerOptions,
    weights: Mapping[str, Path] = NO_WEIGHTS,
) -> Mapping[str, LoadedGraph]:
    """Load graphs by role, for `Session`; when one is refused, release those before it.

    Args:
        module, records, options: what is loaded, and how.
        weights: by role, the ONNX files that stripped engines were built from.
    """
    graphs: dict[str, LoadedGraph] = {}
    with ExitStack() as loaded:
        for role, record in records.items():
            runner = module.load(record.path, record.inputs, record.outputs, options, weights.get(role))
            loaded.callback(runner.close)
            graphs[role] = LoadedGraph(record=record, runner=runner)
        loaded.pop_all()  # all are there: the session closes them
    return graphs


class BoundGraphs:
    """The runs of all graphs on the state, at one batch size.

    Two latents take turns: step t reads one and writes the other. With `steps_kept`, every step has an image and a
    latent of its own instead, in a block that this owns.

    Attributes:
        state, batch, steps_kept: what they are bound to.
        target_runs: once per call.
        encoder_runs, generator_runs, preview_runs: by turn; no previews where the generator renders every step.
    """

    def __init__(
        self, device: Device, state: State, graphs: Mapping[str, LoadedGraph], *, batch: int, steps_kept: int
    ) -> None:
        """Allocate what is kept, and bind.

        Args:
            device, state: where the graphs run.
            graphs: `encoder` and `generator`. With `target`, that runs once for each image set and the encoder takes
                its features. With `preview`, that takes the generator's place at all steps but the last.
            batch: images of one run.
            steps_kept: steps whose results are kept; 0 for the last one only, as a preview has no image.
        """
        self.state, self.batch, self.steps_kept = state, batch, steps_kept
        self._kept = _KeptSteps(device, graphs, batch=batch, steps=steps_kept) if steps_kept else None
        self.encoder_runs: list[list[Run]] = []
        self.generator_runs: list[list[Run]] = []
        self.preview_runs: list[list[Run]] = []
        with ExitStack() as refused:
            refused.callback(self.close)
            shared = {name: state.part(name, 0, batch) for name in state.names}
            self.target_runs = graphs["target"].bind(shared) if "target" in graphs else []
            for turn in range(steps_kept or len(LATENTS)):
                before, after = self._latent(turn, batch), self._latent(turn + 1, batch)
                self.encoder_runs.append(graphs["encoder"].bind({**shared, "latent": before, "latent_out": after}))
                rendered = {**shared, "latent": after, "image": self._image(turn, batch)}
                self.generator_runs.append(graphs["generator"].bind(rendered))
                if "preview" in graphs:
                    self.preview_runs.append(graphs["preview"].bind(rendered))
            refused.pop_all()

    def results(self, steps: int, count: int) -> list[tuple[Array, Array]]:
        """Return (image, latent) of the first `count` images, for each step that is kept: views."""
        if self.steps_kept:
            return [(self._image(step, count), self._latent(step + 1, count)) for step in range(self.steps_kept)]
        return [(self._image(0, count), self._latent(steps, count))]

    def close(self) -> None:
        """Release what is kept; safe to call twice."""
        if self._kept is not None:
            self._kept.block.close()

    def _image(self, step: int, count: int) -> Array:
        if self._kept is None:
            return self.state.part("image", 0, count)
        return self._kept.part("image", step, count)

    def _latent(self, step: int, count: int) -> Array:
        """Return what step `step`, counted from 1, has written; 0 for what the first one reads."""
        if self._kept is None or step == 0:
            return self.state.part(LATENTS[step % len(LATENTS)], 0, count)
        return self._kept.part("latent", step - 1, count)


class _KeptSteps:
    """Images and latents of all steps, each step's at an address of its own that libraries can vectorise from."""

    def __init__(self, device: Device, graphs: Mapping[str, LoadedGraph], *, batch: int, steps: int) -> None:
        specs = {spec.name: spec for spec in (*graphs["generator"].record.inputs, *graphs["generator"].record.outputs)}
        shapes = {
            f"{name} {step}": specs[name].concrete_shape(1)[1:] for name in ("latent", "image") for step in range(steps)
        }
        places, nbytes = place_arrays(shapes, batch)
        self.block = device.allocate(nbytes)
        self._arrays = Arrays(device, self.block, places)

    def part(self, name: str, step: int, count: int) -> Array:
        """Return the first `count` rows of a step, counted from 0."""
        return self._arrays.part(f"{name} {step}", 0, count)


class Loop:
    """So many steps of bound graphs, from the average or from what the state holds."""

    def __init__(
        self, device: Device, graphs: BoundGraphs, *, steps: int, from_average: bool, timing_enabled: bool
    ) -> None:
        self.graphs, self.steps = graphs, steps
        self._from_average = from_average
        self._device, self._timing_enabled = device, timing_enabled
        self._marks: list[Event] = []
        self._replay: Replay | None = None

    @property
    def is_recorded(self) -> bool:
        """Whether `run` replays."""
        return self._replay is not None

    def run(self) -> list[Event]:
        """Enqueue all steps: in one launch once it is recorded, before that one by one.

        Returns:
            With timing, a mark after each run of the encoder (before the first: the average, the target's features) and
            of the generator, in their order; the next run of this loop may use the same marks.
        """
        if self._replay is not None:
            self._replay()
        else:
            self._enqueue()
        return self._marks

    def record(self) -> None:
        """Record the runs, which have run once: their memory is allocated and their kernels are loaded.

        Raises:
            DeviceError: something in them cannot be recorded.
        """
        self._replay = self._device.capture(self._enqueue)

    def close(self) -> None:
        """Release the recording; safe to call twice."""
        if self._replay is not None:
            self._replay.close()

    def _enqueue(self) -> None:
        graphs, marks = self.graphs, []
        if self._from_average:
            graphs.state.set_average(graphs.batch)
        for run in graphs.target_runs:
            run()
        intermediate = graphs.preview_runs or graphs.generator_runs
        for step in range(self.steps):
            turn = step % len(graphs.encoder_runs)
            for run in graphs.encoder_runs[turn]:
                run()
            if self._timing_enabled:
                marks.append(self._device.record(timing=True))
            for run in (intermediate if step < self.steps - 1 else graphs.generator_runs)[turn]:
                run()
            if self._timing_enabled:
                marks.append(self._device.record(timing=True))
        self._marks = marks


class LoopCache:
    """The loops of a session, by batch size, steps, what is kept and the start; the least recently used one goes."""

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
        self._is_recording = capture
        self._batches_kept = HOST_BATCHES_KEPT if device.is_host else LOOPS_KEPT
        self._loops: OrderedDict[tuple[int, int, bool, bool], Loop] = OrderedDict()

    def __len__(self) -> int:
        return len(self._loops)

    def loop(self, *, batch: int, steps: int, every_step: bool, from_average: bool) -> Loop:
        """Return a loop; bound now if there is none."""
        key = (batch, steps, every_step, from_average)
        if key not in self._loops:
            steps_kept = steps if every_step else 0
            bound = self._bound(batch, steps_kept)
            self._shrink(bound)
            if bound is None:
                bound = BoundGraphs(self._device, self._state, self._graphs, batch=batch, steps_kept=steps_kept)
            self._loops[key] = Loop(
                self._device, bound, steps=steps, from_average=from_average, timing_enabled=self._timing_enabled
            )
        self._loops.move_to_end(key)
        return self._loops[key]

    def record(self, loop: Loop) -> None:
        """Record a loop that has run, if it is not yet; where that is refused, loops go on run by run."""
        if loop.is_recorded or not self._is_recording:
            return
        if not all(graph.runner.is_capturable for graph in self._graphs.values()):  # some know only once they have run
            self._is_recording = False
            return
        try:
            loop.record()
        except DeviceError as error:
            self._is_recording = False
            LOGGER.warning("the loop cannot be recorded (%s); its runs are launched one by one", error)

    def close(self) -> None:
        """Release all loops; safe to call twice."""
        with ExitStack() as closing:
            for _ in self._loops:
                closing.callback(self._drop)

    def _bound(self, batch: int, steps_kept: int) -> BoundGraphs | None:
        """Return the graphs that are bound for loops of a batch size, and of the steps that are kept."""
        bound = (loop.graphs for loop in self._loops.values())
        return next((graphs for graphs in bound if (graphs.batch, graphs.steps_kept) == (batch, steps_kept)), None)

    def _shrink(self, kept: BoundGraphs | None) -> None:
        """Make room for a loop of graphs that are bound, or for graphs before they are: then memory is scarce."""
        while len(self._loops) >= LOOPS_KEPT or (kept is None and self._count_bound() >= self._batches_kept):
            self._drop(kept=kept)

    def _count_bound(self) -> int:
        return len({id(loop.graphs) for loop in self._loops.values()})

    def _drop(self, *, kept: BoundGraphs | None = None) -> None:
        _, loop = self._loops.popitem(last=False)
        try:
            if not self._device.is_host:
                self._device.synchronize()  # its runs may be in the queue, and go with what they are bound to
            loop.close()
        finally:
            if loop.graphs is not kept and all(loop.graphs is not other.graphs for other in self._loops.values()):
                loop.graphs.close()
