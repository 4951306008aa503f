"""The torch reference against NumPy, and the ONNX function against the torch reference."""

import itertools
import math
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper

from restyle_deploy.ops import onnx_functions
from restyle_deploy.ops.fused_bias_act import fused_bias_act, onnx_function

FACTORS = ("demod", "noise", "bias", "next_scale")


@given(
    shape=st.lists(st.integers(1, 5), min_size=2, max_size=5),
    negative_slope=st.floats(0, 1),
    gain=st.floats(0.1, 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_reference_is_the_formula(shape: list[int], negative_slope: float, gain: float, seed: int) -> None:
    random = np.random.RandomState(seed)
    x, bias = random.standard_normal(shape), random.standard_normal(shape[1])
    biased = np.moveaxis(np.moveaxis(x, 1, -1) + bias, -1, 1)
    expected = gain * np.where(biased >= 0, biased, negative_slope * biased)
    found = fused_bias_act(torch.from_numpy(x), torch.from_numpy(bias), negative_slope=negative_slope, gain=gain)
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-12)


def test_defaults_are_those_of_stylegan2() -> None:
    found = fused_bias_act(torch.tensor([[[[1.0]], [[-1.0]]]]), torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(found.flatten(), torch.tensor([2 * math.sqrt(2), -0.2 * math.sqrt(2)]))


@given(
    size=st.lists(st.integers(1, 4), max_size=3),
    present=st.sets(st.sampled_from(FACTORS)),
    activation=st.tuples(st.none() | st.floats(0, 1), st.none() | st.floats(0.1, 4)),
    noise_strength=st.floats(-2, 2),
    seed=st.integers(0, 2**32 - 1),
)
def test_each_factor_is_optional(
    size: list[int],
    present: set[str],
    activation: tuple[float | None, float | None],
    noise_strength: float,
    seed: int,
) -> None:
    random = np.random.RandomState(seed)
    x = random.standard_normal((2, 3, *size))
    shapes = {"demod": (2, 3), "noise": (1, 1, *size), "bias": (3,), "next_scale": (2, 3)}
    given_ = {name: random.standard_normal(shapes[name]) for name in FACTORS if name in present}
    found = fused_bias_act(
        torch.from_numpy(x),
        **{name: torch.from_numpy(array) for name, array in given_.items()},
        noise_strength=noise_strength,
        negative_slope=activation[0],
        gain=activation[1],
    )
    expected = np.empty_like(x)
    for sample, channel in itertools.product(range(2), range(3)):
        y = x[sample, channel]
        y = y * given_["demod"][sample, channel] if "demod" in given_ else y
        y = y + noise_strength * given_["noise"][0, 0] if "noise" in given_ else y
        y = y + given_["bias"][channel] if "bias" in given_ else y
        y = np.where(y < 0, y * activation[0], y) if activation[0] is not None else y
        y = y * activation[1] if activation[1] is not None else y
        y = y * given_["next_scale"][sample, channel] if "next_scale" in given_ else y
        expected[sample, channel] = y
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("count", range(len(FACTORS) + 1))
@pytest.mark.parametrize("is_activated", [True, False])
def test_onnx_epilogue_is_the_reference(dtype: type[np.floating], count: int, is_activated: bool) -> None:
    """Each number of factors; an absent one is its neutral element."""
    for present in itertools.combinations(FACTORS, count):
        _check_onnx_epilogue(dtype, present, is_activated=is_activated)


def _check_onnx_epilogue(dtype: type[np.floating], present: tuple[str, ...], *, is_activated: bool) -> None:
    random = np.random.RandomState(0)
    x = random.standard_normal((2, 3, 5, 4)).astype(dtype)
    arrays: dict[str, np.ndarray] = {
        "demod": random.standard_normal((2, 3)) if "demod" in present else np.ones((1, 1)),
        "noise": random.standard_normal((1, 1, 5, 4)) if "noise" in present else np.zeros((1, 1, 1, 1)),
        "bias": random.standard_normal(3) if "bias" in present else np.zeros(1),
        "next_scale": random.standard_normal((2, 3)) if "next_scale" in present else np.ones((1, 1)),
    }
    inputs = {name: array.astype(dtype if name == "noise" else np.float32) for name, array in arrays.items()}
    slope, gain = (0.2, math.sqrt(2)) if is_activated else (1.0, 1.0)
    node = helper.make_node(
        "BiasActEpilogue",
        ["x", *FACTORS],
        ["y"],
        domain="restyle_deploy",
        negative_slope=slope,
        gain=gain,
        factors=sum(onnx_functions.Factor[name.upper()] for name in present),
    )
    (found,) = _session_of(node, {"x": x, **inputs}).run(None, {"x": x, **inputs})
    factors: dict[str, Any] = {name: torch.from_numpy(inputs[name].astype(np.float32)) for name in present}
    expected = fused_bias_act(torch.from_numpy(x.astype(np.float32)), **factors, negative_slope=slope, gain=gain)
    assert found.dtype == dtype
    largest = float(expected.abs().max())
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=2 * largest * float(np.finfo(dtype).eps))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 5, 4)])
@pytest.mark.parametrize(("negative_slope", "gain"), [(0.2, math.sqrt(2)), (0.0, 1.0)])
def test_onnx_function_is_the_reference(
    shape: tuple[int, ...], negative_slope: float, gain: float, dtype: type[np.floating]
) -> None:
    random = np.random.RandomState(0)
    x, bias = random.standard_normal(shape).astype(dtype), random.standard_normal(shape[1]).astype(dtype)
    node = helper.make_node(
        "FusedBiasAct", ["x", "bias"], ["y"], domain="restyle_deploy", negative_slope=negative_slope, gain=gain
    )
    (found,) = _session_of(node, {"x": x, "bias": bias}).run(None, {"x": x, "bias": bias})
    expected = fused_bias_act(torch.from_numpy(x), torch.from_numpy(bias), negative_slope=negative_slope, gain=gain)
    assert found.dtype == dtype
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=8 * float(np.finfo(dtype).eps))


def test_large_half_precision_values_pass_through_the_activation() -> None:
    """Bias and gain may leave the range of float16 on the way; what comes out may not."""
    x, bias = np.full((1, 1, 1, 1), -60000, np.float16), np.full(1, -60000, np.float16)
    node = helper.make_node(
        "FusedBiasAct", ["x", "bias"], ["y"], domain="restyle_deploy", negative_slope=0.2, gain=math.sqrt(2)
    )
    (found,) = _session_of(node, {"x": x, "bias": bias}).run(None, {"x": x, "bias": bias})
    assert float(found.item()) == pytest.approx(-24000 * math.sqrt(2), rel=1e-3)


def test_exported_function_is_the_one_of_the_table() -> None:
    assert onnx_function() == onnx_functions.onnx_function("FusedBiasAct")


def _session_of(node: onnx.NodeProto, inputs: dict[str, Any]) -> ort.InferenceSession:
    """A model of one node, which has nothing but our function to run it."""
    types = {name: helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in inputs.items()}
    values = [helper.make_tensor_value_info(name, types[name], array.shape) for name, array in inputs.items()]
    result = helper.make_tensor_value_info("y", types["x"], ["N", "C", "H", "W"])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("restyle_deploy", 1)]
    model = helper.make_model(
        helper.make_graph([node], "one_node", values, [result]),
        opset_imports=opsets,
        functions=[onnx_functions.onnx_function(node.op_type)],
        ir_version=10,
    )
    onnx.checker.check_model(model, full_check=True)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
