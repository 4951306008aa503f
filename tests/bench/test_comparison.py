import numpy as np
import pytest

from restyle_deploy.bench.comparison import Difference, Ratio, difference_of, ratio_from_samples, worst_of
from restyle_deploy.runtime.session import InversionResult


def result(image: float, latent: float) -> InversionResult:
    """Two images: a black one, and one of this value."""
    images = np.stack([np.zeros((3, 4, 4), np.float32), np.full((3, 4, 4), image, np.float32)])
    return InversionResult(images=images, latents=np.full((2, 3, 5), latent, np.float32))


def test_ratio_is_taken_round_by_round() -> None:
    assert ratio_from_samples([10, 40, 30, 100, 50], [10, 20, 10, 25, 10]) == Ratio(
        median=3, lower_quartile=2, upper_quartile=4
    )


def test_difference_is_that_of_the_worst_image() -> None:
    difference = difference_of(result(0.5, 0.25), result(0.3, 0.0))
    assert difference.psnr_db == pytest.approx(20)
    assert difference.latent_error == 0.25


def test_only_what_is_shown_counts() -> None:
    assert difference_of(result(1.5, 0.0), result(1.25, 0.0)) == Difference(psnr_db=None, latent_error=0.0)


def test_worst_of_several() -> None:
    equal, near, far = (Difference(psnr_db=psnr, latent_error=e) for psnr, e in ((None, 0.0), (50, 0.2), (30, 0.1)))
    assert worst_of([equal, near, far]) == Difference(psnr_db=30, latent_error=0.2)
    assert worst_of([equal]) == equal
