"""Errors of single pixel values: MSE, upstream's L2, PSNR."""

from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from restyle_deploy.bench.metrics.base import DATA_RANGE, Gauge, Metric, MetricOptions, import_library, shown
from restyle_deploy.runtime.images import normalize_images, uint8_from_images

MSE = Metric(
    name="mse",
    label="MSE",
    unit="",
    decimals=4,
    higher_is_better=False,
    lowest=0.0,
    highest=None,
    definition="Mean squared error of values on [-1, 1] as the model gives them, not clipped, at the encoder's size.",
    source="L2 loss of upstream's training (training/coach_restyle_psp.py); NumPy",
)
L2 = Metric(
    name="l2",
    label="L2 of pictures",
    unit="",
    decimals=4,
    higher_is_better=False,
    lowest=0.0,
    highest=4.0,
    definition="Mean squared error on [-1, 1] of the picture as it is saved: clipped and truncated to 8 bits.",
    source="upstream's scripts/calc_losses_on_images.py --mode l2; NumPy",
)
PSNR = Metric(
    name="psnr_db",
    label="PSNR",
    unit="dB",
    decimals=2,
    higher_is_better=True,
    lowest=0.0,
    highest=None,
    definition="Peak signal-to-noise ratio, peak to peak 2, of values clipped to [-1, 1]; infinite for equal images.",
    source="10 log10(2^2 / mean squared error); scikit-image",
)


def open_mse(options: MetricOptions, shape: tuple[int, int]) -> Gauge:
    """Open the mean squared error; see `measure_mse`."""
    return Gauge(metric=MSE, measure=measure_mse)


def open_l2(options: MetricOptions, shape: tuple[int, int]) -> Gauge:
    """Open upstream's L2; see `measure_l2`."""
    return Gauge(metric=L2, measure=measure_l2)


def open_psnr(options: MetricOptions, shape: tuple[int, int]) -> Gauge:
    """Open the peak signal-to-noise ratio; see `measure_psnr`.

    Raises:
        MetricError: scikit-image is not installed.
    """
    import_library("skimage.metrics", command="pip install 'restyle-deploy[bench]'")
    return Gauge(metric=PSNR, measure=measure_psnr)


def measure_mse(images: NDArray[np.float32], targets: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the mean squared error of values as the model gives them, not clipped, on [-1, 1].

    Range: 0 to infinity (0 to 4 where the values are in [-1, 1]); lower is better.
    Source: the L2 loss of upstream's training, `F.mse_loss` of the image pooled to the encoder's size.
    """
    errors: NDArray[np.float64] = np.square(images.astype(np.float64) - targets).mean(axis=(1, 2, 3))
    return errors


def measure_l2(images: NDArray[np.float32], targets: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the mean squared error on [-1, 1] of the pictures as they are saved: clipped, truncated to 8 bits.

    Upstream reads the saved pictures of full size and resizes them to 256 x 256 (antialiased bilinear), targets too;
    here the image is pooled to the encoder's size by block means first and truncated then. So the figures differ a
    little, and more for cars (192 x 256 here) and for models whose encoder is not of 256 px.

    Range: 0 to 4; lower is better.
    Source: upstream's scripts/calc_losses_on_images.py, mode "l2" (`torch.nn.MSELoss`).
    """
    return measure_mse(normalize_images(uint8_from_images(images)), targets)


def measure_psnr(images: NDArray[np.float32], targets: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the peak signal-to-noise ratio in decibels, peak to peak 2, of values clipped to [-1, 1].

    Range: 0 (black and white exchanged) to infinity (equal images); higher is better.
    Source: 10 log10(peak^2 / mean squared error), the field's usual definition; scikit-image's
        `peak_signal_noise_ratio`.
    """
    metrics: Any = import_module("skimage.metrics")  # its functions are not typed
    pairs = zip(shown(images).astype(np.float64), shown(targets).astype(np.float64), strict=True)
    with np.errstate(divide="ignore"):
        values = [metrics.peak_signal_noise_ratio(target, image, data_range=DATA_RANGE) for image, target in pairs]
    return np.array(values, np.float64)
