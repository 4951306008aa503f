"""Graphs that are loaded, and the loop over them on preallocated and bound buffers."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from restyle_deploy.backends.base import Backend, Runner, RunnerOptions
from restyle_deploy.bundle import Bundle, GraphRecord
from restyle_deploy.tensors import BATCH, TensorSpec

Run = Callable[[], None]
NO_WEIGHTS: Mapping[str, Path] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class LoadedGraph:
    """A graph and its runner, which the session owns."""

    record: GraphRecord
    runner: Runner

    def bind(self, buffers: Mapping[str, NDArray[Any]]) -> list[Run]:
        """Bind those of the buffers that the graph names: one run, or one per image for a graph that takes one image.

        Args:
            buffers: by name; their first axis is the batch.
        """
        specs = self.record.inputs + self.record.outputs
        named = {spec.name: buffers[spec.name] for spec in specs}
        if specs[0].shape[0] == BATCH:
            return [self.runner.bind(named)]
        count = len(named[specs[0].name])
        parts = ({name: array[index : index + 1] for name, array in named.items()} for index in range(count))
        return [self.runner.bind(part) for part in parts]


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


class Loop:
    """Buffers of one batch size and the runs bound to them. `run` allocates nothing.

    Two latents take turns: step t reads one and writes the other. With `steps_kept` there are as many images and one
    more latent, and every step has its own.
    """

    def __init__(self, bundle: Bundle, graphs: Mapping[str, LoadedGraph], *, batch: int, steps_kept: int) -> None:
        """Allocate and bind.

        Args:
            bundle: gives the average that the loop starts from.
            graphs: `encoder` and `generator`. With `target`, that runs once for each image set and the encoder takes
                its features. With `preview`, that takes the generator's place at all steps but the last.
            batch: images of one run.
            steps_kept: steps whose results are kept; 0 for the last one only, as a preview has no image.
        """
        self._bundle = bundle
        specs = {
            spec.name: replace(spec, shape=(BATCH, *spec.shape[1:]))
            for record in (*bundle.graphs.values(), *(graph.record for graph in graphs.values()))
            for spec in record.inputs + record.outputs
        }
        self._target, self._current = specs["target"].allocate(batch), specs["current"].allocate(batch)
        self.images = specs["image"].allocate(batch, leading=(max(1, steps_kept),))
        self._latents = specs["latent"].allocate(batch, leading=(max(2, steps_kept + 1),))
        self._steps_kept = steps_kept
        shared = {"target": self._target, "current": self._current}
        self._target_runs: list[Run] = []
        if "target" in graphs:
            shared |= _allocate_outputs(graphs["target"].record, specs, batch)
            self._target_runs = graphs["target"].bind(shared)
        self._encoder_runs: list[list[Run]] = []
        self._generator_runs: list[list[Run]] = []
        self._preview_runs: list[list[Run]] = []
        for step in range(max(2, steps_kept)):
            before, after = self._latents[step], self._latents[(step + 1) % len(self._latents)]
            self._encoder_runs.append(graphs["encoder"].bind({**shared, "latent": before, "latent_out": after}))
            rendered = {**shared, "latent": after, "image": self.images[step % len(self.images)]}
            self._generator_runs.append(graphs["generator"].bind(rendered))
            if "preview" in graphs:
                self._preview_runs.append(graphs["preview"].bind(rendered))

    def run(self, target: NDArray[np.float32], steps: int) -> None:
        """Start from the average and take `steps` steps; the image is that of the last one.

        Of fewer targets than the batch the last one fills the rest.
        """
        self._target[: len(target)], self._target[len(target) :] = target, target[-1:]
        np.copyto(self._current, self._bundle.average_image)
        np.copyto(self._latents[0], self._bundle.latent_avg)
        for run in self._target_runs:
            run()
        intermediate = self._preview_runs or self._generator_runs
        for step in range(steps):
            turn = step % len(self._encoder_runs)
            for run in self._encoder_runs[turn]:
                run()
            for run in (intermediate if step < steps - 1 else self._generator_runs)[turn]:
                run()

    def results(self, steps: int) -> NDArray[np.float32]:
        """Return the latents that `run` left: a view of [kept, N, S, D]."""
        if self._steps_kept:
            return self._latents[1:]
        last = steps % 2
        return self._latents[last : last + 1]


def _allocate_outputs(record: GraphRecord, specs: Mapping[str, TensorSpec], batch: int) -> dict[str, NDArray[Any]]:
    return {spec.name: specs[spec.name].allocate(batch) for spec in record.outputs}
