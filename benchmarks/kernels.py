"""Our CUDA kernels against the memory's floor, torch and torch.compile, call by call in turn. Needs an NVIDIA GPU.

    python -m benchmarks.kernels

Results go to benchmarks/results/<device>/kernels.json and kernels.md, anew after each problem.
"""

from __future__ import annotations

import math
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from itertools import product
from pathlib import Path

import click
import torch
from torch import Tensor

from benchmarks.kernel_contenders import Function, Inputs, functions_of, make_inputs, widen
from benchmarks.kernel_table import (
    CASES,
    COMPILED,
    COPY,
    EAGER,
    OURS,
    SHIFTED,
    KernelRow,
    KernelTable,
    Problem,
    describe,
    format_markdown,
    verdicts_of,
    write_table,
)
from benchmarks.verdicts import format_verdict
from restyle_deploy.bench.environment import describe_environment
from restyle_deploy.bench.measure import StepLatency, step_latency_from
from restyle_deploy.errors import BackendUnavailableError, RestyleDeployError
from restyle_deploy.latency import Latency, measure_interleaved
from restyle_deploy.ops.compiler import check_available
from restyle_deploy.ops.kernels.launches import ELEMENT_TYPES
from restyle_deploy.ops.torch_gpu import why_torch_sees_no_gpu

RESULTS = Path("benchmarks/results")
DTYPES = tuple(sorted(ELEMENT_TYPES, key=["float16", "float32", "bfloat16"].index))
SIZES = (256, 512, 1024)
LARGE_COPY = "large copy"
LARGE_COPY_BYTES = 2**31  # read and written together
ALIGNMENT = 512  # bytes, of each buffer
CACHES = 4  # the buffers of a problem are so many times the L2 cache together
FEWEST_SETS, MOST_SETS = 4, 512
WARMUP = 3
# ‖y − reference‖ / ‖reference‖ of ours; the others round after each operation.
TOLERANCES = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 8e-3}


class EventClock:
    """Seconds on the GPU: each reading waits until the current stream has come to it."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._last = self._reach()

    def __call__(self) -> float:
        """Return the seconds since the clock was made."""
        event = self._reach()
        self._seconds += self._last.elapsed_time(event) / 1e3
        self._last = event
        return self._seconds

    @staticmethod
    def _reach() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        event.synchronize()
        return event


@click.command(help=__doc__)
@click.option("-o", "--output", default=RESULTS, show_default=True, type=click.Path(path_type=Path), help="Results.")
@click.option(
    "--case", "cases", multiple=True, default=tuple(CASES), type=click.Choice(tuple(CASES)), show_default=True
)
@click.option("--dtype", "dtypes", multiple=True, default=DTYPES, type=click.Choice(DTYPES), show_default=True)
@click.option("--size", "sizes", multiple=True, default=SIZES, type=click.IntRange(min=8), show_default=True)
@click.option("--batch", default=1, show_default=True, type=click.IntRange(min=1), help="Images.")
@click.option("--rounds", default=30, show_default=True, type=click.IntRange(min=1), help="Measured calls of each.")
@click.option("--call-ms", default=2.0, show_default=True, type=float, help="Least time of one measured call.")
def main(
    output: Path,
    cases: tuple[str, ...],
    dtypes: tuple[str, ...],
    sizes: tuple[int, ...],
    batch: int,
    rounds: int,
    call_ms: float,
) -> None:
    """Measure problem by problem, and say which goals are reached."""
    if reason := why_torch_sees_no_gpu():
        raise click.ClickException(f"{reason}: nothing was measured")
    try:
        check_available()
    except BackendUnavailableError as error:
        raise click.ClickException(str(error)) from None
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    created = datetime.now(timezone.utc).isoformat(timespec="seconds")
    table = KernelTable(created=created, environment=describe_environment(), device=describe_device(), rows=())
    written: list[Path] = []
    for problem in list_problems(cases, dtypes, sizes, batch):
        click.echo(f"{datetime.now():%H:%M:%S} {describe(problem)}", err=True)
        table = replace(table, rows=(*table.rows, measure_problem(problem, rounds=rounds, call_ms=call_ms)))
        written = write_table(table, output)
    click.echo(format_markdown(table))
    verdicts = verdicts_of(table.rows)
    for verdict in verdicts:
        click.echo(format_verdict(verdict), err=True)
    reached = sum(verdict.is_reached for verdict in verdicts)
    click.echo(f"{reached} of {len(verdicts)} goals reached; written: {', '.join(map(str, written))}", err=True)


def list_problems(cases: Sequence[str], dtypes: Sequence[str], sizes: Sequence[int], batch: int) -> Iterator[Problem]:
    """Yield the problems, dtype by dtype: those that the goals are about come first."""
    for dtype, size, channels_last, case in product(dtypes, sizes, (False, True), cases):
        yield Problem(case=case, size=size, batch=batch, dtype=dtype, channels_last=channels_last)


def describe_device() -> dict[str, str]:
    """Return the GPU's facts."""
    properties = torch.cuda.get_device_properties(0)
    facts = {
        "GPU": properties.name,
        "compute capability": f"{properties.major}.{properties.minor}",
        "L2": f"{properties.L2_cache_size / 2**20:.0f} MiB",
        "CUDA": str(torch.version.cuda),
    }
    query = ("nvidia-smi", "--id=0", "--query-gpu=driver_version,clocks.sm,clocks.mem", "--format=csv,noheader")
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):  # not every machine has it
        return facts
    return {**facts, **dict(zip(("driver", "SM clock", "memory clock"), answer.strip().split(", "), strict=False))}


