"""Batch normalisation as a product and a sum with constants, computed before a graph is typed."""

import numpy as np
import onnx_ir as ir

from restyle_deploy.graph.edit import Edit, array_of, nodes_of_type, replace_value
from restyle_deploy.graph.rewrites.leading_batchnorm import DEFAULT_EPSILON


def split_batchnorm(model: ir.Model) -> ir.Model:
    """Turn γ·(x − mean)/√(variance + ε) + β into x·scale + shift.

    A runtime that gives all five parameters the type of x (TensorRT does) rounds the variance, and loses a small or a
    large one in float16; scale and shift are of order one.

    Args:
        model: changed in place; a normalisation whose parameters are computed, or whose input's rank is unknown, stays.
    """
    for node in nodes_of_type(model, "BatchNormalization"):
        parameters, x = [array_of(value) for value in node.inputs[1:]], node.inputs[0]
        if x is None or x.shape is None or any(array is None for array in parameters):
            continue
        epsilon = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else DEFAULT_EPSILON
        gamma, beta, mean, variance = (np.asarray(array, np.float64) for array in parameters)
        scale = gamma / np.sqrt(variance + epsilon)  # [C]
        shift = beta - mean * scale
        edit = Edit(model, node, "split_batchnorm")
        shape = (1, -1, *[1] * (x.shape.rank() - 2))
        y = edit.add("Mul", x, edit.constant(scale.reshape(shape).astype(np.float32)))
        y = edit.add("Add", y, edit.constant(shift.reshape(shape).astype(np.float32)))
        replace_value(node.outputs[0], y)
        model.graph.remove(node, safe=True)
    return model
