"""What every metric is described by and measured with, and the options that some of them take."""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from restyle_deploy.errors import MetricError

DATA_RANGE = 2.0  # of values in [-1, 1]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """How a metric is named, read and defined.

    Attributes:
        name: key of the values in `MetricSet.measure` and in a report.
        label: for tables and charts, without the unit.
        unit: "" for a pure number.
        decimals: that are worth showing.
        higher_is_better: the direction of improvement.
        lowest, highest: the range; `None` where it is unbounded.
        definition: what is computed, in one sentence. Words that may change: whatever is computed otherwise is another
            metric with another name, as reports are compared by that.
        source: who defined it, and who computes it here.
        depends_on: what its figures depend on besides, as JSON: hashes of models, and what these are given.
    """

    name: str
    label: str
    unit: str
    decimals: int
    higher_is_better: bool
    lowest: float | None
    highest: float | None
    definition: str
    source: str
    depends_on: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class MetricOptions:
    """Which metrics to measure, and the files that some of them need; nothing is ever downloaded.

    Attributes:
        names: of the metrics, in any order; `None`: all.
        lpips_backbone: torchvision's AlexNet weights (`alexnet-owt-7be5be79.pth`); `None`: those in torch's hub cache.
        identity_model: a face-embedding model, ONNX. A sidecar beside it, of the same name with the suffix `.json`, may
            hold `size`, `mean`, `std`, `channels` and `crop`; the options here win over it.
        identity_size: (height, width) of the model's input; `None`: the sidecar's, else what the model's input says.
        identity_mean, identity_std: of the channels of values in [0, 1], in the order that the model takes them: it is
            given (value - mean) / std; `None`: the sidecar's, else 0.5 and 0.5.
        identity_channels: the order of colours that the model takes; `None`: the sidecar's, else "rgb".
        identity_crop: (top, left, bottom, right) of the part that is embedded, as fractions of the image's sides;
            `None`: the sidecar's, else the whole image.
    """

    names: tuple[str, ...] | None = None
    lpips_backbone: Path | None = None
    identity_model: Path | None = None
    identity_size: tuple[int, int] | None = None
    identity_mean: tuple[float, float, float] | None = None
    identity_std: tuple[float, float, float] | None = None
    identity_channels: Literal["rgb", "bgr"] | None = None
    identity_crop: tuple[float, float, float, float] | None = None


Measure = Callable[[NDArray[np.float32], NDArray[np.float32]], NDArray[np.float64]]
"""Compares images with their targets, [N, 3, h, w] float32 both, finite: [N] float64, NaN where it is not defined."""


@dataclass(frozen=True, kw_only=True)
class Gauge:
    """A metric that is ready to measure.

    Attributes:
        metric: as opened: its source names the files that are used.
        measure: see `Measure`.
        reads_pictures: whether its images are `pixels.saved_pictures`, and not the pooled ones.
    """

    metric: Metric
    measure: Measure
    reads_pictures: bool = False


def require_installed(*modules: str, command: str) -> None:
    """Raise `MetricError`, with the command that mends it, unless all modules are installed."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise MetricError(f"{' and '.join(missing)} {'are' if missing[1:] else 'is'} not installed; run: {command}")


def import_library(module: str, *, command: str) -> Any:
    """Import a library that one metric needs, without types.

    Raises:
        MetricError: it is not installed, or importing it fails, as of torchmetrics beside a torchvision of another
            PyTorch; neither must stop the other metrics.
    """
    require_installed(module.partition(".")[0], command=command)
    try:
        return import_module(module)
    except Exception as error:  # what a broken installation raises is not foreseeable
        raise MetricError(
            f"{module} is installed, but importing it fails with {type(error).__name__}: {first_line(error)}; "
            f"mend the installation: {command}"
        ) from error


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, or its kind where it has none."""
    return (str(error) or type(error).__name__).splitlines()[0]


def shown(images: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return values clipped to [-1, 1], as the pictures that are saved show them."""
    return images.clip(-1, 1)
