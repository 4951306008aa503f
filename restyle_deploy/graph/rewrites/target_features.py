"""The target's half of the first convolution, computed once per image: 6 of design §5."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from restyle_deploy.graph.edit import (
    Edit,
    array_of,
    has_explicit_pads,
    integer_of,
    layer_of,
    only_user,
    replace_value,
    window_of,
)

TARGET = "target"
TARGET_FEATURES = "target_features"


@dataclass(frozen=True, kw_only=True)
class FirstConvolution:
    """Where an encoder's two images meet.

    Attributes:
        target, current: [N, 3, H, W].
        concat, convolution: the nodes; nothing else reads the concatenation.
        weight: [C, 6, kh, kw].
    """

    target: ir.Value
    current: ir.Value
    concat: ir.Node
    convolution: ir.Node
    weight: NDArray[Any]


def target_once(model: ir.Model, *, layers: Collection[str] | None = None) -> ir.Model:
    """Let an encoder read the target's half of its first convolution instead of the target.

    conv(W, [target, current]) = conv(W_target, target) + conv(W_current, current), and the first term is the same at
    every step. `target_graph`, called before, gives the graph of that term.

    Args:
        model: the encoder, changed in place: its input `target` becomes `target_features` [N, C, h, w]. One that does
            not begin with a single convolution of both images stays.
        layers: module path of the first convolution; None for any.
    """
    found = first_convolution(model)
    if found is None or (layers is not None and layer_of(found.convolution) not in layers):
        return model
    convolution = found.convolution
    features = ir.Value(name=TARGET_FEATURES, shape=convolution.outputs[0].shape, type=convolution.outputs[0].type)
    edit = Edit(model, convolution, TARGET_FEATURES)
    weight = edit.constant(np.ascontiguousarray(found.weight[:, found.weight.shape[1] // 2 :]))
    y = edit.add("Conv", found.current, weight, **window_of(convolution))
    replace_value(convolution.outputs[0], edit.add("Add", y, features))
    model.graph.remove((convolution, found.concat), safe=True)
    model.graph.inputs[model.graph.inputs.index(found.target)] = features
    return model


def target_graph(model: ir.Model) -> ir.Model | None:
    """Return the graph target -> target_features that `target_once` leaves out, with the convolution's bias.

    Args:
        model: the encoder; it is not changed.
    Returns:
        None where `target_once` would change nothing.
    """
    found = first_convolution(model)
    if found is None:
        return None
    convolution, weight = found.convolution, found.weight
    arrays = {"weight": np.ascontiguousarray(weight[:, : weight.shape[1] // 2])}
    if len(convolution.inputs) > 2:
        bias = array_of(convolution.inputs[2])
        assert bias is not None
        arrays["bias"] = bias
    target = ir.Value(name=TARGET, shape=found.target.shape, type=found.target.type)
    constants = [ir.Value(name=name, const_value=ir.tensor(array, name=name)) for name, array in arrays.items()]
    node = ir.node("Conv", (target, *constants), attributes=window_of(convolution), name=convolution.name)
    output = node.outputs[0]
    output.name, output.shape, output.type = TARGET_FEATURES, convolution.outputs[0].shape, convolution.outputs[0].type
    opsets = dict(model.graph.opset_imports)
    graph = ir.Graph((target,), (output,), nodes=(node,), initializers=constants, opset_imports=opsets, name=TARGET)
    return ir.Model(graph, ir_version=model.ir_version)


def first_convolution(model: ir.Model) -> FirstConvolution | None:
    """Return the convolution of the concatenated images, None where an encoder begins otherwise."""
    target = next((value for value in model.graph.inputs if value.name == TARGET), None)
    concat = only_user(target) if target is not None else None
    if target is None or concat is None or concat.op_type != "Concat" or len(concat.inputs) != 2:
        return None
    if integer_of(concat, "axis", 0) != 1:
        return None
    current, convolution = concat.inputs[1], only_user(concat.outputs[0])
    if current is None or concat.inputs[0] is not target or convolution is None or convolution.op_type != "Conv":
        return None
    weight = array_of(convolution.inputs[1])
    constant_bias = len(convolution.inputs) < 3 or array_of(convolution.inputs[2]) is not None
    plain = integer_of(convolution, "group", 1) == 1 and has_explicit_pads(convolution)
    if weight is None or not constant_bias or not plain:
        return None
    return FirstConvolution(target=target, current=current, concat=concat, convolution=convolution, weight=weight)
