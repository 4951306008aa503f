"""Our CUDA kernels against the memory's floor, torch and torch.compile, call by call in turn. Needs an NVIDIA GPU.

    python -m benchmarks.kernels

Results go to benchmarks/results/<device>/kernels.json and kernels.md, anew after each problem.
"""

from __future__ import annotations

import math
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from itertools import product
from pathlib import Path

import click
import torch
from torch import Tensor

from benchmarks.kernel_contenders import Function, Inputs, functions_of, make_copies, make_inputs, widen
from benchmarks.kernel_table import (
    CASES,
    COMPILED,
    EAGER,
    OURS,
    SHIFTED,
    KernelRow,
    KernelTable,
    Problem,
    copies_from,
    describe,
    format_markdown,
    write_table,
)
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
LARGE_COPY_BYTES = 2**31  # read and written together
CACHES = 4  # the buffers of a problem are so many times the L2 cache together
FEWEST_SETS, MOST_SETS = 4, 512
WARMUP = 3
MOST_LATE = 0.1  # of a contender's samples
# ‖y − reference‖ / ‖reference‖ of ours; the others round after each operation.
TOLERANCES = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 8e-3}

Calls = Sequence[Callable[[], Tensor]]


class EventClock:
    """Seconds on the GPU: each reading waits until the current stream has come to it.

    Attributes:
        was_late: whether the GPU had come to where the last span begins before its end was enqueued, so that the span
            may hold time in which the GPU waited for the CPU.
    """

    def __init__(self) -> None:
        self.was_late = False
        self._seconds = 0.0
        self._begin = self._record()
        self._begin.synchronize()

    def __call__(self) -> float:
        """Return the seconds since the clock was made, less what `restart` left out."""
        self.was_late = self._begin.query()
        end = self._record()
        end.synchronize()
        self._seconds += self._begin.elapsed_time(end) / 1e3
        self._begin = end
        return self._seconds

    def restart(self) -> None:
        """Leave out what was enqueued since the last reading; only enqueues."""
        self._begin = self._record()

    @staticmethod
    def _record() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
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
    created = datetime.now(timezone.utc).isoformat(timespec="seconds")
    table = KernelTable(created=created, environment=describe_environment(), device=describe_device(), rows=())
    written: list[Path] = []
    # torch's convolutions are to be the fastest that it has: cuDNN tries all its algorithms.
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, benchmark_limit=0, allow_tf32=False):
        for problem in list_problems(cases, dtypes, sizes, batch):
            click.echo(f"{datetime.now():%H:%M:%S} {describe(problem)}", err=True)
            table = replace(table, rows=(*table.rows, measure_problem(problem, rounds=rounds, call_ms=call_ms)))
            written = write_table(table, output)
    click.echo(format_markdown(table))
    click.echo(f"written: {', '.join(map(str, written))}", err=True)


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
    count = count_sets(problem.bytes_moved, cache_bytes())
    sets = [make_inputs(problem, seed) for seed in range(count)]
    contenders, errors, reasons = check_contenders(problem, sets[0])
    ours, equal, large = measure_groups(
        {name: [partial(function, one) for one in sets] for name, function in contenders.items()},
        make_copies(problem.bytes_moved, count),
        make_copies(LARGE_COPY_BYTES, 1),
        rounds=rounds,
        call_ms=call_ms,
    )
    return KernelRow(
        problem=problem,
        bytes_moved=problem.bytes_moved,
        equal_copy=copies_from(problem.bytes_moved, equal),
        large_copy=copies_from(LARGE_COPY_BYTES, large),
        latencies=ours,
        errors=errors,
        reasons=reasons,
    )


def measure_groups(*groups: Mapping[str, Calls], rounds: int, call_ms: float) -> list[dict[str, StepLatency]]:
    """Time one call of each name of each group; all take turns, as CUDA graphs.

    Args:
        groups: by name, the same call on several sets of buffers.
        rounds: measured replays of each.
        call_ms: least time of one replay.
    """
    clock = EventClock()
    captured = {
        (number, name): _capture(calls, call_ms, clock)
        for number, group in enumerate(groups)
        for name, calls in group.items()
    }
    late: dict[tuple[int, str], list[bool]] = {cell: [] for cell in captured}
    latencies = measure_interleaved(
        {cell: run for cell, (run, _) in captured.items()},
        warmup=WARMUP,
        repeats=rounds,
        clock=clock,
        after_call=lambda cell: late[cell].append(clock.was_late),
    )
    steps = {
        cell: per_call(latencies[cell], count, late=sum(late[cell][WARMUP:])) for cell, (_, count) in captured.items()
    }
    return [{name: steps[number, name] for name in group} for number, group in enumerate(groups)]


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


def per_call(latency: Latency, calls: int, *, late: int = 0) -> StepLatency:
    """Return the times of one call from those of several; they are not relied on if many samples began too late."""
    step = step_latency_from(
        Latency(
            warmup_ms=tuple(ms / calls for ms in latency.warmup_ms),
            samples_ms=tuple(ms / calls for ms in latency.samples_ms),
        )
    )
    samples = len(latency.samples_ms)
    if late <= MOST_LATE * samples:
        return step
    reason = f"the GPU may have waited for the launch in {late} of {samples} samples, limit {MOST_LATE:.0%}"
    return replace(step, unstable=True, reason="; ".join(filter(None, (step.reason, reason))))


def count_sets(bytes_moved: int, cache: int) -> int:
    """Return how many sets of buffers hold `CACHES` times the cache."""
    return min(MOST_SETS, max(FEWEST_SETS, math.ceil(CACHES * cache / bytes_moved)))


def cache_bytes() -> int:
    """Return the size of the GPU's L2 cache."""
    return int(torch.cuda.get_device_properties(0).L2_cache_size)


def _capture(calls: Calls, call_ms: float, clock: EventClock) -> tuple[Callable[[], None], int]:
    """Return a function that replays a CUDA graph of the calls, and their number in it.

    The graph makes them in turn for at least so long. See `_replay_behind` for what the clock then sees.
    """
    for call in calls:  # outside the graph: what happens at first, happens now
        call()
    run = partial(_replay_behind, _record(calls, 1), clock)
    run()  # the first replay uploads the graph
    begin = clock()
    run()
    cycles = max(1, math.ceil(call_ms / 1e3 / (clock() - begin)))
    return partial(_replay_behind, _record(calls, cycles), clock), cycles * len(calls)


def _replay_behind(graph: torch.cuda.CUDAGraph, clock: EventClock) -> None:
    """Replay a graph behind another replay of it, which keeps the GPU busy while the CPU launches; time the second."""
    graph.replay()
    clock.restart()
    graph.replay()


def _record(calls: Calls, cycles: int) -> torch.cuda.CUDAGraph:
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
