"""The operators in torch: on the CPU they are the reference; what a GPU would be told to launch is recorded."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch.library import opcheck

from restyle_deploy.errors import BackendUnavailableError
from restyle_deploy.ops import compiler, cuda_launch, cuda_ops
from restyle_deploy.ops.kernels.launches import Config, Epilogue, Factor, Launch, launch_fused_bias_act
from restyle_deploy.ops.switch import active_kernels, use_cuda_kernels
from tests.ops.host_cuda.host_kernels import HostLibrary, build_library, find_compiler
from tests.ops.kernel_cases import (
    SKIP_PADS,
    KernelCase,
    assert_close,
    fused_bias_act_cases,
    run_case,
    tensors_of,
    upfirdn2d_cases,
)

BIAS_ACT = torch.ops.restyle_deploy.fused_bias_act
FILTER = torch.ops.restyle_deploy.upfirdn2d
SOME = settings(max_examples=25)


@dataclass(frozen=True)
class Call:
    launch: Launch
    inputs: tuple[Tensor | None, ...]
    y: Tensor


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """What is launched, instead of a GPU."""
    made: list[Call] = []

    def record(launch: Launch, inputs: Sequence[Tensor | None], y: Tensor) -> None:
        made.append(Call(launch, tuple(inputs), y))

    monkeypatch.setattr(cuda_ops, "run", record)
    return made


@SOME
@given(fused_bias_act_cases())
def test_fused_bias_act_on_the_cpu_is_the_reference(case: KernelCase) -> None:
    _check_on_cpu(case)


@SOME
@given(upfirdn2d_cases())
def test_upfirdn2d_on_the_cpu_is_the_reference(case: KernelCase) -> None:
    _check_on_cpu(case)


def _check_on_cpu(case: KernelCase) -> None:
    tensors = tensors_of(case)
    y = run_case(case, tensors)
    assert y.dtype == case.dtype
    assert cuda_ops._is_last(y) <= case.channels_last
    assert_close(case, y, tensors)


LAYOUTS = {
    "float32": torch.randn(2, 3, 6, 5),
    "channels last": torch.randn(2, 3, 6, 5).half().to(memory_format=torch.channels_last),
    "strided": torch.randn(2, 3, 6, 5).bfloat16()[:, :, ::2],
}


@pytest.mark.parametrize("x", [*LAYOUTS.values(), torch.randn(2, 0, 6, 5)], ids=[*LAYOUTS, "empty"])
def test_pytorch_accepts_fused_bias_act(x: Tensor) -> None:
    channels = x.shape[1]
    noise = torch.randn(1, 1, *x.shape[2:])
    for arguments in (
        (torch.randn(channels), None, None, 1.0, None, 0.2, math.sqrt(2)),
        (None, torch.randn(2, channels), noise, 0.5, torch.randn(2, channels), None, None),
    ):
        opcheck(BIAS_ACT.default, (x, *arguments))


@pytest.mark.parametrize("x", LAYOUTS.values(), ids=LAYOUTS)
def test_pytorch_accepts_upfirdn2d(x: Tensor) -> None:
    kernel = torch.randn(4, 4)
    opcheck(FILTER.default, (x, kernel, 2, 1, SKIP_PADS, True, *[None] * 3, 1.0, *[None] * 3))
    opcheck(FILTER.default, (x, kernel, 1, 2, (1, 2, 3, -1), False, torch.randn(3), None, None, 1.0, None, 0.2, 1.5))


def test_other_ranks_are_planes() -> None:
    bias = torch.tensor([1.0, -1.0])
    for shape in ((3, 2), (3, 2, 5), (3, 2, 2, 2, 3)):
        x = torch.randn(shape)
        expected = torch.nn.functional.leaky_relu(x + bias.view(-1, *[1] * (x.ndim - 2)), 0.2) * math.sqrt(2)
        torch.testing.assert_close(cuda_ops.fused_bias_act(x, bias), expected)


def test_gradients_are_refused() -> None:
    x = torch.randn(1, 1, 2, 2, requires_grad=True)
    y = cuda_ops.fused_bias_act(x, torch.zeros(1))
    with pytest.raises(RuntimeError, match="no autograd formula"):
        y.sum().backward()


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_gpu_launches_fused_bias_act(calls: list[Call], channels_last: bool) -> None:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(2, 3, 4, 5).half().to(memory_format=layout)
    demod, bias = torch.randn(2, 3).half(), torch.randn(3)
    noise = torch.randn(1, 1, 4, 5)
    y = cuda_ops._fused_bias_act_cuda(x, bias, demod, noise, 0.5, None, 0.2, None)
    (call,) = calls
    assert call.y is y
    assert y.is_contiguous(memory_format=layout)
    epilogue = Epilogue(factors=Factor(1 | 2 | 4 | 16), noise_strength=0.5, negative_slope=0.2, gain=1.0)
    assert call.launch == launch_fused_bias_act(x.shape, epilogue, dtype="float16", channels_last=channels_last)
    read_x, read_demod, read_noise, read_bias, read_next = call.inputs
    assert read_x is x
    assert read_bias is bias
    assert read_next is None
    for read, given_tensor, dtype in ((read_demod, demod, torch.float32), (read_noise, noise, torch.float16)):
        assert read is not None
        assert read.dtype == dtype
        torch.testing.assert_close(read, given_tensor.to(dtype))


@pytest.mark.parametrize(
    ("up", "pads", "is_separable", "expression"),
    [
        (1, (1, 1, 1, 1), True, "upfirdn2d<float, 1, 0, false>"),
        (2, SKIP_PADS, True, "upfirdn2d<float, 2, 0, false>"),
        (2, SKIP_PADS, False, "upfirdn2d<float, 0, 0, false>"),
    ],
)
def test_a_gpu_launches_upfirdn2d(
    calls: list[Call], up: int, pads: tuple[int, ...], is_separable: bool, expression: str
) -> None:
    x, kernel = torch.randn(1, 2, 6, 7), torch.randn(4, 4).double()
    y = cuda_ops._upfirdn2d_cuda(x, kernel, up, 1, pads, is_separable, *[None] * 3, 1.0, *[None] * 3)
    (call,) = calls
    assert call.launch.expression == expression
    assert tuple(y.shape) == call.launch.out_shape
    assert call.inputs[2:] == (None,) * 4
    read = call.inputs[1]
    assert read is not None
    assert read.dtype == torch.float32
    torch.testing.assert_close(read, kernel.float())


@pytest.mark.parametrize(
    "case",
    [
        KernelCase(shape=(2, 5, 9, 17), factors=Factor(31), dtype=torch.float16, channels_last=True),
        KernelCase(shape=(1, 3, 9, 17), factors=Factor(31), config=Config.BLUR, pads=(1, 1, 1, 1), filter_size=(4, 4)),
    ],
    ids=["fused_bias_act", "upfirdn2d"],
)
def test_what_a_gpu_launches_is_the_reference(case: KernelCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU's way from torch tensors to the kernels, whose sources the host runs."""
    if find_compiler() is None:
        pytest.skip("no C++ compiler is installed")
    monkeypatch.setattr(cuda_ops, "run", _run_on_host)
    tensors = tensors_of(case)
    factors = (tensors.bias, tensors.demod, tensors.noise, case.noise_strength, tensors.next_scale)
    activation = (case.negative_slope, case.gain)
    if tensors.filter is None:
        y = cuda_ops._fused_bias_act_cuda(tensors.x, *factors, *activation)
    else:
        filtering = (tensors.filter, case.up, case.down, case.pads, True)
        y = cuda_ops._upfirdn2d_cuda(tensors.x, *filtering, *factors, *activation)
    assert_close(case, y, tensors)


