import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from skimage.metrics import structural_similarity

from restyle_deploy.bench.quality import ImageQuality, Quality, measure_quality
from restyle_deploy.errors import BackendUnavailableError
from restyle_deploy.runtime.images import pool_images


def random_images(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def test_known_difference() -> None:
    target = np.full((1, 3, 16, 16), 0.25, np.float32)
    quality = measure_quality(target + np.float32(0.5), target).mean
    assert quality.mse == pytest.approx(0.25)
    assert quality.psnr_db == pytest.approx(10 * np.log10(4 / 0.25))
    luminance = (2 * 1.75 * 1.25 + 0.02**2) / (1.75**2 + 1.25**2 + 0.02**2)  # Wang et al., equation 6
    assert quality.ssim == pytest.approx(luminance)


def test_psnr_and_ssim_are_those_of_the_clipped_image_and_mse_is_not() -> None:
    target = random_images(2, 3, 24, 24)
    image = target * np.float32(1.5)
    quality, clipped = measure_quality(image, target).mean, measure_quality(image.clip(-1, 1), target).mean
    assert (quality.psnr_db, quality.ssim) == (clipped.psnr_db, clipped.ssim)
    assert quality.mse == pytest.approx(float(np.mean((image - target) ** 2)), rel=1e-5)
    assert quality.mse > clipped.mse


def test_ssim_agrees_with_that_of_the_saved_pictures() -> None:
    target, noise = random_images(1, 3, 32, 40), random_images(1, 3, 32, 40, seed=1)
    image = (0.8 * target + 0.2 * noise).astype(np.float32)
    pictures = [((array[0] + 1) * 127.5).round().astype(np.uint8) for array in (image, target)]
    expected = structural_similarity(
        *pictures, channel_axis=0, data_range=255, gaussian_weights=True, use_sample_covariance=False
    )
    assert measure_quality(image, target).mean.ssim == pytest.approx(expected, abs=1e-3)


def test_equal_images_have_no_finite_psnr() -> None:
    target = random_images(2, 3, 16, 16)
    image = target.copy()
    image[0] *= 0.9
    first, second = measure_quality(image, target).per_image
    assert first.psnr_db is not None
    assert second == ImageQuality(mse=0, psnr_db=None, ssim=1)
    assert measure_quality(image, target).mean.psnr_db is None


def test_mean_is_over_the_images() -> None:
    images = (ImageQuality(mse=0.1, psnr_db=10, ssim=0.2), ImageQuality(mse=0.3, psnr_db=20, ssim=0.4))
    mean = Quality(per_image=images).mean
    assert (mean.mse, mean.psnr_db, mean.ssim) == pytest.approx((0.2, 15, 0.3))


@given(height=st.integers(1, 14), width=st.integers(1, 14))
def test_small_images_are_measured(height: int, width: int) -> None:
    target = random_images(1, 3, height, width)
    near, far = (measure_quality(target * np.float32(factor), target).mean for factor in (0.9, 0.5))
    assert near.mse < far.mse
    assert -1 <= far.ssim < near.ssim <= 1


@pytest.mark.parametrize("shape", [(1, 3, 16, 16), (2, 3, 16, 8), (3, 16, 16)])
def test_unlike_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected \[N, 3, H, W\] for both"):
        measure_quality(random_images(*shape), random_images(2, 3, 16, 16))


def test_no_images_are_refused() -> None:
    with pytest.raises(ValueError, match="N >= 1"):
        measure_quality(random_images(0, 3, 16, 16), random_images(0, 3, 16, 16))


def test_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(BackendUnavailableError, match="scikit-image"):
        measure_quality(random_images(1, 3, 16, 16), random_images(1, 3, 16, 16))


def test_pooling_takes_block_means_over_any_leading_axes() -> None:
    images = np.arange(2 * 3 * 4 * 8, dtype=np.float32).reshape(1, 2, 3, 4, 8)
    pooled = pool_images(images, (2, 4))
    assert pooled.shape == (1, 2, 3, 2, 4)
    assert pooled.dtype == np.float32
    assert pooled[0, 1, 2, 1, 3] == images[0, 1, 2, 2:4, 6:8].mean()


def test_pooling_to_the_same_size_changes_nothing() -> None:
    images = random_images(2, 3, 4, 6)
    assert np.array_equal(pool_images(images, (4, 6)), images)


@pytest.mark.parametrize("shape", [(3, 8), (4, 5), (8, 8)])
def test_pooling_by_a_fraction_is_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="no whole multiple"):
        pool_images(random_images(1, 3, 4, 8), shape)
