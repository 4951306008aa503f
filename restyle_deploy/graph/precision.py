"""Graphs typed to float16 or bfloat16, with islands of float32: what a strongly typed network is built from."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass, ShapeInferencePass

from restyle_deploy.errors import BuildError
from restyle_deploy.graph.edit import array_of, integer_of, layer_of
from restyle_deploy.graph.rewrites.fuse_epilogue import add_function
from restyle_deploy.graph.rewrites.normalize_styles import normalize_styles
from restyle_deploy.graph.rewrites.split_batchnorm import split_batchnorm
from restyle_deploy.ops.onnx_functions import DOMAIN, OPSET

FLOAT32 = ir.DataType.FLOAT
FLOAT32_PRECISIONS = ("fp32", "tf32")
SHORT_TYPES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
"""Precision -> type of the maps, and of the weights that meet them."""

_NUMPY_TYPES = {
    FLOAT32: np.dtype(np.float32),
    ir.DataType.FLOAT16: np.dtype(np.float16),
    ir.DataType.BFLOAT16: np.dtype(ml_dtypes.bfloat16),
}
MAP_RANK = 4
BFLOAT16_OPSET = 22  # the first whose convolutions and pools take bfloat16


@dataclass(frozen=True, kw_only=True)
class Island:
    """Nodes that compute in float32.

    Attributes:
        what: the nodes, in words.
        why: the reason.
        find: yields them.
    """

    what: str
    why: str
    find: Callable[[ir.Model], Iterable[ir.Node]]


def _vector_nodes(model: ir.Model) -> Iterable[ir.Node]:
    for node in model.graph:
        if all(value.shape is not None and value.shape.rank() < MAP_RANK for value in node.outputs):
            yield node


def _last_nodes(model: ir.Model) -> Iterable[ir.Node]:
    """Walk back from the outputs up to the convolutions that mix channels."""
    waiting = [value.producer() for value in model.graph.outputs]
    found: set[ir.Node] = set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found and not _mixes_channels(node):
            found.add(node)
            waiting.extend(value.producer() for value in node.inputs if value is not None)
    return found


def _fixed_nodes(model: ir.Model) -> Iterable[ir.Node]:
    for node in model.graph:
        if node.op_type == "Cast" or not any(value is not None and value.dtype == FLOAT32 for value in node.inputs):
            yield node


ISLANDS = (
    Island(
        what="vectors: style affine, sum of squares and its root; the heads' linear layers",
        why="squares leave the range of float16, and styles decide on whole channels; all are small",
        find=_vector_nodes,
    ),
    Island(
        what="all behind the last convolutions: ToRGB's norms and bias, the image so far, pooling; the residual latent",
        why="sums over layers or steps, where roundings would add up; images have three channels, so they are small",
        find=_last_nodes,
    ),
    Island(
        what="casts, and nodes that read no float",
        why="their type is their own attribute",
        find=_fixed_nodes,
    ),
)
"""All that stays float32 beside the graph's inputs and outputs. A node outside computes in the short type."""

# Inputs that are float32 whatever the type of the maps is: parameters that the kernels and runtimes read so.
FLOAT32_PLACES = {
    "BatchNormalization": frozenset({1, 2, 3, 4}),
    "BiasActEpilogue": frozenset({1, 3, 4}),
    "FusedBiasAct": frozenset({1}),
    "Resize": frozenset({1, 2}),
    "UpFirDn2d": frozenset({1}),
    "UpFirDn2dEpilogue": frozenset({1, 2, 4, 5}),
}


def set_precision(model: ir.Model, precision: str) -> ir.Model:
    """Type a graph to a precision; its inputs and outputs stay float32.

    Args:
        model: changed in place; rewritten and tidied before.
        precision: "fp32" and "tf32" leave the graph alone; "fp16" has styles and weights normalised, which keeps it in
            the range; "bf16" has that range anyway.
    Raises:
        ValueError: another precision.
        BuildError: a constant is too large for float16, or the type of a value cannot be inferred.
    """
    if precision in FLOAT32_PRECISIONS:
        return model
    if precision not in SHORT_TYPES:
        raise ValueError(
            f"precision is {precision!r}, expected one of {', '.join((*FLOAT32_PRECISIONS, *SHORT_TYPES))}"
        )
    if precision == "fp16":
        normalize_styles(model)
    return set_types(model, SHORT_TYPES[precision])