def _run_on_host(launch: Launch, inputs: Sequence[Tensor | None], y: Tensor) -> None:
    HostLibrary(path=build_library(f"{launch.kernel}.cu", [launch.expression])).run(launch, inputs, y)


def test_a_gpu_copies_what_is_not_dense(calls: list[Call]) -> None:
    x = torch.randn(2, 3, 8, 5)[:, :, ::2]
    cuda_ops._fused_bias_act_cuda(x, None, None, None, 1.0, None, 0.2, 1.0)
    read = calls[0].inputs[0]
    assert read is not None
    assert read.is_contiguous()
    torch.testing.assert_close(read, x)


def test_a_gpu_launches_nothing_for_an_empty_tensor(calls: list[Call]) -> None:
    kernel = torch.ones(1, 1)
    assert cuda_ops._fused_bias_act_cuda(torch.empty(0, 3, 4, 4), None, None, None, 1.0, None, 0.2, 1.0).numel() == 0
    y = cuda_ops._upfirdn2d_cuda(torch.empty(0, 3, 4, 4), kernel, 2, 1, (0,) * 4, True, *[None] * 3, 1.0, *[None] * 3)
    assert y.shape == (0, 3, 8, 8)
    assert calls == []


def test_a_gpu_refuses_other_dtypes(calls: list[Call]) -> None:
    with pytest.raises(TypeError, match="fused_bias_act: got float64, expected one of float32"):
        cuda_ops._fused_bias_act_cuda(torch.zeros(1, 1, 1, 1).double(), None, None, None, 1.0, None, 0.2, 1.0)


