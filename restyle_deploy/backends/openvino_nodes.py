"""Our operators in OpenVINO's: it does not read the functions that a graph has for them."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
import openvino as ov
from openvino import opset15 as ops
from openvino.frontend import NodeContext


def _convert_fused_bias_act(node: NodeContext) -> list[ov.Output]:
    """Compute `gain * leaky_relu(x + bias)`; see `ops.fused_bias_act`."""
    bias = ops.unsqueeze(node.get_input(1), np.array([1, 2]))  # [C, 1, 1]
    activated = ops.prelu(
        ops.add(node.get_input(0), bias), np.array([node.get_attribute("negative_slope")], np.float32)
    )
    return list(ops.multiply(activated, np.array(node.get_attribute("gain"), np.float32)).outputs())


def _convert_upfirdn2d(node: NodeContext) -> list[ov.Output]:
    """Insert zeros, pad, filter and keep every `down`-th sample; see `ops.upfirdn2d`.

    Zeros and filter are one transposed convolution where that gives the same border: it starts before the first
    sample by the filter's size, so that `begin` and `end` are what to cut off.
    """
    x, kernel = node.get_input(0), node.get_input(1)  # [N, C, H, W], [kh, kw]
    up, down, pads = (list(map(int, node.get_attribute(name))) for name in ("up", "down", "pads"))
    channels, size = int(node.get_attribute("channels")), list(kernel.get_shape())
    begin = [size[axis] - 1 - pads[axis] for axis in (0, 1)]
    end = [size[axis] - up[axis] - pads[2 + axis] for axis in (0, 1)]
    if up != [1, 1] and down == [1, 1] and min(begin + end) >= 0:
        weight = ops.broadcast(kernel, np.array([channels, 1, 1, *size]))  # [C, 1, 1, kh, kw]
        return list(
            ops.group_convolution_backprop_data(
                x, weight, strides=up, pads_begin=begin, pads_end=end, dilations=[1, 1]
            ).outputs()
        )
    if up != [1, 1]:
        x = _insert_zeros(x, up, channels)
    if min(pads) < 0:
        cropped = [min(0, pad) for pad in pads]
        x = ops.pad(x, np.array([0, 0, *cropped[:2]]), np.array([0, 0, *cropped[2:]]), "constant", np.float32(0))
    last, before_first = np.array([-1, -1]), np.full(2, -(2**31))
    flipped = ops.slice(kernel, last, before_first, last, np.array([0, 1]))
    padded = [max(0, pad) for pad in pads]
    filtered = ops.group_convolution(
        x,
        ops.broadcast(flipped, np.array([channels, 1, 1, *size])),  # [C, 1, 1, kh, kw]
        strides=down,
        pads_begin=padded[:2],
        pads_end=padded[2:],
        dilations=[1, 1],
    )
    return list(filtered.outputs())


def _insert_zeros(x: ov.Output, up: list[int], channels: int) -> ov.Node:
    """Let `up - 1` zeros follow each sample: a transposed convolution with a filter of one sample."""
    return ops.group_convolution_backprop_data(
        x,
        np.ones((channels, 1, 1, 1, 1), np.float32),
        strides=up,
        pads_begin=[0, 0],
        pads_end=[0, 0],
        dilations=[1, 1],
        output_padding=[factor - 1 for factor in up],
    )


# By operator of the domain `restyle_deploy`.
CONVERSIONS: Mapping[str, Callable[[NodeContext], list[ov.Output]]] = MappingProxyType(
    {"FusedBiasAct": _convert_fused_bias_act, "UpFirDn2d": _convert_upfirdn2d}
)