def measure_problem(problem: Problem, *, rounds: int, call_ms: float) -> KernelRow:
    """Check and time all contenders of a problem, and copies of as many bytes and of very many."""
    torch.compiler.reset()
    torch.cuda.empty_cache()
    sets = [make_inputs(problem, seed) for seed in range(count_sets(problem.bytes_moved, cache_bytes()))]
    contenders, errors, reasons = check_contenders(problem, sets[0])
    calls: dict[str, Callable[[], object]] = {}
    counts: dict[str, int] = {}
    for name, function in contenders.items():
        calls[name], counts[name] = _capture([partial(function, one) for one in sets], call_ms)
    for name, copied in ((COPY, problem.bytes_moved), (LARGE_COPY, LARGE_COPY_BYTES)):
        calls[name], counts[name] = _capture(_make_copies(copied), call_ms)
    latencies = {
        name: per_call(latency, counts[name])
        for name, latency in measure_interleaved(calls, warmup=WARMUP, repeats=rounds, clock=EventClock()).items()
    }
    large = latencies.pop(LARGE_COPY)
    return KernelRow(
        problem=problem,
        bytes_moved=problem.bytes_moved,
        copy_bandwidth=LARGE_COPY_BYTES / (large.median_ms / 1e3),
        latencies=latencies,
        errors=errors,
        reasons=reasons,
    )


def check_contenders(problem: Problem, one: Inputs) -> tuple[dict[str, Function], dict[str, float], dict[str, str]]:
    """Run each contender once; return those to be timed, their errors, and why others are not.

    Ours is left out unless it is right. torch's results have the rounding of each operation, which is reported only.
    """
    functions = functions_of(problem)
    expected = functions[EAGER](widen(one))
    functions[COMPILED] = torch.compile(functions[EAGER], fullgraph=True, dynamic=False)
    if SHIFTED in functions:
        functions[SHIFTED] = torch.compile(functions[SHIFTED], fullgraph=True, dynamic=False)
    errors: dict[str, float] = {}
    reasons: dict[str, str] = {}
    for name, function in list(functions.items()):
        try:
            found = function(one).double()
        except (RuntimeError, RestyleDeployError) as error:  # of one contender; the others are measured
            reasons[name] = str(error).splitlines()[0]
            del functions[name]
            continue
        error_share = float(torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected))
        if math.isfinite(error_share):
            errors[name] = error_share
        if name == OURS and not error_share <= TOLERANCES[problem.dtype]:
            reasons[name] = f"wrong: relative error {error_share:.1e}, expected up to {TOLERANCES[problem.dtype]:.0e}"
            del functions[name]
    return functions, errors, reasons


def per_call(latency: Latency, calls: int) -> StepLatency:
    """Return the times of one call from those of several."""
    return step_latency_from(
        Latency(
            warmup_ms=tuple(ms / calls for ms in latency.warmup_ms),
            samples_ms=tuple(ms / calls for ms in latency.samples_ms),
        )
    )


def count_sets(bytes_moved: int, cache: int) -> int:
    """Return how many sets of buffers hold `CACHES` times the cache."""
    return min(MOST_SETS, max(FEWEST_SETS, math.ceil(CACHES * cache / bytes_moved)))


def cache_bytes() -> int:
    """Return the size of the GPU's L2 cache."""
    return int(torch.cuda.get_device_properties(0).L2_cache_size)


def _make_copies(bytes_moved: int) -> list[Callable[[], Tensor]]:
    """Return copies that read and write so many bytes together, on buffers as many as a problem has."""
    size = math.ceil(bytes_moved / 2 / ALIGNMENT) * ALIGNMENT
    pairs = [
        torch.randint(256, (2, size), dtype=torch.uint8, device="cuda")
        for _ in range(count_sets(bytes_moved, cache_bytes()) if bytes_moved < LARGE_COPY_BYTES else 1)
    ]
    return [partial(target.copy_, source) for target, source in pairs]


def _capture(calls: Sequence[Callable[[], Tensor]], call_ms: float) -> tuple[Callable[[], None], int]:
    """Return a function that runs a CUDA graph of the calls, in turn for at least so long, and the number of them."""
    for call in calls:  # outside the graph: what happens at first, happens now
        call()
    graph = _record(calls, 1)
    clock = EventClock()
    graph.replay()
    begin = clock()
    graph.replay()
    cycles = max(1, math.ceil(call_ms / 1e3 / (clock() - begin)))
    return _record(calls, cycles).replay, cycles * len(calls)


def _record(calls: Sequence[Callable[[], Tensor]], cycles: int) -> torch.cuda.CUDAGraph:
    """Capture the calls; each keeps its result until its next turn, so that no two write to the same memory."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    results: list[Tensor | None] = [None] * len(calls)
    with torch.cuda.graph(graph):
        for _ in range(cycles):
            for turn, call in enumerate(calls):
                results[turn] = None
                results[turn] = call()
    return graph


if __name__ == "__main__":
    main()
