"""The batch at which a device is full: batches are doubled until throughput no longer grows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from restyle_deploy.errors import RestyleDeployError

# Growth of throughput from one batch to its double that counts as none.
LEAST_GROWTH = 0.05
# Doublings in a row without growth, after which the sweep ends: one may be held up by a kernel's tile size.
PATIENCE = 2
MOST_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class BatchPoint:
    """One batch of a sweep.

    Attributes:
        batch: images of one call.
        images_per_s: None where it could not run.
        reason: why it could not.
    """

    batch: int
    images_per_s: float | None
    reason: str | None = None


def next_batch(points: Sequence[BatchPoint], *, most_batch: int = MOST_BATCH) -> int | None:
    """Return the batch to measure next, or None when the sweep is over.

    It is over when a batch could not run (larger ones need more memory), when `PATIENCE` doublings in a row brought
    less than `LEAST_GROWTH` over the best before them, or at `most_batch`.

    Args:
        points: measured so far, batches rising.
        most_batch: the largest that is tried.
    """
    if not points:
        return 1
    last = points[-1]
    if last.images_per_s is None or 2 * last.batch > most_batch:
        return None
    speeds = [point.images_per_s for point in points if point.images_per_s is not None]
    if len(speeds) > PATIENCE and max(speeds[-PATIENCE:]) < (1 + LEAST_GROWTH) * max(speeds[:-PATIENCE]):
        return None
    return 2 * last.batch


def saturated_batch(points: Sequence[BatchPoint]) -> int | None:
    """Return the smallest batch within `LEAST_GROWTH` of the best throughput; None where nothing could run."""
    speeds = {point.batch: point.images_per_s for point in points if point.images_per_s is not None}
    if not speeds:
        return None
    best = max(speeds.values())
    return min(batch for batch, speed in speeds.items() if speed * (1 + LEAST_GROWTH) >= best)


def sweep_batches(measure: Callable[[int], float], *, most_batch: int = MOST_BATCH) -> tuple[BatchPoint, ...]:
    """Measure 1, 2, 4 and so on until throughput no longer grows or a batch cannot run.

    Args:
        measure: images per second at a batch; raises what libraries raise when memory is short.
        most_batch: the largest that is tried.
    """
    points: list[BatchPoint] = []
    while (batch := next_batch(points, most_batch=most_batch)) is not None:
        points.append(_measure_point(measure, batch))
    return tuple(points)


def _measure_point(measure: Callable[[int], float], batch: int) -> BatchPoint:
    try:
        return BatchPoint(batch=batch, images_per_s=measure(batch))
    except MemoryError:
        return BatchPoint(batch=batch, images_per_s=None, reason="it needed more memory than there is")
    except (RestyleDeployError, RuntimeError) as error:  # the latter is how the libraries tell that memory is short
        return BatchPoint(batch=batch, images_per_s=None, reason=str(error) or type(error).__name__)
