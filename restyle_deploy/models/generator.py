"""The StyleGAN2 synthesis network, modulated on activations so that weights are constant and the batch is free."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from restyle_deploy.models.layers import EqualLinear
from restyle_deploy.ops.fused_bias_act import fused_bias_act
from restyle_deploy.ops.upfirdn2d import upfirdn2d

BLUR_PADS = (1, 1, 1, 1)
SKIP_PADS = (2, 2, 1, 1)
DEMODULATION_EPSILON = 1e-8


class Generator(nn.Module):
    """Render W+ codes.

    State-dict names are those of upstream's `Generator(size, style_dim, n_mlp)`; `style.*` (the mapping network) is
    kept for editing and sampling and does not take part in `forward`.

    Args:
        output_size: side of the square image, a power of two of at least 8.
        style_dim: length of one style.
        channels: feature maps at each resolution, for 4, 8, ... up to `output_size`.
        mapping_layers: layers of the mapping network; 0 leaves it out.
        image_channels: 3; 1 serves to train on grey images.
    Source: StyleGAN2, arXiv:1912.04958; upstream models/stylegan2/model.py, Generator.
    """

    def __init__(
        self,
        *,
        output_size: int,
        style_dim: int,
        channels: Mapping[int, int],
        mapping_layers: int,
        image_channels: int = 3,
    ) -> None:
        super().__init__()
        if mapping_layers:
            layers = [MappingLayer(style_dim) for _ in range(mapping_layers)]
            self.style = nn.Sequential(PixelNorm(), *layers)
        self.input = ConstantInput(channels[4])
        self.conv1 = StyledConv(channels[4], channels[4], style_dim)
        self.to_rgb1 = ToRGB(channels[4], style_dim, image_channels=image_channels, upsample=False)
        self.convs = nn.ModuleList()
        self.to_rgbs = nn.ModuleList()
        self.noises = nn.Module()
        self.noises.register_buffer("noise_0", torch.randn(1, 1, 4, 4))
        for size in (2**exponent for exponent in range(3, int(math.log2(output_size)) + 1)):
            self.convs.append(StyledConv(channels[size // 2], channels[size], style_dim, upsample=True))
            self.convs.append(StyledConv(channels[size], channels[size], style_dim))
            self.to_rgbs.append(ToRGB(channels[size], style_dim, image_channels=image_channels, upsample=True))
            for index in (len(self.convs) - 1, len(self.convs)):
                self.noises.register_buffer(f"noise_{index}", torch.randn(1, 1, size, size))

    def forward(self, latent: Tensor) -> Tensor:
        """Render W+ codes with the fixed noise of the checkpoint.

        Args:
            latent: [N, n_styles, style_dim] float.
        Returns:
            [N, image_channels, output_size, output_size] in about [-1, 1], not clipped.
        """
        x = self.conv1(self.input.input, latent[:, 0], self.noises.get_buffer("noise_0"))  # [N, C, 4, 4]
        image: Tensor = self.to_rgb1(x, latent[:, 1], None)
        for index, to_rgb in enumerate(self.to_rgbs):
            for conv in (2 * index, 2 * index + 1):
                x = self.convs[conv](x, latent[:, conv + 1], self.noises.get_buffer(f"noise_{conv + 1}"))
            image = to_rgb(x, latent[:, 2 * index + 3], image)
        return image


class MappingLayer(EqualLinear):
    """One layer of the mapping network: linear, then fused bias and activation, at a hundredth of the learning rate."""

    def __init__(self, style_dim: int) -> None:
        super().__init__(style_dim, style_dim, lr_mul=0.01)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, style_dim] to [N, style_dim]."""
        return fused_bias_act(functional.linear(x, self.weight * self.scale), self.bias * self.lr_mul)


class PixelNorm(nn.Module):
    """Scale each vector to a mean square of one."""

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C] to [N, C]."""
        return x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + 1e-8)


class ConstantInput(nn.Module):
    """The learned 4×4 map that every image starts from."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.input = nn.Parameter(torch.randn(1, channels, 4, 4))


