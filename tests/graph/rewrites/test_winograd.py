"""Convolution by minimal filtering against the direct one."""

from typing import Any

import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from restyle_deploy.graph.rewrites.winograd import can_tile, winograd
from tests.graph_models import (
    ENCODER_TYPES,
    GraphMaker,
    check_nothing_changes,
    check_rewrite,
    exported,
    layers_with,
    operators,
)


def convolution(
    *,
    size: tuple[int | str, int | str] = (8, 12),
    channels: tuple[int, int] = (3, 5),
    weight_size: tuple[int, int] = (3, 3),
    bias: bool = False,
    computed_weight: bool = False,
    computed_bias: bool = False,
    group: int = 1,
    seed: int = 0,
    **attributes: Any,
) -> ir.Model:
    """Return a graph of one convolution; with no arguments, one that can be tiled."""
    maker = GraphMaker(seed)
    x = maker.input("x", channels[0], *size)
    weight = maker.weight(channels[1], channels[0] // group, *weight_size)
    if computed_weight:
        weight = maker.node("Mul", weight, maker.input("factor", batch=1))
    biases = [maker.weight(channels[1])] if bias else []
    if computed_bias:
        biases = [maker.node("Mul", maker.weight(channels[1]), maker.input("factor", batch=1))]
    attributes = {"pads": (1, 1, 1, 1), "group": group, **attributes}
    return maker.model(maker.node("Conv", x, weight, *biases, **attributes))


@settings(max_examples=40)
@given(
    size=st.tuples(*[st.integers(1, 5).map(lambda tiles: 4 * tiles)] * 2),
    channels=st.tuples(st.integers(1, 40), st.integers(1, 9)),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_computes_the_same(size: tuple[int, int], channels: tuple[int, int], bias: bool, seed: int) -> None:
    rewritten = check_rewrite(winograd, convolution(size=size, channels=channels, bias=bias, seed=seed))
    assert operators(rewritten)["Conv"] == 0
    assert operators(rewritten)["Add"] == bias


def test_as_many_channels_as_the_official_models_have() -> None:
    check_rewrite(winograd, convolution(size=(16, 12), channels=(512, 512), bias=True))


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"size": (8, 10)}, id="width of half a tile"),
        pytest.param({"size": (7, 8)}, id="odd height"),
        pytest.param({"size": ("H", "W")}, id="unknown size"),
        pytest.param({"pads": (0, 0, 0, 0)}, id="no padding"),
        pytest.param({"pads": (1, 1, 2, 2)}, id="uneven padding"),
        pytest.param({"strides": (2, 2)}, id="stride"),
        pytest.param({"dilations": (2, 2)}, id="dilation"),
        pytest.param({"channels": (4, 4), "group": 2}, id="groups"),
        pytest.param({"weight_size": (5, 3)}, id="larger weight"),
        pytest.param({"computed_weight": True}, id="computed weight"),
        pytest.param({"computed_bias": True}, id="computed bias"),
    ],
)
def test_other_convolutions_stay(changes: dict[str, Any]) -> None:
    model = convolution(**changes)
    assert not any(can_tile(node) for node in model.graph)
    check_nothing_changes(winograd, model)


@pytest.mark.parametrize("encoder_type", ENCODER_TYPES)
def test_encoders_compute_the_same(encoder_type: str) -> None:
    check_toy_graph(exported("encoder", encoder_type=encoder_type))


@pytest.mark.parametrize("dataset_type", ["ffhq_encode", "cars_encode"])
def test_generator_computes_the_same(dataset_type: str) -> None:
    check_toy_graph(exported("generator", dataset_type=dataset_type))


def check_toy_graph(model: ir.Model) -> None:
    tiled = sum(map(can_tile, model.graph))
    assert tiled
    rewritten = check_rewrite(winograd, model)
    assert not any(map(can_tile, rewritten.graph))
    assert operators(rewritten)["Conv"] == operators(model)["Conv"] - tiled


def test_only_the_named_layers_change() -> None:
    model = exported("generator")
    before = layers_with(model, "Conv")
    winograd(model, layers=["decoder.convs.3.conv", "no such layer"])
    assert layers_with(model, "Conv") == before - {"decoder.convs.3.conv"}
