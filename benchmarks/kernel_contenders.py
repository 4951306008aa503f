"""What the kernels' benchmark runs: our kernels, and the same in torch's own operations."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.kernel_table import CASES, EAGER, OURS, SHIFTED, Problem
from restyle_deploy.ops import cuda_ops
from restyle_deploy.ops.fused_bias_act import GAIN, NEGATIVE_SLOPE
from restyle_deploy.ops.kernels.launches import Factor
from restyle_deploy.ops.upfirdn2d import Pads

ALIGNMENT = 512  # bytes, of each buffer
COPY_WAYS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = MappingProxyType(
    {
        "memcpy": lambda source, target: target.copy_(source),
        "kernel": lambda source, target: torch.mul(source, 1, out=target),
    }
)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a call reads, made before it is timed.

    Attributes:
        x: [N, C, H, W].
        kernel: [kh, kw] float32, the filter.
        flipped: [kh, kw] in the dtype of x: a convolution in torch does not flip its weight.
        weight: [C, 1, kh, kw] in the dtype of x, for each channel: flipped, but for a transposed convolution.
        factors: the keyword arguments of our functions.
        typed: the same in the dtype of x.
    """

    x: Tensor
    kernel: Tensor
    flipped: Tensor
    weight: Tensor
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
    kernel = torch.outer(taps, taps) / 16
    flipped = kernel.flip(0, 1)
    is_transposed = case.filtering is not None and case.filtering.up[0] > 1
    weight = (kernel if is_transposed else flipped).expand(channels, 1, *kernel.shape)  # [C, 1, kh, kw]
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
        kernel=kernel,
        flipped=flipped.to(dtype),
        weight=weight.to(dtype).contiguous(memory_format=layout),
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
        EAGER: lambda one: epilogue(filter_by_convolution(one.x, one.weight, up, pads), **one.typed),
        SHIFTED: lambda one: epilogue(filter_by_shifts(one.x, one.flipped, up, pads), **one.typed),
    }


def widen(one: Inputs) -> Inputs:
    """Return the same numbers in float64: with them, torch's way is the reference."""
    typed = {name: value.double() if isinstance(value, Tensor) else value for name, value in one.typed.items()}
    factors = {name: value.double() for name, value in one.factors.items() if isinstance(value, Tensor)}
    return Inputs(
        x=one.x.double(),
        kernel=one.kernel.double(),
        flipped=one.flipped.double(),  # sixteenths up to nine: exact in each type
        weight=one.weight.double(),
        factors=one.factors,
        # Ours reads float32 factors, so the reference does; noise has the type of x in both.
        typed={**typed, **factors},
    )


def make_copies(bytes_moved: int, count: int, device: str = "cuda") -> dict[str, list[Callable[[], Tensor]]]:
    """Return copies in each way, between so many pairs of buffers; each reads and writes so many bytes together."""
    size = math.ceil(bytes_moved / 2 / ALIGNMENT) * ALIGNMENT
    # Words of four bytes: kernels on single bytes are slower.
    pairs = [torch.randint(256, (2, size), dtype=torch.uint8, device=device).view(torch.int32) for _ in range(count)]
    return {way: [partial(copy, source, target) for source, target in pairs] for way, copy in COPY_WAYS.items()}


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


def filter_by_convolution(x: Tensor, weight: Tensor, up: int, pads: Pads) -> Tensor:
    """Filter as torch does it best: one depthwise convolution that pads by itself, transposed for the upsampling."""
    channels, padding = x.shape[1], pads[:2]
    if up == 1:  # pads (1, 1, 1, 1)
        return functional.conv2d(x, weight, padding=padding, groups=channels)
    # Of the full result, the first and the last row and column are beyond pads (2, 2, 1, 1).
    return functional.conv_transpose2d(x, weight, stride=up, padding=1, groups=channels)


def filter_by_shifts(x: Tensor, flipped: Tensor, up: int, pads: Pads) -> Tensor:
    """Filter as a sum of shifted images, which a compiler can fuse with what follows."""
    batch, channels, height, width = x.shape
    top, left, bottom, right = pads
    if up > 1:
        x = functional.pad(x[:, :, :, None, :, None], (0, up - 1, 0, 0, 0, up - 1))
        x = x.reshape(batch, channels, height * up, width * up)
    x = functional.pad(x, (left, right, top, bottom))
    rows, columns = (size - taps + 1 for size, taps in zip(x.shape[2:], flipped.shape, strict=True))
    shifts = [
        x[:, :, i : i + rows, j : j + columns] * flipped[i, j]
        for i in range(flipped.shape[0])
        for j in range(flipped.shape[1])
    ]
    return sum(shifts[1:], shifts[0])
