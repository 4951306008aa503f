"""Where a graph goes wrong: the outputs of its layers on a backend, against those of the exported graph in float32.

Layers' outputs become outputs of a copy of the graph, from its inputs on and a few at a time, which bounds the memory:
those of a whole 1024 px generator take gigabytes. Only the nodes that they need are kept in the copy.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from restyle_deploy.backends.base import Backend, RunnerOptions
from restyle_deploy.errors import VerificationError
from restyle_deploy.graph.layer_values import LayeredGraph, layer_of_node
from restyle_deploy.tensors import TensorSpec
from restyle_deploy.verify import largest_difference
from restyle_deploy.verify_reference import run_graph
from restyle_deploy.workbench import Workbench

Array = NDArray[Any]
Arrays = Mapping[str, Array]

# Of the reference's layers' outputs in one run; the backend's take as much again.
GROUP_BYTES = 256 * 2**20
# Values are compared with the largest one of the layer, but with no smaller one than this: noise would count as error.
_SMALLEST_SCALE = 1e-3


@dataclass(frozen=True, kw_only=True)
class LayerError:
    """How far a layer's output is off.

    Attributes:
        graph: `encoder` or `generator`, the exported graph that has it.
        layer: the model's layer: what the node's name begins with.
        node, op_type: the node of the exported graph that computes the output.
        error: the largest absolute difference, as a share of `largest`; infinite where a value is not finite.
        largest: the largest absolute value of the reference there.
        merged: layers between this one and those that were compared before it, whose outputs the graph that was run
            does not have: the difference may arise in any of them.
    """

    graph: str
    layer: str
    node: str
    op_type: str
    error: float
    largest: float
    merged: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LayerSearch:
    """What a search of one graph found.

    Attributes:
        graph: `encoder` or `generator`.
        compared: outputs that were compared; the search ends with the first that differs.
        tolerance: share of a layer's largest value that passes.
        first: the first output that differs, None where none does.
        largest: of those that do not differ, the one that is off by most.
        tested: what was run on the backend, for people.
    """

    graph: str
    compared: int
    tolerance: float
    first: LayerError | None
    largest: LayerError | None
    tested: str = ""


@dataclass(frozen=True, kw_only=True)
class GraphRun:
    """How the tested graph is run.

    Attributes:
        file: an ONNX file that has values of the exported graph, by their names.
        inputs: by name.
        backend: what runs it.
        options: with which it is loaded.
    """

    file: Path
    inputs: Arrays
    backend: Backend
    options: RunnerOptions


def find_first_layer(
    name: str, reference: Path, inputs: Arrays, tested: GraphRun, *, tolerance: float, group_bytes: int = GROUP_BYTES
) -> LayerSearch:
    """Compare the layers of a graph in the order of its nodes, until one differs.

    Args:
        name: of the exported graph, for the result.
        reference: the exported graph, which ONNX Runtime computes in float32 as it is.
        inputs: of the exported graph.
        tested: the graph that is under suspicion: the exported one, or one that has been made of it.
        tolerance: share of a layer's largest value that passes.
        group_bytes: of the outputs of one run, unless a single one is larger.
    Raises:
        BackendUnavailableError, BuildError: see `Backend.load`; or ONNX Runtime is not installed.
        VerificationError: the two graphs have no value of the same name in common.
    """
    batch = max(len(array) for array in inputs.values())
    with tempfile.TemporaryDirectory(prefix="restyle-deploy-", ignore_cleanup_errors=True) as folder:
        expected_graph = LayeredGraph(reference, Path(folder) / "reference")
        found_graph = expected_graph
        if tested.file != reference:
            found_graph = LayeredGraph(tested.file, Path(folder) / "tested")
        names = [value for value in expected_graph.values if found_graph.can_stand_for(value, expected_graph)]
        if not names:
            raise VerificationError(f"{tested.file}: has no layer of the exported graph {reference.name}")
        compared, largest = 0, None
        for group in _groups(expected_graph, names, batch, group_bytes):
            expected = run_graph(expected_graph.write(group), expected_graph.inputs_for(group, inputs))
            found = _run_tested(found_graph, group, tested, expected)
            for value in group:
                compared += 1
                error = _error_of(name, expected_graph, value, found[value], expected[value], set(names))
                if not error.error <= tolerance:
                    return LayerSearch(graph=name, compared=compared, tolerance=tolerance, first=error, largest=largest)
                largest = max(largest or error, error, key=lambda one: one.error)
    return LayerSearch(graph=name, compared=compared, tolerance=tolerance, first=None, largest=largest)


def _groups(graph: LayeredGraph, names: Sequence[str], batch: int, most: int) -> Iterator[list[str]]:
    """Yield the values in order, as many at a time as fit into `most` bytes, and at least one."""
    group: list[str] = []
    used = 0.0
    for name in names:
        size = graph.bytes_of(name, batch)
        if group and used + size > most:
            yield group
            group, used = [], 0.0
        group.append(name)
        used += size
    yield group


def _run_tested(graph: LayeredGraph, outputs: Sequence[str], tested: GraphRun, expected: Arrays) -> dict[str, Array]:
    """Run the part of the tested graph that computes these outputs, whose shapes are those of the reference."""
    file = graph.write(outputs)
    inputs = graph.inputs_for(outputs, tested.inputs)
    given = tuple(TensorSpec(name=name, dtype=str(array.dtype), shape=array.shape) for name, array in inputs.items())
    made = tuple(TensorSpec(name=name, dtype=graph.dtype_of(name), shape=expected[name].shape) for name in outputs)
    return run_on_backend(file, inputs, given, made, tested.backend, tested.options)


def run_on_backend(
    file: Path,
    inputs: Arrays,
    given: tuple[TensorSpec, ...],
    made: tuple[TensorSpec, ...],
    backend: Backend,
    options: RunnerOptions,
) -> dict[str, Array]:
    """Load a graph, run it once on host arrays, and return its outputs by name.

    Args:
        file: as for `Backend.load`.
        inputs: C-contiguous, by name; the batch is that of the first one.
        given, made: the border of the graph.
        backend, options: what runs it.
    Raises:
        BackendUnavailableError, BuildError: see `Backend.load`.
        DeviceError: the GPU lacks memory, or fails.
    """
    with Workbench(options) as workbench:
        run = workbench.bind(workbench.load(backend, file, given, made), made, inputs)
        run()
        return {spec.name: run.result(spec.name) for spec in made}


def _error_of(
    name: str, graph: LayeredGraph, value: str, found: Array, expected: Array, compared: set[str]
) -> LayerError:
    node = graph.values[value]
    largest = float(np.abs(expected).max(initial=0))
    return LayerError(
        graph=name,
        layer=layer_of_node(node),
        node=node.name,
        op_type=node.op_type,
        error=largest_difference(found, expected) / max(largest, _SMALLEST_SCALE),
        largest=largest,
        merged=graph.merged_into(value, compared),
    )
