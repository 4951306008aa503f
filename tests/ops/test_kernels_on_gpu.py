"""The kernels on a GPU: the cases that the host emulation runs, larger ones, CUDA graphs, and NVIDIA's checker."""

from __future__ import annotations

import itertools
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from torch import Tensor

from restyle_deploy.errors import BackendUnavailableError
from restyle_deploy.gpu_kernel_checks import (
    FOUND_ERRORS,
    SANITIZER_OPTIONS,
    SANITIZER_PLACES,
    SANITIZER_TOOLS,
    capture_kernels,
    find_sanitizer,
)
from restyle_deploy.ops import cuda_ops
from restyle_deploy.ops.compiler import check_available
from restyle_deploy.ops.cuda_launch import run
from restyle_deploy.ops.fused_bias_act import fused_bias_act
from restyle_deploy.ops.kernels.launches import Config, Factor
from restyle_deploy.ops.torch_gpu import why_torch_sees_no_gpu
from restyle_deploy.ops.upfirdn2d import upfirdn2d_epilogue
from tests.ops.kernel_cases import (
    ALIGNED,
    DTYPES,
    MISALIGNMENTS,
    SKIP_PADS,
    KernelCase,
    Offsets,
    assert_close,
    empty_y,
    fused_bias_act_cases,
    inputs_of,
    launch_of,
    run_case,
    tensors_of,
    upfirdn2d_cases,
)

GUARD = 64  # elements behind y that nobody may write
# More than 2^31 elements; the grid's limit of planes is 65535.
LARGE_SHAPE = (129, 256, 256, 256)
SANITIZER_SECONDS = 1500
# Of the grid, under each tool, which are slow.
SANITIZED_CASES = 120

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def gpu() -> None:
    if reason := why_torch_sees_no_gpu():
        pytest.skip(reason)
    try:
        check_available()
    except BackendUnavailableError as error:
        pytest.skip(str(error))


@settings(max_examples=150)
@given(fused_bias_act_cases())
def test_fused_bias_act_is_the_reference(case: KernelCase) -> None:
    check_kernel(case)


@settings(max_examples=250)
@given(upfirdn2d_cases())
def test_upfirdn2d_is_the_reference(case: KernelCase) -> None:
    check_kernel(case)


@pytest.mark.parametrize("config", [None, Config.BLUR, Config.SKIP_UPSAMPLE])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_of_the_model(config: Config | None, channels_last: bool, dtype: torch.dtype) -> None:
    base = KernelCase(shape=(2, 64, 129, 129), factors=Factor(31), dtype=dtype, channels_last=channels_last)
    check_kernel(base if config is None else _filtering_case(base, config))


@pytest.mark.parametrize("config", [None, Config.BLUR])
@pytest.mark.parametrize("channels_last", [False, True])
def test_tensors_are_misaligned_each_in_its_own_way(config: Config | None, channels_last: bool) -> None:
    for dtype, offsets in itertools.product(DTYPES, MISALIGNMENTS):
        base = KernelCase(
            shape=(1, 16, 4, 8), factors=Factor(31), dtype=dtype, channels_last=channels_last, offsets=offsets
        )
        check_kernel(base if config is None else _filtering_case(base, config))


def check_kernel(case: KernelCase) -> None:
    """Run a case twice, into memory of NaN: right, the same both times, and nothing behind y is touched."""
    launch, tensors = launch_of(case), tensors_of(case, "cuda")
    results = []
    for _ in range(2):
        y, guard = _guarded(case)
        run(launch, inputs_of(tensors), y)
        assert guard.isnan().all(), case
        results.append(y)
    assert_close(case, results[0], tensors)
    assert torch.equal(results[0], results[1]), case


def _guarded(case: KernelCase) -> tuple[Tensor, Tensor]:
    """Return y as `empty_y` makes it, and the elements behind it."""
    start = case.offsets.y
    count = math.prod(case.out_shape)
    memory = torch.full((start + count + GUARD,), math.nan, dtype=case.dtype, device="cuda")
    strides = empty_y(case).stride()
    return memory.as_strided(case.out_shape, strides, start), memory[start + count :]


