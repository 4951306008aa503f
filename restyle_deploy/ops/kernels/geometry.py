"""How many blocks of how many threads each CUDA kernel takes.

Plain integer arithmetic (`+`, `-`, `*`, `//` alone), so that the extents may also be TensorRT's symbolic integers. The
constants are those of the `.cu` files, which hold them as `constexpr`; a test compares the two.
"""

from typing import Any, Protocol, TypeAlias

GENERAL = 0
BLUR = 1
SKIP_UPSAMPLE = 2
CONFIGS = {"general": GENERAL, "blur": BLUR, "skip_upsample": SKIP_UPSAMPLE}

VECTOR_BYTES = 16

# fused_bias_act: one thread takes one vector of pixels in four planes, or one vector of channels in four pixels.
BIAS_ACT_THREADS = 256
BIAS_ACT_PLANES = 4
BIAS_ACT_PIXELS = 4

# upfirdn2d, NCHW: one block makes one tile of one plane. Threads: columns in fours, rows in groups of 16.
TILE_WIDTH = 64
TILE_HEIGHT = 64
TILE_THREADS = (16, 4, 1)

# upfirdn2d, channels last: one block makes one tile of 64 bytes of channels. Threads: vectors of channels, columns.
CHANNELS_LAST_TILE_WIDTH = 32
CHANNELS_LAST_TILE_HEIGHT = 16
CHANNELS_LAST_THREADS = (4, 32, 1)


class Extent(Protocol):
    """A number of batches, channels or pixels: an int, or a symbolic integer with the same operators."""

    def __add__(self, other: Any, /) -> Any: ...
    def __sub__(self, other: Any, /) -> Any: ...
    def __mul__(self, other: Any, /) -> Any: ...
    def __floordiv__(self, other: Any, /) -> Any: ...


Blocks: TypeAlias = tuple[Any, Any, Any]
Threads: TypeAlias = tuple[int, int, int]


def fused_bias_act_grid(
    batch: Extent, channels: Extent, pixels: Extent, item_bytes: int, *, channels_last: bool
) -> tuple[Blocks, Threads]:
    """Return the grid (blocks in x, y, z) and the block (threads in x, y, z) of `fused_bias_act`.

    Args:
        batch: N, at least 1; like all extents an int or a symbolic integer.
        channels: C.
        pixels: H·W.
        item_bytes: size of one element of `x`: 2 or 4.
        channels_last: whether `x` lies in memory as [N, H, W, C].
    """
    vector = VECTOR_BYTES // item_bytes
    if channels_last:
        items = batch * _divide_up(pixels, BIAS_ACT_PIXELS) * _divide_up(channels, vector)
    else:
        items = _divide_up(batch * channels, BIAS_ACT_PLANES) * _divide_up(pixels, vector)
    return (_divide_up(items, BIAS_ACT_THREADS), 1, 1), (BIAS_ACT_THREADS, 1, 1)


def upfirdn2d_grid(
    config: int,
    batch: Extent,
    channels: Extent,
    out_height: Extent,
    out_width: Extent,
    *,
    item_bytes: int,
    channels_last: bool,
) -> tuple[Blocks, Threads]:
    """Return the grid (blocks in x, y, z) and the block (threads in x, y, z) of `upfirdn2d`.

    CUDA limits the grid's y and z to 65535: batch · channels for NCHW, batch for channels last. The caller checks.

    Args:
        config: GENERAL, BLUR or SKIP_UPSAMPLE; all have the same geometry at present.
        batch: N, at least 1; like all extents an int or a symbolic integer.
        channels: C.
        out_height: rows of the result.
        out_width: columns of the result.
        item_bytes: size of one element of `x`: 2 or 4.
        channels_last: whether `x` and the result lie in memory as [N, H, W, C].
    Raises:
        ValueError: there is no such config.
    """
    if config not in CONFIGS.values():
        raise ValueError(f"upfirdn2d has no config {config}; there are {CONFIGS}")
    if channels_last:
        channel_blocks = _divide_up(channels, CHANNELS_LAST_THREADS[0] * (VECTOR_BYTES // item_bytes))
        columns = _divide_up(out_width, CHANNELS_LAST_TILE_WIDTH)
        rows = _divide_up(out_height, CHANNELS_LAST_TILE_HEIGHT)
        return (channel_blocks * columns, rows, batch), CHANNELS_LAST_THREADS
    tiles = _divide_up(out_width, TILE_WIDTH), _divide_up(out_height, TILE_HEIGHT)
    return (*tiles, batch * channels), TILE_THREADS


def _divide_up(value: Any, divisor: int) -> Any:
    return (value + (divisor - 1)) // divisor
