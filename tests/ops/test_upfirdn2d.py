"""The torch reference against SciPy, and the ONNX function against the torch reference."""

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import scipy.signal
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import helper

from restyle_deploy.ops import onnx_functions
from restyle_deploy.ops.upfirdn2d import Pads, onnx_function, upfirdn2d, upfirdn2d_epilogue

PADS = st.tuples(*[st.integers(-3, 4)] * 4)
SIZES = st.tuples(st.integers(1, 9), st.integers(1, 9))
FACTORS = ("demod", "noise", "bias", "next_scale")


def convolve_with_scipy(
    x: NDArray[np.float64], kernel: NDArray[np.float64], *, up: int, down: int, pads: Pads
) -> NDArray[np.float64]:
    """Insert the zeros, pad or crop and convolve one channel [H, W]; nothing here is shared with the reference."""
    upsampled = np.zeros((x.shape[0] * up, x.shape[1] * up))
    upsampled[::up, ::up] = x
    top, left, bottom, right = pads
    padded = np.pad(upsampled, [(max(top, 0), max(bottom, 0)), (max(left, 0), max(right, 0))])
    rows, columns = (
        slice(max(-before, 0), size - max(-after, 0))
        for before, after, size in ((top, bottom, padded.shape[0]), (left, right, padded.shape[1]))
    )
    filtered: NDArray[np.float64] = scipy.signal.convolve2d(padded[rows, columns], kernel, mode="valid")
    return filtered[::down, ::down]


def fits(size: tuple[int, int], kernel_size: tuple[int, int], up: int, pads: Pads) -> bool:
    top, left, bottom, right = pads
    padded = (size[0] * up + top + bottom, size[1] * up + left + right)
    # Cropping more than there is on one side would take rows of the padding on the other, which means nothing.
    overlaps = all(-pad <= extent * up for pad, extent in zip(pads, size * 2, strict=True))
    return overlaps and padded[0] >= kernel_size[0] and padded[1] >= kernel_size[1]


@given(
    size=SIZES,
    kernel_size=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    up=st.integers(1, 3),
    down=st.integers(1, 3),
    pads=PADS,
    seed=st.integers(0, 2**32 - 1),
)
def test_reference_is_a_convolution_of_the_padded_image(
    size: tuple[int, int], kernel_size: tuple[int, int], up: int, down: int, pads: Pads, seed: int
) -> None:
    assume(fits(size, kernel_size, up, pads))
    random = np.random.RandomState(seed)
    x, kernel = random.standard_normal((2, 3, *size)), random.standard_normal(kernel_size)
    found = upfirdn2d(torch.from_numpy(x), torch.from_numpy(kernel), up=up, down=down, pads=pads).numpy()
    expected = [[convolve_with_scipy(channel, kernel, up=up, down=down, pads=pads) for channel in image] for image in x]
    np.testing.assert_allclose(found, np.array(expected), rtol=0, atol=1e-12)


@given(size=SIZES, taps=st.integers(1, 6), up=st.integers(1, 4), down=st.integers(1, 4), seed=st.integers(0, 2**32 - 1))
def test_reference_is_upfirdn_of_each_axis(size: tuple[int, int], taps: int, up: int, down: int, seed: int) -> None:
    """With the padding of a full convolution, a separable filter is SciPy's `upfirdn` along both axes."""
    random = np.random.RandomState(seed)
    x, vertical, horizontal = (random.standard_normal(shape) for shape in (size, taps, taps))
    # SciPy's image ends at the last sample, ours with the zeros that follow it.
    pads = (taps - 1, taps - 1, taps - up, taps - up)
    found = upfirdn2d(
        torch.from_numpy(x)[None, None],
        torch.from_numpy(np.outer(vertical, horizontal)),
        up=up,
        down=down,
        pads=pads,
    )
    expected = scipy.signal.upfirdn(vertical, x, up, down, axis=0)
    expected = scipy.signal.upfirdn(horizontal, expected, up, down, axis=1)
    np.testing.assert_allclose(found[0, 0].numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("kernel_size", "pads"),
    [((4, 4), (0, 0, 0, 0)), ((1, 3), (0, -1, 0, 0)), ((3, 1), (-1, 0, 0, 0)), ((1, 1), (-1, 0, -1, 0))],
)
def test_an_image_smaller_than_the_filter_is_refused(kernel_size: tuple[int, int], pads: Pads) -> None:
    with pytest.raises(ValueError, match=r"padded image .* is smaller than the filter"):
        upfirdn2d(torch.zeros(1, 1, 2, 3), torch.zeros(kernel_size), pads=pads)


