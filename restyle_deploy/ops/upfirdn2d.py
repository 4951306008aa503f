"""Upsample, FIR-filter and downsample in one operator, with an epilogue as an option: torch reference."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from restyle_deploy.ops import onnx_functions
from restyle_deploy.ops.fused_bias_act import GAIN, NEGATIVE_SLOPE, fused_bias_act
from restyle_deploy.ops.switch import active_kernels

if TYPE_CHECKING:
    import onnx

Pads = tuple[int, int, int, int]


def upfirdn2d(x: Tensor, kernel: Tensor, *, up: int = 1, down: int = 1, pads: Pads = (0, 0, 0, 0)) -> Tensor:
    """Insert zeros, pad, convolve with a FIR filter and keep every `down`-th sample, in plain torch.

    Inside `ops.switch.use_cuda_kernels` our kernel computes it on a GPU. While a graph is exported, emit one node
    `restyle_deploy::UpFirDn2d` instead.

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
            version=onnx_functions.DOMAIN_VERSION,
        )
    if (kernels := active_kernels(x)) is not None:
        y: Tensor = kernels.upfirdn2d(x, kernel, up=up, down=down, pads=pads)
        return y
    if up > 1:
        x = functional.pad(x.reshape(batch, channels, height, 1, width, 1), (0, up - 1, 0, 0, 0, up - 1))
        x = x.view(batch, channels, height * up, width * up)
    x = functional.pad(x, (left, right, top, bottom))
    weight = torch.flip(kernel, (0, 1)).expand(channels, 1, kernel_height, kernel_width)
    return functional.conv2d(x, weight, stride=down, groups=channels)


def upfirdn2d_epilogue(
    x: Tensor,
    kernel: Tensor,
    *,
    up: int = 1,
    down: int = 1,
    pads: Pads = (0, 0, 0, 0),
    bias: Tensor | None = None,
    demod: Tensor | None = None,
    noise: Tensor | None = None,
    noise_strength: float = 1.0,
    next_scale: Tensor | None = None,
    negative_slope: float | None = NEGATIVE_SLOPE,
    gain: float | None = GAIN,
) -> Tensor:
    """Compute `fused_bias_act(upfirdn2d(x, kernel), ...)`: the reference of the kernel that does both in one pass.

    The arguments are those of the two functions; `noise` has the size of the filtered image.

    Raises:
        ValueError: the padded image is smaller than the filter.
    """
    if (kernels := active_kernels(x)) is not None:
        y: Tensor = kernels.upfirdn2d_epilogue(
            x,
            kernel,
            up=up,
            down=down,
            pads=pads,
            bias=bias,
            demod=demod,
            noise=noise,
            noise_strength=noise_strength,
            next_scale=next_scale,
            negative_slope=negative_slope,
            gain=gain,
        )
        return y
    return fused_bias_act(
        upfirdn2d(x, kernel, up=up, down=down, pads=pads),
        bias,
        demod=demod,
        noise=noise,
        noise_strength=noise_strength,
        next_scale=next_scale,
        negative_slope=negative_slope,
        gain=gain,
    )


def onnx_function() -> "onnx.FunctionProto":
    """Return the exported node's body in standard operators, for runtimes without a kernel of ours."""
    return onnx_functions.onnx_function("UpFirDn2d")
