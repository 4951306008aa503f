"""Batch normalisation before a zero-padded convolution, folded into it, with the border corrected: 4 of design §5."""

from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from restyle_deploy.graph.edit import (
    Array,
    Edit,
    array_of,
    has_explicit_pads,
    integer_of,
    integers_of,
    nodes_of_type,
    only_user,
    replace_value,
    sizes_of,
    window_of,
)

DEFAULT_EPSILON = 1e-5


def leading_batchnorm(model: ir.Model, *, layers: Collection[str] | None = None) -> ir.Model:
    """Fold scale and shift into the convolution's weight and one constant map.

    With y = scale ⊙ x + shift, zeros padded around y: conv(W, y) = conv(W·scale, x) + conv(W, shift within the image).
    The second term depends on no input. It is the same in the interior and differs where the kernel reaches over the
    border, so it is added as a map of the output's size.

    Args:
        model: changed in place; a normalisation that several nodes read, or whose size is unknown, stays.
        layers: module paths of the normalisations; None for all.
    """
    for node in nodes_of_type(model, "BatchNormalization", layers):
        convolution, parameters = only_user(node.outputs[0]), [array_of(value) for value in node.inputs[1:]]
        sizes, x = sizes_of(node.outputs[0]), node.inputs[0]
        if convolution is None or sizes is None or x is None or any(array is None for array in parameters):
            continue
        weight = array_of(convolution.inputs[1]) if convolution.op_type == "Conv" else None
        plain = integer_of(convolution, "group", 1) == 1 and has_explicit_pads(convolution)
        if weight is None or not plain or convolution.outputs[0].shape is None:
            continue
        epsilon = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else DEFAULT_EPSILON
        gamma, beta, mean, variance = (np.asarray(array, np.float64) for array in parameters)
        scale = gamma / np.sqrt(variance + epsilon)  # [I]
        edit = Edit(model, convolution, "leading_batchnorm")
        folded = edit.constant((weight.astype(np.float64) * scale[:, None, None]).astype(np.float32))
        others = convolution.inputs[2:]
        y = edit.add("Conv", x, folded, *(value for value in others if value is not None), **window_of(convolution))
        shifted = _convolve_constant(weight.astype(np.float64), beta - mean * scale, sizes[1:], convolution)
        replace_value(convolution.outputs[0], edit.add("Add", y, edit.constant(shifted)))
        model.graph.remove((convolution, node), safe=True)
    return model


def _convolve_constant(weight: np.ndarray, shift: np.ndarray, size: tuple[int, ...], node: ir.Node) -> Array:
    """Convolve an image [I, H, W] of one value per channel, as `node` does: [1, O, H', W'] float32."""
    taps = np.einsum("oikl,i->okl", weight, shift)  # [O, kh, kw]
    pads, strides = integers_of(node, "pads", (0, 0, 0, 0)), integers_of(node, "strides", (1, 1))
    dilations = integers_of(node, "dilations", (1, 1))
    inside = [
        _taps_inside(size[axis], taps.shape[1 + axis], pads[axis], pads[axis + 2], strides[axis], dilations[axis])
        for axis in (0, 1)
    ]
    shifted: Array = np.einsum("okl,yk,xl->oyx", taps, *inside)[None].astype(np.float32)
    return shifted


def _taps_inside(size: int, taps: int, before: int, after: int, stride: int, dilation: int) -> np.ndarray:
    """Return [outputs, taps]: 1 where a tap reads the image, 0 where it reads padding."""
    outputs = (size + before + after - dilation * (taps - 1) - 1) // stride + 1
    positions = np.arange(outputs)[:, None] * stride + np.arange(taps)[None] * dilation - before
    return ((positions >= 0) & (positions < size)).astype(np.float64)
