"""A session's times and results beside those of another way to compute the same model."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from restyle_deploy.bench.figures import Aggregate, StepLatency
from restyle_deploy.runtime.session import InversionResult

DATA_RANGE = 2.0  # of values in [-1, 1]


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """The other's time over the session's, round by round: above 1, the session is faster.

    Attributes:
        median: of the rounds.
        lower_quartile, upper_quartile: half of the rounds lie between them.
    """

    median: float
    lower_quartile: float
    upper_quartile: float


@dataclass(frozen=True, kw_only=True)
class ComparedRow:
    """One step count of the reference model, whose quality is that of an exact session."""

    steps: int
    latency: StepLatency
    ratio: Ratio


@dataclass(frozen=True, kw_only=True)
class Against:
    """The reference model, measured in the same process and in the same rounds.

    Attributes:
        reference: what ran it, its version and its threads.
        rows: one per step count, as the report's.
    """

    reference: dict[str, object]
    rows: tuple[ComparedRow, ...]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """What an approximation costs.

    Attributes:
        psnr_db: of the last image, at its full size, to the exact one; the lowest of all images. Values are clipped to
            [-1, 1] as in the pictures that are saved. `None` where all are equal.
        latent_error: the largest absolute difference of the last latent, over all images.
    """

    psnr_db: float | None
    latent_error: float


@dataclass(frozen=True, kw_only=True)
class ExactRow:
    """One step count of the exact session, its quality by metric, and how far the approximate one is from it."""

    steps: int
    latency: StepLatency
    ratio: Ratio
    quality: dict[str, Aggregate]
    difference: Difference


@dataclass(frozen=True, kw_only=True)
class Exact:
    """The exact session of the same bundle and backend, measured in the same rounds as the approximate one.

    Attributes:
        session: as it describes itself.
        rows: one per step count, as the report's.
    """

    session: dict[str, object]
    rows: tuple[ExactRow, ...]


def ratio_from_samples(other_ms: Sequence[float], session_ms: Sequence[float]) -> Ratio:
    """Return the ratio of two sets of samples of the same rounds, at least one."""
    lower, median, upper = np.percentile(np.divide(other_ms, session_ms), (25, 50, 75))
    return Ratio(median=float(median), lower_quartile=float(lower), upper_quartile=float(upper))


def difference_of(result: InversionResult, exact: InversionResult) -> Difference:
    """Compare the last images and latents of two inversions of the same images: [N, 3, R, R'] and [N, S, D]."""
    squared_errors = [
        float(np.square(_clipped(image) - _clipped(exact_image)).mean())
        for image, exact_image in zip(result.images, exact.images, strict=True)
    ]
    return Difference(
        psnr_db=10 * float(np.log10(DATA_RANGE**2 / max(squared_errors))) if max(squared_errors) > 0 else None,
        latent_error=float(np.abs(result.latents - exact.latents).max()),
    )


def worst_of(differences: Sequence[Difference]) -> Difference:
    """Return the largest of several differences, at least one."""
    psnr_db = [difference.psnr_db for difference in differences if difference.psnr_db is not None]
    return Difference(
        psnr_db=min(psnr_db, default=None), latent_error=max(difference.latent_error for difference in differences)
    )


def _clipped(image: NDArray[np.float32]) -> NDArray[np.float64]:
    return image.astype(np.float64).clip(-1, 1)
