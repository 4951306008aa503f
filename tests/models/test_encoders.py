"""The six encoder types: names, taps, heads, how styles are combined, and independence of the images of a batch."""

import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from restyle_deploy.model_config import ModelConfig
from restyle_deploy.models.backbones import ir_se_50, resnet_34
from restyle_deploy.models.encoders import ENCODERS, FpnEncoder, independent_styles, progressive_styles
from tests.toy import toy_model

DATASET_TYPES = ("ffhq_encode", "cars_encode")


def official_encoder(encoder_type: str) -> nn.Module:
    """Return the encoder at its official size without memory for its weights."""
    with torch.device("meta"):
        return ENCODERS[encoder_type](ModelConfig(encoder_type=encoder_type, domain="faces", output_size=1024))


def test_there_are_the_six_official_types() -> None:
    prefixes = ("", "ResNet")
    names = ("BackboneEncoder", "ProgressiveBackboneEncoder", "GradualStyleEncoder")
    assert set(ENCODERS) == {prefix + name for prefix in prefixes for name in names}


@pytest.mark.parametrize("dataset_type", DATASET_TYPES)
@pytest.mark.parametrize("encoder_type", ENCODERS)
def test_images_of_a_batch_do_not_touch_each_other(encoder_type: str, dataset_type: str) -> None:
    model = toy_model(encoder_type=encoder_type, dataset_type=dataset_type)
    height, width = model.config.input_shape
    assert (height, width) == ((24, 32) if dataset_type == "cars_encode" else (32, 32))
    pairs = torch.rand(3, 6, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1
    together = model.encoder(pairs)
    assert together.shape == (3, 10, 16)
    assert together.std() > 0.01
    alone = torch.cat([model.encoder(pair[None]) for pair in pairs])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_progressive_types_share_weights_and_names_with_the_independent_ones() -> None:
    for prefix in ("", "ResNet"):
        independent, progressive = (
            toy_model(encoder_type=f"{prefix}{name}") for name in ("BackboneEncoder", "ProgressiveBackboneEncoder")
        )
        assert list(independent.state_dict()) == list(progressive.state_dict())
        pair = torch.zeros(1, 6, 32, 32)
        styles = independent.encoder(pair)
        expected = torch.cat([styles[:, :1], styles[:, :1] + styles[:, 1:]], dim=1)
        torch.testing.assert_close(progressive.encoder(pair), expected)


def test_styles_are_combined_as_the_two_families_do() -> None:
    styles = [torch.tensor([[1.0]]), torch.tensor([[10.0]]), torch.tensor([[100.0]])]
    assert [style.item() for style in independent_styles(styles)] == [1, 10, 100]
    assert [style.item() for style in progressive_styles(styles)] == [1, 11, 101]


def test_official_backbones_end_their_stages_at_the_taps() -> None:
    config = ModelConfig(encoder_type="GradualStyleEncoder", domain="faces", output_size=1024)
    with torch.device("meta"):
        assert ir_se_50(config).stage_ends == (2, 6, 20, 23)
        assert resnet_34(config).stage_ends == (2, 6, 12, 15)


@pytest.mark.parametrize("encoder_type", ENCODERS)
def test_heads_reduce_their_map_to_one_pixel(encoder_type: str) -> None:
    """One stride-2 convolution per halving; the pyramid's finer maps need one and two more."""
    encoder = official_encoder(encoder_type)
    convolutions = [
        len([key for key in encoder.state_dict() if re.fullmatch(rf"styles\.{index}\.convs\.\d+\.weight", key)])
        for index in range(18)
    ]
    expected = [4] * 3 + [5] * 4 + [6] * 11 if "Gradual" in encoder_type else [4] * 18
    assert convolutions == expected
    slopes = {module.negative_slope for module in encoder.modules() if isinstance(module, nn.LeakyReLU)}
    assert slopes == {0.01}


@pytest.mark.parametrize("encoder_type", ["GradualStyleEncoder", "ResNetGradualStyleEncoder"])
def test_pyramid_has_upstreams_lateral_layers(encoder_type: str) -> None:
    weights = official_encoder(encoder_type).state_dict()
    lateral = {key: list(value.shape) for key, value in weights.items() if key.startswith("latlayer")}
    assert lateral == {
        "latlayer1.weight": [512, 256, 1, 1],
        "latlayer1.bias": [512],
        "latlayer2.weight": [512, 128, 1, 1],
        "latlayer2.bias": [512],
    }


@pytest.mark.parametrize("dataset_type", DATASET_TYPES)
@pytest.mark.parametrize("encoder_type", ["GradualStyleEncoder", "ResNetGradualStyleEncoder"])
def test_pyramid_computes_what_upstream_writes_out(encoder_type: str, dataset_type: str) -> None:
    model = toy_model(encoder_type=encoder_type, dataset_type=dataset_type)
    encoder = model.encoder
    assert isinstance(encoder, FpnEncoder)
    x = torch.rand(2, 6, *model.config.input_shape, generator=torch.Generator().manual_seed(1))
    maps = {}
    stem = ("conv1", "bn1", "relu") if encoder_type.startswith("ResNet") else ("input_layer",)
    y = x
    for name in stem:
        y = encoder.get_submodule(name)(y)
    for index, block in enumerate(encoder.body):
        y = maps[index] = block(y)
    c1, c2, c3 = maps[1], maps[2], maps[3]
    p2 = upsample_add(c3, encoder.latlayer1(c2))
    p1 = upsample_add(p2, encoder.latlayer2(c1))
    sources = [c3] * 3 + [p2] * 4 + [p1] * 3
    expected = torch.stack([head(source) for head, source in zip(encoder.styles, sources, strict=True)], dim=1)
    torch.testing.assert_close(encoder(x), expected)


def upsample_add(x: Tensor, y: Tensor) -> Tensor:
    return functional.interpolate(x, size=(y.shape[2], y.shape[3]), mode="bilinear", align_corners=True) + y
