"""Times as a report has them: calls measured in turn, the machine watched meanwhile, the figures written out."""

import time
from collections.abc import Callable, Mapping
from typing import TypeVar

from restyle_deploy.bench.figures import StepLatency as StepLatency
from restyle_deploy.bench.machine import MachineRecord, MachineWatch
from restyle_deploy.bench.stability import find_instabilities
from restyle_deploy.latency import Latency as Latency
from restyle_deploy.latency import WarmupRule as WarmupRule
from restyle_deploy.latency import measure_interleaved as measure_interleaved

Cell = TypeVar("Cell")


def measure_latencies(
    runs: Mapping[Cell, Callable[[], object]],
    *,
    warmup: int | WarmupRule,
    repeats: int,
    watch: MachineWatch,
    clock: Callable[[], float] = time.perf_counter,
    after_call: Callable[[Cell], None] = lambda cell: None,
) -> dict[Cell, StepLatency]:
    """Measure calls in turn, see `measure_interleaved`, and judge them by their samples and by the machine.

    Args:
        runs, warmup, repeats, clock: as `measure_interleaved` takes them.
        watch: begun just before, so that it sees these calls and little else; looks at the GPU between the calls.
        after_call: told the cell after each of its calls, outside the timed span.
    Raises:
        ValueError: there is nothing to run, or `warmup` or `repeats` is too small.
    """

    def between_calls(cell: Cell) -> None:
        watch.tick()
        after_call(cell)

    latencies = measure_interleaved(runs, warmup=warmup, repeats=repeats, clock=clock, after_call=between_calls)
    machine = watch.record()
    return {cell: step_latency_from(latency, machine) for cell, latency in latencies.items()}


def step_latency_from(latency: Latency, machine: MachineRecord | None = None) -> StepLatency:
    """Write a latency's figures out, and why they are not to be relied on if so.

    Args:
        latency: raw times.
        machine: what was seen of the machine meanwhile.
    """
    reasons = find_instabilities(latency, machine)
    return StepLatency(
        median_ms=latency.median_ms,
        p90_ms=latency.percentile_ms(90),
        p95_ms=latency.percentile_ms(95),
        p99_ms=latency.percentile_ms(99),
        iqr_ms=latency.iqr_ms,
        unstable=bool(reasons),
        reason="; ".join(reasons) or None,
        first_call_ms=latency.warmup_ms[0] if latency.warmup_ms else None,
        samples_ms=latency.samples_ms,
        warmup_ms=latency.warmup_ms,
    )
