"""Our operators' nodes turned into what TensorRT's ONNX parser takes for our plugins."""

from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import onnx_ir as ir

from restyle_deploy.backends.tensorrt_plugins import (
    FACTOR_INPUTS,
    INPUTS,
    JIT_NAMESPACE,
    NAMESPACE,
    PARAMETERS,
    TYPED_LIKE_X,
    VERSION,
    Operation,
)
from restyle_deploy.errors import BuildError
from restyle_deploy.graph.edit import Edit, array_of, integer_of, integers_of, replace_value
from restyle_deploy.ops.kernels.launches import Epilogue, Factor, Filtering, separable_taps
from restyle_deploy.ops.onnx_functions import DOMAIN

if TYPE_CHECKING:
    from restyle_deploy.graph.edit import Attribute

Neutral: TypeAlias = dict[tuple[str, ir.DataType], ir.Value]

_OPERATOR_INPUTS = {"FusedBiasAct": ("x", "bias"), "UpFirDn2d": ("x", "kernel"), **INPUTS}
_IMPLIED_FACTORS = {"FusedBiasAct": Factor.BIAS | Factor.ACTIVATION, "UpFirDn2d": Factor.NONE}
# What stands for an absent factor; the kernels do not read it.
_NEUTRAL_VALUES = dict(zip(FACTOR_INPUTS, (1, 0, 0, 1), strict=True))
_NEUTRAL_RANKS = dict(zip(FACTOR_INPUTS, (2, 4, 1, 2), strict=True))
_ELEMENTS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def bind_plugins(model: ir.Model, *, arch: str, is_aot: bool) -> ir.Model:
    """Replace our operators by our plugins, in place, and drop the operators' function bodies.

    A plugin's node has the inputs of the epilogue operator and four attributes: the plugin's `parameters`, and
    `plugin_namespace`, `plugin_version` and `aot`, by which the parser finds it.

    Args:
        model: our operators are at its top level; the types of their images are known.
        arch: the architecture that embedded kernels are compiled for, "sm_89" style.
        is_aot: whether the kernels are embedded.
    Raises:
        BuildError: an image's type is not known, or none that the kernels take.
    """
    neutral: Neutral = {}
    for node in tuple(model.graph):
        if node.domain == DOMAIN:
            _bind(model, node, _operation_of(node, arch), is_aot=is_aot, neutral=neutral)
    for identifier in [key for key in model.functions if key[0] == DOMAIN]:
        del model.functions[identifier]
    return model


def _bind(model: ir.Model, node: ir.Node, operation: Operation, *, is_aot: bool, neutral: Neutral) -> None:
    given = dict(zip(_OPERATOR_INPUTS[node.op_type], node.inputs, strict=True))
    image = given["x"]
    element = image.dtype if image is not None else None
    if element not in _ELEMENTS:
        raise BuildError(f"{node.name}: x is of type {element}, expected {', '.join(str(each) for each in _ELEMENTS)}")
    edit = Edit(model, node, "plugin")
    inputs = []
    for name in INPUTS[operation.op_type]:
        dtype = element if name in TYPED_LIKE_X else ir.DataType.FLOAT
        value = given.get(name)
        inputs.append(_as_type(edit, value, dtype) if value else _neutral(edit, name, dtype, neutral))
    attributes: dict[str, Attribute] = {
        PARAMETERS: operation.to_parameters(),
        "plugin_namespace": NAMESPACE if is_aot else JIT_NAMESPACE,
        "plugin_version": VERSION,
        **({"aot": 1} if is_aot else {}),
    }
    plugin = ir.node(operation.op_type, inputs, attributes=attributes, domain=DOMAIN, name=node.name)
    model.graph.insert_before(node, plugin)
    replace_value(node.outputs[0], plugin.outputs[0])
    model.graph.remove(node, safe=True)


def _as_type(edit: Edit, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    if value.dtype == dtype:
        return value
    array = array_of(value)
    return edit.add("Cast", value, to=int(dtype)) if array is None else edit.constant(array.astype(dtype.numpy()))


def _neutral(edit: Edit, name: str, dtype: ir.DataType, neutral: Neutral) -> ir.Value:
    """Return a neutral element; one of each kind serves the whole graph."""
    if (name, dtype) not in neutral:
        array = np.full((1,) * _NEUTRAL_RANKS[name], _NEUTRAL_VALUES[name], dtype.numpy())
        neutral[name, dtype] = edit.constant(array)
    return neutral[name, dtype]


def _operation_of(node: ir.Node, arch: str) -> Operation:
    """Return what a node of an operator of ours computes."""
    factors = Factor(integer_of(node, "factors", _IMPLIED_FACTORS.get(node.op_type, Factor.NONE)))
    activation = {}
    if Factor.ACTIVATION in factors:
        activation = {name: node.attributes[name].as_float() for name in ("negative_slope", "gain")}
    is_filter = "kernel" in _OPERATOR_INPUTS[node.op_type]
    return Operation(
        arch=arch,
        epilogue=Epilogue(factors=factors, **activation),
        filtering=_filtering_of(node) if is_filter else None,
    )


def _filtering_of(node: ir.Node) -> Filtering:
    """Return how a node filters. A filter that is not a constant may be any: it is taken for one without taps."""
    kernel = node.inputs[1]
    taps = array_of(kernel)
    size = taps.shape if taps is not None else () if kernel is None or kernel.shape is None else kernel.shape.numpy()
    if len(size) != 2:
        raise BuildError(f"{node.name}: the filter's sizes are {size}, expected two that are known")
    up, down, pads = (integers_of(node, name) for name in ("up", "down", "pads"))
    return Filtering(
        up=(up[0], up[1]),
        down=(down[0], down[1]),
        pads=(pads[0], pads[1], pads[2], pads[3]),
        filter_size=(size[0], size[1]),
        is_separable=taps is not None and separable_taps(taps.astype(np.float32).tolist()) is not None,
    )
