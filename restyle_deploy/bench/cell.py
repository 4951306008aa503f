"""One configuration, measured: opening, parity, quality, latency, stages, memory, load."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from restyle_deploy.backends.base import EXACT_PRECISION
from restyle_deploy.bench.contenders import AGAINST, EXACT, MEASURED, Cell, against_from, exact_from
from restyle_deploy.bench.figures import LoadPoint, Memory, MetricFacts, StepLatency
from restyle_deploy.bench.gpu_monitor import GpuMonitor, open_gpu_monitor
from restyle_deploy.bench.inversions import Pictures, StepResults, count_steps, measure_inversions
from restyle_deploy.bench.job import Job
from restyle_deploy.bench.load import measure_load, rates_from_samples, sustained_rate
from restyle_deploy.bench.machine import MachineWatch
from restyle_deploy.bench.measure import WarmupRule, measure_latencies
from restyle_deploy.bench.memory import MemoryWatch
from restyle_deploy.bench.metrics import MetricSet, open_metrics
from restyle_deploy.bench.quality import aggregate, gains_of, settled_steps
from restyle_deploy.bench.reference import TorchReference, check_reference, open_torch_reference
from restyle_deploy.bench.report import Configuration, ConfigurationResult, Row
from restyle_deploy.bench.stages import measure_image_stages, measure_session_stages, ordered_stages
from restyle_deploy.errors import BackendUnavailableError
from restyle_deploy.latency import measure_interleaved
from restyle_deploy.runtime.session import Session
from restyle_deploy.verify import Parity, check_parity, compare_with_expectation, load_expectation

Contender = Session | TorchReference
USUAL_WARMUP = WarmupRule()

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Opening:
    """Time to open the session, its memory with the first calls, and the first call of each step count."""

    opening_ms: float
    memory: Memory
    first_call_ms: Mapping[int, float]


def measure_configuration(
    job: Job, *, progress: Callable[[int, int], None] = lambda done, total: None
) -> tuple[tuple[MetricFacts, ...], ConfigurationResult]:
    """Measure a configuration in this process.

    The peak memory is that of opening the session and of its first call of each step count; what it is compared with is
    opened afterwards. Then come parity, quality over all images, and latency: of the session, the exact session (for an
    approximate one) and the reference model, in turn. Stages are taken from calls of their own, and so is load.

    Throughput is that of the measured calls one after the other: their images over the sum of their times, so that slow
    calls count. Images over the median would be more than a device with a heavy tail keeps up.

    A metric that fails on these images is dropped, with its reason; the others and the latency go on.

    Args:
        job: what to measure.
        progress: told the refinement steps done and their total.
    Returns:
        The metrics, and the result, whose status is `ok`; its reason names the metrics that failed, if any.
    Raises:
        VerificationError: the (exact) session does not compute what the reference model does; nothing is measured then.
        RestyleDeployError: the session cannot be opened, or what it is compared with.
        ReportError: see `write_step_images`.
    """
    targets = np.load(job.targets, mmap_mode="r")  # so that the memory that is measured holds only what is read
    batch = _batch_of(targets, job.configuration.batch)
    with ExitStack() as stack:
        gpu = _open_monitor(stack, job.configuration.device)
        session, opening = _open_watched(stack, job, batch, gpu)
        exact = stack.enter_context(_open(job, exact=True)) if session.is_approximate else None
        parity = _check_parity(exact or session)
        contenders = stack.enter_context(_open_contenders(session, exact, job))
        tick = _counter(progress, _count_steps(job, targets, session, exact, len(contenders)))
        facts, results, failures = _measure_quality(job, session, exact, targets, tick)
        watch = MachineWatch(gpu=gpu)
        latencies = _measure_latencies(job, contenders, batch, watch, tick)
        machine = watch.record().as_json()
        for count, first_ms in opening.first_call_ms.items():
            latencies[MEASURED, count] = replace(latencies[MEASURED, count], first_call_ms=first_ms)
        descriptions = {who: contender.describe() for who, contender in contenders.items()}
        result = ConfigurationResult(
            configuration=job.configuration,
            status="ok",
            reason="; ".join(failures) or None,
            session=descriptions[MEASURED],
            parity=parity.as_json(),
            rows=tuple(_row(job, count, latencies[MEASURED, count], results.get(count)) for count in job.steps),
            against=against_from(descriptions, latencies, job.steps),
            exact=exact_from(descriptions, latencies, results),
            opening_ms=opening.opening_ms,
            memory=opening.memory,
            load=_measure_loads(job, session, batch, latencies),
            machine=machine,
        )
    result = replace(result, rows=_with_stages(job, result.rows, targets))
    gains = gains_of({count: result.values for count, result in results.items()}, facts)
    return facts, replace(result, gains=gains, settled_at_steps=settled_steps(gains))


def _batch_of(targets: NDArray[np.float32], batch: int) -> NDArray[np.float32]:
    """Return the images of one call: the first ones, again from the start where there are fewer."""
    return np.ascontiguousarray(targets[np.arange(batch) % len(targets)])


def _open(job: Job, *, exact: bool = False, timing_enabled: bool = False) -> Session:
    configuration = replace(job.configuration, precision=EXACT_PRECISION) if exact else job.configuration
    return Session.open(job.bundle, **_session_arguments(configuration, exact), timing_enabled=timing_enabled)


def _session_arguments(configuration: Configuration, exact: bool) -> dict[str, Any]:
    return {
        "backend": configuration.backend,
        "device": configuration.device,
        "threads": configuration.threads,
        "precision": configuration.precision,
        "plain": configuration.plan == "plain",
        "preview_steps": configuration.preview_steps and not exact,
        "max_batch": configuration.batch,
    }


def _open_monitor(stack: ExitStack, device: str) -> GpuMonitor | None:
    """Return what watches the GPU; None on the CPU, and where the driver's library is not there."""
    if not device.startswith("cuda"):
        return None
    try:
        return stack.enter_context(open_gpu_monitor(device))
    except BackendUnavailableError as error:
        _logger.warning("clocks and memory of %s are not read: %s", device, error)
        return None


