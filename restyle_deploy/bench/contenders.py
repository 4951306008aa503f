"""What is measured in the same rounds as a session: the exact session, and the reference model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from restyle_deploy.bench.comparison import Against, ComparedRow, Exact, ExactRow, Ratio, ratio_from_samples
from restyle_deploy.bench.figures import StepLatency
from restyle_deploy.bench.inversions import StepResults
from restyle_deploy.bench.quality import aggregate

Cell = tuple[str, int]  # who is called, and its step count
MEASURED, EXACT, AGAINST = "session", "exact", "against"


def against_from(
    descriptions: Mapping[str, dict[str, Any]], latencies: Mapping[Cell, StepLatency], steps: tuple[int, ...]
) -> Against | None:
    """Return the reference model's rows; None where it was not measured."""
    if AGAINST not in descriptions:
        return None
    rows = (
        ComparedRow(steps=count, latency=latencies[AGAINST, count], ratio=_ratio(latencies, AGAINST, count))
        for count in steps
    )
    return Against(reference=descriptions[AGAINST], rows=tuple(rows))


def exact_from(
    descriptions: Mapping[str, dict[str, Any]],
    latencies: Mapping[Cell, StepLatency],
    results: Mapping[int, StepResults],
) -> Exact | None:
    """Return the exact session's rows; None where the measured one is exact, or no quality was counted."""
    if EXACT not in descriptions:
        return None
    rows = []
    for count, result in results.items():
        assert result.difference is not None
        rows.append(
            ExactRow(
                steps=count,
                latency=latencies[EXACT, count],
                ratio=_ratio(latencies, EXACT, count),
                quality={name: aggregate(values) for name, values in result.exact_values.items()},
                difference=result.difference,
            )
        )
    return Exact(session=descriptions[EXACT], rows=tuple(rows)) if rows else None


def _ratio(latencies: Mapping[Cell, StepLatency], who: str, steps: int) -> Ratio:
    return ratio_from_samples(latencies[who, steps].samples_ms, latencies[MEASURED, steps].samples_ms)
