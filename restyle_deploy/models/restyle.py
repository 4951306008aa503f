"""One refinement step of ReStyle, and its start."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from restyle_deploy.checkpoint import Checkpoint, check_state_dict
from restyle_deploy.errors import CheckpointError
from restyle_deploy.model_config import ModelConfig
from restyle_deploy.models.encoders import ENCODERS
from restyle_deploy.models.generator import Generator


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step leaves for the next one.

    Attributes:
        latent: [N, n_styles, style_dim].
        image: [N, 3, R, R'], cropped to the domain.
        current: [N, 3, H, W], the image pooled to the encoder's input size.
    """

    latent: Tensor
    image: Tensor
    current: Tensor


class RestyleModel(nn.Module):
    """Encoder, generator and average latent; `encoder.*` and `decoder.*` are named as upstream."""

    latent_avg: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = ENCODERS[config.encoder_type](config)
        self.decoder = Generator(
            output_size=config.output_size,
            style_dim=config.style_dim,
            channels=config.generator_channels,
            mapping_layers=config.mapping_layers,
        )
        self.register_buffer("latent_avg", torch.zeros(config.n_styles, config.style_dim), persistent=False)

    def encode(self, target: Tensor, current: Tensor, latent: Tensor) -> Tensor:
        """Add the predicted residual to the W+ code: [N, 3, H, W] twice and [N, S, D] -> [N, S, D]."""
        residual: Tensor = self.encoder(torch.cat([target, current], dim=1))
        return residual + latent

    def generate(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Render W+ codes [N, S, D] to (image [N, 3, R, R'], the same pooled to [N, 3, H, W])."""
        first, end = self.config.variant.crop_rows(self.config.output_size)
        image = self.decoder(latent)[:, :, first:end]
        factor = self.config.output_size // self.config.input_size
        return image, functional.avg_pool2d(image, factor)

    @torch.inference_mode()
    def average_image(self) -> Tensor:
        """Render the average latent at the encoder's size: [3, H, W], the first step's current image."""
        return self.generate(self.latent_avg[None])[1][0]

    def run_step(self, target: Tensor, current: Tensor, latent: Tensor) -> StepResult:
        """Refine the latent once: encode, add the predicted residual, render, pool.

        Args:
            target: [N, 3, H, W] in [-1, 1].
            current: [N, 3, H, W], the last step's pooled image; the average image at the first step.
            latent: [N, S, D], the last step's W+ code; the average latent at the first step.
        Source: ReStyle, arXiv:2104.02699; upstream models/psp.py, pSp.forward.
        """
        latent = self.encode(target, current, latent)
        image, current = self.generate(latent)
        return StepResult(latent=latent, image=image, current=current)

    @torch.inference_mode()
    def invert(self, target: Tensor, *, steps: int) -> list[StepResult]:
        """Run the fixed-step loop from the average; one result per step. `target`: [N, 3, H, W] in [-1, 1]."""
        current = self.average_image().expand(target.shape[0], -1, -1, -1)
        latent = self.latent_avg.expand(target.shape[0], -1, -1)
        results: list[StepResult] = []
        for _ in range(steps):
            results.append(self.run_step(target, current, latent))
            current, latent = results[-1].current, results[-1].latent
        return results


def model_from_checkpoint(checkpoint: Checkpoint) -> RestyleModel:
    """Build the model that a checkpoint announces and give it the checkpoint's weights, in evaluation mode.

    The weights are shared with the checkpoint, not copied.

    Raises:
        CheckpointError: an unknown encoder type, or any missing, unexpected or misshapen key.
    """
    config = checkpoint.config
    if config.encoder_type not in ENCODERS:
        raise CheckpointError(
            f"{checkpoint.path}: encoder_type is {config.encoder_type!r}, expected one of {', '.join(ENCODERS)}"
        )
    with torch.device("meta"):
        model = RestyleModel(config)
    check_state_dict(checkpoint.state_dict, model.state_dict(), checkpoint.path)
    model.load_state_dict(checkpoint.state_dict, strict=True, assign=True)
    model.latent_avg = checkpoint.latent_avg
    return model.eval().requires_grad_(False)
