"""The layer that the encoders and the generator share."""

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
