"""ONNX graphs of this project -> torch modules: each node becomes one call, and nothing is interpreted at run time."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from restyle_deploy.backends.pytorch_nodes import CONVERSIONS, Reader
from restyle_deploy.errors import BuildError
from restyle_deploy.graph.edit import array_of
from restyle_deploy.graph.precision import set_precision
from restyle_deploy.graph.rewrites.fuse_epilogue import fuse_epilogue
from restyle_deploy.tensors import TensorSpec

MAP_RANK = 4


def read_exported(file: Path) -> ir.Model:
    """Read an ONNX file; raise `ValueError` if that is none, or any error of onnx_ir, protobuf or the system."""
    model = ir.load(file)
    if not model.graph.outputs:
        raise ValueError("it is no ONNX file, as it has no output")
    return model


def prepare(model: ir.Model, precision: str) -> ir.Model:
    """Make a graph ready for `module_from_graph`: one node behind each convolution, and typed to a precision.

    Args:
        model: as exported, or rewritten by a plan; changed in place.
        precision: one of `backends.base.UNIFORM_PRECISIONS`.
    Raises:
        BuildError: see `graph.precision.set_precision`.
    """
    return set_precision(fuse_epilogue(model), precision)


def check_border(model: ir.Model, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
    """Raise `ValueError` unless a graph has the inputs and outputs of these names."""
    for what, values, specs in (("inputs", model.graph.inputs, inputs), ("outputs", model.graph.outputs, outputs)):
        found, expected = {value.name for value in values}, {spec.name for spec in specs}
        if found != expected:
            raise ValueError(
                f"its {what} are {', '.join(sorted(str(name) for name in found))}, "
                f"expected {', '.join(sorted(expected))}"
            )


def module_from_graph(
    model: ir.Model,
    inputs: Sequence[str],
    outputs: Sequence[str],
    *,
    device: str,
    channels_last: bool = False,
) -> fx.GraphModule:
    """Turn a graph into a module with its constants on a device.

    Args:
        model: that `prepare` returned, or was saved after it.
        inputs, outputs: names of its inputs and outputs, in the order in which the module takes and returns them.
        device: in torch's words; `meta` for no memory at all.
        channels_last: keep the maps and the weights of convolutions in torch's `channels_last` layout.
    Returns:
        A module in evaluation mode from float32 tensors to a tuple of them, both of the order given.
    Raises:
        ValueError: a node of another kind than our graphs have.
    """
    return _Conversion(model, device=device, channels_last=channels_last).run(inputs, outputs)


class _Conversion:
    """One graph on its way; satisfies `pytorch_nodes.Builder`."""

    def __init__(self, model: ir.Model, *, device: str, channels_last: bool) -> None:
        self._model, self._device, self._channels_last = model, device, channels_last
        self._graph, self._root = fx.Graph(), nn.Module()
        self._converted: dict[ir.Value, Any] = {}
        self._constants = 0

    def run(self, inputs: Sequence[str], outputs: Sequence[str]) -> fx.GraphModule:
        by_name = {value.name: value for value in (*self._model.graph.inputs, *self._model.graph.outputs)}
        for name in inputs:
            self._converted[by_name[name]] = self._input(by_name[name])
        for node in self._model.graph:
            convert = CONVERSIONS.get((node.domain, node.op_type))
            if convert is None:
                raise ValueError(f"{node.name} is a {node.op_type}, which none of our graphs has")
            self._converted[node.outputs[0]] = convert(Reader(node, self))
        self._graph.output(tuple(self.value(by_name[name]) for name in outputs))
        return fx.GraphModule(self._root, self._graph).eval()

    def call(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> fx.Node:
        """Add a call; see `pytorch_nodes.Builder`."""
        return self._graph.call_function(function, arguments, options)

    def value(self, value: ir.Value) -> Any:
        """Return what a value has become; a constant becomes a buffer of the module when it is first asked for."""
        if value not in self._converted:
            array = array_of(value)
            if array is None:
                raise ValueError(f"{value.name} is not computed before it is read")
            self._converted[value] = self._constant(tensor_from_array(array))
        return self._converted[value]

    def _constant(self, tensor: Tensor) -> fx.Node:
        if self._channels_last and tensor.ndim == MAP_RANK:
            tensor = tensor.to(memory_format=torch.channels_last)
        name = f"constant_{self._constants}"
        self._constants += 1
        # Last of all: the copy is complete when it returns, while work on the device would be another stream's.
        self._root.register_buffer(name, tensor.to(self._device))
        return self._graph.get_attr(name)

    def _input(self, value: ir.Value) -> fx.Node:
        node = self._graph.placeholder(re.sub(r"\W", "_", f"input_{value.name}"))
        is_map = value.shape is not None and value.shape.rank() == MAP_RANK
        if self._channels_last and is_map:
            return self._graph.call_method("contiguous", (node,), {"memory_format": torch.channels_last})
        return node


def tensor_from_array(array: NDArray[Any]) -> Tensor:
    """Return a copy of an array as a tensor; bfloat16 is ml_dtypes' on one side and torch's own on the other."""
    array = np.array(array, order="C")  # a mapped or read-only one is not torch's to hold
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def save(model: ir.Model, engine: Path) -> None:
    """Write a prepared graph, its weights in a file beside it; raise `BuildError` where the system refuses."""
    try:
        ir.save(model, engine, external_data=f"{engine.stem}.weights")
    except OSError as error:
        raise BuildError(f"{engine}: cannot be written: {error.strerror}") from error
