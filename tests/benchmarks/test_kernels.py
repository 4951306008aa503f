"""The kernels' benchmark without a GPU: its contenders, and what is checked before they are timed."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from benchmarks import kernels
from benchmarks.kernel_contenders import Inputs, functions_of, make_copies, make_inputs, widen
from benchmarks.kernel_table import CASES, COMPILED, EAGER, OURS, SHIFTED, Problem
from restyle_deploy.errors import BackendUnavailableError, BuildError
from restyle_deploy.latency import Latency
from restyle_deploy.ops.kernels.launches import Epilogue, launch_upfirdn2d
from restyle_deploy.ops.torch_gpu import why_torch_sees_no_gpu

UP_LAYER = Problem(case="up-layer", size=1024, batch=2, dtype="float16", channels_last=False)


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


def test_the_convolution_pads_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(case="blur", size=8, batch=1, dtype="float32", channels_last=False)
    one = make_inputs(problem, 1, "cpu")
    monkeypatch.setattr(torch.nn.functional, "pad", None)  # it would read and write all once more
    assert functions_of(problem)[EAGER](one).shape == (1, 512, 8, 8)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("case", ["blur", "skip"])
def test_a_timed_call_gets_its_weight_ready(case: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(case=case, size=8, batch=1, dtype=dtype, channels_last=True)
    one = make_inputs(problem, 1, "cpu")
    assert one.weight.dtype == one.flipped.dtype == one.x.dtype
    assert one.weight.shape == (problem.shape[1], 1, 4, 4)
    assert one.weight.is_contiguous(memory_format=torch.channels_last)
    weights = []

    def convolve(x: Tensor, weight: Tensor, **options: Any) -> Tensor:
        weights.append(weight)
        return x

    monkeypatch.setattr(torch.nn.functional, "conv2d", convolve)
    monkeypatch.setattr(torch.nn.functional, "conv_transpose2d", convolve)
    functions_of(problem)[EAGER](one)
    assert weights[0] is one.weight


@pytest.mark.parametrize("case", ["blur", "skip"])
def test_weights_are_turned_as_torch_needs_them(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The generator's filter looks the same turned: give the contenders one that does not.
    outer = torch.outer
    monkeypatch.setattr(torch, "outer", lambda left, right: outer(left, right) * torch.arange(1.0, 17.0).view(4, 4))
    problem = Problem(case=case, size=8, batch=1, dtype="float32", channels_last=False)
    one = make_inputs(problem, 1, "cpu")
    results = {name: function(one) for name, function in functions_of(problem).items()}
    torch.testing.assert_close(results[EAGER], results[OURS])
    torch.testing.assert_close(results[SHIFTED], results[OURS])


def test_copies_copy_all_bytes() -> None:
    for way, copies in make_copies(3000, 2, "cpu").items():
        assert len(copies) == 2, way
        for copy in copies:
            source, target = copy.args  # type: ignore[attr-defined]
            assert source.nbytes == target.nbytes == 1536
            target.zero_()
            copy()
            assert torch.equal(target, source)
            assert target.any()


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
