"""Which instantiation of a kernel computes what, with which arguments, grid and block. Plain numbers, no GPU library.

The kernels' parameters are input pointers, then `Launch.scalars` as int32, then the output pointer:

    fused_bias_act: x, demod, noise, bias, next_scale, <scalars>, y
    upfirdn2d:      x, filter, demod, noise, bias, next_scale, <scalars>, y

Pointers of absent factors are never read.
"""

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from types import MappingProxyType

from restyle_deploy.ops.kernels import geometry
from restyle_deploy.ops.onnx_functions import Factor as Factor  # a launch is described by it

FUSED_BIAS_ACT = "fused_bias_act"
UPFIRDN2D = "upfirdn2d"

Size3 = tuple[int, int, int]


class Config(IntEnum):
    """The specialisations of `upfirdn2d`."""

    GENERAL = geometry.GENERAL
    BLUR = geometry.BLUR  # up = down = 1, a separable 4×4 filter, any pads
    SKIP_UPSAMPLE = geometry.SKIP_UPSAMPLE  # up = 2, down = 1, a separable 4×4 filter, pads (2, 2, 1, 1)


@dataclass(frozen=True, kw_only=True)
class ElementType:
    """A type of x, noise and y: its name in CUDA C++ and its size."""

    cuda_name: str
    item_bytes: int


ELEMENT_TYPES: Mapping[str, ElementType] = MappingProxyType(
    {
        "float32": ElementType(cuda_name="float", item_bytes=4),
        "float16": ElementType(cuda_name="__half", item_bytes=2),
        "bfloat16": ElementType(cuda_name="__nv_bfloat16", item_bytes=2),
    }
)

SEPARABLE_FILTER_SIZE = (4, 4)
SKIP_PADS = (2, 2, 1, 1)
# Relative to the largest entry; an outer product of float32 taps is within three roundings.
SEPARABLE_TOLERANCE = 4e-7
GRID_LIMITS = (2**31 - 1, 65535, 65535)
INT32_LIMIT = 2**31 - 1

ALL_FACTORS = Factor.DEMOD | Factor.NOISE | Factor.BIAS | Factor.NEXT_SCALE | Factor.ACTIVATION
UPFIRDN2D_FACTORS = (
    Factor.NONE,
    ALL_FACTORS & ~Factor.NEXT_SCALE,
    ALL_FACTORS,
    Factor.BIAS | Factor.ACTIVATION,
)


@dataclass(frozen=True, kw_only=True)
class Epilogue:
    """What follows a convolution, or a filter, in the same pass.

    Attributes:
        factors: which factors are present.
        noise_strength: factor of the noise.
        negative_slope, gain: of the activation; without it they are not used.
    """

    factors: Factor = Factor.NONE
    noise_strength: float = 1.0
    negative_slope: float = 1.0
    gain: float = 1.0

    @property
    def scalars(self) -> tuple[int, int, int]:
        """The three float32 parameters as the int32 of the same bits."""
        is_active = Factor.ACTIVATION in self.factors
        values = (self.noise_strength, self.negative_slope if is_active else 1.0, self.gain if is_active else 1.0)
        first, second, third = (bits_of_float(value) for value in values)
        return first, second, third


