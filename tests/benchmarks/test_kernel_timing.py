"""What the kernels' benchmark times, on a made-up GPU that runs behind the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from benchmarks import kernel_contenders, kernels
from benchmarks.kernel_contenders import Inputs, functions_of, make_copies, make_inputs
from benchmarks.kernel_table import COMPILED, EAGER, OURS, SHIFTED, KernelRow, Problem, copies_from
from restyle_deploy.bench.environment import describe_environment
from restyle_deploy.bench.measure import step_latency_from
from restyle_deploy.latency import Latency

SMALL = Problem(case="up-layer", size=8, batch=1, dtype="float32", channels_last=False)
CALL_S = 1e-3


class MadeUpGpu:
    """One stream: the CPU spends time on each launch, and the GPU runs what it was given in order.

    Attributes:
        launch_s: what a launch takes on the CPU.
        cpu_s, gpu_s: the time on the CPU; when the GPU has done all.
        captured_s: what the calls of the graph that is being captured take; None while none is.
    """

    def __init__(self) -> None:
        self.launch_s = 0.0
        self.cpu_s = self.gpu_s = 0.0
        self.captured_s: float | None = None

    def run(self, seconds: float) -> None:
        if self.captured_s is not None:
            self.captured_s += seconds
            return
        self.cpu_s += self.launch_s
        self.gpu_s = max(self.gpu_s, self.cpu_s) + seconds

    @contextmanager
    def capture(self, graph: MadeUpGraph) -> Iterator[None]:
        self.captured_s = 0.0
        yield
        graph.seconds, self.captured_s = self.captured_s, None


class MadeUpEvent:
    def __init__(self, gpu: MadeUpGpu, *, enable_timing: bool) -> None:
        assert enable_timing
        self.gpu = gpu

    def record(self) -> None:
        self.reached_s = max(self.gpu.cpu_s, self.gpu.gpu_s)

    def query(self) -> bool:
        return self.reached_s <= self.gpu.cpu_s

    def synchronize(self) -> None:
        self.gpu.cpu_s = max(self.gpu.cpu_s, self.reached_s)

    def elapsed_time(self, end: MadeUpEvent) -> float:
        assert end.query()
        return (end.reached_s - self.reached_s) * 1e3


class MadeUpGraph:
    def __init__(self, gpu: MadeUpGpu) -> None:
        self.gpu = gpu
        self.seconds = 0.0

    def replay(self) -> None:
        self.gpu.run(self.seconds)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> MadeUpGpu:
    made_up = MadeUpGpu()
    monkeypatch.setattr(torch.cuda, "Event", partial(MadeUpEvent, made_up))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", partial(MadeUpGraph, made_up))
    monkeypatch.setattr(torch.cuda, "graph", made_up.capture)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    facts = SimpleNamespace(name="made-up", major=9, minor=0, L2_cache_size=2**16)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: facts)
    return made_up


def _calls(gpu: MadeUpGpu, seconds: float, count: int = 4) -> Sequence[Callable[[], Tensor]]:
    def call() -> Tensor:
        gpu.run(seconds)
        return torch.zeros(1)

    return [call] * count


@pytest.mark.parametrize("launch_s", [0.0, CALL_S, 3.9 * CALL_S])
def test_launching_is_not_timed(gpu: MadeUpGpu, launch_s: float) -> None:
    gpu.launch_s = launch_s
    ((found),) = kernels.measure_groups({"call": _calls(gpu, CALL_S)}, rounds=5, call_ms=1.0)
    assert found["call"].samples_ms == pytest.approx([CALL_S * 1e3] * 5)
    assert not found["call"].unstable


def test_a_launch_longer_than_the_calls_is_told(gpu: MadeUpGpu) -> None:
    gpu.launch_s = 5 * CALL_S  # the graph before the measured one takes 4
    ((found),) = kernels.measure_groups({"call": _calls(gpu, CALL_S)}, rounds=5, call_ms=1.0)
    assert found["call"].median_ms > CALL_S * 1e3
    assert found["call"].unstable
    assert found["call"].reason == "the GPU may have waited for the launch in 5 of 5 samples, limit 10%"


def test_graphs_last_long_enough(gpu: MadeUpGpu) -> None:
    gpu.launch_s = 3 * CALL_S  # if this were counted, the graphs would be shorter
    clock = kernels.EventClock()
    run, count = kernels._capture(_calls(gpu, CALL_S), 39.0, clock)
    assert count == 40
    begin = clock()
    run()
    assert clock() - begin == pytest.approx(40 * CALL_S)


def test_the_clock_without_a_restart(gpu: MadeUpGpu) -> None:
    clock = kernels.EventClock()
    begin = clock()
    gpu.run(0.5)
    gpu.run(0.25)
    assert clock() - begin == pytest.approx(0.75)
    assert clock.was_late


@pytest.mark.parametrize(("late", "unstable"), [(0, False), (1, False), (2, True)])
def test_a_few_late_samples_do_no_harm(late: int, unstable: bool) -> None:
    assert kernels.per_call(Latency(warmup_ms=(), samples_ms=(1.0,) * 10), 4, late=late).unstable == unstable


def test_reasons_are_added_up() -> None:
    step = kernels.per_call(Latency(warmup_ms=(), samples_ms=(1.0, 9.0) * 3), 1, late=6)
    assert step.reason is not None
    assert step.reason.startswith(step_latency_from(Latency(warmup_ms=(), samples_ms=(1.0, 9.0) * 3)).reason or "-")
    assert step.reason.endswith("; the GPU may have waited for the launch in 6 of 6 samples, limit 10%")


@pytest.fixture
def timed_ms(gpu: MadeUpGpu, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What each contender and way to copy takes on the made-up GPU; copies by memcpy are the faster large ones."""
    times = {OURS: 0.1, EAGER: 0.9, SHIFTED: 0.2}

    def timed(function: Callable[..., Tensor], ms_of: Callable[[Any], float]) -> Callable[..., Tensor]:
        def run(*args: Any) -> Tensor:
            gpu.run(ms_of(args[0]) / 1e3)
            return function(*args)

        return run

    def constant(ms: float) -> Callable[[Any], float]:
        return lambda _: ms

    def timed_functions(problem: Problem) -> dict[str, Callable[[Inputs], Tensor]]:
        return {name: timed(function, constant(times[name])) for name, function in functions_of(problem).items()}

    ways = {
        "memcpy": timed(kernel_contenders.COPY_WAYS["memcpy"], lambda source: 0.05 + source.nbytes / 2**24),
        "kernel": timed(kernel_contenders.COPY_WAYS["kernel"], lambda source: source.nbytes / 2**23),
    }
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(kernels, "functions_of", timed_functions)
    monkeypatch.setattr(kernels, "make_inputs", partial(make_inputs, device="cpu"))
    monkeypatch.setattr(kernels, "make_copies", partial(make_copies, device="cpu"))
    monkeypatch.setattr(kernel_contenders, "COPY_WAYS", ways)
    monkeypatch.setattr(kernels, "LARGE_COPY_BYTES", 2**23)
    return times


