"""Upsample, FIR-filter and downsample in one operator: torch reference and ONNX local function."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    import onnx

Pads = tuple[int, int, int, int]

# The node's attributes are ONNX-like lists: up and down [vertical, horizontal], pads [top, left, bottom, right].
# `channels` is the static C of x, so that the filter is one depthwise convolution.
_ONNX_FUNCTION = """
<opset_import: ["" : 20], domain: "restyle_deploy">
UpFirDn2d <up, down, pads, channels> (x, kernel) => (y) {
    zero = Constant <value_ints = [0]> ()
    one = Constant <value_ints = [1]> ()
    factors = Constant <value_ints: ints = @up> ()
    inserted = Sub (factors, one)
    no_pads = Constant <value_ints = [0, 0, 0, 0, 0, 0, 0, 0, 0]> ()
    all_insertions = Concat <axis = 0> (no_pads, inserted)
    insertion_order = Constant <value_ints = [0, 0, 0, 0, 0, 0, 0, 0, 0, 9, 0, 10]> ()
    insertion_pads = Gather (all_insertions, insertion_order)
    inner_axes = Constant <value_ints = [3, 5]> ()
    columns = Unsqueeze (x, inner_axes)
    with_zeros = Pad (columns, insertion_pads)
    outer_shape = Shape <end = 2> (x)
    inner_shape = Shape <start = 2> (x)
    upsampled_inner = Mul (inner_shape, factors)
    upsampled_shape = Concat <axis = 0> (outer_shape, upsampled_inner)
    upsampled = Reshape (with_zeros, upsampled_shape)
    border = Constant <value_ints: ints = @pads> ()
    zero_and_border = Concat <axis = 0> (zero, border)
    border_order = Constant <value_ints = [0, 0, 1, 2, 0, 0, 3, 4]> ()
    border_pads = Gather (zero_and_border, border_order)
    padded = Pad (upsampled, border_pads)
    last = Constant <value_ints = [-1, -1]> ()
    before_first = Constant <value_ints = [-9223372036854775807, -9223372036854775807]> ()
    outer_axes = Constant <value_ints = [0, 1]> ()
    flipped = Slice (kernel, last, before_first, outer_axes, last)
    depthwise = Unsqueeze (flipped, outer_axes)
    channel_count = Constant <value_int: int = @channels> ()
    channel_count_1d = Reshape (channel_count, one)
    weight_shape = Concat <axis = 0> (channel_count_1d, one, one, one)
    weight = Expand (depthwise, weight_shape)
    y = Conv <group: int = @channels, strides: ints = @down> (padded, weight)
}
"""


def upfirdn2d(x: Tensor, kernel: Tensor, *, up: int = 1, down: int = 1, pads: Pads = (0, 0, 0, 0)) -> Tensor:
    """Insert zeros, pad, convolve with a FIR filter and keep every `down`-th sample, in plain torch.

    While a graph is exported, emit one node `restyle_deploy::UpFirDn2d` instead.

    Args:
        x: [N, C, H, W] floating point.
        kernel: [kh, kw] filter, same dtype; a true convolution (the filter is flipped).
        up: `up - 1` zeros follow each sample, in both axes.
        down: stride of the samples kept, in both axes.
        pads: (top, left, bottom, right), applied to the upsampled image; negative values crop.
    Returns:
        [N, C, (H·up + top + bottom − kh) // down + 1, (W·up + left + right − kw) // down + 1].
    Raises:
        ValueError: the padded image is smaller than the filter.
    Source: StyleGAN2, arXiv:1912.04958; the semantics of its `upfirdn_2d`.
    """
    batch, channels, height, width = x.shape
    top, left, bottom, right = pads
    padded_height, padded_width = height * up + top + bottom, width * up + left + right
    kernel_height, kernel_width = kernel.shape
    if padded_height < kernel_height or padded_width < kernel_width:
        raise ValueError(
            f"upfirdn2d: the padded image {padded_height}×{padded_width} "
            f"is smaller than the filter {kernel_height}×{kernel_width}"
        )
    if torch.onnx.is_in_onnx_export():
        size = ((padded_height - kernel_height) // down + 1, (padded_width - kernel_width) // down + 1)
        return torch.onnx.ops.symbolic(
            "restyle_deploy::UpFirDn2d",
            (x, kernel),
            {"up": [up, up], "down": [down, down], "pads": list(pads), "channels": channels},
            dtype=x.dtype,
            shape=(batch, channels, *size),
            version=1,
        )
    if up > 1:
        x = functional.pad(x.reshape(batch, channels, height, 1, width, 1), (0, up - 1, 0, 0, 0, up - 1))
        x = x.view(batch, channels, height * up, width * up)
    x = functional.pad(x, (left, right, top, bottom))
    weight = torch.flip(kernel, (0, 1)).expand(channels, 1, kernel_height, kernel_width)
    return functional.conv2d(x, weight, stride=down, groups=channels)


def onnx_function() -> "onnx.FunctionProto":
    """Return the node's body in standard operators, for runtimes without a kernel of ours."""
    import onnx

    return onnx.parser.parse_function(_ONNX_FUNCTION)
