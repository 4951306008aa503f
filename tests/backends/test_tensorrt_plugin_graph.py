"""What the nodes of plugins say, by computing it: a plugin told by its parameters against the operator's function."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from restyle_deploy.backends.tensorrt_plugins import Operation, prepare_graph
from restyle_deploy.errors import BuildError
from restyle_deploy.graph.edit import array_of
from restyle_deploy.ops.fused_bias_act import fused_bias_act
from restyle_deploy.ops.kernels.launches import Config, Factor
from restyle_deploy.ops.onnx_functions import DOMAIN
from restyle_deploy.ops.upfirdn2d import upfirdn2d_epilogue
from tests.backends.plugin_models import (
    ACTIVATION,
    ANY_FILTER,
    BLUR,
    GENERAL,
    SEPARABLE,
    SHAPE,
    SKIP,
    Arrays,
    factors_of,
    filtered_size,
    image_of,
    model_of,
)


class _Plugin(OpRun):
    """A plugin by its parameters, in torch."""

    op_domain = DOMAIN

    def _run(self, x: Any, *rest: Any, parameters: Any, plugin_namespace: Any, plugin_version: Any, aot: Any) -> Any:
        assert (plugin_namespace, plugin_version, aot) == (DOMAIN, "1", 1)
        operation = Operation.from_parameters(parameters)
        assert operation.op_type == type(self).__name__
        epilogue = operation.epilogue
        names = ("demod", "noise", "bias", "next_scale")
        tensors = dict(zip(names, (torch.from_numpy(value.copy()).float() for value in rest[-4:]), strict=True))
        given: dict[str, Any] = {name: tensors[name] for name in names if Factor[name.upper()] in epilogue.factors}
        has_activation = Factor.ACTIVATION in epilogue.factors
        given["negative_slope"] = epilogue.negative_slope if has_activation else None
        given["gain"] = epilogue.gain if has_activation else None
        image = torch.from_numpy(x).float()
        if operation.filtering is None:
            return (fused_bias_act(image, **given).numpy().astype(x.dtype),)
        filtering = operation.filtering
        y = upfirdn2d_epilogue(
            image,
            torch.from_numpy(rest[0].copy()),
            up=filtering.up[0],
            down=filtering.down[0],
            pads=filtering.pads,
            **given,
        )
        return (y.numpy().astype(x.dtype),)


class BiasActEpilogue(_Plugin):
    pass


class UpFirDn2dEpilogue(_Plugin):
    pass


def check_same(model: ir.Model, inputs: Arrays, *, tolerance: float = 1e-5) -> ir.Node:
    """Compare the operator's function with the plugin's parameters; return the plugin's node."""
    fed = {name: inputs[name] for name in (value.name or "" for value in model.graph.inputs)}
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    wanted: Any = session.run(None, fed)[0]
    prepared = prepare_graph(model, "aot", arch="sm_89")
    assert prepared is model
    assert not prepared.functions
    proto = ir.to_proto(prepared)
    onnx.checker.check_model(proto)
    evaluator: Any = ReferenceEvaluator(proto, new_ops=[BiasActEpilogue, UpFirDn2dEpilogue])
    (got,) = evaluator.run(None, fed)
    assert got.dtype == wanted.dtype
    np.testing.assert_allclose(got.astype(np.float32), wanted.astype(np.float32), rtol=tolerance, atol=tolerance)
    (node,) = (node for node in prepared.graph if node.domain == DOMAIN)
    assert node.name == "layer/op"
    return node


def operation_of(node: ir.Node) -> Operation:
    return Operation.from_parameters(node.attributes["parameters"].as_ints())


@pytest.mark.parametrize("factors", [0, 16, 20, 23, 31])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_bias_act_epilogue(factors: int, dtype: type[np.generic]) -> None:
    values = factors_of(factors, SHAPE[2:])
    values["noise"] = values["noise"].astype(dtype)
    inputs: Arrays = {"x": image_of(0).astype(dtype), **values}
    activation = ACTIVATION if factors & Factor.ACTIVATION else {"negative_slope": 1.0, "gain": 1.0}
    constants = {name: inputs[name] for name in ("noise", "bias")}
    model = model_of("BiasActEpilogue", inputs, constants=constants, factors=factors, **activation)
    node = check_same(model, inputs, tolerance=1e-5 if dtype == np.float32 else 2e-3)
    assert operation_of(node).epilogue.factors == factors


@pytest.mark.parametrize(
    ("geometry", "taps", "config"),
    [
        (BLUR, SEPARABLE, Config.BLUR),
        (SKIP, SEPARABLE, Config.SKIP_UPSAMPLE),
        (GENERAL, ANY_FILTER, Config.GENERAL),
        (BLUR, SEPARABLE + np.eye(4, dtype=np.float32), Config.GENERAL),
    ],
)
def test_upfirdn2d_epilogue(geometry: dict[str, Any], taps: NDArray[np.float32], config: Config) -> None:
    inputs: Arrays = {"x": image_of(1), "kernel": taps, **factors_of(31, filtered_size(geometry, taps))}
    constants = {"kernel": taps}
    model = model_of("UpFirDn2dEpilogue", inputs, constants=constants, factors=31, **geometry, **ACTIVATION)
    filtering = operation_of(check_same(model, inputs)).filtering
    assert filtering is not None
    assert filtering.config is config


