"""The custom operators as ONNX functions of standard operators, for runtimes without a kernel of ours; without torch.

`FusedBiasAct` and `UpFirDn2d` are what the exporter emits. `BiasActEpilogue` and `UpFirDn2dEpilogue` are made of them
by `graph.rewrites.fuse_epilogue`, for backends that have our kernels:

    y = gain · lrelu(v · demod[n, c] + noise[h, w] + bias[c], negative_slope) · next_scale[n, c]

with v = x, or v = upfirdn2d(x, kernel). x, noise and y have one type T: float32, float16 or bfloat16. All other inputs
are float32. A factor that is absent is its neutral element, of sizes 1: demod [1, 1] ones, noise [1, 1, 1, 1] zeros,
bias [1] zeros, next_scale [1, 1] ones. The attribute `factors` says which are present; the functions read all of them.
Both epilogues and `FusedBiasAct` compute in float32 whatever T is; `UpFirDn2d` filters in T.
"""

import enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

DOMAIN = "restyle_deploy"
DOMAIN_VERSION = 1
OPSET = 20


class Factor(enum.IntFlag):
    """The factors of an epilogue that are present: the attribute `factors`, and a parameter of the kernels."""

    NONE = 0
    DEMOD = 1
    NOISE = 2
    BIAS = 4
    NEXT_SCALE = 8
    ACTIVATION = 16


# The node's attributes are ONNX-like lists: up and down [vertical, horizontal], pads [top, left, bottom, right].
# `channels` is the static C of x, so that the filter is one depthwise convolution.
_FILTER = """
    zero = Constant <value_ints = [0]> ()
    one = Constant <value_ints = [1]> ()
    insertions = Constant <value_ints: ints = @up> ()
    inserted = Sub (insertions, one)
    no_pads = Constant <value_ints = [0, 0, 0, 0, 0, 0, 0, 0, 0]> ()
    all_insertions = Concat <axis = 0> (no_pads, inserted)
    insertion_order = Constant <value_ints = [0, 0, 0, 0, 0, 0, 0, 0, 0, 9, 0, 10]> ()
    insertion_pads = Gather (all_insertions, insertion_order)
    inner_axes = Constant <value_ints = [3, 5]> ()
    columns = Unsqueeze ({image}, inner_axes)
    with_zeros = Pad (columns, insertion_pads)
    outer_shape = Shape <end = 2> ({image})
    inner_shape = Shape <start = 2> ({image})
    upsampled_inner = Mul (inner_shape, insertions)
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
    flipped = Slice ({taps}, last, before_first, outer_axes, last)
    depthwise = Unsqueeze (flipped, outer_axes)
    channel_count = Constant <value_int: int = @channels> ()
    channel_count_1d = Reshape (channel_count, one)
    weight_shape = Concat <axis = 0> (channel_count_1d, one, one, one)
    weight = Expand (depthwise, weight_shape)
    {filtered} = Conv <group: int = @channels, strides: ints = @down> (padded, weight)
"""

# From `value`, float32, to `activated`, float32.
_DEMODULATION_AND_NOISE = """
    pixel_axes = Constant <value_ints = [2, 3]> ()
    broadcast_demod = Unsqueeze (demod, pixel_axes)
    demodulated = Mul (value, broadcast_demod)
    wide_noise = Cast <to = 1> (noise)
    noisy = Add (demodulated, wide_noise)
"""
_BIAS_AND_ACTIVATION = """
    bias_axes = Constant <value_ints = [1, 2]> ()
    wide_bias = Cast <to = 1> (bias)
    broadcast_bias = Unsqueeze (wide_bias, bias_axes)
    biased = Add (noisy, broadcast_bias)
    bent = LeakyRelu <alpha: float = @negative_slope> (biased)
    gain_factor = Constant <value_float: float = @gain> ()
    activated = Mul (bent, gain_factor)
"""
_NEXT_SCALE = """
    broadcast_next_scale = Unsqueeze (next_scale, pixel_axes)
    scaled = Mul (activated, broadcast_next_scale)
    y = CastLike (scaled, x)
"""
_EPILOGUE = _DEMODULATION_AND_NOISE + _BIAS_AND_ACTIVATION + _NEXT_SCALE

_SIGNATURES_AND_BODIES = {
    "FusedBiasAct": (
        "<negative_slope, gain> (x, bias)",
        f"noisy = Cast <to = 1> (x) {_BIAS_AND_ACTIVATION} y = CastLike (activated, x)",
    ),
    "UpFirDn2d": (
        "<up, down, pads, channels> (x, kernel)",
        "typed_kernel = CastLike (kernel, x)" + _FILTER.format(image="x", taps="typed_kernel", filtered="y"),
    ),
    "BiasActEpilogue": (
        "<negative_slope, gain, factors> (x, demod, noise, bias, next_scale)",
        f"value = Cast <to = 1> (x) {_EPILOGUE}",
    ),
    "UpFirDn2dEpilogue": (
        "<up, down, pads, channels, negative_slope, gain, factors> (x, kernel, demod, noise, bias, next_scale)",
        "image = Cast <to = 1> (x)" + _FILTER.format(image="image", taps="kernel", filtered="value") + _EPILOGUE,
    ),
}
OPERATORS = frozenset(_SIGNATURES_AND_BODIES)


def onnx_function(op_type: str, *, opset: int = OPSET) -> "onnx.FunctionProto":
    """Return the body of an operator of ours.

    Args:
        op_type: one of `OPERATORS`.
        opset: of the standard operators, at least 20; bfloat16 needs 22.
    """
    import onnx

    signature, body = _SIGNATURES_AND_BODIES[op_type]
    text = f'<opset_import: ["" : {opset}], domain: "{DOMAIN}">\n{op_type} {signature} => (y) {{ {body} }}'
    return onnx.parser.parse_function(text)
