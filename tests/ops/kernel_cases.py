"""Cases for the CUDA kernels: shapes, types, layouts, pads, factors and alignments, and what must come out."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from restyle_deploy.ops.fused_bias_act import fused_bias_act
from restyle_deploy.ops.kernels.launches import (
    Config,
    Epilogue,
    Factor,
    Filtering,
    Launch,
    launch_fused_bias_act,
    launch_upfirdn2d,
)
from restyle_deploy.ops.upfirdn2d import Pads, upfirdn2d

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SKIP_PADS: Pads = (2, 2, 1, 1)
# Beside small ones: widths around a tile's, and channel counts around a vector's and a block's.
SIDES = st.one_of(st.integers(1, 12), st.sampled_from((16, 31, 32, 33, 40, 63, 64, 65, 66, 70)))
CHANNELS = st.one_of(st.integers(1, 9), st.sampled_from((16, 31, 32, 33, 64, 65)))
FACTORS = st.integers(0, 31).map(Factor)
MOST_ELEMENTS = 40_000
MOST_OFFSET = 7  # elements: beyond them, those of 16 bits are aligned again
FLOAT32_ERROR = 4e-6  # of some ten roundings, as a share of the sum of magnitudes


@dataclass(frozen=True, kw_only=True)
class Offsets:
    """By how many elements, of its own type, each tensor of a case lies behind a 16-byte boundary."""

    x: int = 0
    noise: int = 0
    y: int = 0
    demod: int = 0
    bias: int = 0
    next_scale: int = 0


ALIGNED = Offsets()
TENSORS = tuple(asdict(ALIGNED))
# Each tensor alone; x and y as each other, and otherwise. Too rare in what is drawn to leave them to it.
MISALIGNMENTS = (*(replace(ALIGNED, **{name: 1}) for name in TENSORS), Offsets(x=3, y=3), Offsets(x=1, y=3))
OFFSETS = st.integers(1, MOST_OFFSET)
# None is misaligned, one alone, x and y as each other, or every one in its own way.
ALIGNMENTS = st.one_of(
    st.just(ALIGNED),
    st.builds(lambda name, offset: replace(ALIGNED, **{name: offset}), st.sampled_from(TENSORS), OFFSETS),
    OFFSETS.map(lambda offset: Offsets(x=offset, y=offset)),
    st.builds(Offsets, **dict.fromkeys(TENSORS, st.integers(0, MOST_OFFSET))),
)


@dataclass(frozen=True, kw_only=True)
class KernelCase:
    """One call of a kernel.

    Attributes:
        config: of `upfirdn2d`; None for `fused_bias_act`, where up, down, pads and filter_size mean nothing.
        dtype: of x, noise and y.
        factors: which are present.
        channels_last: whether x and y are [N, H, W, C] in memory.
        offsets: by how much each tensor is misaligned.
        shape: [N, C, H, W] of x.
        noise_strength, negative_slope, gain: slope and gain are 1 without the factor ACTIVATION.
        seed: of the values.
    """

    config: Config | None = None
    dtype: torch.dtype = torch.float32
    factors: Factor = Factor.ACTIVATION
    channels_last: bool = False
    offsets: Offsets = ALIGNED
    shape: tuple[int, int, int, int]
    up: int = 1
    down: int = 1
    pads: Pads = (0, 0, 0, 0)
    filter_size: tuple[int, int] = (1, 1)
    noise_strength: float = 0.7
    negative_slope: float = 0.2
    gain: float = math.sqrt(2.0)
    seed: int = 0

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        """[N, C, H', W'] of y."""
        batch, channels, *sides = self.shape
        top, left, bottom, right = self.pads
        if self.config is None:
            return self.shape
        height, width = (
            (side * self.up + pad - taps) // self.down + 1
            for side, pad, taps in zip(sides, (top + bottom, left + right), self.filter_size, strict=True)
        )
        return batch, channels, height, width


@dataclass(frozen=True, kw_only=True)
class KernelTensors:
    """The tensors of a case; those of absent factors are None. All but `filter` are misaligned as the case says."""

    x: Tensor
    filter: Tensor | None
    demod: Tensor | None
    noise: Tensor | None
    bias: Tensor | None
    next_scale: Tensor | None


@st.composite
def fused_bias_act_cases(draw: st.DrawFn) -> KernelCase:
    """Draw a case of `fused_bias_act`."""
    return KernelCase(
        shape=_draw_shape(draw),
        offsets=draw(ALIGNMENTS),
        **_draw_common(draw),  # type: ignore[arg-type]
    )


@st.composite
def upfirdn2d_cases(draw: st.DrawFn, configs: tuple[Config, ...] = tuple(Config)) -> KernelCase:
    """Draw a case of `upfirdn2d`; the output has at least one pixel."""
    config = draw(st.sampled_from(configs))
    shape = _draw_shape(draw)
    up, down, filter_size, pads = 1, 1, (4, 4), SKIP_PADS
    if config is Config.GENERAL:
        up, down = draw(st.integers(1, 3)), draw(st.integers(1, 3))
        filter_size = draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    if config is Config.SKIP_UPSAMPLE:
        up = 2
    else:
        pads = draw(_pads(shape[2] * up, shape[3] * up, filter_size))
    return KernelCase(
        config=config,
        shape=shape,
        up=up,
        down=down,
        pads=pads,
        filter_size=filter_size,
        offsets=draw(ALIGNMENTS),
        **_draw_common(draw),  # type: ignore[arg-type]
    )


def tensors_of(case: KernelCase, device: str = "cpu") -> KernelTensors:
    """Make the tensors of a case; the same values on every device."""
    random = torch.Generator().manual_seed(case.seed)
    batch, channels, *_ = case.shape

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=random).to(dtype)

    def given(factor: Factor, tensor: Tensor, offset: int) -> Tensor | None:
        if factor not in case.factors:
            return None
        return _storage(tensor.numel(), tensor.dtype, offset, device).view(tensor.shape).copy_(tensor)

    # Every one is drawn, so that a factor's absence changes no other value.
    x, noise = normal(*case.shape, dtype=case.dtype), normal(1, 1, *case.out_shape[2:], dtype=case.dtype)
    demod, next_scale = normal(batch, channels).abs() + 0.1, normal(batch, channels)
    bias, filter_ = normal(channels), _make_filter(case, normal(sum(case.filter_size)), normal(*case.filter_size))
    return KernelTensors(
        x=_empty(case, case.shape, case.offsets.x, device).copy_(x),
        filter=None if filter_ is None else filter_.to(device),
        demod=given(Factor.DEMOD, demod, case.offsets.demod),
        noise=given(Factor.NOISE, noise, case.offsets.noise),
        bias=given(Factor.BIAS, bias, case.offsets.bias),
        next_scale=given(Factor.NEXT_SCALE, next_scale, case.offsets.next_scale),
    )


def empty_y(case: KernelCase, device: str = "cpu") -> Tensor:
    """Return NaN of the shape, dtype, layout and offset of y."""
    return _empty(case, case.out_shape, case.offsets.y, device)


def launch_of(case: KernelCase) -> Launch:
    """Return how the case is launched."""
    facts: dict[str, Any] = {
        "dtype": str(case.dtype).removeprefix("torch."),
        "channels_last": case.channels_last,
    }
    epilogue = Epilogue(
        factors=case.factors,
        noise_strength=case.noise_strength,
        negative_slope=case.negative_slope,
        gain=case.gain,
    )
    if case.config is None:
        return launch_fused_bias_act(case.shape, epilogue, **facts)
    filtering = Filtering(
        up=(case.up, case.up),
        down=(case.down, case.down),
        pads=case.pads,
        filter_size=case.filter_size,
        is_separable=case.config is not Config.GENERAL,
    )
    launch = launch_upfirdn2d(case.shape, filtering, epilogue, **facts)
    assert filtering.config is case.config
    return launch


def inputs_of(tensors: KernelTensors) -> tuple[Tensor | None, ...]:
    """Return the input tensors in the order of the kernel's parameters."""
    first = (tensors.x,) if tensors.filter is None else (tensors.x, tensors.filter)
    return *first, tensors.demod, tensors.noise, tensors.bias, tensors.next_scale