def _open_watched(
    stack: ExitStack, job: Job, batch: NDArray[np.float32], gpu: GpuMonitor | None
) -> tuple[Session, _Opening]:
    with MemoryWatch(gpu.used_bytes if gpu else None) as watch:
        begin = time.perf_counter()
        session = stack.enter_context(_open(job))
        opening_ms = (time.perf_counter() - begin) * 1e3
        first_calls = measure_interleaved(
            {count: partial(session.invert, batch, steps=count) for count in job.steps}, warmup=0, repeats=1
        )
    first_call_ms = {count: latency.samples_ms[0] for count, latency in first_calls.items()}
    return session, _Opening(opening_ms=opening_ms, memory=watch.result(), first_call_ms=first_call_ms)


def _check_parity(session: Session) -> Parity:
    parity = compare_with_expectation(session, load_expectation(session.bundle.expectation))
    check_parity(parity, session.bundle.path.name)
    return parity


@contextmanager
def _open_contenders(session: Session, exact: Session | None, job: Job) -> Iterator[dict[str, Contender]]:
    """Yield all that is measured, by `MEASURED`, `EXACT` and `AGAINST`; the reference model is opened and checked."""
    contenders: dict[str, Contender] = {MEASURED: session}
    if exact is not None and job.metrics is not None:  # without quality there is nothing to compare the gain with
        contenders[EXACT] = exact
    if job.against is None:
        yield contenders
        return
    with open_torch_reference(session.bundle, threads=job.configuration.threads) as reference:
        check_reference(reference, exact or session)
        yield {**contenders, AGAINST: reference}


def _count_steps(
    job: Job, targets: NDArray[np.float32], session: Session, exact: Session | None, contenders: int
) -> int:
    """Return about how many refinement steps are to be done; a warm-up by rule is counted with its fewest calls."""
    inverted = len(targets) * sum(count_steps(each, job.steps) for each in (session, exact) if each)
    warmup = USUAL_WARMUP.least_calls if job.warmup is None else job.warmup
    return inverted * (job.metrics is not None) + (warmup + job.repeats) * sum(job.steps) * contenders