@pytest.mark.parametrize("config", [None, Config.BLUR])
@pytest.mark.parametrize("channels_last", [False, True])
def test_more_than_two_to_the_31_elements(
    config: Config | None, channels_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = math.prod(LARGE_SHAPE)
    assert count > 2**31
    free, _ = torch.cuda.mem_get_info()
    if free < 6 * count:
        pytest.skip(f"{6 * count / 2**30:.0f} GiB of GPU memory are needed, {free / 2**30:.0f} are free")
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.empty(LARGE_SHAPE, dtype=torch.float16, device="cuda", memory_format=layout).normal_()
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    bias = torch.randn(LARGE_SHAPE[1], device="cuda")
    taps = torch.tensor([1.0, 2.0, 4.0, 1.0], device="cuda")
    kernel, pads = torch.outer(taps, taps) / 16, (2, 1, 1, 2)
    if config is None:
        y = cuda_ops.fused_bias_act(x, bias)
    else:
        y = cuda_ops.upfirdn2d_epilogue(x, kernel, pads=pads, bias=bias)
    for image in (0, 127, 128):  # 128 lies behind 2^31 elements
        x_one = x[image : image + 1].float()
        if config is None:
            expected = fused_bias_act(x_one, bias)
        else:
            expected = upfirdn2d_epilogue(x_one, kernel, pads=pads, bias=bias)
        torch.testing.assert_close(y[image : image + 1].float(), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("config", [None, Config.BLUR, Config.SKIP_UPSAMPLE])
def test_a_cuda_graph_captures_it(config: Config | None) -> None:
    base = KernelCase(shape=(1, 8, 33, 40), factors=Factor(31), dtype=torch.float16)
    case = base if config is None else _filtering_case(base, config)
    tensors = tensors_of(case, "cuda")
    run_case(case, tensors)  # compiles, and reads the filter
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run_case(case, tensors)
    tensors.x.copy_(tensors.x.flip(0, 1, 2, 3).clone())
    y.fill_(math.nan)
    graph.replay()
    torch.cuda.synchronize()
    assert_close(case, y, tensors)


def test_the_check_of_doctor_replays_them() -> None:
    assert capture_kernels().endswith("the same bits")


def test_it_runs_on_the_current_stream() -> None:
    """On another stream, behind a wait: on the default stream it would read x before it is written."""
    case = KernelCase(shape=(1, 8, 64, 64), factors=Factor(31))
    tensors = tensors_of(case, "cuda")
    run_case(case, tensors)
    values = tensors.x.clone()
    tensors.x.fill_(math.nan)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        tensors.x.copy_(values)
        y = run_case(case, tensors)
    stream.synchronize()
    assert_close(case, y, tensors)


def test_what_is_not_dense_is_copied() -> None:
    x = torch.randn(2, 6, 9, 7, device="cuda")[:, ::2, 1:, ::3]
    bias = torch.randn(3, device="cuda")
    torch.testing.assert_close(cuda_ops.fused_bias_act(x, bias), fused_bias_act(x, bias))


def test_pytorch_accepts_the_operators() -> None:
    x, bias, kernel = torch.randn(2, 3, 6, 5, device="cuda"), torch.randn(3, device="cuda"), torch.ones(4, 4).cuda()
    epilogue = (bias, None, None, 1.0, None, 0.2, math.sqrt(2))
    torch.library.opcheck(torch.ops.restyle_deploy.fused_bias_act.default, (x, *epilogue))
    torch.library.opcheck(torch.ops.restyle_deploy.upfirdn2d.default, (x, kernel, 2, 1, SKIP_PADS, True, *epilogue))


@pytest.mark.slow
@pytest.mark.parametrize("call", ["run_samples()", f"run_grid({SANITIZED_CASES})"])
@pytest.mark.parametrize("tool", SANITIZER_TOOLS)
def test_the_sanitizer_finds_nothing(tool: str, call: str, project_root: Path) -> None:
    code, output = _sanitize(tool, call, project_root)
    assert code == 0, output[-4000:]
    assert re.search(r"\d+ (samples|cases) ran", output)


@pytest.mark.slow
def test_the_sanitizer_finds_a_planted_overrun(project_root: Path) -> None:
    """Else the test above could not fail."""
    code, output = _sanitize("memcheck", "run_overrun()", project_root)
    assert code == FOUND_ERRORS, output[-4000:]
    assert "Invalid __global__" in output


def run_samples() -> None:
    """Run every kernel on each type and layout, on shapes that end inside a vector and inside a tile."""
    base = KernelCase(shape=(2, 5, 37, 67), factors=Factor(31))
    configs = (None, *Config)
    count = 0
    for config, dtype, channels_last in itertools.product(configs, DTYPES, (False, True)):
        for shape, offsets in ((base.shape, Offsets(x=1, noise=1, y=1)), ((1, 65, 16, 32), ALIGNED)):
            case = replace(base, shape=shape, dtype=dtype, channels_last=channels_last, offsets=offsets)
            case = case if config is None else _filtering_case(case, config)
            tensors, y = tensors_of(case, "cuda"), empty_y(case, "cuda")
            run(launch_of(case), inputs_of(tensors), y)
            assert_close(case, y, tensors)
            count += 1
    print(f"{count} samples ran")  # noqa: T201


def run_grid(count: int) -> None:
    """Run as many cases of the grid as the tests above have, half of each kernel, the same ones each time."""
    ran = 0

    def run_one(case: KernelCase) -> None:
        nonlocal ran
        tensors, y = tensors_of(case, "cuda"), empty_y(case, "cuda")
        run(launch_of(case), inputs_of(tensors), y)
        assert_close(case, y, tensors)
        ran += 1

    for cases in (fused_bias_act_cases(), upfirdn2d_cases()):
        limits = settings(
            max_examples=count // 2,
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        limits(given(cases)(run_one))()
    print(f"{ran} cases ran")  # noqa: T201


def run_overrun() -> None:
    """Tell a kernel of one image more than there is."""
    case = KernelCase(shape=(4, 64, 64, 64), factors=Factor.ACTIVATION)
    tensors, y = tensors_of(case, "cuda"), empty_y(case, "cuda")
    run(launch_of(replace(case, shape=(5, *case.shape[1:]))), inputs_of(tensors), y)
    torch.cuda.synchronize()


def _filtering_case(case: KernelCase, config: Config) -> KernelCase:
    """Return the case with a filter before what it does."""
    if config is Config.SKIP_UPSAMPLE:
        return replace(case, config=config, up=2, pads=SKIP_PADS, filter_size=(4, 4))
    if config is Config.BLUR:
        return replace(case, config=config, pads=(1, 1, 1, 1), filter_size=(4, 4))
    return replace(case, config=config, up=3, down=2, pads=(2, -1, 3, 1), filter_size=(3, 5))


def _sanitize(tool: str, call: str, project_root: Path) -> tuple[int, str]:
    """Run a function of this file under compute-sanitizer; return the exit code and all output."""
    found = find_sanitizer()
    if found is None:
        pytest.skip(f"no compute-sanitizer on the PATH or in {', '.join(SANITIZER_PLACES)}")
    # torch would hand out parts of one large allocation, beyond which nothing is found.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(project_root), os.environ.get("PYTHONPATH"))))
    result = subprocess.run(
        [
            *(found, "--tool", tool, *SANITIZER_OPTIONS),
            *(sys.executable, "-c", f"from tests.ops.test_kernels_on_gpu import *; {call}"),
        ],
        cwd=project_root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=SANITIZER_SECONDS,
        check=False,
    )
    output = result.stdout + result.stderr
    if "Device not supported" in output:
        pytest.skip("compute-sanitizer says: Device not supported")
    return result.returncode, output