def run_case(case: KernelCase, tensors: KernelTensors) -> Tensor:
    """Return y as `cuda_ops` computes it on the tensors' device."""
    from restyle_deploy.ops import cuda_ops  # here: the cases serve tests that need no operator of torch

    is_active = Factor.ACTIVATION in case.factors
    factors: dict[str, Any] = {
        "bias": tensors.bias,
        "demod": tensors.demod,
        "noise": tensors.noise,
        "noise_strength": case.noise_strength,
        "next_scale": tensors.next_scale,
        "negative_slope": case.negative_slope if is_active else None,
        "gain": case.gain if is_active else None,
    }
    if tensors.filter is None:
        return cuda_ops.fused_bias_act(tensors.x, **factors)
    return cuda_ops.upfirdn2d_epilogue(tensors.x, tensors.filter, up=case.up, down=case.down, pads=case.pads, **factors)


def expected(case: KernelCase, tensors: KernelTensors) -> Tensor:
    """Return y by the torch reference, in float64 on the CPU."""
    return _reference(case, tensors, magnitudes=False)


def assert_close(case: KernelCase, found: Tensor, tensors: KernelTensors) -> None:
    """Check y against the reference: sums in float32, then one rounding to T."""
    target, magnitudes = expected(case, tensors), _reference(case, tensors, magnitudes=True)
    assert found.shape == target.shape, case
    # What storing y costs: half a unit in the last place of T, or of its subnormal numbers.
    rounding = 0.0 if case.dtype is torch.float32 else 0.51 * torch.finfo(case.dtype).eps
    smallest = 2.0**-24 if case.dtype is torch.float16 else 1e-37
    allowed = rounding * target.abs() + FLOAT32_ERROR * magnitudes + smallest
    error = (found.double().cpu() - target).abs()
    wrong = ~(error <= allowed)  # NaN is wrong, too
    assert not wrong.any(), (
        f"{case}: {int(wrong.sum())} of {wrong.numel()} are wrong, first at {wrong.nonzero()[0].tolist()}: "
        f"{found.double().cpu()[wrong][0]:.7g}, expected {target[wrong][0]:.7g} to {allowed[wrong][0]:.2g}"
    )