@dataclass(frozen=True, kw_only=True)
class Filtering:
    """How an image is filtered: the attributes of `upfirdn2d`.

    Attributes:
        up, down: factors (vertical, horizontal).
        pads: (top, left, bottom, right), applied to the upsampled image; negative values crop.
        filter_size: (kh, kw).
        is_separable: whether the filter is an outer product; see `separable_taps`.
    """

    up: tuple[int, int] = (1, 1)
    down: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    filter_size: tuple[int, int]
    is_separable: bool = False

    @property
    def config(self) -> Config:
        """The most special kernel that computes this."""
        if not self.is_separable or self.filter_size != SEPARABLE_FILTER_SIZE or self.down != (1, 1):
            return Config.GENERAL
        if self.up == (1, 1):
            return Config.BLUR
        if self.up == (2, 2) and self.pads == SKIP_PADS:
            return Config.SKIP_UPSAMPLE
        return Config.GENERAL

    def out_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the size of the filtered image.

        Raises:
            ValueError: the factors differ between the axes or are below 1, the filter is empty, or the padded image is
                smaller than the filter.
        """
        problems = []
        for name, (vertical, horizontal) in (("up", self.up), ("down", self.down)):
            if vertical != horizontal:
                problems.append(f"{name} is {vertical} by {horizontal}, expected the same in both axes")
            elif vertical < 1:
                problems.append(f"{name} is {vertical}, expected at least 1")
        if min(self.filter_size) < 1:
            problems.append(f"the filter is {self.filter_size[0]}×{self.filter_size[1]}, expected at least 1×1")
        if problems:
            raise ValueError(f"upfirdn2d: {'; '.join(problems)}")
        top, left, bottom, right = self.pads
        padded = (height * self.up[0] + top + bottom, width * self.up[1] + left + right)
        if padded[0] < self.filter_size[0] or padded[1] < self.filter_size[1]:
            raise ValueError(
                f"upfirdn2d: the padded image {padded[0]}×{padded[1]} "
                f"is smaller than the filter {self.filter_size[0]}×{self.filter_size[1]}"
            )
        rows, columns = ((size - taps) // self.down[0] + 1 for size, taps in zip(padded, self.filter_size, strict=True))
        return rows, columns


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One launch of a kernel.

    Attributes:
        kernel: `FUSED_BIAS_ACT` or `UPFIRDN2D`: the source file.
        expression: the instantiation, as a C++ expression that NVRTC takes.
        grid: blocks along x, y, z.
        block: threads along x, y, z.
        scalars: the int32 parameters, in order.
        out_shape: [N, C, H', W'] of y.
    """

    kernel: str
    expression: str
    grid: Size3
    block: Size3
    scalars: tuple[int, ...]
    out_shape: tuple[int, int, int, int]


def launch_fused_bias_act(
    shape: Sequence[int], epilogue: Epilogue, *, dtype: str, channels_last: bool = False
) -> Launch:
    """Choose how `fused_bias_act` is launched.

    Args:
        shape: [N, C, H, W] of x and y, none of them 0.
        epilogue: what is computed.
        dtype: a key of `ELEMENT_TYPES`: of x, noise and y.
        channels_last: whether x and y are [N, H, W, C] in memory.
    Raises:
        TypeError: no kernel for this dtype.
        ValueError: no kernel for this shape.
    """
    batch, channels, height, width = _check_shape(FUSED_BIAS_ACT, shape)
    element = _element_type(FUSED_BIAS_ACT, dtype)
    grid, block = geometry.fused_bias_act_grid(
        batch, channels, height * width, element.item_bytes, channels_last=channels_last
    )
    return Launch(
        kernel=FUSED_BIAS_ACT,
        expression=fused_bias_act_expression(dtype, epilogue.factors, channels_last=channels_last),
        grid=_check_grid(FUSED_BIAS_ACT, shape, grid),
        block=block,
        scalars=(batch, channels, height * width, *epilogue.scalars),
        out_shape=(batch, channels, height, width),
    )


def launch_upfirdn2d(
    shape: Sequence[int], filtering: Filtering, epilogue: Epilogue, *, dtype: str, channels_last: bool = False
) -> Launch:
    """Choose how `upfirdn2d` is launched.

    Args:
        shape: [N, C, H, W] of x, none of them 0.
        filtering: how x is filtered.
        epilogue: what follows; noise is of the filtered image's size.
        dtype: a key of `ELEMENT_TYPES`: of x, noise and y. The filter is float32.
        channels_last: whether x and y are [N, H, W, C] in memory.
    Raises:
        TypeError: no kernel for this dtype.
        ValueError: no kernel for this shape or filtering.
    """
    batch, channels, height, width = _check_shape(UPFIRDN2D, shape)
    element = _element_type(UPFIRDN2D, dtype)
    out_height, out_width = filtering.out_size(height, width)
    _check_shape(UPFIRDN2D, (batch, channels, out_height, out_width))
    config = filtering.config
    grid, block = geometry.upfirdn2d_grid(
        config,
        batch,
        channels,
        out_height,
        out_width,
        item_bytes=element.item_bytes,
        channels_last=channels_last,
    )
    return Launch(
        kernel=UPFIRDN2D,
        expression=upfirdn2d_expression(dtype, config, epilogue.factors, channels_last=channels_last),
        grid=_check_grid(UPFIRDN2D, shape, grid),
        block=block,
        scalars=(
            *(batch, channels, height, width, out_height, out_width),
            *(filtering.up[0], filtering.down[0], filtering.pads[0], filtering.pads[1]),
            *filtering.filter_size,
            *epilogue.scalars,
        ),
        out_shape=(batch, channels, out_height, out_width),
    )


