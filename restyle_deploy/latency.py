"""Wall-clock time of a call: raw samples, warm-up apart, and the few figures drawn from them."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

UNSTABLE_ABOVE = 0.1  # interquartile range as a share of the median

Cell = TypeVar("Cell")


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Times of one call, repeated.

    Attributes:
        warmup_ms: the first calls, in milliseconds; no figure below counts them.
        samples_ms: the measured calls, in the order in which they ran.
    """

    warmup_ms: tuple[float, ...]
    samples_ms: tuple[float, ...]

    def percentile_ms(self, percent: float) -> float:
        """Return a percentile of the samples, interpolated linearly between neighbours."""
        return float(np.percentile(self.samples_ms, percent))

    @property
    def median_ms(self) -> float:
        """Median of the samples."""
        return self.percentile_ms(50)

    @property
    def p95_ms(self) -> float:
        """95th percentile of the samples."""
        return self.percentile_ms(95)

    @property
    def iqr_ms(self) -> float:
        """Interquartile range of the samples: 75th less 25th percentile."""
        return self.percentile_ms(75) - self.percentile_ms(25)

    @property
    def is_unstable(self) -> bool:
        """Whether the interquartile range exceeds a tenth of the median: other work disturbed the machine."""
        return self.iqr_ms > UNSTABLE_ABOVE * self.median_ms


def measure_interleaved(
    runs: Mapping[Cell, Callable[[], object]],
    *,
    warmup: int,
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
    after_call: Callable[[Cell], None] | None = None,
) -> dict[Cell, Latency]:
    """Time several calls in turn, so that a disturbance of the machine hits all of them alike.

    Every round calls each cell once; the next round starts one cell later, so that no cell is always the first.

    Args:
        runs: the calls by cell; one returns only when its result is complete (a GPU backend synchronises inside).
        warmup: calls of each cell before the measured ones, at least 0.
        repeats: measured calls of each cell, at least 1.
        clock: seconds, monotonic.
        after_call: told the cell after each of its calls, warm-up included, outside the timed span.
    Returns:
        A `Latency` per cell, in the order of `runs`.
    Raises:
        ValueError: there is nothing to run, or `warmup` or `repeats` is too small.
    """
    if not runs or warmup < 0 or repeats < 1:
        raise ValueError(
            f"got {len(runs)} calls, warmup {warmup}, repeats {repeats}; expected at least 1 call, 0 and 1"
        )
    cells = list(runs)
    times_ms: dict[Cell, list[float]] = {cell: [] for cell in cells}
    for turn in range(warmup + repeats):
        first = turn % len(cells)
        for cell in cells[first:] + cells[:first]:
            run = runs[cell]
            begin = clock()
            run()
            end = clock()
            times_ms[cell].append((end - begin) * 1e3)
            if after_call is not None:
                after_call(cell)
    return {
        cell: Latency(warmup_ms=tuple(times[:warmup]), samples_ms=tuple(times[warmup:]))
        for cell, times in times_ms.items()
    }
