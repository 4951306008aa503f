"""Which kernel is launched how. The geometry's own arithmetic is tested with the kernels."""

import math
import struct
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from restyle_deploy.ops.kernels import geometry
from restyle_deploy.ops.kernels.launches import (
    ALL_FACTORS,
    FUSED_BIAS_ACT,
    INSTANTIATIONS,
    SKIP_PADS,
    UPFIRDN2D,
    Config,
    Epilogue,
    Factor,
    Filtering,
    bits_of_float,
    launch_fused_bias_act,
    launch_upfirdn2d,
    separable_taps,
)

BLUR = Filtering(pads=(1, 1, 1, 1), filter_size=(4, 4), is_separable=True)
SKIP = Filtering(up=(2, 2), pads=SKIP_PADS, filter_size=(4, 4), is_separable=True)
FULL = Epilogue(factors=ALL_FACTORS, noise_strength=0.5, negative_slope=0.25, gain=2.0)
HALF, QUARTER, ONE, TWO = 0x3F000000, 0x3E800000, 0x3F800000, 0x40000000


def test_fused_bias_act_in_parameter_order() -> None:
    launch = launch_fused_bias_act((2, 3, 5, 7), FULL, dtype="float16")
    assert launch.kernel == FUSED_BIAS_ACT
    assert launch.expression == "fused_bias_act<__half, 31, false>"
    assert launch.scalars == (2, 3, 35, HALF, QUARTER, TWO)
    assert launch.out_shape == (2, 3, 5, 7)
    assert (launch.grid, launch.block) == geometry.fused_bias_act_grid(2, 3, 35, 2, channels_last=False)


def test_upfirdn2d_in_parameter_order() -> None:
    filtering = Filtering(up=(3, 3), down=(2, 2), pads=(4, -1, 2, 3), filter_size=(2, 5))
    launch = launch_upfirdn2d((2, 3, 5, 7), filtering, FULL, dtype="bfloat16", channels_last=True)
    out_height, out_width = (15 + 6 - 2) // 2 + 1, (21 + 2 - 5) // 2 + 1
    assert launch.kernel == UPFIRDN2D
    assert launch.expression == "upfirdn2d<__nv_bfloat16, 0, 31, true>"
    assert launch.scalars == (2, 3, 5, 7, out_height, out_width, 3, 2, 4, -1, 2, 5, HALF, QUARTER, TWO)
    assert launch.out_shape == (2, 3, out_height, out_width)
    expected = geometry.upfirdn2d_grid(0, 2, 3, out_height, out_width, item_bytes=2, channels_last=True)
    assert (launch.grid, launch.block) == expected


def test_without_activation_slope_and_gain_are_one() -> None:
    epilogue = replace(FULL, factors=Factor.DEMOD | Factor.NOISE)
    launch = launch_fused_bias_act((1, 1, 1, 1), epilogue, dtype="float32", channels_last=True)
    assert launch.expression == "fused_bias_act<float, 3, true>"
    assert launch.scalars[-3:] == (HALF, ONE, ONE)


@pytest.mark.parametrize(
    ("filtering", "config"),
    [
        (BLUR, Config.BLUR),
        (replace(BLUR, pads=(-1, 5, 0, 3)), Config.BLUR),
        (SKIP, Config.SKIP_UPSAMPLE),
        (replace(BLUR, is_separable=False), Config.GENERAL),
        (replace(BLUR, filter_size=(4, 3)), Config.GENERAL),
        (replace(BLUR, down=(2, 2)), Config.GENERAL),
        (replace(SKIP, pads=(1, 2, 2, 1)), Config.GENERAL),
        (replace(SKIP, up=(3, 3)), Config.GENERAL),
        (replace(SKIP, is_separable=False), Config.GENERAL),
    ],
)
def test_the_most_special_kernel_is_taken(filtering: Filtering, config: Config) -> None:
    assert filtering.config is config
    launch = launch_upfirdn2d((1, 2, 8, 8), filtering, Epilogue(), dtype="float32")
    assert launch.expression == f"upfirdn2d<float, {int(config)}, 0, false>"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"up": (1, 2)}, "up is 1 by 2, expected the same in both axes"),
        ({"down": (3, 1)}, "down is 3 by 1, expected the same in both axes"),
        ({"up": (0, 0)}, "up is 0, expected at least 1"),
        ({"up": (1, 2), "down": (-1, -1)}, "up is 1 by 2.*; down is -1, expected at least 1"),
        ({"filter_size": (0, 4)}, "the filter is 0×4"),
        ({"pads": (-4, 0, 0, 0)}, "the padded image 3×7 is smaller than the filter 4×4"),
        ({"pads": (0, 0, 0, -4)}, "the padded image 7×3 is smaller than the filter 4×4"),
    ],
)
def test_filtering_that_no_kernel_does(changes: dict[str, tuple[int, ...]], message: str) -> None:
    filtering = replace(BLUR, **changes)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"upfirdn2d: {message}"):
        launch_upfirdn2d((1, 1, 7, 7), filtering, Epilogue(), dtype="float32")


