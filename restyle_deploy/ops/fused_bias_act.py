"""Bias, leaky ReLU and gain in one operator: torch reference and ONNX local function."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    import onnx

NEGATIVE_SLOPE = 0.2
GAIN = math.sqrt(2.0)

_ONNX_FUNCTION = """
<opset_import: ["" : 20], domain: "restyle_deploy">
FusedBiasAct <negative_slope, gain> (x, bias) => (y) {
    axes = Constant <value_ints = [1, 2]> ()
    broadcast_bias = Unsqueeze (bias, axes)
    sum = Add (x, broadcast_bias)
    activated = LeakyRelu <alpha: float = @negative_slope> (sum)
    gain_float = Constant <value_float: float = @gain> ()
    gain_typed = CastLike (gain_float, activated)
    y = Mul (activated, gain_typed)
}
"""


def fused_bias_act(x: Tensor, bias: Tensor, *, negative_slope: float = NEGATIVE_SLOPE, gain: float = GAIN) -> Tensor:
    """Compute `gain * leaky_relu(x + bias)` in plain torch: the reference of the kernels.

    While a graph is exported, emit one node `restyle_deploy::FusedBiasAct` instead; `x` is [N, C, H, W] then.

    Args:
        x: [N, C, ...] floating point.
        bias: [C], same dtype; added along axis 1.
        negative_slope: factor of negative values.
        gain: factor of the result; √2 keeps the variance.
    Returns:
        [N, C, ...], same dtype as `x`, newly allocated.
    Source: StyleGAN2, arXiv:1912.04958, appendix B; the fused activation of its code.
    """
    if torch.onnx.is_in_onnx_export():
        return torch.onnx.ops.symbolic(
            "restyle_deploy::FusedBiasAct",
            (x, bias),
            {"negative_slope": negative_slope, "gain": gain},
            dtype=x.dtype,
            shape=x.shape,
            version=1,
        )
    broadcast_bias = bias.view(1, -1, *([1] * (x.ndim - 2)))
    return functional.leaky_relu(x + broadcast_bias, negative_slope) * gain


def onnx_function() -> "onnx.FunctionProto":
    """Return the node's body in standard operators, for runtimes without a kernel of ours."""
    import onnx

    return onnx.parser.parse_function(_ONNX_FUNCTION)
