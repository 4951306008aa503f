"""Styles and weights of order one in every modulated convolution, so that float16 neither overflows nor loses bits.

With m the largest magnitude of a sample's style s, and c_o that of an output channel's weights times √fan_in:

    conv(W, x ⊙ s) = m · c_o · conv(W / c_o, x ⊙ s / m)

m·c_o goes into the demodulation, or follows the convolution where there is none (ToRGB). Several convolutions of one
map, such as the phases of an up-convolution, share m, and one c that is the same for all channels. The sum of squares,
its epsilon and its root are left alone, in float32, and read the style as it was. So epsilon weighs the same, and the
function stays for all styles that it was finite for: zeros, tiny ones, and up to magnitudes of about 1e18, whose sum of
squares leaves float32. c is a power of two, so that nothing is lost when it divides the weights. Source: design §6.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from restyle_deploy.graph.edit import (
    Array,
    Edit,
    array_of,
    integer_of,
    integers_of,
    nodes_of_type,
    only_user,
    replace_value,
    sizes_of,
)
from restyle_deploy.ops.onnx_functions import Factor

# A style that is smaller is divided by this: zeros stay zeros, and the inverse is finite in float32.
LEAST_NORM = 1e-30
PIXEL_AXES = (2, 3)
# Where a convolution's weight has the output channels.
CHANNEL_AXES = {"Conv": 0, "ConvTranspose": 1}
# Places of an epilogue's factors among its inputs.
DEMOD_PLACES = {"BiasActEpilogue": 1, "UpFirDn2dEpilogue": 2}
NEXT_SCALE_PLACES = {"BiasActEpilogue": 4, "UpFirDn2dEpilogue": 5}


@dataclass(frozen=True, kw_only=True)
class _Reader:
    """A node that reads a factor [N, C] at one of its inputs: an `Unsqueeze`, or an epilogue."""

    node: ir.Node
    place: int

    @property
    def value(self) -> ir.Value:
        value = self.node.inputs[self.place]
        assert value is not None
        return value


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """A modulated convolution, or several of one modulated map.

    Attributes:
        convolutions: all that reads x ⊙ style; their weights are constant, and they have no bias.
        style: what scales their input.
        demod: what scales their result, after a filter or after they were interleaved, too; None where nothing does.
        keeps_channels: whether the result that demod scales has the one convolution's channels.
    """

    convolutions: tuple[ir.Node, ...]
    style: _Reader
    demod: _Reader | None
    keeps_channels: bool

    @property
    def weights(self) -> tuple[Array, ...]:
        """Each [O, I, k, k], or [I, O, k, k] of a transposed convolution."""
        arrays = (array_of(node.inputs[1]) for node in self.convolutions)
        return tuple(array.astype(np.float32, copy=False) for array in arrays if array is not None)


def normalize_styles(model: ir.Model) -> ir.Model:
    """Divide styles by their largest magnitude and weights by theirs, and multiply both back behind the convolution.

    Args:
        model: changed in place; a generator, fused by `fuse_epilogue` or not. What has no modulated convolution stays.
    """
    for layer in list(_find_layers(model)):
        _normalize(model, layer)
    model.graph.sort()
    return model


def _find_layers(model: ir.Model) -> Iterator[_Layer]:
    seen: set[ir.Value] = set()
    for op_type in CHANNEL_AXES:
        for node in nodes_of_type(model, op_type):
            modulated = node.inputs[0]
            if modulated is None or modulated in seen:
                continue
            seen.add(modulated)
            convolutions = tuple(dict.fromkeys(use.node for use in modulated.uses()))
            if modulated.is_graph_output() or not all(_is_scalable(user, modulated) for user in convolutions):
                continue
            style = _next_scale_of(modulated)
            if style is not None:
                demod, keeps_channels = _demod_after(convolutions)
                yield _Layer(convolutions=convolutions, style=style, demod=demod, keeps_channels=keeps_channels)


def _is_scalable(node: ir.Node, x: ir.Value) -> bool:
    """Whether a node is a convolution of x that a factor of x goes through, and whose weight is known."""
    is_convolution = node.op_type in CHANNEL_AXES and len(node.inputs) == 2 and node.inputs[0] is x
    return is_convolution and array_of(node.inputs[1]) is not None and integer_of(node, "group", 1) == 1


def _next_scale_of(modulated: ir.Value) -> _Reader | None:
    """Return what reads the style that a value was scaled by last."""
    node = modulated.producer()
    if node is None:
        return None
    if node.op_type in NEXT_SCALE_PLACES:
        has_factor = integer_of(node, "factors", 0) & Factor.NEXT_SCALE
        return _Reader(node=node, place=NEXT_SCALE_PLACES[node.op_type]) if has_factor else None
    return _unsqueezed_factor(node) if node.op_type == "Mul" else None


def _demod_after(convolutions: tuple[ir.Node, ...]) -> tuple[_Reader | None, bool]:
    """Follow the convolutions' result over the filter to what scales it; the second: it has the same channels there."""
    keeps_channels = len(convolutions) == 1
    value = convolutions[0].outputs[0] if keeps_channels else _interleaved(convolutions)
    if value is None:
        return None, False
    node = only_user(value)
    while node is not None and _is_filter(node, value):
        keeps_channels = keeps_channels and node.op_type != "DepthToSpace"
        value = node.outputs[0]
        node = only_user(value)
    if node is None or (node.op_type != "Mul" and node.inputs[0] is not value):
        return None, len(convolutions) == 1
    if node.op_type in DEMOD_PLACES and integer_of(node, "factors", 0) & Factor.DEMOD:
        return _Reader(node=node, place=DEMOD_PLACES[node.op_type]), keeps_channels
    return (_unsqueezed_factor(node) if node.op_type == "Mul" else None), keeps_channels