@pytest.mark.parametrize("shape", [(1, 0, 4, 4), (2, 3, 4), (0, 1, 1, 1), (1, 1, 2**16, 2**15), (2**16, 2**15, 1, 1)])
def test_shapes_that_no_kernel_takes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"fused_bias_act: got shape .*, expected"):
        launch_fused_bias_act(shape, Epilogue(), dtype="float32")
    with pytest.raises(ValueError, match=r"upfirdn2d: got shape .*, expected"):
        launch_upfirdn2d(shape, BLUR, Epilogue(), dtype="float32")


def test_a_result_that_no_kernel_makes() -> None:
    with pytest.raises(ValueError, match=r"upfirdn2d: got shape \[1, 1, 65536, 65536\]"):
        launch_upfirdn2d((1, 1, 2**15, 2**15), SKIP, Epilogue(), dtype="float32")


def test_a_grid_that_no_gpu_takes() -> None:
    assert launch_upfirdn2d((127, 516, 4, 4), BLUR, Epilogue(), dtype="float16").grid[2] == 127 * 516
    with pytest.raises(ValueError, match=r"upfirdn2d: shape \[128, 512, 4, 4\] needs a grid of .* split the batch"):
        launch_upfirdn2d((128, 512, 4, 4), BLUR, Epilogue(), dtype="float16")
    assert launch_upfirdn2d((128, 512, 4, 4), BLUR, Epilogue(), dtype="float16", channels_last=True).grid[2] == 128


def test_dtypes_that_no_kernel_takes() -> None:
    with pytest.raises(TypeError, match="fused_bias_act: got float64, expected one of float32, float16, bfloat16"):
        launch_fused_bias_act((1, 1, 1, 1), Epilogue(), dtype="float64")
    with pytest.raises(TypeError, match="upfirdn2d: got int8"):
        launch_upfirdn2d((1, 1, 4, 4), BLUR, Epilogue(), dtype="int8")


@given(
    taps=st.lists(st.floats(-4, 4, width=32), min_size=8, max_size=8).filter(
        lambda taps: any(taps[:4]) and any(taps[4:])
    ),
)
def test_an_outer_product_gives_its_taps(taps: list[float]) -> None:
    vertical, horizontal = np.array(taps[:4], np.float32), np.array(taps[4:], np.float32)
    product = np.outer(vertical, horizontal)
    largest = float(np.abs(product).max())
    if largest < 1e-30:  # the entries underflow: they are no outer product any more
        return
    found = separable_taps(product.tolist())
    assert found is not None
    np.testing.assert_allclose(np.outer(*found), product, rtol=0, atol=1e-6 * largest)


@pytest.mark.parametrize(
    "filter_rows",
    [
        [[1.0, 0.0], [0.0, 1.0]],
        [[1.0, 2.0], [2.0, 4.00001]],
        [[0.0, 0.0], [0.0, 0.0]],
        [[1.0, 2.0], [2.0, math.inf]],
        [[math.nan, 2.0], [2.0, 4.0]],
    ],
)
def test_other_filters_have_no_taps(filter_rows: list[list[float]]) -> None:
    assert separable_taps(filter_rows) is None


def test_the_filter_of_stylegan2_is_separable() -> None:
    taps = np.array([1, 3, 3, 1], np.float32)
    found = separable_taps((np.outer(taps, taps) / 16).tolist())
    assert found is not None
    np.testing.assert_array_equal(np.outer(*found), np.outer(taps, taps) / 16)


@given(st.floats(width=32, allow_nan=False))
def test_bits_of_a_float_are_its_own(value: float) -> None:
    bits = bits_of_float(value)
    assert -(2**31) <= bits < 2**31
    assert struct.unpack("<f", struct.pack("<i", bits)) == (value,)


def test_the_table_of_instantiations() -> None:
    assert len(INSTANTIATIONS[FUSED_BIAS_ACT]) == 16 * 3 * 2
    assert len(INSTANTIATIONS[UPFIRDN2D]) == 3 * 3 * 2 * 4
    assert all(len(set(expressions)) == len(expressions) for expressions in INSTANTIATIONS.values())
    bias_only = launch_fused_bias_act((1, 1, 1, 1), replace(FULL, factors=Factor(20)), dtype="float16")
    assert bias_only.expression in INSTANTIATIONS[FUSED_BIAS_ACT]
    for factors in (0, 20, 23, 31):
        launch = launch_upfirdn2d((1, 1, 4, 4), SKIP, replace(FULL, factors=Factor(factors)), dtype="bfloat16")
        assert launch.expression in INSTANTIATIONS[UPFIRDN2D]


def test_it_imports_no_heavy_library() -> None:
    """Plugins and builders ask it what to launch, with no torch near."""
    code = (
        "import sys, restyle_deploy.ops.kernels.launches\nprint(sorted({'torch', 'cuda', 'onnx'} & set(sys.modules)))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"
