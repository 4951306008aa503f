"""Reading what the layers of an ONNX file compute: copies of its parts, whose outputs are the layers' values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)
_EXTERNAL_FROM_BYTES = 1024


class LayeredGraph:
    """An ONNX file whose values can become outputs. Its weights are written once, beside the copies.

    Attributes:
        values: the nodes that compute floating-point values, by the values' names, in order.
    """

    def __init__(self, path: Path, folder: Path) -> None:
        """Read a file, whose weights may lie beside it.

        Args:
            path: the ONNX file.
            folder: is made, and takes the weights and the copies.
        """
        folder.mkdir()
        self._folder = folder
        self._model = onnx.load(path)
        # Saving moves the weights into the file, and out of the model.
        onnx.save_model(
            self._model,
            folder / "whole.onnx",
            save_as_external_data=True,
            location="weights",
            size_threshold=_EXTERNAL_FROM_BYTES,
        )
        graph = self._model.graph
        self._infos = {info.name: info for info in (*graph.value_info, *graph.output)}
        self._nodes = list(graph.node)
        self._inputs, self._initializers = list(graph.input), list(graph.initializer)
        self._producers = {value: node for node in self._nodes for value in node.output if value}
        self.values = {value: node for value, node in self._producers.items() if self._is_float(value)}

    def can_stand_for(self, value: str, other: LayeredGraph) -> bool:
        """Whether the graph computes a value of another one, of the same shape as far as the files tell."""
        if value not in self.values or not any(info.name in self._needed([value]) for info in self._inputs):
            return False
        ours, theirs = self._sizes_of(value), other._sizes_of(value)
        return ours is None or theirs is None or ours[1:] == theirs[1:]

    def bytes_of(self, value: str, batch: int) -> float:
        """Return the size of a value, infinite where the file does not tell its shape."""
        sizes = self._sizes_of(value)
        if sizes is None:
            return math.inf
        return math.prod(size or batch for size in sizes) * np.dtype(self.dtype_of(value)).itemsize

    def dtype_of(self, value: str) -> str:
        """Return NumPy's name of a value's type; a value of which the file says nothing is taken for float32."""
        info = self._infos.get(value)
        element = info.type.tensor_type.elem_type if info is not None else TensorProto.FLOAT
        return helper.tensor_dtype_to_np_dtype(element).name

    def inputs_for(self, outputs: Sequence[str], arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Return those of the arrays that the outputs depend on."""
        needed = self._needed(outputs)
        return {info.name: arrays[info.name] for info in self._inputs if info.name in needed}

    def write(self, outputs: Sequence[str]) -> Path:
        """Write the part of the graph that computes these outputs, and return the file."""
        needed, graph = self._needed(outputs), self._model.graph
        for field, kept in (
            (graph.node, [node for node in self._nodes if not needed.isdisjoint(node.output)]),
            (graph.input, [info for info in self._inputs if info.name in needed]),
            (graph.initializer, [tensor for tensor in self._initializers if tensor.name in needed]),
            (graph.output, [self._info_of(value) for value in outputs]),
        ):
            del field[:]
            field.extend(kept)
        path = self._folder / "part.onnx"
        path.write_bytes(self._model.SerializeToString())
        return path

    def merged_into(self, value: str, compared: set[str]) -> tuple[str, ...]:
        """Return the layers between a value and the compared ones before it, in the order of the graph."""
        layers, waiting, seen = set(), list(self._producers[value].input), set(compared)
        while waiting:
            one = waiting.pop()
            if one in seen or one not in self._producers:
                continue
            seen.add(one)
            layers.add(layer_of_node(self._producers[one]))
            waiting += self._producers[one].input
        layers.discard(layer_of_node(self._producers[value]))
        return tuple(dict.fromkeys(layer for layer in map(layer_of_node, self._nodes) if layer in layers))

    def _needed(self, outputs: Iterable[str]) -> set[str]:
        """Return the names of all values, inputs and constants that the outputs depend on, and their own."""
        needed: set[str] = set()
        waiting = list(outputs)
        while waiting:
            value = waiting.pop()
            if value not in needed:
                needed.add(value)
                producer = self._producers.get(value)
                waiting += [] if producer is None else [name for name in producer.input if name]
        return needed

    def _sizes_of(self, value: str) -> tuple[int, ...] | None:
        """Return a value's sizes, 0 for a free one; None where the file does not tell its shape."""
        info = self._infos.get(value)
        if info is None or not info.type.tensor_type.HasField("shape"):
            return None
        return tuple(size.dim_value for size in info.type.tensor_type.shape.dim)

    def _info_of(self, value: str) -> onnx.ValueInfoProto:
        return self._infos.get(value) or helper.make_tensor_value_info(value, TensorProto.FLOAT, None)

    def _is_float(self, value: str) -> bool:
        info = self._infos.get(value)
        return info is None or info.type.tensor_type.elem_type in _FLOATS


def layer_of_node(node: onnx.NodeProto) -> str:
    """Return the module path that a node's name begins with: `encoder.body.3` of `encoder.body.3/Conv_12`."""
    return node.name.partition("/")[0]
