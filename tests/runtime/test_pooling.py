import numpy as np
import pytest
from numpy.typing import NDArray

from restyle_deploy.runtime.images import pool_images


def random_images(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)


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
