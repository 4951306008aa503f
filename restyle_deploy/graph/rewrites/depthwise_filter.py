"""FIR filter as a depthwise convolution: with the transposed convolution before it, up-convolution (a) of design §5."""

from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from restyle_deploy.graph.edit import Array, Edit, array_of, integer_of, integers_of, nodes_of_type, replace_value

SEPARABLE_TOLERANCE = 1e-6


def depthwise_filter(model: ir.Model, *, layers: Collection[str] | None = None, separable: bool = False) -> ir.Model:
    """Turn `UpFirDn2d` without upsampling into one depthwise convolution, or into two of one axis each.

    Args:
        model: changed in place.
        layers: module paths; None for all.
        separable: filter columns, then rows; a filter that is no outer product stays one convolution.
    """
    for node in nodes_of_type(model, "UpFirDn2d", layers):
        kernel = array_of(node.inputs[1])
        pads = integers_of(node, "pads")
        if kernel is None or integers_of(node, "up") != (1, 1) or min(pads) < 0:
            continue
        kernel = np.flip(kernel.astype(np.float32))
        factors = _factor_kernel(kernel) if separable else None
        edit = Edit(model, node, "depthwise_filter")
        x, channels, (down_y, down_x) = node.inputs[0], integer_of(node, "channels", 0), integers_of(node, "down")
        assert x is not None
        top, left, bottom, right = pads
        if factors is None:
            y = _filter(edit, x, kernel, channels, pads=pads, strides=(down_y, down_x))
        else:
            column, row = factors
            y = _filter(edit, x, column[:, None], channels, pads=(top, 0, bottom, 0), strides=(down_y, 1))
            y = _filter(edit, y, row[None], channels, pads=(0, left, 0, right), strides=(1, down_x))
        replace_value(node.outputs[0], y)
        model.graph.remove(node, safe=True)
    return model


def separable_filter(model: ir.Model, *, layers: Collection[str] | None = None) -> ir.Model:
    """Turn `UpFirDn2d` without upsampling into two depthwise convolutions, one per axis."""
    return depthwise_filter(model, layers=layers, separable=True)


def _filter(
    edit: Edit, x: ir.Value, kernel: Array, channels: int, *, pads: tuple[int, ...], strides: tuple[int, int]
) -> ir.Value:
    weight = edit.constant(np.tile(kernel, (channels, 1, 1, 1)))  # [C, 1, kh, kw]
    return edit.add("Conv", x, weight, group=channels, pads=pads, strides=strides, kernel_shape=kernel.shape)


def _factor_kernel(kernel: Array) -> tuple[Array, Array] | None:
    """Return (column, row) whose outer product is the kernel, None where there are none."""
    left, singular, right = np.linalg.svd(kernel.astype(np.float64))
    if len(singular) > 1 and singular[1] > SEPARABLE_TOLERANCE * singular[0]:
        return None
    root = np.sqrt(singular[0])
    return (left[:, 0] * root).astype(np.float32), (right[0] * root).astype(np.float32)
