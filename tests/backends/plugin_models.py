"""Models of one operator of ours, small, with its inputs."""

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from restyle_deploy.ops.kernels.launches import Factor
from restyle_deploy.ops.onnx_functions import DOMAIN, onnx_function

Arrays = dict[str, NDArray[Any]]

SEPARABLE = np.outer([1, 3, 3, 1], [1, 3, 3, 1]).astype(np.float32) / 16
ANY_FILTER = np.arange(6, dtype=np.float32).reshape(2, 3)
SHAPE = (2, 4, 6, 8)
ACTIVATION = {"negative_slope": 0.1, "gain": 1.5}
BLUR = {"up": [1, 1], "down": [1, 1], "pads": [1, 2, 2, 1], "channels": 4}
SKIP = {"up": [2, 2], "down": [1, 1], "pads": [2, 2, 1, 1], "channels": 4}
GENERAL = {"up": [1, 1], "down": [2, 2], "pads": [0, 1, -1, 2], "channels": 4}


def image_of(seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(SHAPE).astype(np.float32)


def filtered_size(geometry: dict[str, Any], taps: NDArray[Any]) -> tuple[int, int]:
    """Rows and columns of a filtered image."""
    up, down, pads = geometry["up"], geometry["down"], geometry["pads"]
    rows, columns = (
        (size * up[axis] + pads[axis] + pads[axis + 2] - taps.shape[axis]) // down[axis] + 1
        for axis, size in enumerate(SHAPE[2:])
    )
    return rows, columns


def factors_of(factors: int, size: tuple[int, int], *, channels: int = SHAPE[1]) -> Arrays:
    """All inputs of an epilogue; those that are absent are neutral."""
    random = np.random.default_rng(factors)
    batch = SHAPE[0]
    shapes = {"demod": (batch, channels), "noise": (1, 1, *size), "bias": (channels,), "next_scale": (batch, channels)}
    neutral = {"demod": 1, "noise": 0, "bias": 0, "next_scale": 1}
    values: Arrays = {}
    for name, shape in shapes.items():
        if factors & Factor[name.upper()]:
            values[name] = random.standard_normal(shape).astype(np.float32)
        else:
            values[name] = np.full((1,) * len(shape), neutral[name], np.float32)
    return values


def model_of(op_type: str, inputs: Arrays, *, constants: Arrays, **attributes: Any) -> ir.Model:
    """A model of one operator with its function; `inputs` are in order, those of `constants` are in the model."""
    element = helper.np_dtype_to_tensor_dtype(inputs["x"].dtype)
    node = helper.make_node(op_type, list(inputs), ["y"], domain=DOMAIN, name="layer/op", **attributes)
    values = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in inputs.items()
        if name not in constants
    ]
    graph = helper.make_graph(
        [node],
        "graph",
        values,
        [helper.make_tensor_value_info("y", element, [None] * 4)],
        initializer=[numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, 1)]
    function = onnx_function(op_type)
    return ir.from_proto(helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=10))
