"""The two official backbones as lists of modules: a stem by name, and the blocks of four stages."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

from torch import Tensor, nn
from torch.nn import functional

from restyle_deploy.model_config import ModelConfig

IMAGE_PAIR_CHANNELS = 6
SE_REDUCTION = 16
IR_SE_50_UNITS = (3, 4, 14, 3)
RESNET_34_UNITS = (3, 4, 6, 3)


@dataclass(frozen=True, kw_only=True)
class BackboneParts:
    """What an encoder registers under upstream's names.

    Attributes:
        stem: modules before the blocks, in order, by their state-dict name.
        blocks: the blocks of all stages, in order.
        stage_ends: index of the last block of each stage.
    """

    stem: Mapping[str, nn.Module]
    blocks: list[nn.Module]
    stage_ends: tuple[int, ...]


def ir_se_50(config: ModelConfig) -> BackboneParts:
    """Build IR-SE-50; the first block of each stage halves the resolution.

    Source: ArcFace, arXiv:1801.07698, with SE blocks, arXiv:1709.01507; upstream models/encoders/helpers.py.
    """
    widths, units = config.encoder_widths, config.encoder_units or IR_SE_50_UNITS
    first = widths[0]
    stem = nn.Sequential(
        nn.Conv2d(IMAGE_PAIR_CHANNELS, first, 3, padding=1, bias=False), nn.BatchNorm2d(first), nn.PReLU(first)
    )
    blocks: list[nn.Module] = []
    in_channels = first
    for width, count in zip(widths, units, strict=True):
        for index in range(count):
            blocks.append(IrSeBlock(in_channels, width, stride=2 if index == 0 else 1))
            in_channels = width
    return BackboneParts(stem={"input_layer": stem}, blocks=blocks, stage_ends=_stage_ends(units))


def resnet_34(config: ModelConfig) -> BackboneParts:
    """Build ResNet-34 without its max-pooling; the stem and the stages after the first halve the resolution.

    Source: arXiv:1512.03385; upstream models/encoders/restyle_psp_encoders.py.
    """
    widths, units = config.encoder_widths, config.encoder_units or RESNET_34_UNITS
    first = widths[0]
    stem = {
        "conv1": nn.Conv2d(IMAGE_PAIR_CHANNELS, first, 7, stride=2, padding=3, bias=False),
        "bn1": nn.BatchNorm2d(first),
        "relu": nn.PReLU(first),
    }
    blocks: list[nn.Module] = []
    in_channels = first
    for stage, (width, count) in enumerate(zip(widths, units, strict=True)):
        for index in range(count):
            blocks.append(ResNetBlock(in_channels, width, stride=2 if stage and index == 0 else 1))
            in_channels = width
    return BackboneParts(stem=stem, blocks=blocks, stage_ends=_stage_ends(units))


def _stage_ends(units: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(end - 1 for end in accumulate(units))


class SqueezeExcitation(nn.Module):
    """Scale each channel by a gate computed from all channel means."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        reduced = max(1, channels // SE_REDUCTION)
        self.fc1 = nn.Conv2d(channels, reduced, 1, bias=False)
        self.fc2 = nn.Conv2d(reduced, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C, H, W] to [N, C, H, W]."""
        gate = functional.relu(self.fc1(x.mean(dim=(2, 3), keepdim=True)))
        scale: Tensor = self.fc2(gate).sigmoid()
        return x * scale


class IrSeBlock(nn.Module):
    """Improved residual block with squeeze and excitation."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int) -> None:
        super().__init__()
        if in_channels == out_channels:
            self.shortcut_layer: nn.Module = nn.MaxPool2d(1, stride)
        else:
            self.shortcut_layer = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
            )
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(in_channels),
            nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
            nn.PReLU(out_channels),
            nn.Conv2d(out_channels, out_channels, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            SqueezeExcitation(out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, I, H, W] to [N, O, ⌈H/stride⌉, ⌈W/stride⌉]."""
        residual: Tensor = self.res_layer(x)
        shortcut: Tensor = self.shortcut_layer(x)
        return residual + shortcut


class ResNetBlock(nn.Module):
    """The basic block of ResNet-34, names as in torchvision."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, I, H, W] to [N, O, ⌈H/stride⌉, ⌈W/stride⌉]."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = functional.relu(self.bn1(self.conv1(x)))
        residual: Tensor = self.bn2(self.conv2(x))
        return functional.relu(residual + shortcut)
