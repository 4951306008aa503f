"""An encoder in bfloat16 that keeps the latents: weights in two parts, and gates and sums in float32.

The roundings that cost the latents most are those that are the same at every pixel and in every step, as they add up:
the weights', and those of the gates that weigh whole channels.
"""

import math
import tempfile
import xml.etree.ElementTree as ET
from functools import cache
from pathlib import Path

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset15 as ops

# Where many weights are read for few pixels, reading them is all the time, and half of it would be for the second part.
# Those convolutions, most of the heads', add little to the latents' error.
LEAST_PIXELS_SPLIT = 64
MOST_WEIGHTS_SPLIT = 2**20
# An attribute of OpenVINO's nodes that has no function in Python: models are read with it. Its CPU plugin then leaves
# the node in float32 whatever the precision of inference is; versions that do not know it, as 2025.4, ignore it.
_EXACT_ATTRIBUTE = {"name": "DisablePrecisionConversion", "version": "0", "value": "dynamic:f16"}
_MAP_RANK = 4


def refine_encoder(model: ov.Model) -> None:
    """Change an encoder in place so that inference in bfloat16 rounds less; in float32 it computes what it did.

    Args:
        model: an encoder, or the part of one that sees only the target.
    """
    for node in model.get_ordered_ops():
        if _is_gate_or_sum(node):
            _compute_exactly(node)
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Convolution":
            _split_weights(node)
    model.validate_nodes_and_infer_types()


def _is_gate_or_sum(node: ov.Node) -> bool:
    """Whether a node is the sigmoid of a gate, applies one to a map, or adds to a map: a bias, or another map."""
    if node.get_type_name() == "Sigmoid":
        return True
    return node.get_type_name() in ("Multiply", "Add") and len(node.get_output_partial_shape(0)) == _MAP_RANK


def _compute_exactly(node: ov.Node) -> None:
    """Put a node of the same operator in the place of one, which the plugin leaves in float32."""
    exact = _find(_exact_model(node.get_type_name()).clone(), node.get_type_name())
    for index, value in enumerate(node.input_values()):
        exact.input(index).replace_source_output(value)
    for reader in node.output(0).get_target_inputs():
        reader.replace_source_output(exact.output(0))
    exact.set_friendly_name(node.get_friendly_name())


@cache
def _exact_model(operator: str) -> ov.Model:
    """Return a model of one operator without attributes that carries the plugin's attribute."""
    build = {"Sigmoid": ops.sigmoid, "Multiply": ops.multiply, "Add": ops.add}[operator]
    inputs = [ops.parameter([-1] * _MAP_RANK, np.float32) for _ in range(1 if operator == "Sigmoid" else 2)]
    with tempfile.TemporaryDirectory(prefix="restyle-deploy-", ignore_cleanup_errors=True) as folder:
        file = Path(folder) / "model.xml"
        ov.serialize(ov.Model([build(*inputs)], inputs), file)
        root = ET.parse(file).getroot()
    for layer in root.iter("layer"):
        if layer.get("type") == operator:
            attributes = ET.Element("rt_info")
            ET.SubElement(attributes, "attribute", _EXACT_ATTRIBUTE)
            layer.insert(1 if layer.find("data") is not None else 0, attributes)
    return ov.Core().read_model(ET.tostring(root), b"")


def _find(model: ov.Model, operator: str) -> ov.Node:
    return next(node for node in model.get_ordered_ops() if node.get_type_name() == operator)


def _split_weights(node: ov.Node) -> None:
    """Turn a convolution into the sum of two: one whose weights are exact in bfloat16, one with what they lack.

    The plugin lets the second one add to the first one's result, so that there is no pass beside theirs.
    """
    weights = node.input_value(1).get_node()
    if weights.get_type_name() != "Constant":
        return
    values: NDArray[np.float32] = weights.get_data()
    if values.dtype != np.float32 or (values.size > MOST_WEIGHTS_SPLIT and _pixels(node) < LEAST_PIXELS_SPLIT):
        return
    first = _truncate(values)
    node.input(1).replace_source_output(ops.constant(first).output(0))
    attributes = node.get_attributes()
    second = ops.convolution(
        node.input_value(0),
        ops.constant(values - first),
        attributes["strides"],
        attributes["pads_begin"],
        attributes["pads_end"],
        attributes["dilations"],
        attributes["auto_pad"],
    )
    readers = node.output(0).get_target_inputs()
    total = ops.add(node, second)
    for reader in readers:
        reader.replace_source_output(total.output(0))


def _pixels(convolution: ov.Node) -> int:
    """Return the pixels of one channel that a convolution writes; where they are not known, as many as matter."""
    sizes = list(convolution.get_output_partial_shape(0))[2:]
    return math.prod(size.get_length() if size.is_static else LEAST_PIXELS_SPLIT for size in sizes)


def _truncate(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the values with 8 bits of precision; what they lack of the former ones is exact in float32."""
    return (np.ascontiguousarray(values).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
