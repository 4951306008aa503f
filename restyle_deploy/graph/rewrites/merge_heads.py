"""All style heads at once: one convolution, then grouped ones, then one batched linear layer: 5 of design §5."""

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from restyle_deploy.graph.edit import (
    Array,
    Edit,
    array_of,
    has_explicit_pads,
    integer_of,
    integers_of,
    layer_of,
    nodes_of_type,
    only_user,
    replace_value,
)


@dataclass(frozen=True, kw_only=True)
class Head:
    """A head: convolutions with leaky ReLU down to one pixel, then a linear layer.

    Attributes:
        x: the map that it reads, [N, C, H, W].
        convolutions: in order.
        slopes: of the leaky ReLU after each.
        linear: the last node, `Gemm`; its output is [N, D].
    """

    x: ir.Value
    convolutions: tuple[ir.Node, ...]
    slopes: tuple[float, ...]
    linear: ir.Node

    @property
    def layer(self) -> str:
        """Module path of the list that the head is in: `encoder.styles` of `encoder.styles.3.linear`."""
        return ".".join(layer_of(self.linear).split(".")[:-2])

    @property
    def weight_count(self) -> int:
        """Weights of the convolutions."""
        return sum(_constant(node, 1).size for node in self.convolutions)

    @property
    def form(self) -> tuple[object, ...]:
        """What heads have to share to be merged: the map that they read and the shape of all that follows."""
        shapes = tuple(_constant(node, 1).shape for node in (*self.convolutions, self.linear))
        strides = tuple((integers_of(node, "strides"), integers_of(node, "pads")) for node in self.convolutions)
        return id(self.x), shapes, strides, self.slopes


def merge_heads(model: ir.Model, *, layers: Collection[str] | None = None) -> ir.Model:
    """Merge heads that read the same map and have the same form; a head without a partner stays.

    The first convolutions become one from C to S·D channels, the others have S groups, and the linear layers become one
    batched product of [S, N, D] and [S, D, D].

    Args:
        model: changed in place.
        layers: module paths that heads lie in, such as `encoder.styles`; None for all.
    """
    groups: dict[tuple[object, ...], list[Head]] = defaultdict(list)
    for head in find_heads(model):
        if layers is None or head.layer in layers:
            groups[head.form].append(head)
    for heads in groups.values():
        if len(heads) > 1:
            _merge(model, heads)
    return model


def find_heads(model: ir.Model) -> list[Head]:
    """Return the heads in the order of their last nodes."""
    return [head for node in nodes_of_type(model, "Gemm") if (head := _head_before(node)) is not None]


def _head_before(linear: ir.Node) -> Head | None:
    """Walk from a linear layer back over its convolutions."""
    reshape = _only_producer(linear.inputs[0])
    if reshape is None or reshape.op_type != "Reshape" or not _is_head_linear(linear):
        return None
    convolutions: list[ir.Node] = []
    slopes: list[float] = []
    value = reshape.inputs[0]
    while value is not None:
        activation = _only_producer(value)
        if activation is None or activation.op_type != "LeakyRelu":
            break
        convolution = _only_producer(activation.inputs[0])
        if convolution is None or not _is_head_convolution(convolution):
            break
        convolutions.insert(0, convolution)
        slopes.insert(0, activation.attributes["alpha"].as_float())
        value = convolution.inputs[0]
    if value is None or not convolutions:
        return None
    return Head(x=value, convolutions=tuple(convolutions), slopes=tuple(slopes), linear=linear)


def _only_producer(value: ir.Value | None) -> ir.Node | None:
    """Return the node of a value that one node reads: a value with other readers is where a head begins."""
    return value.producer() if value is not None and only_user(value) is not None else None


def _has_constants(node: ir.Node) -> bool:
    """Whether weight and bias are there and constant."""
    return len(node.inputs) == 3 and all(array_of(value) is not None for value in node.inputs[1:])


def _is_head_linear(node: ir.Node) -> bool:
    factors = (node.attributes[name].as_float() for name in ("alpha", "beta") if name in node.attributes)
    transposed = integer_of(node, "transB", 0) == 1 and integer_of(node, "transA", 0) == 0
    return transposed and all(factor == 1 for factor in factors) and _has_constants(node)


def _is_head_convolution(node: ir.Node) -> bool:
    return (
        node.op_type == "Conv"
        and _has_constants(node)
        and integer_of(node, "group", 1) == 1
        and set(integers_of(node, "dilations")) <= {1}
        and has_explicit_pads(node)
    )


def _merge(model: ir.Model, heads: list[Head]) -> None:
    # The first linear layer may have users before the last head's convolutions: the merged nodes go in front of the
    # first convolution, where all that they read is known.
    anchor = min((head.convolutions[0] for head in heads), key=_positions(model).__getitem__)
    edit = Edit(model, anchor, "merge_heads")
    y = heads[0].x
    for index, node in enumerate(heads[0].convolutions):
        weight, bias = (
            edit.constant(np.concatenate([_constant(head.convolutions[index], place) for head in heads]))
            for place in (1, 2)
        )
        y = edit.add(
            "Conv",
            y,
            weight,
            bias,
            group=len(heads) if index else 1,
            strides=integers_of(node, "strides"),
            pads=integers_of(node, "pads"),
            kernel_shape=integers_of(node, "kernel_shape"),
        )
        y = edit.add("LeakyRelu", y, alpha=heads[0].slopes[index])  # [N, S·D, h, w]
    y = edit.add("Reshape", y, edit.integers(-1, len(heads), _constant(heads[0].linear, 1).shape[1]))
    y = edit.add("Transpose", y, perm=(1, 0, 2))  # [S, N, D]
    weight = edit.constant(np.stack([_constant(head.linear, 1).T for head in heads]))  # [S, D, D]
    bias = edit.constant(np.stack([_constant(head.linear, 2) for head in heads])[:, None])  # [S, 1, D]
    y = edit.add("Add", edit.add("MatMul", y, weight), bias)
    styles = [edit.add("Gather", y, edit.constant(np.array(index, np.int64)), axis=0) for index in range(len(heads))]
    for head, style in zip(heads, styles, strict=True):  # [N, D]
        replace_value(head.linear.outputs[0], style)
        _remove_head(model, head)


def _constant(node: ir.Node, place: int) -> Array:
    array = array_of(node.inputs[place])
    assert array is not None
    return array.astype(np.float32, copy=False)


def _positions(model: ir.Model) -> dict[ir.Node, int]:
    return {node: index for index, node in enumerate(model.graph)}


def _remove_head(model: ir.Model, head: Head) -> None:
    """Remove a head's nodes from its end."""
    node: ir.Node | None = head.linear
    while node is not None:
        value = node.inputs[0]
        model.graph.remove(node, safe=True)
        node = value.producer() if value is not None and value is not head.x else None
