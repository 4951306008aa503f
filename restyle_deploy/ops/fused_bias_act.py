"""Demodulation, noise, bias, leaky ReLU, gain and the next layer's style in one operator: torch reference."""

import math
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from torch.nn import functional

from restyle_deploy.ops import onnx_functions
from restyle_deploy.ops.switch import active_kernels

if TYPE_CHECKING:
    import onnx

NEGATIVE_SLOPE = 0.2
GAIN = math.sqrt(2.0)


def fused_bias_act(
    x: Tensor,
    bias: Tensor | None = None,
    *,
    demod: Tensor | None = None,
    noise: Tensor | None = None,
    noise_strength: float = 1.0,
    next_scale: Tensor | None = None,
    negative_slope: float | None = NEGATIVE_SLOPE,
    gain: float | None = GAIN,
) -> Tensor:
    """Compute `gain * leaky_relu(x * demod + noise_strength * noise + bias) * next_scale` in plain torch.

    The reference of the kernels, which compute it on a GPU inside `ops.switch.use_cuda_kernels`. Each factor is
    optional, and the arithmetic is in the type of `x`. While a graph is exported, bias and activation alone become one
    node `restyle_deploy::FusedBiasAct`; `x` is [N, C, H, W] then.

    Args:
        x: [N, C, ...] floating point.
        bias: [C], same dtype as all tensors here; added along axis 1.
        demod: [N, C].
        noise: broadcastable to `x`; of a convolution, [1, 1, H, W].
        noise_strength: factor of `noise`.
        next_scale: [N, C], the style of the convolution that follows.
        negative_slope: factor of negative values; None for no activation.
        gain: factor of the result; √2 keeps the variance. None for 1.
    Returns:
        [N, C, ...], same dtype as `x`.
    Source: StyleGAN2, arXiv:1912.04958, appendix B; the fused activation of its code.
    """
    is_plain = demod is None and noise is None and next_scale is None
    is_activated = bias is not None and negative_slope is not None and gain is not None
    if torch.onnx.is_in_onnx_export() and is_plain and is_activated:
        return torch.onnx.ops.symbolic(
            "restyle_deploy::FusedBiasAct",
            (x, bias),
            {"negative_slope": cast(float, negative_slope), "gain": cast(float, gain)},
            dtype=x.dtype,
            shape=x.shape,
            version=onnx_functions.DOMAIN_VERSION,
        )
    if (kernels := active_kernels(x)) is not None:
        y: Tensor = kernels.fused_bias_act(
            x,
            bias,
            demod=demod,
            noise=noise,
            noise_strength=noise_strength,
            next_scale=next_scale,
            negative_slope=negative_slope,
            gain=gain,
        )
        return y
    pixel_axes = [1] * (x.ndim - 2)
    if demod is not None:
        x = x * demod.view(*demod.shape, *pixel_axes)
    if noise is not None:
        x = x + noise_strength * noise
    if bias is not None:
        x = x + bias.view(1, -1, *pixel_axes)
    if negative_slope is not None:
        x = functional.leaky_relu(x, negative_slope)
    if gain is not None:
        x = x * gain
    if next_scale is not None:
        x = x * next_scale.view(*next_scale.shape, *pixel_axes)
    return x


def onnx_function() -> "onnx.FunctionProto":
    """Return the exported node's body in standard operators, for runtimes without a kernel of ours."""
    return onnx_functions.onnx_function("FusedBiasAct")
