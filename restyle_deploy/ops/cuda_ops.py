"""The two operators in torch by our CUDA kernels: `torch.ops.restyle_deploy.fused_bias_act` and `.upfirdn2d`.

Importing this module registers them. On the CPU they are the torch reference, in float32 for shorter types; on a GPU
they launch our kernels on torch's current stream, with nothing but `torch.empty` beside: a CUDA graph may capture them
once each has run (the first run compiles). They have no gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from restyle_deploy.ops import fused_bias_act as bias_act_reference
from restyle_deploy.ops import upfirdn2d as upfirdn2d_reference
from restyle_deploy.ops.cuda_launch import run
from restyle_deploy.ops.fused_bias_act import GAIN, NEGATIVE_SLOPE
from restyle_deploy.ops.kernels.launches import (
    Epilogue,
    Factor,
    Filtering,
    launch_fused_bias_act,
    launch_upfirdn2d,
    separable_taps,
)
from restyle_deploy.ops.upfirdn2d import Pads

_separable_filters = WeakTensorKeyDictionary()


def fused_bias_act(
    x: Tensor,
    bias: Tensor | None = None,
    *,
    demod: Tensor | None = None,
    noise: Tensor | None = None,
    noise_strength: float = 1.0,
    next_scale: Tensor | None = None,
    negative_slope: float | None = NEGATIVE_SLOPE,
    gain: float | None = GAIN,
) -> Tensor:
    """Compute what `ops.fused_bias_act.fused_bias_act` does, in one pass over memory.

    Args:
        x: [N, C, ...] float32, float16 or bfloat16; contiguous or `torch.channels_last`, else it is copied.
        bias: [C], any floating dtype, like demod and next_scale; the kernel reads float32.
        demod: [N, C].
        noise: [1, 1, H, W].
        noise_strength: factor of `noise`.
        next_scale: [N, C].
        negative_slope: factor of negative values; None for 1.
        gain: factor of the result; None for 1.
    Returns:
        Like `x`, in its layout.
    Raises:
        TypeError: on a GPU, another dtype.
        ValueError: the shapes do not fit, or a factor is on another device than `x`.
    """
    planes = x if x.ndim == 4 else x.reshape(*x.shape[:2], -1, 1)
    y: Tensor = torch.ops.restyle_deploy.fused_bias_act(
        planes, bias, demod, noise, noise_strength, next_scale, negative_slope, gain
    )
    return y.view(x.shape) if x.ndim != 4 else y


def upfirdn2d(x: Tensor, kernel: Tensor, *, up: int = 1, down: int = 1, pads: Pads = (0, 0, 0, 0)) -> Tensor:
    """Compute what `ops.upfirdn2d.upfirdn2d` does; see `upfirdn2d_epilogue`."""
    return upfirdn2d_epilogue(x, kernel, up=up, down=down, pads=pads, negative_slope=None, gain=None)


def upfirdn2d_epilogue(
    x: Tensor,
    kernel: Tensor,
    *,
    up: int = 1,
    down: int = 1,
    pads: Pads = (0, 0, 0, 0),
    bias: Tensor | None = None,
    demod: Tensor | None = None,
    noise: Tensor | None = None,
    noise_strength: float = 1.0,
    next_scale: Tensor | None = None,
    negative_slope: float | None = NEGATIVE_SLOPE,
    gain: float | None = GAIN,
) -> Tensor:
    """Compute what `ops.upfirdn2d.upfirdn2d_epilogue` does, in one pass over memory.

    The first call with a filter on a GPU reads it, to see whether it is separable. A filter that is first met while a
    CUDA graph is captured, when nothing may be read, is taken for one that is not: right, but slower.

    Args:
        x: [N, C, H, W] float32, float16 or bfloat16; contiguous or `torch.channels_last`, else it is copied.
        kernel: [kh, kw] filter, any floating dtype; the kernel reads float32.
        up, down, pads: as in `ops.upfirdn2d.upfirdn2d`.
        bias, demod, noise, noise_strength, next_scale, negative_slope, gain: as in `fused_bias_act`; noise has the size
            of the filtered image.
    Returns:
        [N, C, H', W'] of the dtype and layout of `x`.
    Raises:
        TypeError, ValueError: as in `fused_bias_act`, of the filter too.
    """
    y: Tensor = torch.ops.restyle_deploy.upfirdn2d(
        x,
        kernel,
        up,
        down,
        list(pads),
        x.is_cuda and _is_separable(kernel),
        bias,
        demod,
        noise,
        noise_strength,
        next_scale,
        negative_slope,
        gain,
    )
    return y


class _EpilogueArguments(NamedTuple):
    """The last arguments of both operators."""

    bias: Tensor | None
    demod: Tensor | None
    noise: Tensor | None
    noise_strength: float
    next_scale: Tensor | None
    negative_slope: float | None
    gain: float | None

    @property
    def in_kernel_order(self) -> tuple[Tensor | None, ...]:
        return self.demod, self.noise, self.bias, self.next_scale

    def check(self, shape: Sequence[int], device: torch.device, kernel: Tensor | None = None) -> None:
        """Raise `ValueError` unless the factors fit [N, C, H, W], and they and the filter are on a device."""
        batch, channels, height, width = shape
        expected = {
            "bias": (self.bias, (channels,)),
            "demod": (self.demod, (batch, channels)),
            "noise": (self.noise, (1, 1, height, width)),
            "next_scale": (self.next_scale, (batch, channels)),
        }
        problems = [
            f"{name} is {list(tensor.shape)}, expected {list(fitting)}"
            for name, (tensor, fitting) in expected.items()
            if tensor is not None and tensor.shape != fitting
        ]
        tensors = {"kernel": kernel, **{name: tensor for name, (tensor, _) in expected.items()}}
        problems += [
            f"{name} is on {tensor.device}, expected {device}"  # elsewhere, its address would mean nothing
            for name, tensor in tensors.items()
            if tensor is not None and tensor.device != device
        ]
        if problems:
            raise ValueError(f"for a result of {list(shape)}: {'; '.join(problems)}")

    def describe(self) -> Epilogue:
        """Return what the kernels are told."""
        flags = (Factor.DEMOD, Factor.NOISE, Factor.BIAS, Factor.NEXT_SCALE)
        factors = Factor.NONE
        for flag, tensor in zip(flags, self.in_kernel_order, strict=True):
            if tensor is not None:
                factors |= flag
        if self.negative_slope is not None or self.gain is not None:
            factors |= Factor.ACTIVATION
        return Epilogue(
            factors=factors,
            noise_strength=self.noise_strength,
            negative_slope=1.0 if self.negative_slope is None else self.negative_slope,
            gain=1.0 if self.gain is None else self.gain,
        )

    def widen(self, dtype: torch.dtype) -> dict[str, Any]:
        """Return the arguments of the reference, of one dtype."""
        return {name: value.to(dtype) if isinstance(value, Tensor) else value for name, value in self._asdict().items()}


_EPILOGUE = (
    "Tensor? bias, Tensor? demod, Tensor? noise, float noise_strength, Tensor? next_scale, "
    "float? negative_slope, float? gain"
)


@torch.library.custom_op(
    "restyle_deploy::fused_bias_act", mutates_args=(), device_types="cpu", schema=f"(Tensor x, {_EPILOGUE}) -> Tensor"
)
def _fused_bias_act(x: Tensor, *arguments: Any) -> Tensor:
    epilogue, dtype = _EpilogueArguments(*arguments), _arithmetic_dtype(x)
    epilogue.check(x.shape, x.device)
    return _empty_like(x, x.shape).copy_(bias_act_reference.fused_bias_act(x.to(dtype), **epilogue.widen(dtype)))


@_fused_bias_act.register_kernel("cuda")
def _fused_bias_act_cuda(x: Tensor, *arguments: Any) -> Tensor:
    epilogue = _EpilogueArguments(*arguments)
    epilogue.check(x.shape, x.device)
    y = _empty_like(x, x.shape)
    if y.numel():
        launch = launch_fused_bias_act(x.shape, epilogue.describe(), dtype=_dtype_name(x), channels_last=_is_last(x))
        run(launch, (_dense(x), *_kernel_factors(epilogue, x.dtype)), y)
    return y


@_fused_bias_act.register_fake
def _fused_bias_act_fake(x: Tensor, *arguments: Any) -> Tensor:
    return _empty_like(x, x.shape)


@torch.library.custom_op(
    "restyle_deploy::upfirdn2d",
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor x, Tensor kernel, int up, int down, int[] pads, bool is_separable, {_EPILOGUE}) -> Tensor",
)
def _upfirdn2d(
    x: Tensor, kernel: Tensor, up: int, down: int, pads: Sequence[int], is_separable: bool, *arguments: Any
) -> Tensor:
    epilogue, dtype = _EpilogueArguments(*arguments), _arithmetic_dtype(x)
    shape = _filtered_shape(x, _filtering(kernel, up, down, pads, is_separable))
    epilogue.check(shape, x.device, kernel)
    top, left, bottom, right = pads
    y = upfirdn2d_reference.upfirdn2d_epilogue(
        x.to(dtype), kernel.to(dtype), up=up, down=down, pads=(top, left, bottom, right), **epilogue.widen(dtype)
    )
    return _empty_like(x, shape).copy_(y)


@_upfirdn2d.register_kernel("cuda")
def _upfirdn2d_cuda(
    x: Tensor, kernel: Tensor, up: int, down: int, pads: Sequence[int], is_separable: bool, *arguments: Any
) -> Tensor:
    epilogue, filtering = _EpilogueArguments(*arguments), _filtering(kernel, up, down, pads, is_separable)
    shape = _filtered_shape(x, filtering)
    epilogue.check(shape, x.device, kernel)
    y = _empty_like(x, shape)
    if y.numel():
        launch = launch_upfirdn2d(
            x.shape, filtering, epilogue.describe(), dtype=_dtype_name(x), channels_last=_is_last(x)
        )
        run(launch, (_dense(x), kernel.float().contiguous(), *_kernel_factors(epilogue, x.dtype)), y)
    return y


@_upfirdn2d.register_fake
def _upfirdn2d_fake(
    x: Tensor, kernel: Tensor, up: int, down: int, pads: Sequence[int], is_separable: bool, *arguments: Any
) -> Tensor:
    return _empty_like(x, _filtered_shape(x, _filtering(kernel, up, down, pads, is_separable)))


def _is_separable(kernel: Tensor) -> bool:
    version = None if kernel.is_inference() else kernel._version
    known = _separable_filters.get(kernel)
    if known is None or known[0] != version:
        if torch.cuda.is_current_stream_capturing():
            return False
        known = _separable_filters[kernel] = (version, separable_taps(kernel.tolist()) is not None)
    return bool(known[1])


def _filtering(kernel: Tensor, up: int, down: int, pads: Sequence[int], is_separable: bool) -> Filtering:
    rows, columns = kernel.shape
    top, left, bottom, right = pads
    return Filtering(
        up=(up, up),
        down=(down, down),
        pads=(top, left, bottom, right),
        filter_size=(rows, columns),
        is_separable=is_separable,
    )


def _filtered_shape(x: Tensor, filtering: Filtering) -> tuple[int, int, int, int]:
    batch, channels, height, width = x.shape
    return batch, channels, *filtering.out_size(height, width)


def _kernel_factors(epilogue: _EpilogueArguments, noise_dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    """Return the factors as the kernels read them: noise of x's dtype, the others float32, all dense."""
    dtypes = (torch.float32, noise_dtype, torch.float32, torch.float32)
    return tuple(
        None if tensor is None else tensor.to(dtype).contiguous()
        for tensor, dtype in zip(epilogue.in_kernel_order, dtypes, strict=True)
    )


def _arithmetic_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _dtype_name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _is_last(x: Tensor) -> bool:
    """Whether x is [N, H, W, C] in memory, and not [N, C, H, W] as well."""
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _dense(x: Tensor) -> Tensor:
    return x if _is_last(x) else x.contiguous()


def _empty_like(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Return memory of a shape, in the dtype and layout of x."""
    layout = torch.channels_last if _is_last(x) else torch.contiguous_format
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
