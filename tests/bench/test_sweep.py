from collections.abc import Callable

import pytest

from restyle_deploy.bench.sweep import BatchPoint, next_batch, saturated_batch, sweep_batches
from restyle_deploy.errors import BuildError


def device(full_at: int) -> Callable[[int], float]:
    """Return a device that takes the same time for up to so many images."""
    return lambda batch: 10.0 * min(batch, full_at)


def test_sweep_ends_after_two_doublings_without_growth() -> None:
    points = sweep_batches(device(8))
    assert [point.batch for point in points] == [1, 2, 4, 8, 16, 32]
    assert saturated_batch(points) == 8


def test_a_device_that_one_image_fills() -> None:
    points = sweep_batches(device(1))
    assert [point.batch for point in points] == [1, 2, 4]
    assert saturated_batch(points) == 1


def test_one_doubling_without_growth_does_not_end_it() -> None:
    speeds = {1: 10.0, 2: 10.1, 4: 20.0, 8: 20.1, 16: 19.0}
    points = sweep_batches(speeds.__getitem__)
    assert [point.batch for point in points] == [1, 2, 4, 8, 16]
    assert saturated_batch(points) == 4


def test_slow_growth_that_adds_up_goes_on() -> None:
    points = sweep_batches(lambda batch: 10 * batch**0.06, most_batch=16)  # 4 % a doubling, 8 % in two
    assert [point.batch for point in points] == [1, 2, 4, 8, 16]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), "it needed more memory than there is"),
        (RuntimeError("CUDA out of memory"), "CUDA out of memory"),
        (RuntimeError(), "RuntimeError"),
        (BuildError("the profile ends at 2"), "the profile ends at 2"),
    ],
)
def test_a_batch_that_cannot_run_ends_it_and_says_so(error: Exception, reason: str) -> None:
    def measure(batch: int) -> float:
        if batch > 2:
            raise error
        return 10.0 * batch

    points = sweep_batches(measure)
    assert points[-1] == BatchPoint(batch=4, images_per_s=None, reason=reason)
    assert saturated_batch(points) == 2


def test_bugs_pass_through() -> None:
    with pytest.raises(KeyError):
        sweep_batches({"no": 0.0}.__getitem__)  # type: ignore[arg-type]


def test_limits() -> None:
    assert next_batch(()) == 1
    assert next_batch([BatchPoint(batch=8, images_per_s=1.0)], most_batch=15) is None
    assert saturated_batch([BatchPoint(batch=1, images_per_s=None, reason="none")]) is None
