"""Upstream's arithmetic against the model's: the same function and the same weights."""

import pytest
import torch

from benchmarks.upstream_arithmetic import UpstreamArithmetic, upfirdn2d_native
from restyle_deploy.models.generator import BLUR_PADS, SKIP_PADS
from restyle_deploy.ops.upfirdn2d import Pads, upfirdn2d
from tests.toy import toy_model

TOLERANCE = 1e-5


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dataset_type", ["ffhq_encode", "cars_encode"])
def test_inversion_is_the_models(dataset_type: str, batch: int) -> None:
    model = toy_model(dataset_type=dataset_type)
    upstream = UpstreamArithmetic.from_model(model)
    target = torch.rand(batch, 3, *model.config.input_shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for found, expected in zip(upstream.invert(target, steps=3), model.invert(target, steps=3), strict=True):
        for name in ("latent", "image", "current"):
            assert (getattr(found, name) - getattr(expected, name)).abs().max() <= TOLERANCE, name


def test_images_of_a_batch_do_not_mix() -> None:
    upstream = UpstreamArithmetic.from_model(toy_model())
    latents = torch.randn(3, *upstream.latent_avg.shape, generator=torch.Generator().manual_seed(1))
    images = upstream.generate(latents)[0]
    for latent, image in zip(latents, images, strict=True):
        torch.testing.assert_close(upstream.generate(latent[None])[0][0], image, rtol=0, atol=TOLERANCE)


def test_weights_are_shared() -> None:
    model = toy_model()
    upstream = UpstreamArithmetic.from_model(model)
    assert not upstream.training
    pairs = zip(upstream.state_dict().values(), model.state_dict().values(), strict=True)
    assert all(found.data_ptr() == given.data_ptr() for found, given in pairs)


@pytest.mark.parametrize(("up", "pads"), [(1, BLUR_PADS), (2, SKIP_PADS)])
def test_filter_is_the_models(up: int, pads: Pads) -> None:
    random = torch.Generator().manual_seed(2)
    x, kernel = torch.randn(2, 3, 5, 7, generator=random), torch.randn(4, 4, generator=random)
    torch.testing.assert_close(upfirdn2d_native(x, kernel, up=up, pads=pads), upfirdn2d(x, kernel, up=up, pads=pads))
