"""The official architecture in small, with random weights: what most tests run on."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from restyle_deploy.checkpoint import config_from_options
from restyle_deploy.models.restyle import RestyleModel

TOY_MAPPING_LAYERS = 2


def toy_options(
    encoder_type: str = "BackboneEncoder", dataset_type: str = "ffhq_encode", **changes: Any
) -> dict[str, Any]:
    """Return a checkpoint's `opts` for a model of 64 px; `changes` are more options, or other values of these."""
    output_size = changes.get("output_size", 64)
    return {
        "encoder_type": encoder_type,
        "dataset_type": dataset_type,
        "output_size": output_size,
        "input_size": 32,
        "style_dim": 16,
        "encoder_widths": [8, 8, 16, 16],
        "encoder_units": [1, 1, 1, 1],
        "generator_channels": {2**exponent: 8 for exponent in range(2, output_size.bit_length())},
        "device": "cuda:0",
        **changes,
    }


def toy_model(*, mapping_layers: int = TOY_MAPPING_LAYERS, seed: int = 0, **options: Any) -> RestyleModel:
    """Return a model in evaluation mode, the same for the same seed; `options` as for `toy_options`."""
    config = config_from_options(toy_options(**options), mapping_layers=mapping_layers, overrides={})
    random = torch.Generator().manual_seed(seed)
    model = RestyleModel(config)
    slopes = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.PReLU)}
    for key, value in model.state_dict().items():
        if not key.endswith((".kernel", "num_batches_tracked")):
            value.copy_(_weight(key, torch.randn(value.shape, generator=random), is_slope=key in slopes))
    model.latent_avg = 0.5 * torch.randn(model.latent_avg.shape, generator=random)
    return model.eval().requires_grad_(False)


def toy_checkpoint_content(
    *, mapping_layers: int = TOY_MAPPING_LAYERS, seed: int = 0, **options: Any
) -> dict[str, Any]:
    """Return what an official checkpoint file of a toy model holds."""
    model = toy_model(mapping_layers=mapping_layers, seed=seed, **options)
    state_dict = dict(model.state_dict())
    given = {**toy_options(**options), "mapping_layers": mapping_layers}
    return {"state_dict": state_dict, "latent_avg": model.latent_avg, "opts": given}


def write_toy_checkpoint(path: Path, **options: Any) -> Path:
    """Write a toy checkpoint and return its path; `options` as for `toy_checkpoint_content`."""
    torch.save(toy_checkpoint_content(**options), path)
    return path


def _weight(key: str, normal: Tensor, *, is_slope: bool) -> Tensor:
    """Turn standard normal numbers into a weight with which values stay of order one and latents move by about 0.1."""
    if is_slope:
        return 0.25 + 0.05 * normal
    if key.startswith("decoder.style.") and key.endswith("weight"):
        return 100 * normal
    if key.endswith("running_var"):
        return 1 + 0.1 * normal.abs()
    if key.endswith(("modulation.bias", "bn1.weight", "bn2.weight")):
        return 1 + 0.1 * normal
    if key.endswith(("bias", "noise.weight", "running_mean")):
        return 0.1 * normal
    if key.startswith("decoder."):
        return 0.1 * normal if "to_rgb" in key and key.endswith("conv.weight") else normal
    if key.endswith("linear.weight"):
        return 0.2 * normal
    if normal.ndim >= 2:
        return normal * math.sqrt(1.5 / normal[0].numel())
    return 1 + 0.1 * normal