def separable_taps(filter_rows: Sequence[Sequence[float]]) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Return (vertical, horizontal) taps whose outer product is the filter; None if there are none.

    Args:
        filter_rows: [kh, kw] float32 values. A filter of zeros has no taps: the kernels divide by its largest entry.
    """
    entries = {(i, j): entry for i, row in enumerate(filter_rows) for j, entry in enumerate(row)}
    row, column = max(entries, key=lambda position: abs(entries[position]))
    largest = entries[row, column]
    if largest == 0.0 or not all(math.isfinite(entry) for entry in entries.values()):
        return None
    horizontal = tuple(filter_rows[row])
    vertical = tuple(line[column] / largest for line in filter_rows)
    exact = all(
        abs(vertical[i] * horizontal[j] - entry) <= SEPARABLE_TOLERANCE * abs(largest)
        for (i, j), entry in entries.items()
    )
    return (vertical, horizontal) if exact else None


def bits_of_float(value: float) -> int:
    """Return the int32 that has the bits of a float32."""
    bits: int = struct.unpack("<i", struct.pack("<f", value))[0]
    return bits


def fused_bias_act_expression(dtype: str, factors: Factor, *, channels_last: bool) -> str:
    """Return the name expression of an instantiation."""
    cuda_name = _element_type(FUSED_BIAS_ACT, dtype).cuda_name
    return f"{FUSED_BIAS_ACT}<{cuda_name}, {int(factors)}, {str(channels_last).lower()}>"


def upfirdn2d_expression(dtype: str, config: Config, factors: Factor, *, channels_last: bool) -> str:
    """Return the name expression of an instantiation."""
    cuda_name = _element_type(UPFIRDN2D, dtype).cuda_name
    return f"{UPFIRDN2D}<{cuda_name}, {int(config)}, {int(factors)}, {str(channels_last).lower()}>"


def _check_shape(kernel: str, shape: Sequence[int]) -> tuple[int, int, int, int]:
    if len(shape) != 4 or min(shape) < 1:
        raise ValueError(f"{kernel}: got shape {list(shape)}, expected [N, C, H, W], each at least 1")
    batch, channels, height, width = shape
    if max(batch * channels, height * width) > INT32_LIMIT:
        raise ValueError(f"{kernel}: got shape {list(shape)}, expected fewer than 2^31 planes and pixels of each")
    return batch, channels, height, width


def _check_grid(kernel: str, shape: Sequence[int], grid: Size3) -> Size3:
    if any(size > limit for size, limit in zip(grid, GRID_LIMITS, strict=True)):
        raise ValueError(
            f"{kernel}: shape {list(shape)} needs a grid of {grid}, a GPU takes {GRID_LIMITS}; split the batch"
        )
    return grid


def _element_type(kernel: str, dtype: str) -> ElementType:
    if dtype not in ELEMENT_TYPES:
        raise TypeError(f"{kernel}: got {dtype}, expected one of {', '.join(ELEMENT_TYPES)}")
    return ELEMENT_TYPES[dtype]


def _instantiations() -> dict[str, tuple[str, ...]]:
    variants = [(dtype, channels_last) for dtype in ELEMENT_TYPES for channels_last in (False, True)]
    return {
        FUSED_BIAS_ACT: tuple(
            fused_bias_act_expression(dtype, Factor(subset) | Factor.ACTIVATION, channels_last=channels_last)
            for dtype, channels_last in variants
            for subset in range(Factor.ACTIVATION)
        ),
        UPFIRDN2D: tuple(
            upfirdn2d_expression(dtype, config, factors, channels_last=channels_last)
            for dtype, channels_last in variants
            for config in Config
            for factors in UPFIRDN2D_FACTORS
        ),
    }


# What engines and tests use. A kernel takes any other set of factors, too.
INSTANTIATIONS: Mapping[str, tuple[str, ...]] = MappingProxyType(_instantiations())