def set_types(model: ir.Model, short: ir.DataType) -> ir.Model:
    """Let all nodes outside the islands compute in a short type: the typing alone, which may overflow.

    Each constant is stored in the type that its readers need; casts stand at the borders of the islands only.

    Args:
        model: changed in place.
        short: FLOAT16 or BFLOAT16.
    Raises:
        BuildError: see `set_precision`.
    """
    for domain, name, _ in tuple(model.functions):
        if domain == DOMAIN:
            # In the place of the export's, whose operators may lack the type, or want it for all inputs.
            add_function(model, name, opset=BFLOAT16_OPSET if short == ir.DataType.BFLOAT16 else OPSET)
    if short == ir.DataType.BFLOAT16:
        # From 20 on, the operators of our graphs have gained types and changed nothing else.
        model.graph.opset_imports[""] = max(BFLOAT16_OPSET, model.graph.opset_imports.get("", 0))
    for value in model.graph.initializers.values():
        if value.const_value is not None:
            value.type = ir.TensorType(value.const_value.dtype)
    split_batchnorm(model)
    ShapeInferencePass(strict_mode=False)(model)
    _check_known(model)
    islands = {node for island in ISLANDS for node in island.find(model)}
    _Typing(model, islands, short).run()
    RemoveUnusedNodesPass()(model)
    return model


def _mixes_channels(node: ir.Node) -> bool:
    if node.op_type not in ("Conv", "ConvTranspose"):
        return False
    weight = node.inputs[1]
    is_depthwise = weight is not None and weight.shape is not None and weight.shape[1] == 1
    return integer_of(node, "group", 1) == 1 or not is_depthwise


def _check_known(model: ir.Model) -> None:
    for node in model.graph:
        for value in node.outputs:
            if value.dtype is None or value.shape is None:
                raise BuildError(f"{node.name}: ONNX infers no type for what {node.op_type} gives")


class _Typing:
    """One graph being typed."""

    def __init__(self, model: ir.Model, islands: set[ir.Node], short: ir.DataType) -> None:
        self._graph = model.graph
        self._islands = islands
        self._short = short
        self._typed: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def run(self) -> None:
        nodes = tuple(self._graph)
        # As long as the types are set, a value's type says whether it is a float; so they are set in the end.
        for node in nodes:
            for place, value in enumerate(node.inputs):
                if value is not None and value.dtype == FLOAT32 and node.op_type != "Shape":
                    node.replace_input_with(place, self._value_for(node, place, value))
        self._cast_outputs()
        for node in nodes:
            for value in node.outputs:
                if value.dtype == FLOAT32:
                    value.type = ir.TensorType(self._type_of(node))  # a clone shares the old type

    def _type_of(self, node: ir.Node | None) -> ir.DataType:
        return FLOAT32 if node is None or node in self._islands else self._short

    def _value_for(self, reader: ir.Node, place: int, value: ir.Value) -> ir.Value:
        """Return a value in the type that a node reads it in."""
        reads_float32 = place in FLOAT32_PLACES.get(reader.op_type, ())
        wanted = FLOAT32 if reads_float32 else self._type_of(reader)
        array = array_of(value)
        if wanted == (FLOAT32 if array is not None else self._type_of(value.producer())):
            return value
        if (value, wanted) not in self._typed:
            typed = self._cast(value, wanted, reader) if array is None else self._constant(value, array, reader)
            self._typed[value, wanted] = typed
        return self._typed[value, wanted]

    def _cast(self, value: ir.Value, wanted: ir.DataType, reader: ir.Node) -> ir.Value:
        """Cast in front of a reader; all other readers come later."""
        source = value.producer() or reader
        name = self._name(value, source, wanted)
        node = ir.node("Cast", [value], attributes={"to": wanted}, name=name)
        node.outputs[0].name, node.outputs[0].shape, node.outputs[0].dtype = name, value.shape, wanted
        self._graph.insert_before(reader, node)
        return node.outputs[0]

    def _name(self, value: ir.Value, node: ir.Node, wanted: ir.DataType) -> str:
        name = f"{value.name}_{wanted.name.lower()}"
        return name if "/" in name else f"{layer_of(node)}/{name}"

    def _constant(self, value: ir.Value, array: np.ndarray, reader: ir.Node) -> ir.Value:
        """Store a constant in the short type."""
        with np.errstate(over="ignore"):
            short = array.astype(_NUMPY_TYPES[self._short])
        if np.isfinite(array).all() and not np.isfinite(short.astype(np.float32)).all():
            raise BuildError(
                f"{layer_of(reader)}: a weight of magnitude {np.abs(array).max():.3g} is beyond the range of "
                f"{self._short.name.lower()}; build with --precision bf16 or fp32"
            )
        name = f"{value.name}_{self._short.name.lower()}"
        typed = ir.Value(name=name, const_value=ir.tensor(short, dtype=self._short, name=name))
        typed.shape, typed.dtype = ir.Shape(array.shape), self._short
        self._graph.register_initializer(typed)
        return typed

    def _cast_outputs(self) -> None:
        """Let the graph's outputs be float32; those that an island computes are."""
        for index, value in enumerate(self._graph.outputs):
            producer = value.producer()
            if producer is None or value.dtype != FLOAT32 or self._type_of(producer) == FLOAT32:
                continue
            name, value.name = value.name, self._name(value, producer, self._short)
            node = ir.node("Cast", [value], attributes={"to": FLOAT32}, name=self._name(value, producer, FLOAT32))
            output = node.outputs[0]
            output.name, output.shape, output.dtype = name, value.shape, FLOAT32
            self._graph.append(node)
            self._graph.outputs[index] = output