def _reference(case: KernelCase, tensors: KernelTensors, *, magnitudes: bool) -> Tensor:
    """Return y, or with `magnitudes` what it would be were all numbers positive: rounding errors go with that."""

    def wide(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        tensor = tensor.double().cpu().contiguous()
        return tensor.abs() if magnitudes else tensor

    is_active = Factor.ACTIVATION in case.factors
    x, filter_ = wide(tensors.x), wide(tensors.filter)
    assert x is not None
    if filter_ is not None:
        x = upfirdn2d(x, filter_, up=case.up, down=case.down, pads=case.pads)
    return fused_bias_act(
        x,
        wide(tensors.bias),
        demod=wide(tensors.demod),
        noise=wide(tensors.noise),
        noise_strength=abs(case.noise_strength) if magnitudes else case.noise_strength,
        next_scale=wide(tensors.next_scale),
        negative_slope=case.negative_slope if is_active else None,
        gain=case.gain if is_active else None,
    )


def _empty(case: KernelCase, shape: tuple[int, int, int, int], offset: int, device: str) -> Tensor:
    """Return NaN of the case's dtype and layout."""
    batch, channels, height, width = shape
    flat = _storage(math.prod(shape), case.dtype, offset, device)
    if case.channels_last:
        return flat.view(batch, height, width, channels).permute(0, 3, 1, 2)
    return flat.view(shape)


def _storage(count: int, dtype: torch.dtype, offset: int, device: str) -> Tensor:
    """Return so many elements of NaN, so many elements behind a boundary; PyTorch's allocators begin at one."""
    flat = torch.full((offset + count,), math.nan, dtype=dtype, device=device)[offset:]
    assert (flat.data_ptr() - offset * flat.element_size()) % 16 == 0
    return flat


def _draw_common(draw: st.DrawFn) -> dict[str, object]:
    return {
        "dtype": draw(st.sampled_from(DTYPES)),
        "factors": draw(FACTORS),
        "channels_last": draw(st.booleans()),
        "noise_strength": draw(st.sampled_from((0.0, 1.0, -0.37))),
        "negative_slope": draw(st.sampled_from((0.2, 0.0, 1.0))),
        "gain": draw(st.sampled_from((math.sqrt(2.0), 1.0, 0.5))),
        "seed": draw(st.integers(0, 2**32 - 1)),
    }


def _draw_shape(draw: st.DrawFn) -> tuple[int, int, int, int]:
    """Draw [N, C, H, W], small enough for an emulation on the host."""
    batch, channels, height, width = draw(st.integers(1, 3)), draw(CHANNELS), draw(SIDES), draw(SIDES)
    while batch * channels * height * width > MOST_ELEMENTS:
        if batch > 1:
            batch -= 1
        elif channels > 1 and channels * 64 >= height * width:
            channels = (channels + 1) // 2
        else:
            height = (height + 1) // 2
    return batch, channels, height, width


def _pads(height: int, width: int, filter_size: tuple[int, int]) -> st.SearchStrategy[Pads]:
    """Pads, negative ones among them, that leave an image of at least the filter's size.

    At either side no more is cropped than there is: the padding of the other side is no image.
    """

    def fits(pads: Pads) -> bool:
        rows, columns = height + pads[0] + pads[2], width + pads[1] + pads[3]
        return rows >= filter_size[0] and columns >= filter_size[1]

    row_pads, column_pads = st.integers(-min(height, 3), 5), st.integers(-min(width, 3), 5)
    drawn = st.tuples(row_pads, column_pads, row_pads, column_pads)
    return st.one_of(st.just((1, 1, 1, 1)), drawn).filter(fits)


def _make_filter(case: KernelCase, taps: Tensor, dense: Tensor) -> Tensor | None:
    """Return [kh, kw] float32: an outer product where the kernel is separable, asymmetric in any case."""
    if case.config is None:
        return None
    if case.config is Config.GENERAL:
        return dense
    rows = case.filter_size[0]
    return torch.outer(taps[:rows], taps[rows:]) / 2
