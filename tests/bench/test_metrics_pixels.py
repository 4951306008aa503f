"""MSE, L2, PSNR and both structural similarities, against direct formulas and other libraries."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from scipy.ndimage import correlate1d
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from restyle_deploy.bench.metrics import MetricOptions, open_metrics
from restyle_deploy.bench.metrics.pixels import measure_l2, measure_mse, measure_psnr, saved_pictures
from restyle_deploy.bench.metrics.structure import (
    MS_SSIM_LEAST_SIDE,
    SCALE_WEIGHTS,
    measure_ms_ssim,
    measure_ssim,
)
from restyle_deploy.runtime.images import load_image, normalize_images, pool_images, resize_image

Array = NDArray[np.float64]
TAPS = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
C1, C2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2


def random_images(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def smooth_images(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    """Return images with something to see at each scale."""
    images = np.random.default_rng(seed).normal(size=shape)
    for axis in (-2, -1):
        images = np.cumsum(images, axis=axis)
    scaled: NDArray[np.float32] = (images / np.abs(images).max(axis=(-2, -1), keepdims=True)).astype(np.float32)
    return scaled


def blur(planes: Array) -> Array:
    """Return planes [3, H, W] through the window of 11 x 11, the border mirrored without its edge."""
    once = correlate1d(planes, TAPS / TAPS.sum(), axis=-1, mode="mirror")
    blurred: Array = correlate1d(once, TAPS / TAPS.sum(), axis=-2, mode="mirror")
    return blurred


def similarity_maps(image: Array, target: Array) -> tuple[Array, Array]:
    """Return SSIM and its contrast-structure factor at each pixel: Wang et al. 2004, equations 9, 12 and 13."""
    mean, target_mean = blur(image), blur(target)
    variance, target_variance = blur(image**2) - mean**2, blur(target**2) - target_mean**2
    covariance = blur(image * target) - mean * target_mean
    contrast = (2 * covariance + C2) / (variance + target_variance + C2)
    return contrast * (2 * mean * target_mean + C1) / (mean**2 + target_mean**2 + C1), contrast


def halve(planes: Array) -> Array:
    """Return means of 2 x 2 pixels; an odd last row or column is left out."""
    height, width = (side // 2 * 2 for side in planes.shape[-2:])
    even = planes[:, :height, :width]
    return (even[:, ::2, ::2] + even[:, 1::2, ::2] + even[:, ::2, 1::2] + even[:, 1::2, 1::2]) / 4


def ms_ssim_by_hand(image: Array, target: Array) -> float:
    value = 1.0
    for scale, weight in enumerate(SCALE_WEIGHTS):
        similarity, contrast = similarity_maps(image, target)
        is_coarsest = scale == len(SCALE_WEIGHTS) - 1
        value *= max(0.0, similarity.mean() if is_coarsest else contrast[:, 5:-5, 5:-5].mean()) ** weight
        image, target = halve(image), halve(target)
    return value


def test_known_difference() -> None:
    target = np.full((1, 3, 16, 16), 0.25, np.float32)
    image = target + np.float32(0.5)
    assert measure_mse(image, target) == pytest.approx(0.25)
    assert measure_psnr(image, target) == pytest.approx(10 * np.log10(4 / 0.25))
    luminance = (2 * 1.75 * 1.25 + C1) / (1.75**2 + 1.25**2 + C1)  # Wang et al., equation 6
    assert measure_ssim(image, target) == pytest.approx(luminance)


def test_mse_is_that_of_torch_on_values_as_they_are() -> None:
    import torch

    image, target = random_images(2, 3, 24, 24) * np.float32(1.5), random_images(2, 3, 24, 24, seed=1)
    expected = [
        torch.nn.functional.mse_loss(torch.from_numpy(first), torch.from_numpy(second)).item()
        for first, second in zip(image, target, strict=True)
    ]
    assert measure_mse(image, target) == pytest.approx(expected, rel=1e-5)
    assert (measure_mse(image, target) > measure_mse(image.clip(-1, 1), target)).all()


def test_psnr_is_that_of_scikit_image_on_clipped_values() -> None:
    image, target = random_images(2, 3, 24, 24) * np.float32(1.5), random_images(2, 3, 24, 24, seed=1)
    expected = [
        peak_signal_noise_ratio(second, first.clip(-1, 1), data_range=2)
        for first, second in zip(image, target, strict=True)
    ]
    assert measure_psnr(image, target) == pytest.approx(expected, rel=1e-6)


def test_l2_is_that_of_the_saved_picture() -> None:
    target = np.zeros((1, 3, 8, 8), np.float32)
    # 0.5 is 191.25 of 255, saved as 191, and 2 is saved as white.
    image = np.stack([np.full((8, 8), value, np.float32) for value in (0.5, 2.0, 0.0)])[None]
    saved = np.array([191, 255, 127]) / 127.5 - 1
    assert measure_l2(saved_pictures(image, (8, 8)), target) == pytest.approx(np.square(saved).mean(), rel=1e-5)


def test_l2_of_the_target_itself_is_half_a_level_at_most() -> None:
    levels = np.arange(256, dtype=np.float32) / 127.5 - 1
    target = np.broadcast_to(levels.reshape(1, 1, 16, 16), (1, 3, 16, 16)).astype(np.float32)
    assert measure_l2(saved_pictures(target, (16, 16)), target)[0] <= (1 / 127.5) ** 2


@pytest.mark.parametrize(
    ("side", "blur", "l2", "ratio"), [(256, 3, 0.038, 1.0), (1024, 12, 0.03, 1.01), (1024, 4, 0.004, 1.12)]
)
def test_l2_is_upstreams_of_the_full_picture_reduced_by_pillow(
    project_root: Path, side: int, blur: int, l2: float, ratio: float
) -> None:
    """It is a little more than the pooled image's where that is larger than 256 px, as `saved_pictures` tells."""
    photo = Image.fromarray(load_image(project_root / "examples/photos/grace-hopper.png")).resize((side, side))
    saved = np.asarray(photo.filter(ImageFilter.GaussianBlur(blur)))
    target = normalize_images(resize_image(np.asarray(photo), (256, 256))[None])
    upstream = measure_mse(normalize_images(resize_image(saved, (256, 256))[None]), target)[0]
    rendered = ((saved.transpose(2, 0, 1)[None] + 0.5) / 127.5 - 1).astype(np.float32)  # truncated, it is what is saved
    with open_metrics(MetricOptions(names=("mse", "l2")), (256, 256)) as metrics:
        pooled = pool_images(rendered, (256, 256))
        values = metrics.measure(pooled, target, saved_pictures(rendered, (256, 256)))
        of_pooled = metrics.measure(pooled, target)["l2"][0]
    assert values["l2"][0] == upstream == pytest.approx(l2, rel=0.15)
    assert upstream / of_pooled == pytest.approx(ratio, abs=0.005)


