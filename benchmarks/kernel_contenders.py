"""What the kernels' benchmark runs: our kernels, and the same in torch's own operations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.kernel_table import CASES, EAGER, OURS, SHIFTED, Problem
from restyle_deploy.ops import cuda_ops
from restyle_deploy.ops.fused_bias_act import GAIN, NEGATIVE_SLOPE
from restyle_deploy.ops.kernels.launches import Factor
from restyle_deploy.ops.upfirdn2d import Pads


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a call reads: `factors` are the keyword arguments of our functions; `typed` the same in the dtype of x."""

    x: Tensor
    kernel: Tensor
    factors: Mapping[str, Any]
    typed: Mapping[str, Any]


Function = Callable[[Inputs], Tensor]


def make_inputs(problem: Problem, seed: int, device: str = "cuda") -> Inputs:
    """Make random inputs; zeros would be faster than what a model has."""
    case, dtype = CASES[problem.case], getattr(torch, problem.dtype)
    random = torch.Generator(device).manual_seed(seed)
    batch, channels, *_ = problem.shape
    layout = torch.channels_last if problem.channels_last else torch.contiguous_format

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=device)

    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], device=device)
    present = {
        Factor.DEMOD: {"demod": normal(batch, channels).abs()},
        Factor.NOISE: {"noise": normal(1, 1, problem.size, problem.size).to(dtype)},
        Factor.BIAS: {"bias": normal(channels)},
        Factor.NEXT_SCALE: {"next_scale": normal(batch, channels)},
    }
    factors = {name: t for factor, named in present.items() if factor in case.factors for name, t in named.items()}
    is_active = Factor.ACTIVATION in case.factors
    numbers = {"negative_slope": NEGATIVE_SLOPE if is_active else None, "gain": GAIN if is_active else None}
    return Inputs(
        x=normal(*problem.shape).to(dtype).contiguous(memory_format=layout),
        kernel=torch.outer(taps, taps) / 16,
        factors={**factors, **numbers},
        typed={**{name: tensor.to(dtype) for name, tensor in factors.items()}, **numbers},
    )


def functions_of(problem: Problem) -> dict[str, Function]:
    """Return what the contenders of a problem compute, each a function from `Inputs` to y; nothing is compiled yet."""
    filtering = CASES[problem.case].filtering
    if filtering is None:
        return {
            OURS: lambda one: cuda_ops.fused_bias_act(one.x, **one.factors),
            EAGER: lambda one: epilogue(one.x, **one.typed),
        }
    up, pads = filtering.up[0], filtering.pads
    return {
        OURS: lambda one: cuda_ops.upfirdn2d_epilogue(one.x, one.kernel, up=up, pads=pads, **one.factors),
        EAGER: lambda one: epilogue(filter_by_convolution(one.x, one.kernel, up, pads), **one.typed),
        SHIFTED: lambda one: epilogue(filter_by_shifts(one.x, one.kernel, up, pads), **one.typed),
    }


def widen(one: Inputs) -> Inputs:
    """Return the same numbers in float64: with them, torch's way is the reference."""
    typed = {name: value.double() if isinstance(value, Tensor) else value for name, value in one.typed.items()}
    factors = {name: value.double() for name, value in one.factors.items() if isinstance(value, Tensor)}
    # Ours reads float32 factors, so the reference does; noise has the type of x in both.
    return Inputs(x=one.x.double(), kernel=one.kernel.double(), factors=one.factors, typed={**typed, **factors})


def epilogue(
    y: Tensor,
    *,
    negative_slope: float | None,
    gain: float | None,
    demod: Tensor | None = None,
    noise: Tensor | None = None,
    bias: Tensor | None = None,
    next_scale: Tensor | None = None,
) -> Tensor:
    """Compute the factors as the model does, in torch."""
    if demod is not None:
        y = y * demod[:, :, None, None]
    if noise is not None:
        y = y + noise
    if bias is not None:
        y = y + bias[None, :, None, None]
    if negative_slope is not None and gain is not None:
        y = functional.leaky_relu(y, negative_slope) * gain
    return y if next_scale is None else y * next_scale[:, :, None, None]


def filter_by_convolution(x: Tensor, kernel: Tensor, up: int, pads: Pads) -> Tensor:
    """Filter as torch does it best: one depthwise convolution, transposed for the upsampling."""
    channels, (top, left, bottom, right) = x.shape[1], pads
    weight = kernel.to(x.dtype).expand(channels, 1, *kernel.shape)
    if up == 1:
        return functional.conv2d(functional.pad(x, (left, right, top, bottom)), weight.flip(2, 3), groups=channels)
    # Of the full result, the first and the last row and column are beyond pads (2, 2, 1, 1).
    return functional.conv_transpose2d(x, weight, stride=up, padding=1, groups=channels)


def filter_by_shifts(x: Tensor, kernel: Tensor, up: int, pads: Pads) -> Tensor:
    """Filter as a sum of shifted images, which a compiler can fuse with what follows."""
    batch, channels, height, width = x.shape
    top, left, bottom, right = pads
    if up > 1:
        x = functional.pad(x[:, :, :, None, :, None], (0, up - 1, 0, 0, 0, up - 1))
        x = x.reshape(batch, channels, height * up, width * up)
    x = functional.pad(x, (left, right, top, bottom))
    rows, columns = (size - taps + 1 for size, taps in zip(x.shape[2:], kernel.shape, strict=True))
    flipped = kernel.to(x.dtype).flip(0, 1)
    shifts = [
        x[:, :, i : i + rows, j : j + columns] * flipped[i, j]
        for i in range(kernel.shape[0])
        for j in range(kernel.shape[1])
    ]
    return sum(shifts[1:], shifts[0])
