"""The generator computed as upstream computes it on a machine without its CUDA kernels: the baseline of the tables.

Weights are modulated and demodulated per sample, the batch becomes the groups of one convolution, and the FIR filter is
the native fallback: one channel at a time, the channels in the batch axis. Same function and weights, other arithmetic.
Source: upstream models/stylegan2/model.py, ModulatedConv2d.forward; models/stylegan2/op/upfirdn2d.py, upfirdn2d_native.
"""

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional

from restyle_deploy.models.generator import (
    BLUR_PADS,
    DEMODULATION_EPSILON,
    SKIP_PADS,
    Generator,
    ModulatedConv2d,
    StyledConv,
    ToRGB,
)
from restyle_deploy.models.restyle import RestyleModel
from restyle_deploy.ops.fused_bias_act import fused_bias_act
from restyle_deploy.ops.switch import active_kernels
from restyle_deploy.ops.upfirdn2d import Pads


class UpstreamArithmetic(RestyleModel):
    """The reference model with upstream's arithmetic in the generator; the encoder's is the same in both."""

    @classmethod
    def from_model(cls, model: RestyleModel) -> "UpstreamArithmetic":
        """Return a model that shares the given model's weights."""
        with torch.device("meta"):
            upstream = cls(model.config)
        upstream.load_state_dict(model.state_dict(), assign=True)
        upstream.latent_avg = model.latent_avg
        return upstream.eval().requires_grad_(False)

    def generate(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Render W+ codes [N, S, D] to (image [N, 3, R, R'], the same pooled to [N, 3, H, W])."""
        first, end = self.config.variant.crop_rows(self.config.output_size)
        image = render(self.decoder, latent)[:, :, first:end]
        return image, functional.adaptive_avg_pool2d(image, self.config.input_shape)


def render(decoder: Generator, latent: Tensor) -> Tensor:
    """Render W+ codes [N, n_styles, style_dim] to [N, image_channels, output_size, output_size]."""
    noises = decoder.noises
    x = decoder.input.input.repeat(len(latent), 1, 1, 1)
    x = _styled_conv(decoder.conv1, x, latent[:, 0], noises.get_buffer("noise_0"))
    image = _to_rgb(decoder.to_rgb1, x, latent[:, 1], None)
    convs = cast(Iterable[StyledConv], decoder.convs)
    for index, (conv, to_rgb) in enumerate(zip(convs, _repeat_twice(decoder), strict=True)):
        x = _styled_conv(conv, x, latent[:, index + 1], noises.get_buffer(f"noise_{index + 1}"))
        if to_rgb is not None:
            image = _to_rgb(to_rgb, x, latent[:, index + 2], image)
    return image


def _repeat_twice(decoder: Generator) -> list[ToRGB | None]:
    """Return the ToRGB layer after each convolution, None after the first of each resolution."""
    layers: list[ToRGB | None] = []
    for to_rgb in cast(Iterable[ToRGB], decoder.to_rgbs):
        layers += [None, to_rgb]
    return layers


def _styled_conv(layer: StyledConv, x: Tensor, style: Tensor, noise: Tensor) -> Tensor:
    x = _modulated_conv(layer.conv, x, style)
    x = x + layer.noise.weight * noise
    return fused_bias_act(x, layer.activate.bias)


def _to_rgb(layer: ToRGB, x: Tensor, style: Tensor, skip: Tensor | None) -> Tensor:
    image = _modulated_conv(layer.conv, x, style) + layer.bias
    if skip is None:
        return image
    return image + upfirdn2d_native(skip, layer.upsample.kernel, up=2, pads=SKIP_PADS)


def _modulated_conv(conv: ModulatedConv2d, x: Tensor, style: Tensor) -> Tensor:
    batch, in_channels, height, width = x.shape
    out_channels, kernel_size = conv.weight.shape[1], conv.weight.shape[-1]
    weight = conv.scale * conv.weight * conv.modulation(style).view(batch, 1, in_channels, 1, 1)  # [N, O, I, k, k]
    if conv.demodulate:
        weight = weight * torch.rsqrt(weight.square().sum((2, 3, 4), keepdim=True) + DEMODULATION_EPSILON)
    x = x.reshape(1, batch * in_channels, height, width)
    if conv.upsample:
        weight = weight.transpose(1, 2).reshape(batch * in_channels, out_channels, kernel_size, kernel_size)
        x = functional.conv_transpose2d(x, weight, stride=2, groups=batch)
        x = x.view(batch, out_channels, x.shape[2], x.shape[3])
        return upfirdn2d_native(x, conv.blur.kernel, pads=BLUR_PADS)
    weight = weight.view(batch * out_channels, in_channels, kernel_size, kernel_size)
    x = functional.conv2d(x, weight, padding=kernel_size // 2, groups=batch)
    return x.view(batch, out_channels, height, width)


def upfirdn2d_native(x: Tensor, kernel: Tensor, *, up: int = 1, pads: Pads) -> Tensor:
    """Insert zeros, pad and filter, each channel as an image of its own: [N, C, H, W] -> [N, C, H', W'].

    Inside `ops.switch.use_cuda_kernels` our kernel stands for the one that upstream compiles where it finds a GPU.
    """
    kernels = active_kernels(x)
    if kernels is not None:
        filtered: Tensor = kernels.upfirdn2d(x, kernel, up=up, pads=pads)
        return filtered
    batch, channels, height, width = x.shape
    top, left, bottom, right = pads
    x = x.reshape(-1, 1, height, 1, width, 1)
    x = functional.pad(x, (0, up - 1, 0, 0, 0, up - 1)).view(-1, 1, height * up, width * up)
    x = functional.pad(x, (left, right, top, bottom))
    x = functional.conv2d(x, torch.flip(kernel, (0, 1))[None, None])
    return x.view(batch, channels, x.shape[2], x.shape[3])