class FirFilter(nn.Module):
    """Holder of the FIR filter under upstream's name; the weights come from the checkpoint."""

    kernel: Tensor

    def __init__(self) -> None:
        super().__init__()
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
        self.register_buffer("kernel", torch.outer(taps, taps) / 64 * 4)


class ModulatedConv2d(nn.Module):
    """A convolution whose input channels are scaled by a style, and whose output is brought back to unit variance.

    The style multiplies the activations instead of the weights, which computes the same function with constant weights:
    y = demod ⊙ conv(W, x ⊙ s), demod_o = rsqrt(Σ_i s_i² · Σ_k W_oik² + 1e-8).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        style_dim: int,
        *,
        demodulate: bool = True,
        upsample: bool = False,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, out_channels, in_channels, kernel_size, kernel_size))
        self.modulation = EqualLinear(style_dim, in_channels, bias_init=1.0)
        self.scale = 1 / math.sqrt(in_channels * kernel_size**2)
        self.demodulate = demodulate
        if upsample:
            self.blur = FirFilter()
        self.upsample = upsample

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        """Convolve.

        Args:
            x: [N, I, H, W], or [1, I, H, W] for all.
            style: [N, style_dim].
        Returns:
            [N, O, H, W], or [N, O, 2H, 2W] with `upsample`.
        """
        weight = self.weight[0] * self.scale  # [O, I, k, k]
        style = self.modulation(style)  # [N, I]
        x = x * style[:, :, None, None]
        if self.upsample:
            x = functional.conv_transpose2d(x, weight.transpose(0, 1), stride=2)  # [N, O, 2H+1, 2W+1]
            x = upfirdn2d(x, self.blur.kernel, pads=BLUR_PADS)  # [N, O, 2H, 2W]
        else:
            x = functional.conv2d(x, weight, padding=weight.shape[-1] // 2)
        if self.demodulate:
            weight_energy = weight.square().sum(dim=(2, 3))  # [O, I]
            # As a bias: the exporter's optimiser takes an added scalar of up to 1e-8 for a zero and drops it.
            epsilon = weight_energy.new_full((len(weight_energy),), DEMODULATION_EPSILON)
            demod = torch.rsqrt(functional.linear(style.square(), weight_energy, epsilon))  # [N, O]
            x = x * demod[:, :, None, None]
        return x


class NoiseInjection(nn.Module):
    """The learned strength of a layer's noise."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))


class ActivationBias(nn.Module):
    """The bias that is fused with the activation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))


class StyledConv(nn.Module):
    """Modulated convolution, noise, bias and activation."""

    def __init__(self, in_channels: int, out_channels: int, style_dim: int, *, upsample: bool = False) -> None:
        super().__init__()
        self.conv = ModulatedConv2d(in_channels, out_channels, 3, style_dim, upsample=upsample)
        self.noise = NoiseInjection()
        self.activate = ActivationBias(out_channels)

    def forward(self, x: Tensor, style: Tensor, noise: Tensor) -> Tensor:
        """Map [N, I, H, W] to [N, O, H', W']; `noise` is [1, 1, H', W']."""
        x = self.conv(x, style) + self.noise.weight * noise
        return fused_bias_act(x, self.activate.bias)


class ToRGB(nn.Module):
    """A layer's contribution to the image, added to the upsampled image so far."""

    def __init__(self, in_channels: int, style_dim: int, *, image_channels: int, upsample: bool) -> None:
        super().__init__()
        self.conv = ModulatedConv2d(in_channels, image_channels, 1, style_dim, demodulate=False)
        self.bias = nn.Parameter(torch.zeros(1, image_channels, 1, 1))
        if upsample:
            self.upsample = FirFilter()

    def forward(self, x: Tensor, style: Tensor, skip: Tensor | None) -> Tensor:
        """Map [N, C, H, W] to [N, image_channels, H, W]; `skip` is [N, image_channels, H/2, W/2], or None at 4 px."""
        image: Tensor = self.conv(x, style) + self.bias
        if skip is None:
            return image
        return image + upfirdn2d(skip, self.upsample.kernel, up=2, pads=SKIP_PADS)
