"""Errors of single pixel values: MSE, L2 of the pictures (upstream's), PSNR."""

from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from restyle_deploy.bench.metrics.base import DATA_RANGE, Gauge, Metric, MetricOptions, import_library, shown
from restyle_deploy.runtime.images import normalize_images, resize_image, uint8_from_images

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
    definition="Mean squared error on [-1, 1] of the picture as it is saved in 8 bits, resized to the encoder's size.",
    source="upstream's scripts/calc_losses_on_images.py --mode l2; Pillow, NumPy",
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
    """Open the L2 of the pictures; see `measure_l2`."""
    return Gauge(metric=L2, measure=measure_l2, reads_pictures=True)


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


def measure_l2(pictures: NDArray[np.float32], targets: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the mean squared error on [-1, 1] of pictures as they are saved and then resized: see `saved_pictures`.

    Upstream's script differs in what it is given: pictures of JPEG inputs were compressed as such; cars, 192 x 256
    here, are stretched to a square, and smaller models enlarged, as it compares at 256 x 256 whatever the model. It
    leaves out the images that do not fill the last batch (of 4), and prints two decimals.

    Range: 0 to 4; lower is better.
    Source: upstream's scripts/calc_losses_on_images.py, mode "l2" (`torch.nn.MSELoss`).
    """
    return measure_mse(pictures, targets)


def saved_pictures(images: NDArray[np.float32], shape: tuple[int, int]) -> NDArray[np.float32]:
    """Return what upstream's script reads of images [N, 3, H, W] in [-1, 1]: [N, 3, *shape] float32.

    They are clipped and truncated to 8 bits at their full size, as they are saved, and then resized by Pillow's
    antialiased bilinear filter, which is twice as wide as a block mean: of a photo of 1024 px blurred to an L2 of 0.03
    it leaves 1 per cent more error, of a nearly exact one (0.004) 12 per cent.

    Source: upstream's scripts/inference_iterative.py, which saves the pictures, and scripts/calc_losses_on_images.py.
    """
    saved = uint8_from_images(images)
    return normalize_images(np.stack([resize_image(picture, shape) for picture in saved]))


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
