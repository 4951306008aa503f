"""The kernels' benchmark without a GPU: its bytes, contenders, table and verdicts."""

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from benchmarks import kernels
from benchmarks.kernel_contenders import Inputs, functions_of, make_inputs, widen
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
    device_folder,
    format_markdown,
    verdicts_of,
    write_table,
)
from benchmarks.verdicts import format_verdict
from restyle_deploy.bench.environment import describe_environment
from restyle_deploy.bench.measure import StepLatency, step_latency_from
from restyle_deploy.errors import BackendUnavailableError, BuildError
from restyle_deploy.latency import Latency
from restyle_deploy.ops.kernels.launches import Epilogue, launch_upfirdn2d
from restyle_deploy.ops.torch_gpu import why_torch_sees_no_gpu

UP_LAYER = Problem(case="up-layer", size=1024, batch=2, dtype="float16", channels_last=False)


@pytest.fixture
def row() -> KernelRow:
    return KernelRow(
        problem=UP_LAYER,
        bytes_moved=UP_LAYER.bytes_moved,
        copy_bandwidth=UP_LAYER.bytes_moved / 0.09e-3,  # so that the floor is 0.09 ms
        latencies={OURS: _latency(0.1), EAGER: _latency(0.9), COMPILED: _latency(0.25), COPY: _latency(0.095)},
        errors={OURS: 1e-4},
        reasons={SHIFTED: "it has | failed"},
    )


def _latency(ms: float, *more: float) -> StepLatency:
    return step_latency_from(Latency(warmup_ms=(), samples_ms=(ms, *(more or [ms] * 4))))


def test_bytes_of_the_up_layer() -> None:
    assert UP_LAYER.shape == (2, 32, 1025, 1025)
    x, y, noise = 2 * 32 * 1025 * 1025 * 2, 2 * 32 * 1024 * 1024 * 2, 1024 * 1024 * 2
    demod, next_scale, bias, taps = 2 * 32 * 4, 2 * 32 * 4, 32 * 4, 16 * 4
    assert UP_LAYER.bytes_moved == x + y + noise + demod + next_scale + bias + taps


def test_bytes_of_other_cases() -> None:
    one = replace(UP_LAYER, batch=1, dtype="float32")
    assert replace(one, case="skip").bytes_moved == 3 * (512**2 + 1024**2) * 4 + 64
    assert replace(one, case="blur").bytes_moved == 32 * (1025**2 + 1024**2) * 4 + 64
    assert replace(one, case="bias-act", size=256).bytes_moved == 2 * 128 * 256**2 * 4 + 128 * 4
    assert replace(one, case="epilogue", size=32).shape == (1, 512, 32, 32)


@pytest.mark.parametrize("case", CASES)
def test_shapes_are_those_that_the_kernels_give(case: str) -> None:
    problem = replace(UP_LAYER, case=case)
    filtering = CASES[case].filtering
    if filtering is None:
        assert problem.shape[2:] == (1024, 1024)
    else:
        launch = launch_upfirdn2d(problem.shape, filtering, Epilogue(), dtype=problem.dtype)
        assert launch.out_shape[2:] == (1024, 1024)


@pytest.mark.parametrize(
    ("case", "dtype", "channels_last"),
    [
        *itertools.product(CASES, ("float32",), (False, True)),
        ("epilogue", "float16", True),  # torch's own convolution takes seconds for these types on a CPU
        ("epilogue", "bfloat16", False),
    ],
)
def test_contenders_compute_the_same(case: str, channels_last: bool, dtype: str) -> None:
    problem = Problem(case=case, size=8, batch=2, dtype=dtype, channels_last=channels_last)
    one = make_inputs(problem, 1, "cpu")
    assert one.x.shape == problem.shape
    functions = functions_of(problem)
    expected = functions[EAGER](widen(one))
    assert expected.dtype == torch.float64
    assert expected.shape[2:] == (8, 8)
    for name, function in functions.items():
        found = function(one)
        assert found.dtype == one.x.dtype, name
        error = torch.linalg.vector_norm(found.double() - expected) / torch.linalg.vector_norm(expected)
        assert error < kernels.TOLERANCES[dtype] * (1 if name == OURS else 10), name