def test_a_problem_is_measured_against_the_faster_copies(gpu: MadeUpGpu, timed_ms: dict[str, float]) -> None:
    gpu.launch_s = 0.05e-3
    row = kernels.measure_problem(SMALL, rounds=5, call_ms=0.3)
    assert {name: latency.median_ms for name, latency in row.latencies.items()} == pytest.approx(
        {**timed_ms, COMPILED: timed_ms[EAGER]}
    )
    assert row.reasons == {}
    assert (row.equal_copy.fastest, row.large_copy.fastest) == ("kernel", "memcpy")
    assert set(row.equal_copy.latencies) == set(row.large_copy.latencies) == {"memcpy", "kernel"}
    assert row.equal_copy.bytes_moved == SMALL.bytes_moved
    assert row.large_copy.bandwidth == pytest.approx(2**23 / 0.3e-3)
    assert row.equal_copy.median_ms == pytest.approx(SMALL.bytes_moved / 2 / 2**23, rel=0.01)


def test_cudnn_tries_its_algorithms_for_the_run_only(
    gpu: MadeUpGpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cudnn, seen = torch.backends.cudnn, []

    def measure(problem: Problem, *, rounds: int, call_ms: float) -> KernelRow:
        seen.append((cudnn.enabled, cudnn.benchmark, cudnn.allow_tf32))
        copies = copies_from(
            problem.bytes_moved, {"memcpy": step_latency_from(Latency(warmup_ms=(), samples_ms=(1.0,)))}
        )
        return KernelRow(
            problem=problem,
            bytes_moved=problem.bytes_moved,
            equal_copy=copies,
            large_copy=copies,
            latencies={},
            errors={},
            reasons={},
        )

    environment = describe_environment()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernels, "check_available", lambda: None)
    monkeypatch.setattr(kernels, "describe_environment", lambda: environment)
    monkeypatch.setattr(kernels, "measure_problem", measure)
    monkeypatch.setattr(cudnn, "benchmark", False)
    monkeypatch.setattr(cudnn, "allow_tf32", True)
    before = (cudnn.enabled, cudnn.benchmark, cudnn.allow_tf32)
    result = CliRunner().invoke(
        kernels.main, ["-o", str(tmp_path), "--case", "blur", "--dtype", "float16", "--size", "8"]
    )
    assert result.exit_code == 0, result.output
    assert seen == [(True, True, False)] * 2
    assert (cudnn.enabled, cudnn.benchmark, cudnn.allow_tf32) == before
    assert "reached by 0 of 2" in (tmp_path / "made-up" / "kernels.md").read_text(encoding="utf-8")
