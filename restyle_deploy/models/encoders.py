"""Encoders: (target, current image) -> residual of the W+ code. The six official types, in one table."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional

from restyle_deploy.model_config import ModelConfig
from restyle_deploy.models.backbones import BackboneParts, ir_se_50, resnet_34
from restyle_deploy.models.layers import EqualLinear

# Styles below the first bound are read from the coarsest map, below the second from the middle one, the others from
# the finest. Source: upstream models/encoders/fpn_encoders.py, coarse_ind and middle_ind.
COARSE_END, MIDDLE_END = 3, 7


class StyleHead(nn.Module):
    """Reduce a map to one style: stride-2 convolutions down to one pixel, then an equalised linear layer.

    Source: pixel2style2pixel, arXiv:2008.00951; upstream models/encoders/map2style.py, GradualStyleBlock.
    """

    def __init__(self, in_channels: int, style_dim: int, map_size: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(map_size.bit_length() - 1):
            layers += [nn.Conv2d(in_channels, style_dim, 3, stride=2, padding=1), nn.LeakyReLU(0.01)]
            in_channels = style_dim
        self.convs = nn.Sequential(*layers)
        self.linear = EqualLinear(style_dim, style_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C, H, map_size] to [N, style_dim]; H is map_size, or three quarters of it (cars)."""
        style: Tensor = self.linear(self.convs(x).flatten(1))
        return style


class _Backbone(nn.Module):
    """Stem and body under upstream's names; subclasses add the heads."""

    def __init__(self, parts: BackboneParts) -> None:
        super().__init__()
        for name, module in parts.stem.items():
            self.add_module(name, module)
        self.body = nn.Sequential(*parts.blocks)
        self._stem_names = tuple(parts.stem)
        self._stage_ends = parts.stage_ends

    def _read_stages(self, x: Tensor) -> list[Tensor]:
        """Return the last map of each stage, finest first."""
        for name in self._stem_names:
            x = self.get_submodule(name)(x)
        stages = []
        for index, block in enumerate(self.body):
            x = block(x)
            if index in self._stage_ends:
                stages.append(x)
        return stages


def independent_styles(styles: list[Tensor]) -> list[Tensor]:
    """pSp: each head gives the residual of its own style."""
    return styles


def progressive_styles(styles: list[Tensor]) -> list[Tensor]:
    """e4e: head 0 gives one residual for all styles, the others add their difference to it.

    Source: encoder4editing, arXiv:2102.02766.
    """
    shared, *deltas = styles
    return [shared, *(shared + delta for delta in deltas)]


class BackboneEncoder(_Backbone):
    """All heads read the last map of the backbone.

    Source: ReStyle, arXiv:2104.02699; upstream models/encoders/restyle_psp_encoders.py, restyle_e4e_encoders.py.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        backbone: Callable[[ModelConfig], BackboneParts],
        combine: Callable[[list[Tensor]], list[Tensor]],
    ) -> None:
        super().__init__(backbone(config))
        width, map_size = config.encoder_widths[-1], config.input_size // 16
        self.styles = nn.ModuleList(StyleHead(width, config.style_dim, map_size) for _ in range(config.n_styles))
        self._combine = combine

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, 6, H, W] (target and current image in [-1, 1]) to the residual [N, n_styles, style_dim]."""
        coarse = self._read_stages(x)[-1]
        return torch.stack(self._combine([head(coarse) for head in self.styles]), dim=1)


class FpnEncoder(_Backbone):
    """Styles read from a feature pyramid over the last three stages.

    Source: pixel2style2pixel, arXiv:2008.00951; upstream models/encoders/fpn_encoders.py, GradualStyleEncoder.
    """

    def __init__(self, config: ModelConfig, *, backbone: Callable[[ModelConfig], BackboneParts]) -> None:
        super().__init__(backbone(config))
        _, fine_width, middle_width, width = config.encoder_widths
        self.styles = nn.ModuleList(
            StyleHead(width, config.style_dim, config.input_size // (16, 8, 4)[_pyramid_level(index)])
            for index in range(config.n_styles)
        )
        self.latlayer1 = nn.Conv2d(middle_width, width, 1)
        self.latlayer2 = nn.Conv2d(fine_width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, 6, H, W] (target and current image in [-1, 1]) to the residual [N, n_styles, style_dim]."""
        _, fine, middle, coarse = self._read_stages(x)
        middle = _upsample_add(coarse, self.latlayer1(middle))
        fine = _upsample_add(middle, self.latlayer2(fine))
        pyramid = (coarse, middle, fine)
        return torch.stack([head(pyramid[_pyramid_level(i)]) for i, head in enumerate(self.styles)], dim=1)


def _pyramid_level(style_index: int) -> int:
    return (style_index >= COARSE_END) + (style_index >= MIDDLE_END)


def _upsample_add(coarse: Tensor, fine: Tensor) -> Tensor:
    return functional.interpolate(coarse, size=fine.shape[2:], mode="bilinear", align_corners=True) + fine


ENCODERS: Mapping[str, Callable[[ModelConfig], nn.Module]] = MappingProxyType(
    {
        "BackboneEncoder": partial(BackboneEncoder, backbone=ir_se_50, combine=independent_styles),
        "ResNetBackboneEncoder": partial(BackboneEncoder, backbone=resnet_34, combine=independent_styles),
        "ProgressiveBackboneEncoder": partial(BackboneEncoder, backbone=ir_se_50, combine=progressive_styles),
        "ResNetProgressiveBackboneEncoder": partial(BackboneEncoder, backbone=resnet_34, combine=progressive_styles),
        "GradualStyleEncoder": partial(FpnEncoder, backbone=ir_se_50),
        "ResNetGradualStyleEncoder": partial(FpnEncoder, backbone=resnet_34),
    }
)