def test_equal_images_have_an_infinite_psnr() -> None:
    target = random_images(2, 3, 16, 16)
    image = target.copy()
    image[0] *= 0.9
    finite, infinite = measure_psnr(image, target)
    assert np.isfinite(finite)
    assert np.isposinf(infinite)
    assert measure_mse(image, target)[1] == 0
    assert measure_ssim(image, target)[1] == 1


def test_psnr_and_similarities_are_those_of_the_clipped_image() -> None:
    target = smooth_images(1, 3, MS_SSIM_LEAST_SIDE, MS_SSIM_LEAST_SIDE)
    image = target * np.float32(1.5)
    for measure in (measure_psnr, measure_ssim, measure_ms_ssim):
        assert measure(image, target) == measure(image.clip(-1, 1), target)


def test_ssim_agrees_with_that_of_the_saved_pictures() -> None:
    target, noise = random_images(1, 3, 32, 40), random_images(1, 3, 32, 40, seed=1)
    image = (0.8 * target + 0.2 * noise).astype(np.float32)
    pictures = [((array[0] + 1) * 127.5).round().astype(np.uint8) for array in (image, target)]
    expected = structural_similarity(
        *pictures, channel_axis=0, data_range=255, gaussian_weights=True, use_sample_covariance=False
    )
    assert measure_ssim(image, target) == pytest.approx(expected, abs=1e-3)


def test_ssim_is_that_of_the_paper() -> None:
    target = smooth_images(2, 3, 40, 48)
    image = (target + 0.1 * random_images(2, 3, 40, 48)).clip(-1, 1).astype(np.float32)
    expected = [
        similarity_maps(first + 1.0, second + 1.0)[0][:, 5:-5, 5:-5].mean()
        for first, second in zip(image.astype(np.float64), target.astype(np.float64), strict=True)
    ]
    assert measure_ssim(image, target) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("shape", [(192, 256), (MS_SSIM_LEAST_SIDE, MS_SSIM_LEAST_SIDE + 5)])
def test_ms_ssim_is_that_of_the_paper(shape: tuple[int, int]) -> None:
    target = smooth_images(2, 3, *shape)
    noise = random_images(2, 3, *shape, seed=2) * np.array([0.05, 0.4], np.float32).reshape(2, 1, 1, 1)
    image = (target * np.float32(0.9) + noise).clip(-1, 1).astype(np.float32)
    expected = [
        ms_ssim_by_hand(first + 1.0, second + 1.0)
        for first, second in zip(image.astype(np.float64), target.astype(np.float64), strict=True)
    ]
    found = measure_ms_ssim(image, target)
    assert found == pytest.approx(expected, abs=2e-5)
    assert found[0] > found[1] + 0.05


def test_ms_ssim_of_equal_images_is_one_and_of_inverted_ones_zero() -> None:
    target = smooth_images(1, 3, MS_SSIM_LEAST_SIDE, MS_SSIM_LEAST_SIDE)
    assert measure_ms_ssim(target, target) == pytest.approx(1)
    assert measure_ms_ssim(-target, target) == pytest.approx(0)


@settings(deadline=None)
@given(height=st.integers(1, 14), width=st.integers(1, 14))
def test_small_images_are_measured(height: int, width: int) -> None:
    target = random_images(1, 3, height, width)
    for measure, direction in ((measure_mse, 1), (measure_psnr, -1), (measure_ssim, -1)):
        near, far = (measure(target * np.float32(factor), target)[0] for factor in (0.9, 0.5))
        assert direction * near < direction * far