@pytest.mark.parametrize("case", CASES)
def test_pytorch_can_compile_its_contenders_whole(case: str) -> None:
    problem = Problem(case=case, size=8, batch=1, dtype="float32", channels_last=False)
    one = make_inputs(problem, 1, "cpu")
    torch.compiler.reset()
    for name, function in functions_of(problem).items():
        if name != OURS:
            compiled = torch.compile(function, fullgraph=True, dynamic=False, backend="eager")
            torch.testing.assert_close(compiled(one), function(one))


def test_figures_of_a_row(row: KernelRow) -> None:
    assert row.floor_ms == pytest.approx(0.09)
    assert row.share(OURS) == pytest.approx(0.9)
    assert row.share(SHIFTED) is None
    assert row.ratio(COMPILED) == pytest.approx(2.5)
    assert row.ratio(SHIFTED) is None
    assert replace(row, latencies={}).ratio(COMPILED) is None


def test_goals_that_are_reached(row: KernelRow) -> None:
    share, ratio = verdicts_of([row])
    assert share.is_reached
    assert ratio.is_reached
    name = "blur and whole epilogue (up-layer), 1024 px, batch 2, float16, NCHW"
    assert format_verdict(share) == f"pass: {name}: share of the copy: 0.9, goal at least 0.8"
    assert format_verdict(ratio) == f"pass: {name}: times torch.compile: 2.5, goal at least 2"


@pytest.mark.parametrize(
    ("ours_ms", "compiled_ms", "reached"),
    [(0.1125, 0.225, [True, True]), (0.113, 0.3, [False, True]), (0.1, 0.199, [True, False])],
)
def test_goals_have_an_edge(row: KernelRow, ours_ms: float, compiled_ms: float, reached: list[bool]) -> None:
    found = verdicts_of([replace(row, latencies={OURS: _latency(ours_ms), COMPILED: _latency(compiled_ms)})])
    assert [verdict.is_reached for verdict in found] == reached
    assert [format_verdict(verdict).startswith("pass") for verdict in found] == reached


def test_what_was_not_measured_is_not_reached(row: KernelRow) -> None:
    verdicts = verdicts_of([replace(row, latencies={})])
    assert [format_verdict(verdict).split(":")[0] for verdict in verdicts] == ["FAIL", "FAIL"]
    assert "not measured, goal at least 0.8" in format_verdict(verdicts[0])


def test_goals_are_for_float16(row: KernelRow) -> None:
    assert verdicts_of([replace(row, problem=replace(row.problem, dtype="float32"))]) == []
    assert len(verdicts_of([replace(row, problem=replace(row.problem, case="blur"))])) == 1


@pytest.fixture
def table(row: KernelRow) -> KernelTable:
    unstable = replace(row, latencies={OURS: _latency(0.1, 0.1, 0.2, 0.2)})
    refused = replace(row, latencies={}, reasons={OURS: "wrong: a | b"})
    return KernelTable(
        created="2026-01-02T03:04:05+00:00",
        environment=describe_environment(),
        device={"GPU": "NVIDIA H999 (SXM)", "driver": "1.2"},
        rows=(row, unstable, refused),
    )


def test_the_table(table: KernelTable) -> None:
    text = format_markdown(table)
    assert "GPU NVIDIA H999 (SXM), driver 1.2; 2026-01-02." in text
    name = describe(UP_LAYER)
    assert f"| {name} | 0.0900 | 0.1000 | 90% | 95% | 9.00 | 2.50 | – |" in text
    assert f"| {name} | 0.0900 | 0.1500 ± | 60% | – | – | – | – |" in text
    assert f"| {name} | 0.0900 | wrong: a / b | – | – | – | – | – |" in text
    assert f"- pass: {name}: share of the copy: 0.9, goal at least 0.8" in text


