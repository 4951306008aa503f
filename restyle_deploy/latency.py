"""Wall-clock time of a call: raw samples, warm-up apart, and the few figures drawn from them."""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

Cell = TypeVar("Cell")


@dataclass(frozen=True, kw_only=True)
class WarmupRule:
    """When calls count as warm: the medians of the last `window` calls and of as many before them agree.

    A first call that compiles or allocates, clocks that rise and caches that fill all show as a difference between the
    two windows. The rule gives up when a limit is reached. Calls so slow that there were fewer than two windows by then
    are judged by the halves of what there is.

    Attributes:
        window: calls of one window, at least 1.
        tolerance: difference of the two medians, as a share of the later one, up to which they agree.
        least_calls, most_calls: of one cell; the least is made whatever time it takes.
        most_seconds: of one cell's calls together; a call that has begun is finished.
    """

    window: int = 5
    tolerance: float = 0.05
    least_calls: int = 3
    most_calls: int = 60
    most_seconds: float = 30.0

    def is_settled(self, times_ms: Sequence[float]) -> bool:
        """Whether the last two windows of all calls so far agree, or the last two parts as long as there can be."""
        window = min(self.window, len(times_ms) // 2)
        if window == 0:
            return False
        before, last = (float(np.median(part)) for part in (times_ms[-2 * window : -window], times_ms[-window:]))
        return abs(last - before) <= self.tolerance * last

    def is_over(self, times_ms: Sequence[float]) -> bool:
        """Whether no more warm-up call is made: two whole windows agree, or a limit is reached."""
        if len(times_ms) < self.least_calls:
            return False
        if len(times_ms) >= self.most_calls or sum(times_ms) >= self.most_seconds * 1e3:
            return True
        return len(times_ms) >= 2 * self.window and self.is_settled(times_ms)


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Times of one call, repeated.

    Attributes:
        warmup_ms: the first calls, in milliseconds; no figure below counts them.
        samples_ms: the measured calls, in the order in which they ran.
        is_warmed_up: whether the warm-up had settled; true where a number of calls was asked for instead.
    """

    warmup_ms: tuple[float, ...]
    samples_ms: tuple[float, ...]
    is_warmed_up: bool = True

    def percentile_ms(self, percent: float) -> float:
        """Return a percentile of the samples, interpolated linearly between neighbours."""
        return float(np.percentile(self.samples_ms, percent))

    @property
    def median_ms(self) -> float:
        """Median of the samples."""
        return self.percentile_ms(50)

    @property
    def iqr_ms(self) -> float:
        """Interquartile range of the samples: 75th less 25th percentile."""
        return self.percentile_ms(75) - self.percentile_ms(25)


def measure_interleaved(
    runs: Mapping[Cell, Callable[[], object]],
    *,
    warmup: int | WarmupRule,
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
    after_call: Callable[[Cell], None] | None = None,
) -> dict[Cell, Latency]:
    """Time several calls in turn, so that a disturbance of the machine hits all of them alike.

    Every round calls each cell once; the next round starts one cell later, so that no cell is always the first. Between
    the two readings of the clock there is nothing but the call.

    Args:
        runs: the calls by cell; one returns only when its result is complete (a GPU backend synchronises inside).
        warmup: calls of each cell before the measured ones, at least 0; or the rule by which each cell's warm-up ends.
        repeats: measured calls of each cell, at least 1.
        clock: seconds, monotonic.
        after_call: told the cell after each of its calls, warm-up included, outside the timed span.
    Returns:
        A `Latency` per cell, in the order of `runs`.
    Raises:
        ValueError: there is nothing to run, or `warmup` or `repeats` is too small.
    """
    if not runs or repeats < 1 or (isinstance(warmup, int) and warmup < 0):
        raise ValueError(
            f"got {len(runs)} calls, warmup {warmup}, repeats {repeats}; expected at least 1 call, 0 and 1"
        )
    warmup_ms: dict[Cell, list[float]] = {cell: [] for cell in runs}
    samples_ms: dict[Cell, list[float]] = {cell: [] for cell in runs}
    turns = itertools.count()
    while cold := [cell for cell, times in warmup_ms.items() if not _is_over(warmup, times)]:
        _time_round(runs, _rotated(cold, next(turns)), warmup_ms, clock, after_call)
    for _ in range(repeats):
        _time_round(runs, _rotated(list(runs), next(turns)), samples_ms, clock, after_call)
    return {
        cell: Latency(
            warmup_ms=tuple(warmup_ms[cell]),
            samples_ms=tuple(samples_ms[cell]),
            is_warmed_up=isinstance(warmup, int) or warmup.is_settled(warmup_ms[cell]),
        )
        for cell in runs
    }


def _is_over(warmup: int | WarmupRule, times_ms: Sequence[float]) -> bool:
    return len(times_ms) >= warmup if isinstance(warmup, int) else warmup.is_over(times_ms)


def _rotated(cells: list[Cell], turn: int) -> list[Cell]:
    first = turn % len(cells)
    return cells[first:] + cells[:first]


def _time_round(
    runs: Mapping[Cell, Callable[[], object]],
    cells: Sequence[Cell],
    times_ms: Mapping[Cell, list[float]],
    clock: Callable[[], float],
    after_call: Callable[[Cell], None] | None,
) -> None:
    """Call each of the cells once and note its milliseconds."""
    for cell in cells:
        run = runs[cell]
        begin = clock()
        run()
        end = clock()
        times_ms[cell].append((end - begin) * 1e3)
        if after_call is not None:
            after_call(cell)
