"""Latency under load: calls that arrive at random, whether or not the earlier ones are done.

A loop that sends the next call when the last one has returned waits whenever the callee is slow, and so leaves out the
very calls that would have waited: coordinated omission. Here all arrivals are drawn beforehand, and a call's latency
counts from its intended arrival, whenever its turn came.
"""

import time
from collections.abc import Callable, Sequence

import numpy as np

from restyle_deploy.bench.figures import LoadPoint

# Of what the callee can do, one call after the other.
USUAL_SHARES = (0.5, 0.7, 0.9)
# Sleeping ends late by up to about a millisecond: the rest of the time is spent asking the clock.
SPIN_S = 0.002


def sustained_rate(samples_ms: Sequence[float]) -> float:
    """Return how many calls per second are done one after the other: calls over the sum of their times.

    Not the median's inverse: a rare call that takes ten times as long holds up those behind it, and a rate that leaves
    it out cannot be kept up.
    """
    return 1e3 * len(samples_ms) / sum(samples_ms)


def rates_from_samples(samples_ms: Sequence[float], shares: Sequence[float] = USUAL_SHARES) -> tuple[float, ...]:
    """Return calls per second: shares of the sustained rate."""
    return tuple(share * sustained_rate(samples_ms) for share in shares)


def draw_arrivals(rate_per_s: float, seconds: float, *, seed: int = 0) -> tuple[float, ...]:
    """Draw the arrivals of a Poisson process: seconds from the beginning, rising; at least one.

    Args:
        rate_per_s: on average.
        seconds: after which no call arrives.
        seed: the same arrivals for the same seed.
    Raises:
        ValueError: a rate or a time that is not above 0.
    """
    if not (rate_per_s > 0 and seconds > 0):
        raise ValueError(f"rate {rate_per_s} per second for {seconds} seconds: both must be above 0")
    random = np.random.default_rng(seed)
    arrivals: list[float] = []
    now = float(random.exponential(1 / rate_per_s))
    while now < seconds:
        arrivals.append(now)
        now += float(random.exponential(1 / rate_per_s))
    return tuple(arrivals) or (0.0,)


def measure_load(
    call: Callable[[], object],
    *,
    rate_per_s: float,
    seconds: float = 20.0,
    patience_s: float = 20.0,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> LoadPoint:
    """Make calls at random times and measure each from its intended arrival.

    One call is served at a time, in the order of arrival, as a session with one queue does it. Calls whose turn has not
    come `patience_s` after the last possible arrival are dropped: the rate is more than the callee can do. They enter
    the percentiles with the time that they had waited until then, so that these are lower bounds.

    Args:
        call: returns when its result is complete; warm.
        rate_per_s: arrivals per second, on average.
        seconds: over which calls arrive.
        patience_s: see above.
        seed: of the arrivals.
        clock: seconds, monotonic.
        sleep: waits so many seconds.
    Raises:
        ValueError: a rate or a time that is not above 0.
    """
    arrivals = draw_arrivals(rate_per_s, seconds, seed=seed)
    deadline = seconds + patience_s
    samples_ms: list[float] = []
    begin = clock()
    for arrival in arrivals:
        _wait_until(begin + arrival, clock, sleep)
        if clock() - begin > deadline:
            break
        call()
        samples_ms.append((clock() - begin - arrival) * 1e3)
    ended = clock() - begin
    dropped = arrivals[len(samples_ms) :]
    waited_ms = [(ended - arrival) * 1e3 for arrival in dropped]
    p50, p90, p95, p99 = np.percentile(samples_ms + waited_ms, (50, 90, 95, 99))
    return LoadPoint(
        rate_per_s=rate_per_s,
        achieved_per_s=len(samples_ms) / ended,
        p50_ms=float(p50),
        p90_ms=float(p90),
        p95_ms=float(p95),
        p99_ms=float(p99),
        samples_ms=tuple(samples_ms),
        dropped=len(dropped),
    )


def _wait_until(moment: float, clock: Callable[[], float], sleep: Callable[[float], None]) -> None:
    """Return at a moment of the clock, or at once if it is past."""
    while (left := moment - clock()) > 0:
        sleep(max(0.0, left - SPIN_S))
