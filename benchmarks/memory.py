"""Memory that a process takes, in MiB, and what a model needs at least."""

import math
from dataclasses import dataclass
from pathlib import Path

import onnx

from restyle_deploy.bench.memory import read_status_bytes

FLOAT32_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class ModelMemory:
    """What one image's inversion needs at least.

    Attributes:
        weight_bytes: of the constants of both exported graphs.
        activation_bytes: of the largest set of tensors that are alive together, over both graphs, at batch 1: inputs,
            outputs and whatever a later node still reads. Memory inside a node does not count.
    """

    weight_bytes: int
    activation_bytes: int


def read_status_mib(field: str) -> float:
    """Return a field of Linux's status file, such as VmHWM (the peak) or VmRSS, in MiB; 0 where there is none."""
    return (read_status_bytes(field) or 0) / 2**20


def memory_of_graphs(*graphs: Path) -> ModelMemory:
    """Add the weights of several exported graphs, and find the largest set of live tensors of any.

    Raises:
        ValueError: a graph does not tell a tensor's shape.
    """
    weights, activations = 0, 0
    for path in graphs:
        graph = onnx.load(path).graph
        weights += sum(FLOAT32_BYTES * math.prod(tensor.dims) for tensor in graph.initializer)
        activations = max(activations, _largest_live_set(graph))
    return ModelMemory(weight_bytes=weights, activation_bytes=activations)


def _largest_live_set(graph: onnx.GraphProto) -> int:
    """Return the bytes of the largest set of tensors alive while a node runs, with one image."""
    constants = {tensor.name for tensor in graph.initializer}
    sizes = {value.name: _bytes_of(value) for value in (*graph.value_info, *graph.input, *graph.output)}
    last_use = {name: index for index, node in enumerate(graph.node) for name in node.input}
    last_use |= {value.name: len(graph.node) for value in (*graph.input, *graph.output)}
    alive = {value.name: sizes[value.name] for value in graph.input if value.name not in constants}
    largest = 0
    for index, node in enumerate(graph.node):
        for name in node.output:
            if name not in sizes:
                raise ValueError(f"the graph does not tell the shape of {name}")
            alive[name] = sizes[name]
        largest = max(largest, sum(alive.values()))
        for name in {*node.input, *node.output}:
            if last_use.get(name, index) <= index:
                alive.pop(name, None)
    return largest


def _bytes_of(value: onnx.ValueInfoProto) -> int:
    """Return a tensor's bytes; the free batch counts as 1."""
    shape = [dimension.dim_value or 1 for dimension in value.type.tensor_type.shape.dim]
    return FLOAT32_BYTES * math.prod(shape)
