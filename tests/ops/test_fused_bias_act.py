"""The torch reference against NumPy, and the ONNX function against the torch reference."""

import math

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from restyle_deploy.ops.fused_bias_act import fused_bias_act, onnx_function


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


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 5, 4)])
@pytest.mark.parametrize(("negative_slope", "gain"), [(0.2, math.sqrt(2)), (0.0, 1.0)])
def test_onnx_function_is_the_reference(
    shape: tuple[int, ...], negative_slope: float, gain: float, dtype: type[np.floating]
) -> None:
    random = np.random.RandomState(0)
    x, bias = random.standard_normal(shape).astype(dtype), random.standard_normal(shape[1]).astype(dtype)
    element_type = helper.np_dtype_to_tensor_dtype(x.dtype)
    (found,) = _session(element_type, negative_slope, gain).run(None, {"x": x, "bias": bias})
    expected = fused_bias_act(torch.from_numpy(x), torch.from_numpy(bias), negative_slope=negative_slope, gain=gain)
    assert found.dtype == dtype
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=8 * float(np.finfo(dtype).eps))


def _session(element_type: "TensorProto.DataType", negative_slope: float, gain: float) -> ort.InferenceSession:
    """A model of one node, which has nothing but our function to run it."""
    node = helper.make_node(
        "FusedBiasAct", ["x", "bias"], ["y"], domain="restyle_deploy", negative_slope=negative_slope, gain=gain
    )
    graph = helper.make_graph(
        [node],
        "one_node",
        [
            helper.make_tensor_value_info("x", element_type, ["N", "C", "H", "W"]),
            helper.make_tensor_value_info("bias", element_type, ["C"]),
        ],
        [helper.make_tensor_value_info("y", element_type, ["N", "C", "H", "W"])],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("restyle_deploy", 1)]
    model = helper.make_model(graph, opset_imports=opsets, functions=[onnx_function()], ir_version=10)
    onnx.checker.check_model(model)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
