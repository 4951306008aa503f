"""How near an inversion comes to its target: MSE, PSNR and SSIM, by scikit-image."""

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from restyle_deploy.bench.libraries import require_bench_libraries

DATA_RANGE = 2.0  # of values in [-1, 1]
SSIM_SIGMA = 1.5
SSIM_WINDOW = 11


@dataclass(frozen=True, kw_only=True)
class Metric:
    """How a metric is named and read.

    Attributes:
        name: the field of `ImageQuality`.
        label: for tables and charts.
        decimals: that are worth showing.
        higher_is_better: the direction of improvement.
    """

    name: str
    label: str
    decimals: int
    higher_is_better: bool


METRICS = (
    Metric(name="mse", label="MSE", decimals=4, higher_is_better=False),
    Metric(name="psnr_db", label="PSNR (dB)", decimals=2, higher_is_better=True),
    Metric(name="ssim", label="SSIM", decimals=3, higher_is_better=True),
)


@dataclass(frozen=True, kw_only=True)
class ImageQuality:
    """Distance of an image from its target, or the mean of several.

    Attributes:
        mse: mean squared error on [-1, 1], of values as the model gives them (not clipped), as upstream's loss counts
            it; 0 to infinity, lower is better.
        psnr_db: peak signal-to-noise ratio, peak to peak 2, of values clipped to [-1, 1] as in the pictures that are
            saved; decibels, higher is better. `None` for equal images, where it is infinite; so is a mean with one.
        ssim: structural similarity per channel, then averaged, of clipped values (shifted to [0, 2], as it is defined
            for intensities); -1 to 1, higher is better. Source: Wang et al. 2004, doi:10.1109/TIP.2003.819861.
    """

    mse: float
    psnr_db: float | None
    ssim: float


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Distances of a set of images from their targets, in the order of the images; at least one."""

    per_image: tuple[ImageQuality, ...]

    @property
    def mean(self) -> ImageQuality:
        """Mean over the images."""
        psnr_db = [image.psnr_db for image in self.per_image if image.psnr_db is not None]
        return ImageQuality(
            mse=float(np.mean([image.mse for image in self.per_image])),
            psnr_db=float(np.mean(psnr_db)) if len(psnr_db) == len(self.per_image) else None,
            ssim=float(np.mean([image.ssim for image in self.per_image])),
        )


def measure_quality(images: NDArray[np.float32], targets: NDArray[np.float32]) -> Quality:
    """Compare images with their targets.

    Args:
        images: [N, 3, H, W] float32, about [-1, 1]; N at least 1. Larger images: `images.pool_images` first.
        targets: the same shape, in [-1, 1].
    Raises:
        ValueError: the shapes differ, or there is no image.
        BackendUnavailableError: scikit-image is not installed.
    """
    if images.shape != targets.shape or images.ndim != 4 or len(images) == 0:
        raise ValueError(
            f"got images {list(images.shape)} and targets {list(targets.shape)}; expected [N, 3, H, W] for both, N >= 1"
        )
    require_bench_libraries()
    pairs = zip(images.astype(np.float64), targets.astype(np.float64), strict=True)
    return Quality(per_image=tuple(_compare(image, target) for image, target in pairs))


def _compare(image: NDArray[np.float64], target: NDArray[np.float64]) -> ImageQuality:
    """Compare two images [3, H, W]."""
    metrics: Any = import_module("skimage.metrics")  # its functions are not typed
    shown, shown_target = image.clip(-1, 1) + 1, target.clip(-1, 1) + 1
    side = min(image.shape[-2:])
    ssim = metrics.structural_similarity(
        shown,
        shown_target,
        channel_axis=0,
        data_range=DATA_RANGE,
        gaussian_weights=True,
        sigma=SSIM_SIGMA,
        use_sample_covariance=False,
        # The Gaussian always has 11 taps; the border that is left out shrinks for images smaller than that.
        win_size=min(SSIM_WINDOW, side - 1 + side % 2),
    )
    psnr_db = None
    if not np.array_equal(shown, shown_target):
        psnr_db = float(metrics.peak_signal_noise_ratio(shown_target, shown, data_range=DATA_RANGE))
    return ImageQuality(mse=float(metrics.mean_squared_error(image, target)), psnr_db=psnr_db, ssim=float(ssim))
