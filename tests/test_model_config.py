"""Sizes that follow from a model's facts."""

import pytest

from restyle_deploy.model_config import ModelConfig, official_generator_channels


@pytest.mark.parametrize(
    ("domain", "output_size", "n_styles", "input_shape", "image_shape"),
    [
        ("faces", 1024, 18, (256, 256), (1024, 1024)),
        ("cars", 512, 16, (192, 256), (384, 512)),
        ("churches", 256, 14, (256, 256), (256, 256)),
    ],
)
def test_sizes_of_the_official_models(
    domain: str, output_size: int, n_styles: int, input_shape: tuple[int, int], image_shape: tuple[int, int]
) -> None:
    config = ModelConfig(encoder_type="BackboneEncoder", domain=domain, output_size=output_size)
    assert config.n_styles == n_styles
    assert config.input_shape == input_shape
    assert config.image_shape == image_shape
    assert config.variant.name == domain


def test_official_generator_narrows_from_128_px() -> None:
    assert official_generator_channels(1024) == {
        **{4: 512, 8: 512, 16: 512, 32: 512, 64: 512},
        **{128: 256, 256: 128, 512: 64, 1024: 32},
    }
    assert list(official_generator_channels(256)) == [4, 8, 16, 32, 64, 128, 256]