@pytest.mark.parametrize(
    ("size", "kernel_size", "up", "down", "pads"),
    [
        ((5, 5), (4, 4), 1, 1, (1, 1, 1, 1)),  # the blur after an up-convolution
        ((4, 6), (4, 4), 2, 1, (2, 2, 1, 1)),  # the upsampling of the image so far
        ((7, 5), (3, 2), 1, 2, (0, 1, 2, 0)),
        ((5, 9), (2, 3), 3, 2, (4, 0, 1, 2)),
        ((6, 7), (1, 1), 2, 1, (-1, -2, -3, 0)),
        ((8, 5), (3, 3), 1, 1, (-2, 1, 3, -1)),
    ],
)
def test_onnx_function_is_the_reference(
    size: tuple[int, int], kernel_size: tuple[int, int], up: int, down: int, pads: Pads
) -> None:
    random = np.random.RandomState(0)
    x = random.standard_normal((2, 3, *size)).astype(np.float32)
    kernel = random.standard_normal(kernel_size).astype(np.float32)
    expected = upfirdn2d(torch.from_numpy(x), torch.from_numpy(kernel), up=up, down=down, pads=pads)
    (found,) = _session(channels=3, up=up, down=down, pads=pads).run(None, {"x": x, "kernel": kernel})
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("present", [(), ("bias",), ("demod", "noise", "bias"), FACTORS])
@pytest.mark.parametrize(
    ("up", "down", "pads"), [(1, 1, (1, 1, 1, 1)), (2, 1, (2, 2, 1, 1)), (1, 2, (0, 1, 2, 0)), (3, 2, (4, -1, 1, 2))]
)
def test_onnx_epilogue_is_the_reference(
    up: int, down: int, pads: Pads, present: tuple[str, ...], dtype: type[np.floating]
) -> None:
    random = np.random.RandomState(0)
    x, kernel = random.standard_normal((2, 3, 6, 5)).astype(dtype), random.standard_normal((4, 4)).astype(np.float32)
    wide = torch.from_numpy(x.astype(np.float32))
    filtered = upfirdn2d(wide, torch.from_numpy(kernel), up=up, down=down, pads=pads)
    shapes = {"demod": (2, 3), "noise": (1, 1, *filtered.shape[2:]), "bias": (3,), "next_scale": (2, 3)}
    absent = {"demod": np.ones((1, 1)), "noise": np.zeros((1, 1, 1, 1)), "bias": np.zeros(1)}
    absent["next_scale"] = np.ones((1, 1))
    arrays = {name: random.standard_normal(shapes[name]) if name in present else absent[name] for name in FACTORS}
    factors = {name: array.astype(dtype if name == "noise" else np.float32) for name, array in arrays.items()}
    inputs = {"x": x, "kernel": kernel, **factors}
    attributes = {"up": [up, up], "down": [down, down], "pads": list(pads), "channels": 3}
    activation = {"negative_slope": 0.2, "gain": 2.0**0.5}
    bits = sum(onnx_functions.Factor[name.upper()] for name in present) + onnx_functions.Factor.ACTIVATION
    (found,) = _session_of("UpFirDn2dEpilogue", inputs, {**attributes, **activation, "factors": bits}).run(None, inputs)
    given_: dict[str, Any] = {name: torch.from_numpy(factors[name].astype(np.float32)) for name in present}
    expected = upfirdn2d_epilogue(wide, torch.from_numpy(kernel), up=up, down=down, pads=pads, **given_).numpy()
    assert found.dtype == dtype
    tolerance = 16 * float(np.finfo(dtype).eps) if dtype is np.float32 else 2 * float(np.finfo(dtype).eps)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def test_epilogue_follows_the_filter() -> None:
    random = np.random.RandomState(0)
    x, kernel = random.standard_normal((2, 3, 5, 5)), random.standard_normal((4, 4))
    demod, noise, bias, scale = (random.standard_normal(shape) for shape in ((2, 3), (1, 1, 4, 4), (3,), (2, 3)))
    found = upfirdn2d_epilogue(
        torch.from_numpy(x),
        torch.from_numpy(kernel),
        pads=(1, 1, 1, 1),
        demod=torch.from_numpy(demod),
        noise=torch.from_numpy(noise),
        noise_strength=0.5,
        bias=torch.from_numpy(bias),
        next_scale=torch.from_numpy(scale),
        negative_slope=0.1,
        gain=3.0,
    )
    filtered = [[convolve_with_scipy(c, kernel, up=1, down=1, pads=(1, 1, 1, 1)) for c in image] for image in x]
    y = np.array(filtered) * demod[..., None, None] + 0.5 * noise + bias[:, None, None]
    np.testing.assert_allclose(found, 3 * np.where(y < 0, 0.1 * y, y) * scale[..., None, None], rtol=0, atol=1e-12)


