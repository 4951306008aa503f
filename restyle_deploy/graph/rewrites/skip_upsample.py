"""Upsampling of the skip image as one depthwise transposed convolution: 3 of design §5."""

from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from restyle_deploy.graph.edit import Edit, array_of, integer_of, integers_of, nodes_of_type, replace_value


def skip_upsample(model: ir.Model, *, layers: Collection[str] | None = None) -> ir.Model:
    """Turn `UpFirDn2d` with upsampling and without downsampling into a depthwise transposed convolution.

    Sample r of the filtered image is Σ_i x[i]·K[r + s − up·i] with s = kh − 1 − top: a transposed convolution whose
    output begins s samples late. It leaves out kh − up − bottom at the end; where either is negative, the node stays.

    Args:
        model: changed in place.
        layers: module paths; None for all.
    """
    for node in nodes_of_type(model, "UpFirDn2d", layers):
        kernel, up = array_of(node.inputs[1]), integers_of(node, "up")
        if kernel is None or up == (1, 1) or integers_of(node, "down") != (1, 1):
            continue
        top, left, bottom, right = integers_of(node, "pads")
        (height, width), channels = kernel.shape, integer_of(node, "channels", 0)
        pads = (height - 1 - top, width - 1 - left, height - up[0] - bottom, width - up[1] - right)
        if min(pads) < 0:
            continue
        edit = Edit(model, node, "skip_upsample")
        x = node.inputs[0]
        assert x is not None
        weight = edit.constant(np.tile(kernel.astype(np.float32), (channels, 1, 1, 1)))  # [C, 1, kh, kw]
        y = edit.add("ConvTranspose", x, weight, group=channels, strides=up, pads=pads, kernel_shape=(height, width))
        replace_value(node.outputs[0], y)
        model.graph.remove(node, safe=True)
    return model