def _counter(progress: Callable[[int, int], None], total: int) -> Callable[[int], None]:
    """Return a function that adds refinement steps and tells the sum."""
    done = 0

    def add(count: int) -> None:
        nonlocal done
        done += count
        progress(done, max(done, total))

    return add


def _measure_quality(
    job: Job, session: Session, exact: Session | None, targets: NDArray[np.float32], tick: Callable[[int], None]
) -> tuple[tuple[MetricFacts, ...], dict[int, StepResults], list[str]]:
    """Return the metrics, the results by step count, and which metrics failed on the images, with the reason.

    Of a metric that failed there are values of some images only: it is left out.
    """
    options = job.metric_options
    if options is None:
        return (), {}, []
    opened: MetricSet = open_metrics(options, session.config.input_shape)
    with opened as metrics:
        labels = {metric.name: metric.label for metric in metrics.available}
        pictures = Pictures(
            folder=Path(job.output), configuration=job.configuration.name, names=job.names, count=job.picture_count
        )
        results = measure_inversions(
            session, targets, steps=job.steps, exact=exact, metrics=metrics, pictures=pictures, tick=tick
        )
        failures = [f"{label}: {metrics.missing[name]}" for name, label in labels.items() if name in metrics.missing]
        kept = {metric.name for metric in metrics.available}
        return metrics.facts, {count: _of_metrics(result, kept) for count, result in results.items()}, failures


def _of_metrics(results: StepResults, names: Set[str]) -> StepResults:
    """Return the results of these metrics alone."""
    values, exact_values = (
        {name: column for name, column in columns.items() if name in names}
        for columns in (results.values, results.exact_values)
    )
    return replace(results, values=values, exact_values=exact_values)


def _measure_latencies(
    job: Job,
    contenders: Mapping[str, Contender],
    batch: NDArray[np.float32],
    watch: MachineWatch,
    tick: Callable[[int], None],
) -> dict[Cell, StepLatency]:
    runs = {
        (who, count): partial(contender.invert, batch, steps=count)
        for who, contender in contenders.items()
        for count in job.steps
    }
    warmup = USUAL_WARMUP if job.warmup is None else job.warmup
    return measure_latencies(
        runs, warmup=warmup, repeats=job.repeats, watch=watch, after_call=lambda cell: tick(cell[1])
    )


def _row(job: Job, steps: int, latency: StepLatency, results: StepResults | None) -> Row:
    values = results.values if results else {}
    return Row(
        steps=steps,
        latency=latency,
        throughput=job.configuration.batch * sustained_rate(latency.samples_ms),
        quality={name: aggregate(column) for name, column in values.items()},
        per_image={
            name: tuple(value if np.isfinite(value) else None for value in column) for name, column in values.items()
        },
    )


def _measure_loads(
    job: Job, session: Session, batch: NDArray[np.float32], latencies: Mapping[Cell, StepLatency]
) -> tuple[LoadPoint, ...]:
    """Measure calls of the largest step count that arrive at random."""
    steps = job.steps[-1]
    rates = (*rates_from_samples(latencies[MEASURED, steps].samples_ms, job.load_shares), *job.load_rates)
    call = partial(session.invert, batch, steps=steps)
    return tuple(measure_load(call, rate_per_s=rate, seconds=job.load_seconds) for rate in rates)


def _with_stages(job: Job, rows: tuple[Row, ...], targets: NDArray[np.float32]) -> tuple[Row, ...]:
    """Add each row's stages, of a session that was opened for timing."""
    batch = _batch_of(targets, job.configuration.batch)
    found = []
    with _open(job, timing_enabled=True) as session:
        around = _measure_around(job, session, batch) if job.files else {}
        for row in rows:
            inside = measure_session_stages(
                lambda steps=row.steps: session.invert(batch, steps=steps).timings,  # type: ignore[misc]
                repeats=min(5, job.repeats),
            )
            found.append(replace(row, stages=ordered_stages(around, inside)))
    return tuple(found)


def _measure_around(job: Job, session: Session, batch: NDArray[np.float32]) -> dict[str, float]:
    images = session.invert(batch, steps=1).images
    return measure_image_stages(
        [Path(file) for file in job.files],
        images,
        input_shape=session.config.input_shape,
        repeats=min(5, job.repeats),
    )
