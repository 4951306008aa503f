"""Graphs that are loaded, and loops over them on the session's state: bound once, recorded once, and replayed."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from restyle_deploy.backends.base import Backend, Runner, RunnerOptions
from restyle_deploy.bundle import GraphRecord
from restyle_deploy.device_array import Array
from restyle_deploy.runtime.arena import LATENTS, Arrays, State, part_of, place_arrays
from restyle_deploy.runtime.base import Block, Device, Event, Replay
from restyle_deploy.tensors import BATCH

Run = Callable[[], None]
NO_WEIGHTS: Mapping[str, Path] = MappingProxyType({})

Kind = tuple[int, int, bool, bool]
"""Batch size, steps, whether each step is kept, and whether the loop starts from the average."""


@dataclass(frozen=True, kw_only=True)
class LoadedGraph:
    """A graph and its runner, which the session owns."""

    record: GraphRecord
    runner: Runner

    @property
    def takes_batches(self) -> bool:
        """Whether one run takes any number of images."""
        return self.record.inputs[0].shape[0] == BATCH

    def bind(self, buffers: Mapping[str, Array]) -> list[Run]:
        """Bind those of the buffers that the graph names: one run, or one per image for a graph that takes one image.

        Args:
            buffers: by name; their first axis is the batch.
        """
        specs = self.record.inputs + self.record.outputs
        named = {spec.name: buffers[spec.name] for spec in specs}
        if self.takes_batches:
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
            runner = module.load(record.path, record.inputs, record.outputs, options.for_graph(role), weights.get(role))
            loaded.callback(runner.close)
            graphs[role] = LoadedGraph(record=record, runner=runner)
        loaded.pop_all()  # all are there: the session closes them
    return graphs


@dataclass(frozen=True, kw_only=True)
class Step:
    """The runs of one step, and where their results are.

    Attributes:
        encoder, generator, preview: runs; no previews where the generator renders every step.
        arrays, image, latent: names of the results, and what has them.
    """

    encoder: list[Run]
    generator: list[Run]
    preview: list[Run]
    arrays: Arrays
    image: str
    latent: str

    def results(self, count: int) -> tuple[Array, Array]:
        """Return image and latent of the first `count` images: views."""
        return self.arrays.part(self.image, 0, count), self.arrays.part(self.latent, 0, count)


class BoundGraphs:
    """The runs of all graphs on the state, at one batch size. Runs are bound when a loop first needs them.

    Two latents take turns: step t reads one and writes the other. Where steps are kept, each has an image and a latent
    of its own instead, in blocks that this owns; loops of any number of steps share them.

    Attributes:
        batch: images of one run.
        target_runs: once per call.
    """

    def __init__(self, device: Device, state: State, graphs: Mapping[str, LoadedGraph], *, batch: int) -> None:
        """Bind what is run once per call.

        Args:
            device, state: where the graphs run.
            graphs: `encoder` and `generator`. With `target`, that runs once for each image set and the encoder takes
                its features. With `preview`, that takes the generator's place at all steps but the last.
            batch: images of one run.
        """
        self.batch = batch
        self._device, self._state, self._graphs = device, state, graphs
        self._shared = {name: state.part(name, 0, batch) for name in state.names}
        self.target_runs = graphs["target"].bind(self._shared) if "target" in graphs else []
        self._turns: list[Step] = []
        self._kept: list[Step] = []
        self._blocks: list[Block] = []

    def turns(self, steps: int, *, every_step: bool) -> list[Step]:
        """Return what so many steps take in turns, bound now if it is not; one for each step where they are kept.

        Raises:
            DeviceError: there is no memory for what is kept; all that was there before is as it was.
        """
        if every_step:
            if len(self._kept) < steps:
                self._keep(steps)
            return self._kept[:steps]
        if not self._turns:
            arrays = self._state.arrays
            first, second = LATENTS
            self._turns = [
                self._bind_step(self._state.part(before, 0, self.batch), arrays, "image", after)
                for before, after in ((first, second), (second, first))
            ]
        return self._turns

    def start(self) -> None:
        """Enqueue what makes a loop start from the average."""
        self._state.set_average(self.batch)

    def close(self) -> None:
        """Release what is kept; safe to call twice."""
        self._kept.clear()
        with ExitStack() as closing:
            while self._blocks:
                closing.callback(self._blocks.pop().close)

    def _keep(self, count: int) -> None:
        """Allocate and bind those of so many steps that are not there yet, each at an address of its own."""
        steps = range(len(self._kept), count)
        records = self._graphs["generator"].record
        specs = {spec.name: spec for spec in (*records.inputs, *records.outputs)}
        shapes = {f"{name} {step}": specs[name].concrete_shape(1)[1:] for name in ("latent", "image") for step in steps}
        places, nbytes = place_arrays(shapes, self.batch)
        with ExitStack() as refused:
            block = self._device.allocate(nbytes)
            refused.callback(block.close)
            arrays, bound = Arrays(self._device, block, places), list[Step]()
            before = self._kept[-1].results(self.batch)[1] if self._kept else self._shared[LATENTS[0]]
            for step in steps:
                bound.append(self._bind_step(before, arrays, f"image {step}", f"latent {step}"))
                before = arrays.part(f"latent {step}", 0, self.batch)
            refused.pop_all()
        self._blocks.append(block)
        self._kept += bound

    def _bind_step(self, before: Array, arrays: Arrays, image: str, latent: str) -> Step:
        after = arrays.part(latent, 0, self.batch)
        read = {**self._shared, "latent": before, "latent_out": after}
        rendered = {**self._shared, "latent": after, "image": arrays.part(image, 0, self.batch)}
        return Step(
            encoder=self._graphs["encoder"].bind(read),
            generator=self._graphs["generator"].bind(rendered),
            preview=self._graphs["preview"].bind(rendered) if "preview" in self._graphs else [],
            arrays=arrays,
            image=image,
            latent=latent,
        )


class Loop:
    """So many steps of bound graphs, from the average or from what the state holds.

    Attributes:
        kind: what tells it from others.
        last_run: the session's run, counted, that has used it last.
    """

    def __init__(self, device: Device, graphs: BoundGraphs, kind: Kind, *, timing: bool) -> None:
        """Take graphs, whose runs are bound now if they are not; with `timing`, put marks between them."""
        self.kind, self.last_run = kind, 0
        _, self._steps, self._is_every_kept, self._is_from_average = kind
        self._device, self._graphs, self._timing = device, graphs, timing
        self._turns = graphs.turns(self._steps, every_step=self._is_every_kept)
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

    def results(self, count: int) -> list[tuple[Array, Array]]:
        """Return (image, latent) of the first `count` images, for each step that is kept: views."""
        kept = range(0 if self._is_every_kept else self._steps - 1, self._steps)
        return [self._turns[step % len(self._turns)].results(count) for step in kept]

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
        marks = []
        if self._is_from_average:
            self._graphs.start()
        for run in self._graphs.target_runs:
            run()
        for step in range(self._steps):
            turn = self._turns[step % len(self._turns)]
            for run in turn.encoder:
                run()
            if self._timing:
                marks.append(self._device.record(timing=True))
            for run in turn.generator if step == self._steps - 1 else turn.preview or turn.generator:
                run()
            if self._timing:
                marks.append(self._device.record(timing=True))
        self._marks = marks
