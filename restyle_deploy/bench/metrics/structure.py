"""Structural similarity at one scale (scikit-image) and at five (torchmetrics)."""

from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from restyle_deploy.bench.metrics.base import DATA_RANGE, Gauge, Metric, MetricOptions, import_library, shown
from restyle_deploy.errors import MetricError

SIGMA = 1.5
WINDOW = 11
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
# torchmetrics asks for a sixteenth of the side that is larger than the window less one.
MS_SSIM_LEAST_SIDE = (WINDOW - 1) * 2 ** (len(SCALE_WEIGHTS) - 1) + 16

SSIM = Metric(
    name="ssim",
    label="SSIM",
    unit="",
    decimals=3,
    higher_is_better=True,
    lowest=-1.0,
    highest=1.0,
    definition="Structural similarity per channel, Gaussian window of 11 px (sigma 1.5), averaged; of clipped values.",
    source="Wang et al. 2004, doi:10.1109/TIP.2003.819861; scikit-image",
)
MS_SSIM = Metric(
    name="ms_ssim",
    label="MS-SSIM",
    unit="",
    decimals=3,
    higher_is_better=True,
    lowest=0.0,
    highest=1.0,
    definition="Structural similarity over five scales with the weights of the paper; of clipped values.",
    source="Wang, Simoncelli and Bovik 2003, doi:10.1109/ACSSC.2003.1292216; torchmetrics",
)


def open_ssim(options: MetricOptions, shape: tuple[int, int]) -> Gauge:
    """Open SSIM; see `measure_ssim`.

    Raises:
        MetricError: scikit-image is not installed.
    """
    import_library("skimage.metrics", command="pip install 'restyle-deploy[bench]'")
    return Gauge(metric=SSIM, measure=measure_ssim)


def open_ms_ssim(options: MetricOptions, shape: tuple[int, int]) -> Gauge:
    """Open MS-SSIM for images of `shape`; see `measure_ms_ssim`.

    Raises:
        MetricError: torchmetrics is not installed or cannot be imported, or the images are too small for five scales.
    """
    if min(shape) < MS_SSIM_LEAST_SIDE:
        raise MetricError(
            f"images of {shape[0]}x{shape[1]} pixels are too small for its five scales; "
            f"expected at least {MS_SSIM_LEAST_SIDE} on both sides"
        )
    for module in ("torch", "torchmetrics.functional.image"):
        import_library(module, command="pip install 'restyle-deploy[metrics]'")
    return Gauge(metric=MS_SSIM, measure=measure_ms_ssim)


def measure_ssim(images: NDArray[np.float32], targets: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the structural similarity per channel, then averaged, of clipped values.

    The values are shifted to [0, 2], as it is defined for intensities. The border of 5 px, where the window does not
    fit, is left out; it shrinks for images smaller than the window.

    Range: -1 to 1; higher is better.
    Source: Wang et al. 2004, doi:10.1109/TIP.2003.819861; scikit-image's `structural_similarity`, its settings for
        that paper.
    """
    metrics: Any = import_module("skimage.metrics")  # its functions are not typed
    side = min(images.shape[-2:])
    pairs = zip(shown(images).astype(np.float64) + 1, shown(targets).astype(np.float64) + 1, strict=True)
    values = [
        metrics.structural_similarity(
            image,
            target,
            channel_axis=0,
            data_range=DATA_RANGE,
            gaussian_weights=True,
            sigma=SIGMA,
            use_sample_covariance=False,
            # The Gaussian always has 11 taps; this is the border that is left out.
            win_size=min(WINDOW, side - 1 + side % 2),
        )
        for image, target in pairs
    ]
    return np.array(values, np.float64)


def measure_ms_ssim(images: NDArray[np.float32], targets: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the structural similarity over five scales, of clipped values shifted to [0, 2].

    Contrast and structure of four scales and SSIM of the coarsest, each a mean over pixels and channels, to the powers
    of the paper; scales are made by means of 2 x 2 pixels. A negative mean counts as 0, so that powers exist. Two
    things are torchmetrics' own: the mean is taken over the channels before the powers, and at the coarsest scale it
    includes the border, mirrored.

    Range: 0 to 1; higher is better.
    Source: Wang, Simoncelli and Bovik 2003, doi:10.1109/ACSSC.2003.1292216; torchmetrics'
        `multiscale_structural_similarity_index_measure`.
    """
    torch: Any = import_module("torch")
    metrics: Any = import_module("torchmetrics.functional.image")
    pairs = (torch.from_numpy(shown(array) + 1) for array in (images, targets))
    values = metrics.multiscale_structural_similarity_index_measure(
        *pairs,
        data_range=DATA_RANGE,
        sigma=SIGMA,
        kernel_size=WINDOW,
        betas=SCALE_WEIGHTS,
        normalize="relu",
        reduction="none",
    )
    found: NDArray[np.float64] = values.double().numpy()
    return found
