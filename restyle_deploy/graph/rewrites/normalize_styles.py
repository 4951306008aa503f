"""Styles and weights of order one in every modulated convolution, so that float16 neither overflows nor loses bits.

With m the largest magnitude of a sample's style s, and c_o that of an output channel's weights times √fan_in:

    conv(W, x ⊙ s) = m · c_o · conv(W / c_o, x ⊙ s / m)

m·c_o goes into the demodulation, or follows the convolution where there is none (ToRGB). The sum of squares, its
epsilon and its root are left alone, in float32, and read the style as it was. So epsilon weighs the same, and the
function stays for all styles that it was finite for: zeros, tiny ones, and up to magnitudes of about 1e18, whose sum of
squares leaves float32. c is a power of two, so that nothing is lost when it divides the weights. Source: design §6.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from restyle_deploy.graph.edit import Array, Edit, array_of, integer_of, nodes_of_type, only_user, replace_value
from restyle_deploy.ops.onnx_functions import Factor

# A style that is smaller is divided by this: zeros stay zeros, and the inverse is finite in float32.
LEAST_NORM = 1e-30
PIXEL_AXES = (2, 3)
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
    """A modulated convolution.

    Attributes:
        convolution: reads x ⊙ style, which nothing else reads; its weight is constant, and it has no bias.
        weight: [O, I, k, k], or [I, O, k, k] of a transposed convolution.
        style: what scales its input.
        demod: what scales its result, perhaps after a filter; None where nothing does.
        keeps_channels: whether the result that demod scales has the convolution's channels.
    """

    convolution: ir.Node
    weight: Array
    style: _Reader
    demod: _Reader | None
    keeps_channels: bool


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
    for op_type, axis in (("Conv", 0), ("ConvTranspose", 1)):
        for node in nodes_of_type(model, op_type):
            weight, modulated = array_of(node.inputs[1]), node.inputs[0]
            if weight is None or modulated is None or len(node.inputs) > 2 or integer_of(node, "group", 1) != 1:
                continue
            style = _next_scale_of(modulated) if only_user(modulated) is node else None
            if style is not None:
                demod, keeps_channels = _demod_after(node, channels=weight.shape[axis])
                yield _Layer(
                    convolution=node,
                    weight=weight.astype(np.float32, copy=False),
                    style=style,
                    demod=demod,
                    keeps_channels=keeps_channels,
                )


def _next_scale_of(modulated: ir.Value) -> _Reader | None:
    """Return what reads the style that a value was scaled by last."""
    node = modulated.producer()
    if node is None:
        return None
    if node.op_type in NEXT_SCALE_PLACES:
        has_factor = integer_of(node, "factors", 0) & Factor.NEXT_SCALE
        return _Reader(node=node, place=NEXT_SCALE_PLACES[node.op_type]) if has_factor else None
    return _unsqueezed_factor(node) if node.op_type == "Mul" else None


def _demod_after(convolution: ir.Node, *, channels: int) -> tuple[_Reader | None, bool]:
    """Follow a convolution's result over the filter to what scales it; the second: it has the same channels there."""
    keeps_channels, value = True, convolution.outputs[0]
    node = only_user(value)
    while node is not None and _is_filter(node, value):
        keeps_channels = keeps_channels and node.op_type != "DepthToSpace"
        value = node.outputs[0]
        node = only_user(value)
    if node is None or (node.op_type != "Mul" and node.inputs[0] is not value):
        return None, True
    if node.op_type in DEMOD_PLACES and integer_of(node, "factors", 0) & Factor.DEMOD:
        return _Reader(node=node, place=DEMOD_PLACES[node.op_type]), keeps_channels
    return (_unsqueezed_factor(node) if node.op_type == "Mul" else None), keeps_channels


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
    convolution, weight = layer.convolution, layer.weight
    channel_axis = 0 if convolution.op_type == "Conv" else 1
    norms = _weight_norms(weight, channel_axis, per_channel=layer.keeps_channels)  # [O] or [1]
    edit = Edit(model, convolution, "normalize_styles")
    shape = [-1 if axis == channel_axis else 1 for axis in range(weight.ndim)]
    convolution.replace_input_with(1, edit.constant(weight / norms.reshape(shape)))
    style = layer.style.value
    norm = edit.add("ReduceMax", edit.add("Abs", style), edit.integers(1), keepdims=1)  # [N, 1]
    norm = edit.add("Max", norm, edit.constant(np.float32(LEAST_NORM).reshape(1)))
    layer.style.node.replace_input_with(layer.style.place, edit.add("Div", style, norm))
    factor = edit.add("Mul", norm, edit.constant(norms))  # [N, O] or [N, 1]
    if layer.demod is not None:
        product = edit.add("Mul", layer.demod.value, factor)
        layer.demod.node.replace_input_with(layer.demod.place, product)
        return
    attributes = {name: attribute.value for name, attribute in convolution.attributes.items()}
    y = edit.add(convolution.op_type, *(value for value in convolution.inputs if value is not None), **attributes)
    y = edit.add("Mul", y, edit.add("Unsqueeze", factor, edit.integers(*PIXEL_AXES)))
    replace_value(convolution.outputs[0], y)
    model.graph.remove(convolution, safe=True)


def _weight_norms(weight: Array, channel_axis: int, *, per_channel: bool) -> Array:
    """Return max |W|·√fan_in of each output channel, or of all, rounded up to a power of two; 1 for zeros."""
    fan_in = weight.size // weight.shape[channel_axis]
    other_axes = tuple(axis for axis in range(weight.ndim) if axis != channel_axis)
    largest = np.abs(weight).max(axis=other_axes if per_channel else None).reshape(-1).astype(np.float64)
    norms = np.where(largest > 0, largest, 1 / np.sqrt(fan_in)) * np.sqrt(fan_in)
    rounded: Array = np.exp2(np.ceil(np.log2(norms))).astype(np.float32)
    return rounded