def test_files_are_named_after_the_device(table: KernelTable, tmp_path: Path) -> None:
    files = write_table(table, tmp_path)
    assert [str(file.relative_to(tmp_path)) for file in files] == [
        "nvidia-h999-sxm/kernels.json",
        "nvidia-h999-sxm/kernels.md",
    ]
    content = json.loads(files[0].read_text(encoding="utf-8"))
    assert content["format_version"] == 1
    assert content["rows"][0]["latencies"][OURS]["samples_ms"] == [0.1] * 5
    assert content["rows"][0]["problem"]["case"] == "up-layer"
    assert files[1].read_text(encoding="utf-8") == format_markdown(table)
    assert device_folder("NVIDIA H200") == "nvidia-h200"


def test_buffers_exceed_the_cache() -> None:
    cache = 60 * 2**20
    for problem in kernels.list_problems(tuple(CASES), kernels.DTYPES, kernels.SIZES, 1):
        count = kernels.count_sets(problem.bytes_moved, cache)
        assert count >= kernels.FEWEST_SETS
        assert count == kernels.MOST_SETS or count * problem.bytes_moved >= kernels.CACHES * cache


def test_problems_of_the_goals_come_first() -> None:
    problems = list(kernels.list_problems(tuple(CASES), kernels.DTYPES, kernels.SIZES, 1))
    assert len(problems) == len(set(problems)) == 5 * 3 * 3 * 2
    assert {problem.dtype for problem in problems[:30]} == {"float16"}


def test_times_of_one_call() -> None:
    latency = kernels.per_call(Latency(warmup_ms=(8.0,), samples_ms=(4.0, 2.0)), 4)
    assert (latency.warmup_ms, latency.samples_ms, latency.median_ms) == ((2.0,), (1.0, 0.5), 0.75)


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Callable[[Inputs], Tensor]], None]:
    """No compiler; and a function that replaces what one contender computes."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)

    def replace_contender(name: str, function: Callable[[Inputs], Tensor]) -> None:
        monkeypatch.setattr(kernels, "functions_of", lambda problem: {**functions_of(problem), name: function})

    return replace_contender


SMALL = Problem(case="up-layer", size=8, batch=1, dtype="float32", channels_last=True)


def test_contenders_are_checked_first(uncompiled: Any) -> None:
    functions, errors, reasons = kernels.check_contenders(SMALL, make_inputs(SMALL, 0, "cpu"))
    assert set(functions) == set(errors) == {OURS, EAGER, COMPILED, SHIFTED}
    assert reasons == {}
    assert all(0 < error < 1e-6 for error in errors.values())


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_a_wrong_kernel_is_not_timed(uncompiled: Any, value: float) -> None:
    uncompiled(OURS, lambda one: torch.full((1, 512, 8, 8), value))
    functions, errors, reasons = kernels.check_contenders(SMALL, make_inputs(SMALL, 0, "cpu"))
    assert OURS not in functions
    assert reasons[OURS].startswith("wrong: relative error")
    assert (OURS in errors) == (value == 0.0)


@pytest.mark.parametrize("error", [RuntimeError("no memory\nmore"), BuildError("no memory")])
def test_a_contender_that_fails_leaves_the_others(uncompiled: Any, error: Exception) -> None:
    def fail(one: Inputs) -> Tensor:
        raise error

    uncompiled(SHIFTED, fail)
    functions, _, reasons = kernels.check_contenders(SMALL, make_inputs(SMALL, 0, "cpu"))
    assert set(functions) == {OURS, EAGER, COMPILED}
    assert reasons == {SHIFTED: "no memory"}


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(kernels.main, [])
    assert result.exit_code == 1
    assert result.output == f"Error: {why_torch_sees_no_gpu()}: nothing was measured\n"


def test_without_a_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise BackendUnavailableError("the CUDA kernels need cuda-core")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernels, "check_available", fail)
    result = CliRunner().invoke(kernels.main, [])
    assert (result.exit_code, result.output) == (1, "Error: the CUDA kernels need cuda-core\n")