def _interleaved(convolutions: tuple[ir.Node, ...]) -> ir.Value | None:
    """Return the map that is made of the convolutions' results and of nothing else, each sample of its own.

    They are concatenated, then reordered by reshapes and transpositions; these leave the axis of the batch alone.
    """
    results, sizes = [node.outputs[0] for node in convolutions], [sizes_of(node.outputs[0]) for node in convolutions]
    value, node = None, only_user(results[0])
    if node is not None and node.op_type == "Concat" and integer_of(node, "axis", 0) == 1:
        is_whole = set(node.inputs) == set(results) and all(only_user(result) is node for result in results)
        value = node.outputs[0] if is_whole and None not in sizes else None
    count = sum(math.prod(size) for size in sizes if size is not None)
    while value is not None and (node := only_user(value)) is not None and _reorders(node, value, count):
        value = node.outputs[0]
    return value


def _reorders(node: ir.Node, value: ir.Value, count: int) -> bool:
    """Whether a node reorders the `count` numbers of each sample of a value."""
    if node.op_type == "Reshape" and node.inputs[0] is value:
        shape = array_of(node.inputs[1])
        return shape is not None and shape[0] in (-1, 1) and min(shape[1:]) > 0 and math.prod(shape[1:]) == count
    return node.op_type == "Transpose" and integers_of(node, "perm")[:1] == (0,)


def _is_filter(node: ir.Node, value: ir.Value) -> bool:
    """Whether a node filters each channel of a value, or interleaves channels."""
    if node.inputs[0] is not value:
        return False
    weight = array_of(node.inputs[1]) if node.op_type == "Conv" and len(node.inputs) == 2 else None
    is_depthwise = weight is not None and weight.shape[:2] == (integer_of(node, "group", 1), 1)
    return is_depthwise or node.op_type in ("UpFirDn2d", "DepthToSpace")


def _unsqueezed_factor(product: ir.Node) -> _Reader | None:
    """Return what unsqueezes the factor of a product, where only the product reads it."""
    for factor in product.inputs:
        node = factor.producer() if factor is not None else None
        if node is None or node.op_type != "Unsqueeze" or only_user(node.outputs[0]) is not product:
            continue
        axes = array_of(node.inputs[1])
        if axes is not None and tuple(axes.tolist()) == PIXEL_AXES:
            return _Reader(node=node, place=0)
    return None


def _normalize(model: ir.Model, layer: _Layer) -> None:
    edit = Edit(model, layer.convolutions[0], "normalize_styles")
    style = layer.style.value
    norm = edit.add("ReduceMax", edit.add("Abs", style), edit.integers(1), keepdims=1)  # [N, 1]
    norm = edit.add("Max", norm, edit.constant(np.float32(LEAST_NORM).reshape(1)))
    layer.style.node.replace_input_with(layer.style.place, edit.add("Div", style, norm))
    weight_norms = _divide_weights(edit, layer)
    factor = edit.add("Mul", norm, edit.constant(weight_norms))  # [N, O] or [N, 1]
    if layer.demod is not None:
        product = edit.add("Mul", layer.demod.value, factor)
        layer.demod.node.replace_input_with(layer.demod.place, product)
        return
    factor = edit.add("Unsqueeze", factor, edit.integers(*PIXEL_AXES))
    for convolution in layer.convolutions:
        behind = Edit(model, convolution, "normalize_styles")
        attributes = {name: attribute.value for name, attribute in convolution.attributes.items()}
        inputs = (value for value in convolution.inputs if value is not None)
        y = behind.add("Mul", behind.add(convolution.op_type, *inputs, **attributes), factor)
        replace_value(convolution.outputs[0], y)
        model.graph.remove(convolution, safe=True)


def _divide_weights(edit: Edit, layer: _Layer) -> Array:
    """Divide a layer's weights by what this returns: [O] for the channels of one convolution, or [1] for all."""
    norms: Array
    axes = [CHANNEL_AXES[node.op_type] for node in layer.convolutions]
    of_each = [
        _weight_norms(weight, axis, per_channel=layer.keeps_channels)
        for weight, axis in zip(layer.weights, axes, strict=True)
    ]
    norms = np.max(of_each, axis=0)
    for node, weight, axis in zip(layer.convolutions, layer.weights, axes, strict=True):
        shape = [-1 if index == axis else 1 for index in range(weight.ndim)]
        node.replace_input_with(1, edit.constant(weight / norms.reshape(shape)))
    return norms


def _weight_norms(weight: Array, channel_axis: int, *, per_channel: bool) -> Array:
    """Return max |W|·√fan_in of each output channel, or of all, rounded up to a power of two; 1 for zeros."""
    fan_in = weight.size // weight.shape[channel_axis]
    other_axes = tuple(axis for axis in range(weight.ndim) if axis != channel_axis)
    largest = np.abs(weight).max(axis=other_axes if per_channel else None).reshape(-1).astype(np.float64)
    norms = np.where(largest > 0, largest, 1 / np.sqrt(fan_in)) * np.sqrt(fan_in)
    rounded: Array = np.exp2(np.ceil(np.log2(norms))).astype(np.float32)
    return rounded
