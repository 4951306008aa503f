"""Modulation on activations against modulation on weights, which is how upstream computes it."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from restyle_deploy.models.generator import Generator, MappingLayer, ModulatedConv2d, StyledConv, ToRGB
from tests.toy import toy_model

RELATIVE_TOLERANCE = 1e-4


def modulate_weights(conv: ModulatedConv2d, x: Tensor, style: Tensor) -> Tensor:
    """Convolve each image with its own modulated weight in one grouped convolution."""
    batch = len(style)
    x = x.expand(batch, -1, -1, -1)
    _, in_channels, height, width = x.shape
    _, out_channels, _, size, _ = conv.weight.shape
    modulation = conv.modulation
    scales = style @ modulation.weight.T / math.sqrt(style.shape[1]) + modulation.bias  # [N, I]
    weight = conv.weight / math.sqrt(in_channels * size**2) * scales.view(batch, 1, in_channels, 1, 1)
    if conv.demodulate:
        weight = weight * torch.rsqrt(weight.square().sum(dim=(2, 3, 4), keepdim=True) + 1e-8)
    x = x.reshape(1, batch * in_channels, height, width)
    if not conv.upsample:
        weight = weight.view(batch * out_channels, in_channels, size, size)
        return functional.conv2d(x, weight, padding=size // 2, groups=batch).view(batch, out_channels, height, width)
    weight = weight.transpose(1, 2).reshape(batch * in_channels, out_channels, size, size)
    x = functional.conv_transpose2d(x, weight, stride=2, groups=batch)
    x = functional.conv2d(x, fir_filter(batch * out_channels), padding=1, groups=batch * out_channels)
    return x.view(batch, out_channels, 2 * height, 2 * width)


def fir_filter(channels: int) -> Tensor:
    """Return [1, 3, 3, 1] as a depthwise weight [C, 1, 4, 4]; it is symmetric, so flipping it changes nothing."""
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
    return (torch.outer(taps, taps) / 16).expand(channels, 1, 4, 4)


def render_like_upstream(generator: Generator, latent: Tensor) -> Tensor:
    """Run all layers with modulated weights, and upsample the image with a transposed convolution."""

    def styled(layer: StyledConv, x: Tensor, style: Tensor, noise: Tensor) -> Tensor:
        x = modulate_weights(layer.conv, x, style) + layer.noise.weight * noise
        return functional.leaky_relu(x + layer.activate.bias.view(1, -1, 1, 1), 0.2) * math.sqrt(2)

    def to_image(layer: ToRGB, x: Tensor, style: Tensor) -> Tensor:
        return modulate_weights(layer.conv, x, style) + layer.bias

    x = styled(generator.conv1, generator.input.input, latent[:, 0], generator.noises.get_buffer("noise_0"))
    image = to_image(generator.to_rgb1, x, latent[:, 1])
    for index, layer in enumerate(generator.convs):
        assert isinstance(layer, StyledConv)
        x = styled(layer, x, latent[:, index + 1], generator.noises.get_buffer(f"noise_{index + 1}"))
        if index % 2:
            skip = functional.conv_transpose2d(image, fir_filter(3), stride=2, padding=1, groups=3)
            to_rgb = generator.to_rgbs[index // 2]
            assert isinstance(to_rgb, ToRGB)
            image = skip + to_image(to_rgb, x, latent[:, index + 2])
    return image


def assert_relatively_close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= RELATIVE_TOLERANCE * expected.abs().max()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("x_batch", ["shared", "own"])
@pytest.mark.parametrize(
    ("kernel_size", "demodulate", "upsample"), [(3, True, False), (3, True, True), (1, False, False), (3, False, True)]
)
def test_modulated_activations_are_modulated_weights(
    kernel_size: int, demodulate: bool, upsample: bool, batch: int, x_batch: str
) -> None:
    torch.manual_seed(0)
    conv = ModulatedConv2d(5, 7, kernel_size, 12, demodulate=demodulate, upsample=upsample)
    x, style = torch.randn(1 if x_batch == "shared" else batch, 5, 6, 9), torch.randn(batch, 12)
    with torch.no_grad():
        assert_relatively_close(conv(x, style), modulate_weights(conv, x, style))


def test_tiny_styles_keep_the_epsilon_of_the_demodulation() -> None:
    torch.manual_seed(0)
    conv = ModulatedConv2d(4, 4, 3, 8)
    with torch.no_grad():
        conv.modulation.bias.zero_()
        x, style = torch.randn(2, 4, 5, 5), 1e-5 * torch.randn(2, 8)
        assert_relatively_close(conv(x, style), modulate_weights(conv, x, style))


def test_a_style_of_zero_gives_zero() -> None:
    conv = ModulatedConv2d(4, 4, 3, 8)
    with torch.no_grad():
        conv.modulation.bias.zero_()
        assert torch.equal(conv(torch.randn(2, 4, 5, 5), torch.zeros(2, 8)), torch.zeros(2, 4, 5, 5))


@pytest.mark.parametrize("output_size", [32, 64, 128])
def test_generator_renders_what_upstream_renders(output_size: int) -> None:
    model = toy_model(output_size=output_size)
    generator = model.decoder
    latent = torch.randn(3, model.config.n_styles, 16, generator=torch.Generator().manual_seed(2))
    image = generator(latent)
    assert image.shape == (3, 3, output_size, output_size)
    assert_relatively_close(image, render_like_upstream(generator, latent))


def test_every_style_reaches_the_image() -> None:
    model = toy_model()
    generator = model.decoder
    latent = torch.zeros(1, model.config.n_styles, 16)
    image = generator(latent)
    for index in range(model.config.n_styles):
        changed = latent.clone()
        changed[0, index] += 1
        assert not torch.equal(generator(changed), image), f"style {index}"


def test_a_generator_without_mapping_network_renders_the_same() -> None:
    model, without = toy_model(), toy_model(mapping_layers=0)
    weights = model.decoder.state_dict()
    mapping = {key for key in weights if key.startswith("style.")}
    assert mapping == {"style.1.weight", "style.1.bias", "style.2.weight", "style.2.bias"}
    assert set(without.decoder.state_dict()) == set(weights) - mapping
    without.decoder.load_state_dict({key: value for key, value in weights.items() if key not in mapping})
    latent = model.latent_avg[None]
    assert torch.equal(model.decoder(latent), without.decoder(latent))


def test_mapping_network_computes_styles_from_noise() -> None:
    generator = toy_model().decoder
    z = torch.randn(3, 16, generator=torch.Generator().manual_seed(3))
    expected = z / torch.sqrt((z**2).mean(dim=1, keepdim=True) + 1e-8)
    for layer in list(generator.style)[1:]:
        assert isinstance(layer, MappingLayer)
        expected = expected @ (layer.weight.T * 0.01 / math.sqrt(16)) + 0.01 * layer.bias
        expected = math.sqrt(2) * torch.where(expected > 0, expected, 0.2 * expected)
    torch.testing.assert_close(generator.style(z), expected)


def test_grey_images_have_one_channel() -> None:
    channels = {4: 2, 8: 2, 16: 2}
    generator = Generator(output_size=16, style_dim=4, channels=channels, mapping_layers=0, image_channels=1)
    assert generator(torch.zeros(2, 6, 4)).shape == (2, 1, 16, 16)
