"""Batch normalisation before a zero-padded convolution."""

from typing import Any

import onnx_ir as ir
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from restyle_deploy.graph.rewrites.leading_batchnorm import leading_batchnorm
from tests.graph_models import (
    FPN,
    IR_SE,
    RESNET,
    GraphMaker,
    check_nothing_changes,
    check_rewrite,
    exported,
    layers_with,
    operators,
)


def normalized_input(
    *,
    channels: tuple[int, int] = (4, 3),
    size: tuple[int | str, int | str] = (6, 7),
    weight_size: tuple[int, int] = (3, 3),
    bias: bool = False,
    group: int = 1,
    epsilon: float | None = 1e-3,
    computed_weight: bool = False,
    computed_mean: bool = False,
    activation: bool = False,
    second_user: bool = False,
    seed: int = 0,
    **attributes: Any,
) -> ir.Model:
    """Return a normalisation and the convolution of its result; with no arguments, one that can be folded."""
    maker = GraphMaker(seed)
    mean = maker.input("mean", batch=channels[0]) if computed_mean else None
    y = maker.batchnorm(maker.input("x", channels[0], *size), channels[0], mean=mean, epsilon=epsilon)
    others = [maker.node("Neg", y)] if second_user else []
    y = maker.node("Relu", y) if activation else y
    weight = maker.weight(channels[1], channels[0] // group, *weight_size)
    weight = maker.node("Mul", weight, maker.input("factor", batch=1)) if computed_weight else weight
    biases = [maker.weight(channels[1])] if bias else []
    return maker.model(maker.node("Conv", y, weight, *biases, group=group, **attributes), *others)


@settings(max_examples=50)
@given(
    channels=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    size=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    weight_size=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    pads=st.tuples(*[st.integers(0, 3)] * 4),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilations=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_computes_the_same(
    channels: tuple[int, int],
    size: tuple[int, int],
    weight_size: tuple[int, int],
    pads: tuple[int, ...],
    strides: tuple[int, int],
    dilations: tuple[int, int],
    bias: bool,
    seed: int,
) -> None:
    for axis in (0, 1):
        assume(size[axis] + pads[axis] + pads[axis + 2] > dilations[axis] * (weight_size[axis] - 1))
    model = normalized_input(
        channels=channels,
        size=size,
        weight_size=weight_size,
        bias=bias,
        seed=seed,
        pads=pads,
        strides=strides,
        dilations=dilations,
    )
    assert operators(check_rewrite(leading_batchnorm, model)) == {"Conv": 1, "Add": 1}


def test_epsilon_and_attributes_have_onnx_defaults() -> None:
    check_rewrite(leading_batchnorm, normalized_input(epsilon=None))


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"size": ("H", "W")}, id="unknown size"),
        pytest.param({"group": 2, "channels": (4, 4)}, id="groups"),
        pytest.param({"computed_weight": True}, id="computed weight"),
        pytest.param({"computed_mean": True}, id="computed mean"),
        pytest.param({"activation": True}, id="no convolution follows"),
        pytest.param({"second_user": True}, id="normalisation that is read twice"),
        pytest.param({"auto_pad": "SAME_UPPER"}, id="padding left to the runtime"),
    ],
)
def test_other_normalisations_stay(changes: dict[str, Any]) -> None:
    check_nothing_changes(leading_batchnorm, normalized_input(**changes))


def test_a_normalized_output_stays() -> None:
    maker = GraphMaker()
    check_nothing_changes(leading_batchnorm, maker.model(maker.batchnorm(maker.input("x", 2, 3, 3), 2)))


@pytest.mark.parametrize(
    ("encoder_type", "dataset_type"),
    [
        (IR_SE, "ffhq_encode"),
        (FPN, "ffhq_encode"),
        pytest.param(IR_SE, "cars_encode", marks=pytest.mark.slow),
        pytest.param(FPN, "cars_encode", marks=pytest.mark.slow),
    ],
)
def test_ir_se_encoders_have_no_normalisation_left(encoder_type: str, dataset_type: str) -> None:
    model = exported("encoder", encoder_type=encoder_type, dataset_type=dataset_type)
    assert operators(model)["BatchNormalization"] == 4
    rewritten = check_rewrite(leading_batchnorm, model)
    assert operators(rewritten)["BatchNormalization"] == 0
    assert operators(rewritten)["Conv"] == operators(model)["Conv"]


def test_resnet_encoders_stay() -> None:
    check_nothing_changes(leading_batchnorm, exported("encoder", encoder_type=RESNET))


def test_only_the_named_layers_change() -> None:
    model = exported("encoder")
    before = layers_with(model, "BatchNormalization")
    leading_batchnorm(model, layers=["encoder.body.1.res_layer.0", "no such layer"])
    assert layers_with(model, "BatchNormalization") == before - {"encoder.body.1.res_layer.0"}
