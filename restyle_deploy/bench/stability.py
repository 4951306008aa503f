"""Whether a measured median is to be relied on: what in the samples, and what on the machine, says that it is not.

The rule to keep: of two runs on an idle machine, either the medians are within `MOST_SHIFT` of each other or one of
the runs is called unstable.
"""

import math
from collections.abc import Iterator

import numpy as np

from restyle_deploy.bench.gpu_monitor import POWER_LIMIT
from restyle_deploy.bench.machine import GpuRecord, MachineRecord
from restyle_deploy.latency import Latency

MOST_IQR = 0.1  # interquartile range, as a share of the median
MOST_SHIFT = 0.03  # of a median, as a share of it: between halves of a run, or between two runs
LEAST_SAMPLES = 5
MOST_BUSY = 0.1  # by other processes or a hypervisor, as a share of all cores
MOST_QUOTA = 0.01  # of the time
# Standard normal quantile of a two-sided interval of 95 %.
Z = 1.96


def find_instabilities(latency: Latency, machine: MachineRecord | None = None) -> tuple[str, ...]:
    """Return why a latency's median is not to be relied on, each reason with its figure and its limit; or nothing.

    Args:
        latency: its samples in the order in which they ran.
        machine: what was seen of the machine meanwhile.
    """
    reasons = list(_reasons_of_samples(latency))
    if machine is not None:
        reasons += _reasons_of_machine(machine)
    return tuple(reasons)


def spread_between_runs(samples_ms: tuple[float, ...]) -> float:
    """Return how far two runs' medians may lie apart, 95 times out of 100, as a share of the median.

    The samples tell the interval of one run's median by their ranks (its order statistics, in the normal approximation
    of the binomial), whatever their distribution is; the difference of two medians is wider by the root of two.
    """
    half = min(50.0, 100 * Z / 2 / math.sqrt(len(samples_ms)))
    low, median, high = np.percentile(samples_ms, (50 - half, 50, 50 + half))
    return float((high - low) / 2 * math.sqrt(2) / median)


def drift_between_halves(samples_ms: tuple[float, ...]) -> float:
    """Return the later half's median less the earlier one's, as a share of the earlier one; of at least two samples."""
    middle = len(samples_ms) // 2
    earlier, later = (float(np.median(half)) for half in (samples_ms[:middle], samples_ms[middle:]))
    return (later - earlier) / earlier


def _reasons_of_samples(latency: Latency) -> Iterator[str]:
    samples = latency.samples_ms
    if not latency.is_warmed_up:
        yield f"the warm-up had not settled after {len(latency.warmup_ms)} calls"
    if len(samples) < LEAST_SAMPLES:
        yield f"too few calls to tell how much they vary: {len(samples)} (at least {LEAST_SAMPLES})"
        return
    if not min(samples) > 0:
        yield "a call took no time that the clock can tell"
        return
    iqr = latency.iqr_ms / latency.median_ms
    if iqr > MOST_IQR:
        yield f"interquartile range {iqr:.0%} of the median ({MOST_IQR:.0%} at most)"
    drift = drift_between_halves(samples)
    if abs(drift) > MOST_SHIFT:
        change = f"{abs(drift):.1%} {'slower' if drift > 0 else 'faster'}"
        yield f"the later half of the calls was {change} than the earlier one ({MOST_SHIFT:.0%} at most)"
    spread = spread_between_runs(samples)
    if spread > MOST_SHIFT:
        yield f"another run's median may differ by {spread:.1%} ({MOST_SHIFT:.0%} at most); more repeats narrow it"


def _reasons_of_machine(machine: MachineRecord) -> Iterator[str]:
    most = MOST_BUSY * machine.cores
    for cores, what in (
        (machine.other_cores, "other processes used"),
        (machine.stolen_cores, "the hypervisor took away"),
    ):
        if cores is not None and cores > most:
            yield f"{what} {cores:.2f} of {machine.cores} cores ({most:.2f} at most)"
    if machine.quota_share is not None and machine.quota_share > MOST_QUOTA:
        yield f"the container's CPU quota held it back {machine.quota_share:.0%} of the time ({MOST_QUOTA:.0%} at most)"
    if machine.gpu is not None:
        yield from _reasons_of_gpu(machine.gpu)


def _reasons_of_gpu(gpu: GpuRecord) -> Iterator[str]:
    """Yield what held the clocks back; not the power limit, at which a GPU under full load may run for ever."""
    limits = [limit for limit in gpu.limits or () if limit != POWER_LIMIT]
    if limits:
        hottest = "" if gpu.highest_temperature_c is None else f", up to {gpu.highest_temperature_c} °C"
        clocks = "" if gpu.lowest_sm_mhz is None else f", {gpu.lowest_sm_mhz} to {gpu.highest_sm_mhz} MHz"
        yield f"the GPU was throttled: {', '.join(limits)}{hottest}{clocks}"
