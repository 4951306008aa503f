"""Noise and bias scaled beforehand by the activation's gain."""

from typing import Any

import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from restyle_deploy.graph.rewrites.scale_constants import scale_constants
from tests.graph_models import GraphMaker, check_nothing_changes, check_rewrite, exported, layers_with, operators


def epilogue(
    *,
    channels: int = 3,
    size: tuple[int, int] = (4, 5),
    gain: float = 2.0**0.5,
    negative_slope: float = 0.2,
    computed_noise: bool = False,
    computed_bias: bool = False,
    demodulated: bool = True,
    noise: bool = True,
    second_user: str | None = None,
    seed: int = 0,
) -> ir.Model:
    """Return demodulation, noise, bias and activation of a layer; `second_user` reads that operator's value too."""
    maker = GraphMaker(seed)
    values = {"x": maker.input("x", channels, *size)}
    if demodulated:
        demodulation = maker.input("demodulation", channels)
        values["Unsqueeze"] = maker.node("Unsqueeze", demodulation, maker.integers(2, 3), layer="conv")
        values["Mul"] = maker.node("Mul", values["x"], values["Unsqueeze"], layer="conv")
    if noise:
        map_ = maker.input("noise", 1, *size) if computed_noise else maker.weight(1, 1, *size)
        values["Add"] = maker.node("Add", values.get("Mul", "x"), map_)
    bias = maker.weight(channels)
    bias = maker.node("Neg", maker.node("Mul", bias, maker.input("factor", batch=1))) if computed_bias else bias
    last = values.get("Add", values.get("Mul", "x"))
    activated = maker.node("FusedBiasAct", last, bias, negative_slope=negative_slope, gain=gain)
    others = [maker.node("Neg", values[second_user])] if second_user else []
    return maker.model(activated, *others)


@settings(max_examples=30)
@given(
    channels=st.integers(1, 5),
    size=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    gain=st.floats(0.25, 3, width=32),
    negative_slope=st.floats(0, 1.5, width=32),
    seed=st.integers(0, 99),
)
def test_computes_the_same(channels: int, size: tuple[int, int], gain: float, negative_slope: float, seed: int) -> None:
    model = epilogue(channels=channels, size=size, gain=gain, negative_slope=negative_slope, seed=seed)
    rewritten = check_rewrite(scale_constants, model)
    assert operators(rewritten) == {"Mul": 2, "Unsqueeze": 1, "Add": 2, "LeakyRelu": 1}


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"gain": 0.0}, id="no gain"),
        pytest.param({"gain": -1.0}, id="negative gain"),
        pytest.param({"computed_noise": True}, id="computed noise"),
        pytest.param({"computed_bias": True}, id="computed bias"),
        pytest.param({"demodulated": False}, id="no demodulation"),
        pytest.param({"noise": False}, id="no noise"),
        pytest.param({"second_user": "Unsqueeze"}, id="demodulation that is read twice"),
        pytest.param({"second_user": "Mul"}, id="scaled map that is read twice"),
        pytest.param({"second_user": "Add"}, id="noisy map that is read twice"),
    ],
)
def test_other_activations_stay(changes: dict[str, Any]) -> None:
    check_nothing_changes(scale_constants, epilogue(**changes))


@pytest.mark.parametrize("dataset_type", ["ffhq_encode", "cars_encode"])
def test_generator_has_no_fused_activation_left(dataset_type: str) -> None:
    model = exported("generator", dataset_type=dataset_type)
    assert operators(model)["FusedBiasAct"] == 9
    rewritten = check_rewrite(scale_constants, model)
    assert operators(rewritten)["FusedBiasAct"] == 0
    assert operators(rewritten)["LeakyRelu"] == 9


def test_only_the_named_layers_change() -> None:
    model = exported("generator")
    before = layers_with(model, "FusedBiasAct")
    scale_constants(model, layers=["decoder.convs.3", "no such layer"])
    assert layers_with(model, "FusedBiasAct") == before - {"decoder.convs.3"}
