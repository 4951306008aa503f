"""Demodulation, noise, bias, activation and the next style as one node."""

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_ir.passes.common import ShapeInferencePass

from restyle_deploy.graph.edit import integer_of
from restyle_deploy.graph.rewrites.depthwise_filter import depthwise_filter
from restyle_deploy.graph.rewrites.fuse_epilogue import fuse_epilogue
from restyle_deploy.graph.rewrites.tidy import tidy
from restyle_deploy.ops.onnx_functions import DOMAIN, Factor
from tests.graph_models import GraphMaker, check_nothing_changes, check_rewrite, exported, layers_with, operators


def epilogue(
    *,
    channels: int = 3,
    size: tuple[int, int] = (4, 5),
    gain: float = 2.0**0.5,
    negative_slope: float = 0.2,
    filtered: bool = False,
    up: int = 1,
    demodulated: bool = True,
    noise: str | None = "constant",
    computed_bias: bool = False,
    next_style: bool = True,
    style_axes: tuple[int, int] = (2, 3),
    second_user: str | None = None,
    swapped: bool = False,
    seed: int = 0,
) -> ir.Model:
    """Return what follows a convolution; `second_user` reads that operator's value too, `swapped` swaps operands."""
    maker = GraphMaker(seed)

    def operands(left: str, right: str) -> tuple[str, str]:
        return (right, left) if swapped else (left, right)

    x = maker.input("x", channels, *(side + 1 for side in size) if filtered else size)
    values = {"x": x}
    if filtered:
        values["UpFirDn2d"] = x = maker.filter(x, maker.weight(4, 4), channels=channels, up=up, pads=(1, 1, 1, 1))
    if demodulated:
        factor = maker.node("Unsqueeze", maker.input("demod", channels), maker.integers(*style_axes), layer="conv")
        values["Mul"] = x = maker.node("Mul", *operands(x, factor), layer="conv")
    if noise is not None:
        shapes = {"constant": (1, 1, *size), "one": (1, 1, 1, 1), "channels": (1, channels, *size), "rows": (1, *size)}
        map_ = maker.input("noise", 1, *size) if noise == "computed" else maker.weight(*shapes[noise])
        values["Add"] = x = maker.node("Add", *operands(x, map_))
    bias = maker.weight(channels)
    bias = maker.node("Mul", bias, maker.input("factor", batch=1)) if computed_bias else bias
    values["FusedBiasAct"] = x = maker.node("FusedBiasAct", x, bias, negative_slope=negative_slope, gain=gain)
    if next_style:  # computed behind the activation: the new node cannot stand in the place of that
        style = maker.node("Neg", maker.input("style", channels), layer="next")
        factor = maker.node("Unsqueeze", style, maker.integers(*style_axes), layer="next")
        x = maker.node("Mul", *operands(x, factor), layer="next")
    others = [maker.node("Neg", values[second_user])] if second_user else []
    model = maker.model(x, *others)
    for node in model.graph:
        if node.op_type == "UpFirDn2d":  # whose size the exporter knows and ONNX does not infer
            node.outputs[0].shape = ir.Shape(("N", channels, *(up * (side + 1) - 1 for side in size)))
    ShapeInferencePass()(model)
    return model


def fused_nodes(model: ir.Model) -> list[tuple[str, Factor]]:
    return [(node.op_type, Factor(integer_of(node, "factors", 0))) for node in model.graph if node.domain == DOMAIN]


@settings(max_examples=20)
@given(
    channels=st.integers(1, 5),
    size=st.tuples(st.integers(2, 6), st.integers(2, 6)),
    gain=st.floats(-1, 3, width=32),
    negative_slope=st.floats(0, 1.5, width=32),
    flags=st.fixed_dictionaries(
        {name: st.booleans() for name in ("filtered", "demodulated", "next_style", "swapped")}
        | {"noise": st.sampled_from([None, "constant"])}
    ),
    seed=st.integers(0, 99),
)
def test_computes_the_same(
    channels: int, size: tuple[int, int], gain: float, negative_slope: float, flags: dict[str, Any], seed: int
) -> None:
    model = epilogue(channels=channels, size=size, gain=gain, negative_slope=negative_slope, seed=seed, **flags)
    rewritten = check_rewrite(fuse_epilogue, model)
    factors = Factor.BIAS | Factor.ACTIVATION
    factors |= Factor.DEMOD if flags["demodulated"] else Factor.NONE
    factors |= Factor.NOISE if flags["noise"] else Factor.NONE
    factors |= Factor.NEXT_SCALE if flags["next_style"] else Factor.NONE
    if flags["filtered"]:
        assert fused_nodes(rewritten) == [("UpFirDn2dEpilogue", factors)]
    elif factors != Factor.BIAS | Factor.ACTIVATION:
        assert fused_nodes(rewritten) == [("BiasActEpilogue", factors)]
    else:
        assert fused_nodes(rewritten) == [("FusedBiasAct", Factor.NONE)]
    assert set(operators(rewritten)) <= {"BiasActEpilogue", "UpFirDn2dEpilogue", "FusedBiasAct", "Neg"}