def test_factors_that_do_not_fit_are_all_named() -> None:
    x = torch.zeros(2, 3, 4, 5)
    message = r"for a result of \[2, 3, 4, 5\]: bias is \[2\], expected \[3\]; noise is \[1, 1, 5, 4\], expected"
    with pytest.raises(ValueError, match=message):
        cuda_ops.fused_bias_act(x, torch.zeros(2), noise=torch.zeros(1, 1, 5, 4))
    with pytest.raises(ValueError, match=r"for a result of \[2, 3, 8, 10\]: demod is \[3, 2\], expected \[2, 3\]"):
        cuda_ops.upfirdn2d_epilogue(x, torch.zeros(4, 4), up=2, pads=SKIP_PADS, demod=torch.zeros(3, 2))
    with pytest.raises(ValueError, match="is smaller than the filter"):
        cuda_ops.upfirdn2d(x, torch.zeros(8, 8))


@pytest.mark.parametrize("operator", ["_fused_bias_act", "_fused_bias_act_cuda"])
def test_factors_elsewhere_are_all_named(calls: list[Call], operator: str) -> None:
    """To a kernel, an address of another device would be one of its own."""
    x, bias, demod = torch.zeros(2, 3, 4, 5), torch.zeros(3, device="meta"), torch.zeros(2, 3, device="meta")
    with pytest.raises(ValueError, match=r"\[2, 3, 4, 5\]: bias is on meta, expected cpu; demod is on meta, expected"):
        _inner(operator)(x, bias, demod, None, 1.0, None, 0.2, 1.5)
    assert calls == []


@pytest.mark.parametrize("operator", ["_upfirdn2d", "_upfirdn2d_cuda"])
def test_filter_elsewhere_is_named(calls: list[Call], operator: str) -> None:
    kernel = torch.zeros(4, 4, device="meta")
    with pytest.raises(ValueError, match="kernel is on meta, expected cpu"):
        _inner(operator)(torch.zeros(2, 3, 4, 5), kernel, 1, 1, (0,) * 4, False, *[None] * 3, 1.0, *[None] * 3)
    assert calls == []


def _inner(operator: str) -> Any:
    """What an operator computes on its kind of device, without torch's choice among them."""
    made = getattr(cuda_ops, operator)
    return getattr(made, "_init_fn", made)


def test_a_filter_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    kernel = torch.outer(torch.arange(1.0, 5), torch.arange(2.0, 6))
    assert cuda_ops._is_separable(kernel)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert cuda_ops._is_separable(kernel)  # known
    assert not cuda_ops._is_separable(kernel.clone())  # may not be read now
    kernel[0, 0] = 0
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert not cuda_ops._is_separable(kernel)  # it has changed
    with torch.inference_mode():
        assert cuda_ops._is_separable(torch.ones(4, 4))


def test_a_launch_is_on_the_current_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[Any, ...]] = []
    monkeypatch.setattr(cuda_launch, "primary_context", lambda index: index)
    monkeypatch.setattr(cuda_launch, "current_context", lambda context: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
    monkeypatch.setattr(cuda_launch, "enqueue", lambda *arguments, stream: made.append((*arguments, stream)))
    x, bias = torch.zeros(1, 2, 3, 4), torch.zeros(2)
    launch = launch_fused_bias_act(x.shape, Epilogue(), dtype="float32")
    y = torch.empty_like(x)
    cuda_launch.run(launch, (x, None, None, bias, None), y)
    assert made == [(launch, [x.data_ptr(), 0, 0, bias.data_ptr(), 0], y.data_ptr(), 7)]


def test_the_switch_is_for_cuda_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "check_available", lambda: None)
    on_gpu: Any = SimpleNamespace(is_cuda=True)
    assert active_kernels(on_gpu) is None
    with use_cuda_kernels():
        assert active_kernels(on_gpu) is cuda_ops
        assert active_kernels(torch.zeros(1)) is None
    assert active_kernels(on_gpu) is None


def test_the_switch_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise BackendUnavailableError("the CUDA kernels need cuda-core")

    monkeypatch.setattr(compiler, "check_available", fail)
    with pytest.raises(BackendUnavailableError, match="need cuda-core"), use_cuda_kernels():
        raise AssertionError("entered")


def test_wrappers_pass_each_argument_to_its_place() -> None:
    """Values are distinct: an exchanged pair would change the result."""
    case = KernelCase(shape=(2, 3, 4, 5), factors=Factor(31), gain=1.7, negative_slope=0.3)
    tensors = tensors_of(case)
    assert_close(case, run_case(case, tensors), tensors)
