"""Layers that the encoders and the generator share."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


class EqualLinear(nn.Module):
    """A linear layer with equalised learning rate: the stored weight is scaled by lr_mul / √fan_in when used.

    Source: StyleGAN2, arXiv:1912.04958; upstream models/stylegan2/model.py, EqualLinear (without activation).
    """

    def __init__(self, in_features: int, out_features: int, *, bias_init: float = 0.0, lr_mul: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / lr_mul)
        self.bias = nn.Parameter(torch.full((out_features,), bias_init))
        self.scale = lr_mul / math.sqrt(in_features)
        self.lr_mul = lr_mul

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, in_features] to [N, out_features]."""
        return functional.linear(x, self.weight * self.scale, self.bias * self.lr_mul)


class EqualConv2d(nn.Module):
    """A convolution with equalised learning rate: the stored weight is scaled by 1 / √fan_in when used."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.scale = 1 / math.sqrt(in_channels * kernel_size**2)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, in_channels, H, W] to [N, out_channels, ⌈H/stride⌉, ⌈W/stride⌉]."""
        padding = self.weight.shape[-1] // 2
        return functional.conv2d(x, self.weight * self.scale, self.bias, stride=self.stride, padding=padding)