@pytest.mark.parametrize(
    ("changes", "left", "factors"),
    [
        pytest.param({"noise": "computed"}, {"Add", "Mul", "Unsqueeze", "Neg"}, 28, id="computed noise"),
        pytest.param({"noise": "one"}, {"Add", "Mul", "Unsqueeze", "Neg"}, 28, id="noise of one value"),
        pytest.param({"noise": "channels"}, {"Add", "Mul", "Unsqueeze", "Neg"}, 28, id="noise of all channels"),
        pytest.param({"noise": "rows"}, {"Add", "Mul", "Unsqueeze", "Neg"}, 28, id="noise of three axes"),
        pytest.param({"second_user": "Add"}, {"Add", "Mul", "Unsqueeze", "Neg"}, 28, id="noisy map read twice"),
        pytest.param({"second_user": "Mul"}, {"Mul", "Unsqueeze", "Neg"}, 30, id="scaled map read twice"),
        pytest.param({"second_user": "FusedBiasAct"}, {"Mul", "Unsqueeze", "Neg"}, 23, id="activation read twice"),
    ],
)
def test_only_what_fits_is_taken_in(changes: dict[str, Any], left: set[str], factors: int) -> None:
    rewritten = check_rewrite(fuse_epilogue, epilogue(**changes))
    assert fused_nodes(rewritten) == [("BiasActEpilogue", Factor(factors))]
    assert set(operators(rewritten)) == {"BiasActEpilogue", *left}


@pytest.mark.parametrize("changes", [{"second_user": "UpFirDn2d"}, {"up": 2, "noise": None}])
def test_filter_stays_if_it_is_read_twice_or_upsamples(changes: dict[str, Any]) -> None:
    rewritten = check_rewrite(fuse_epilogue, epilogue(filtered=True, **changes))
    assert [op_type for op_type, _ in fused_nodes(rewritten)] == ["UpFirDn2d", "BiasActEpilogue"]


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"computed_bias": True}, id="computed bias"),
        pytest.param({"demodulated": False, "noise": None, "next_style": False}, id="nothing around it"),
        pytest.param({"size": (3, 3), "channels": 3, "noise": None, "style_axes": (0, 1)}, id="factors of other axes"),
    ],
)
def test_other_activations_stay(changes: dict[str, Any]) -> None:
    check_nothing_changes(fuse_epilogue, epilogue(**changes))


@pytest.mark.parametrize("dataset_type", ["ffhq_encode", "cars_encode"])
def test_generator_has_one_node_behind_each_convolution(dataset_type: str) -> None:
    rewritten = check_rewrite(
        lambda model: tidy(fuse_epilogue(model)), exported("generator", dataset_type=dataset_type)
    )
    assert [pair for pair in fused_nodes(rewritten) if pair[0] != "UpFirDn2d"] == [
        ("BiasActEpilogue", Factor(23)),
        *[("UpFirDn2dEpilogue", Factor(31)), ("BiasActEpilogue", Factor(23))] * 3,
        ("UpFirDn2dEpilogue", Factor(31)),
        ("BiasActEpilogue", Factor(31)),  # the last map is read by ToRGB alone
    ]
    assert operators(rewritten)["UpFirDn2d"] == 4
    assert {name for _, name, _ in rewritten.functions} == {"BiasActEpilogue", "UpFirDn2d", "UpFirDn2dEpilogue"}
    onnx.checker.check_model(ir.to_proto(rewritten), full_check=True)


def test_filter_of_another_rewrite_is_followed_by_an_epilogue() -> None:
    rewritten = check_rewrite(lambda model: fuse_epilogue(depthwise_filter(model)), exported("generator"))
    assert operators(rewritten)["BiasActEpilogue"] == 9


def test_absent_factors_are_neutral() -> None:
    rewritten = fuse_epilogue(epilogue(demodulated=False, next_style=False))
    (node,) = (node for node in rewritten.graph if node.op_type == "BiasActEpilogue")
    constants = [value.const_value.numpy() for value in node.inputs[1:] if value is not None and value.const_value]
    assert [array.shape for array in constants] == [(1, 1), (1, 1, 4, 5), (3,), (1, 1)]
    np.testing.assert_array_equal(constants[0], 1)
    np.testing.assert_array_equal(constants[3], 1)


def test_only_the_named_layers_change() -> None:
    model = exported("generator")
    before = layers_with(model, "FusedBiasAct")
    fuse_epilogue(model, layers=["decoder.convs.3", "no such layer"])
    assert layers_with(model, "FusedBiasAct") == before - {"decoder.convs.3"}
    assert layers_with(model, "BiasActEpilogue") == {"decoder.convs.3"}