def test_epilogue_without_factors_is_the_filter() -> None:
    x, kernel = torch.randn(1, 2, 5, 6), torch.randn(3, 3)
    found = upfirdn2d_epilogue(x, kernel, up=2, pads=(1, 2, 0, 1), negative_slope=None, gain=None)
    torch.testing.assert_close(found, upfirdn2d(x, kernel, up=2, pads=(1, 2, 0, 1)), rtol=0, atol=0)


def test_float32_filter_serves_half_precision_images() -> None:
    random = np.random.RandomState(0)
    x, kernel = random.standard_normal((1, 2, 5, 4)).astype(np.float16), random.standard_normal((4, 4))
    inputs: dict[str, NDArray[Any]] = {"x": x, "kernel": kernel.astype(np.float16).astype(np.float32)}
    attributes = {"up": [2, 2], "down": [1, 1], "pads": [2, 2, 1, 1], "channels": 2}
    (found,) = _session_of("UpFirDn2d", inputs, attributes).run(None, inputs)
    wide = torch.from_numpy(x.astype(np.float32))
    expected = upfirdn2d(wide, torch.from_numpy(inputs["kernel"]), up=2, pads=(2, 2, 1, 1)).numpy()
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, expected, rtol=0, atol=4e-3 * np.abs(expected).max())


def test_exported_function_is_the_one_of_the_table() -> None:
    assert onnx_function() == onnx_functions.onnx_function("UpFirDn2d")


def _session(*, channels: int, up: int, down: int, pads: Pads) -> ort.InferenceSession:
    """A model of one filter of free sizes."""
    inputs = {"x": np.zeros((1, channels, 1, 1), np.float32), "kernel": np.zeros((1, 1), np.float32)}
    attributes = {"up": [up, up], "down": [down, down], "pads": list(pads), "channels": channels}
    return _session_of("UpFirDn2d", inputs, attributes, free=True)


def _session_of(
    op_type: str, inputs: dict[str, NDArray[Any]], attributes: dict[str, Any], *, free: bool = False
) -> ort.InferenceSession:
    """A model of one node, which has nothing but our function to run it."""
    node = helper.make_node(op_type, list(inputs), ["y"], domain="restyle_deploy", **attributes)
    types = {name: helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in inputs.items()}
    shapes: dict[str, list[Any]] = {name: list(array.shape) for name, array in inputs.items()}
    if free:
        shapes = {"x": ["N", attributes["channels"], "H", "W"], "kernel": ["kernel_height", "kernel_width"]}
    values = [helper.make_tensor_value_info(name, types[name], shapes[name]) for name in inputs]
    result = helper.make_tensor_value_info("y", types["x"], ["N", attributes["channels"], "out_height", "out_width"])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("restyle_deploy", 1)]
    model = helper.make_model(
        helper.make_graph([node], "one_node", values, [result]),
        opset_imports=opsets,
        functions=[onnx_functions.onnx_function(op_type)],
        ir_version=10,
    )
    onnx.checker.check_model(model, full_check=True)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