def test_fused_bias_act_becomes_an_epilogue() -> None:
    inputs: Arrays = {"x": image_of(2), "bias": np.array([1, -2, 3, 0.5], np.float32)}
    node = check_same(model_of("FusedBiasAct", inputs, constants={"bias": inputs["bias"]}, **ACTIVATION), inputs)
    assert node.op_type == "BiasActEpilogue"
    assert operation_of(node).epilogue.factors == Factor.BIAS | Factor.ACTIVATION
    neutral = {1: [[1.0]], 2: [[[[0.0]]]], 4: [[1.0]]}
    for place, content in neutral.items():
        array = array_of(node.inputs[place])
        assert array is not None
        assert array.tolist() == content


def test_bare_filter_becomes_an_epilogue_without_factors() -> None:
    inputs: Arrays = {"x": image_of(3), "kernel": SEPARABLE}
    node = check_same(model_of("UpFirDn2d", inputs, constants={"kernel": SEPARABLE}, **SKIP), inputs)
    bias = array_of(node.inputs[4])
    assert bias is not None
    assert bias.tolist() == [0.0]
    assert node.op_type == "UpFirDn2dEpilogue"
    assert operation_of(node).epilogue.factors == 0


def test_factors_of_half_precision_become_float32() -> None:
    inputs: Arrays = {"x": image_of(2).astype(np.float16), "bias": np.array([1, -2, 3, 0.5], np.float16)}
    node = check_same(
        model_of("FusedBiasAct", inputs, constants={"bias": inputs["bias"]}, **ACTIVATION), inputs, tolerance=2e-3
    )
    half, full = ir.DataType.FLOAT16, ir.DataType.FLOAT
    assert [value and value.dtype for value in node.inputs] == [half, full, half, full, full]


def test_computed_factors_are_cast() -> None:
    inputs: Arrays = {"x": image_of(2).astype(np.float16), "bias": np.array([1, -2, 3, 0.5], np.float16)}
    model = model_of("FusedBiasAct", inputs, constants={}, **ACTIVATION)
    node = check_same(model, inputs, tolerance=2e-3)
    assert node.inputs[3] is not None
    producer = node.inputs[3].producer()
    assert producer is not None
    assert producer.op_type == "Cast"


def test_computed_filter_is_not_taken_for_separable() -> None:
    inputs: Arrays = {"x": image_of(3), "kernel": SEPARABLE}
    filtering = operation_of(check_same(model_of("UpFirDn2d", inputs, constants={}, **SKIP), inputs)).filtering
    assert filtering is not None
    assert filtering.config is Config.GENERAL


def test_neutral_elements_are_shared() -> None:
    inputs: Arrays = {"x": image_of(2), "bias": np.array([1, -2, 3, 0.5], np.float32)}
    model = model_of("FusedBiasAct", inputs, constants={"bias": inputs["bias"]}, **ACTIVATION)
    (first,) = model.graph
    second = ir.node("FusedBiasAct", [first.outputs[0], first.inputs[1]], attributes=ACTIVATION, domain=DOMAIN)
    first.outputs[0].shape = ir.Shape(SHAPE)
    model.graph.append(second)
    model.graph.outputs[0] = second.outputs[0]
    prepare_graph(model, "jit", arch="sm_89")
    one, other = model.graph
    assert [a is b for a, b in zip(one.inputs, other.inputs, strict=True)] == [False, True, True, True, True]
    assert "aot" not in one.attributes
    assert one.attributes["plugin_namespace"].as_string() == "restyle_deploy_jit"


def test_functions_stay() -> None:
    inputs: Arrays = {"x": image_of(3), "kernel": SEPARABLE}
    model = model_of("UpFirDn2d", inputs, constants={"kernel": SEPARABLE}, **SKIP)
    before = ir.to_proto(model).SerializeToString()
    assert ir.to_proto(prepare_graph(model, "functions")).SerializeToString() == before


def forget_type(model: ir.Model) -> None:
    model.graph.inputs[0].type = None


def forget_filter_size(model: ir.Model) -> None:
    model.graph.inputs[1].shape = None


def use_doubles(model: ir.Model) -> None:
    model.graph.inputs[0].dtype = ir.DataType.DOUBLE


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (forget_type, "layer/op: x is of type None, expected FLOAT, FLOAT16, BFLOAT16"),
        (use_doubles, "layer/op: x is of type DOUBLE"),
        (forget_filter_size, "layer/op: the filter's sizes are"),
    ],
)
def test_refused_graphs(spoil: Callable[[ir.Model], None], message: str) -> None:
    inputs: Arrays = {"x": image_of(3), "kernel": SEPARABLE}
    model = model_of("UpFirDn2d", inputs, constants={}, **SKIP)
    spoil(model)
    with pytest.raises(BuildError, match=message):
        prepare_graph(model, "aot", arch="sm_89")
