"""The launches cover every element, on plain and on symbolic integers, with the constants of the CUDA sources."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from restyle_deploy.ops.kernels import geometry

SOURCES = Path(geometry.__file__).parent
CONSTANT = re.compile(r"^constexpr int (\w+) = (\d+);", re.MULTILINE)
EXTENTS = st.integers(1, 70000)


class Symbol:
    """An integer with no more operators than TensorRT's symbolic ones."""

    def __init__(self, value: int) -> None:
        self.value = value

    def _with(self, other: Symbol | int, operation: Callable[[int, int], int]) -> Symbol:
        return Symbol(operation(self.value, other.value if isinstance(other, Symbol) else other))

    def __add__(self, other: Symbol | int) -> Symbol:
        return self._with(other, int.__add__)

    def __sub__(self, other: Symbol | int) -> Symbol:
        return self._with(other, int.__sub__)

    def __mul__(self, other: Symbol | int) -> Symbol:
        return self._with(other, int.__mul__)

    def __floordiv__(self, other: Symbol | int) -> Symbol:
        return self._with(other, int.__floordiv__)


def plain(grid: tuple[Any, Any, Any]) -> tuple[int, ...]:
    return tuple(size.value if isinstance(size, Symbol) else size for size in grid)


def test_the_constants_are_those_of_the_sources() -> None:
    found = {
        name: int(value)
        for path in SOURCES.glob("*.cu*")
        for name, value in CONSTANT.findall(path.read_text(encoding="utf-8"))
    }
    assert {name: found[name] for name in ("GENERAL", "BLUR", "SKIP_UPSAMPLE")} == {
        "GENERAL": geometry.GENERAL,
        "BLUR": geometry.BLUR,
        "SKIP_UPSAMPLE": geometry.SKIP_UPSAMPLE,
    }
    for name in ("VECTOR_BYTES", "BIAS_ACT_THREADS", "BIAS_ACT_PLANES", "BIAS_ACT_PIXELS"):
        assert found[name] == getattr(geometry, name), name
    for name in ("TILE_WIDTH", "TILE_HEIGHT", "CHANNELS_LAST_TILE_WIDTH", "CHANNELS_LAST_TILE_HEIGHT"):
        assert found[name] == getattr(geometry, name), name
    assert (found["TILE_LANES"], found["TILE_STRIPS"], 1) == geometry.TILE_THREADS
    assert (found["CHANNELS_LAST_VECTORS"], found["CHANNELS_LAST_TILE_WIDTH"], 1) == geometry.CHANNELS_LAST_THREADS


@given(EXTENTS, EXTENTS, EXTENTS, st.sampled_from((2, 4)), st.booleans())
def test_fused_bias_act_has_a_thread_for_every_vector(
    batch: int, channels: int, pixels: int, item_bytes: int, channels_last: bool
) -> None:
    (x, y, z), block = geometry.fused_bias_act_grid(batch, channels, pixels, item_bytes, channels_last=channels_last)
    assert (y, z, block) == (1, 1, (256, 1, 1))
    vector = 16 // item_bytes
    if channels_last:
        items = batch * -(-channels // vector) * -(-pixels // geometry.BIAS_ACT_PIXELS)
    else:
        items = -(-batch * channels // geometry.BIAS_ACT_PLANES) * -(-pixels // vector)
    assert (x - 1) * 256 < items <= x * 256


@pytest.mark.parametrize("config", geometry.CONFIGS.values(), ids=list(geometry.CONFIGS))
@given(EXTENTS, EXTENTS, EXTENTS, EXTENTS)
def test_upfirdn2d_has_a_tile_for_every_pixel(config: int, batch: int, channels: int, height: int, width: int) -> None:
    (x, y, z), block = geometry.upfirdn2d_grid(
        config, batch, channels, height, width, item_bytes=2, channels_last=False
    )
    assert (x - 1) * 64 < width <= x * 64
    assert (y - 1) * 64 < height <= y * 64
    assert (z, block) == (batch * channels, (16, 4, 1))
    (x, y, z), block = geometry.upfirdn2d_grid(config, batch, channels, height, width, item_bytes=4, channels_last=True)
    channel_blocks = -(-channels // 16)  # 64 bytes
    assert x % channel_blocks == 0
    assert (x // channel_blocks - 1) * 32 < width <= x // channel_blocks * 32
    assert (y - 1) * 16 < height <= y * 16
    assert (z, block) == (batch, (4, 32, 1))


@given(EXTENTS, EXTENTS, EXTENTS, EXTENTS, st.booleans())
def test_symbolic_extents_give_the_same(
    batch: int, channels: int, height: int, width: int, channels_last: bool
) -> None:
    n, c, h, w = map(Symbol, (batch, channels, height, width))
    symbolic, block = geometry.fused_bias_act_grid(n, c, h * w, 2, channels_last=channels_last)
    numeric, same_block = geometry.fused_bias_act_grid(batch, channels, height * width, 2, channels_last=channels_last)
    assert (plain(symbolic), block) == (numeric, same_block)
    symbolic, block = geometry.upfirdn2d_grid(1, n, c, h, w, item_bytes=2, channels_last=channels_last)
    numeric, same_block = geometry.upfirdn2d_grid(
        1, batch, channels, height, width, item_bytes=2, channels_last=channels_last
    )
    assert (plain(symbolic), block) == (numeric, same_block)


def test_an_unknown_config() -> None:
    with pytest.raises(ValueError, match="no config 3"):
        geometry.upfirdn2d_grid(3, 1, 1, 1, 1, item_bytes=2, channels_last=False)
