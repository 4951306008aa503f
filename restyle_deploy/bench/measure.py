"""Times as a report has them: a `Latency` with its figures written out."""

from dataclasses import dataclass

from restyle_deploy.latency import UNSTABLE_ABOVE as UNSTABLE_ABOVE  # what the report's figures are drawn with
from restyle_deploy.latency import Latency as Latency
from restyle_deploy.latency import measure_interleaved as measure_interleaved


@dataclass(frozen=True, kw_only=True)
class StepLatency:
    """A `Latency`, with its figures written out."""

    median_ms: float
    p95_ms: float
    iqr_ms: float
    unstable: bool
    samples_ms: tuple[float, ...]
    warmup_ms: tuple[float, ...]


def step_latency_from(latency: Latency) -> StepLatency:
    """Write a latency's figures out."""
    return StepLatency(
        median_ms=latency.median_ms,
        p95_ms=latency.p95_ms,
        iqr_ms=latency.iqr_ms,
        unstable=latency.is_unstable,
        samples_ms=latency.samples_ms,
        warmup_ms=latency.warmup_ms,
    )
