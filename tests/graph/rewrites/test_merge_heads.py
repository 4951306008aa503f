"""All style heads at once against one after the other."""

from typing import Any

import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from restyle_deploy.graph.rewrites.merge_heads import find_heads, merge_heads
from tests.graph_models import (
    ENCODER_TYPES,
    FPN,
    GraphMaker,
    check_nothing_changes,
    check_rewrite,
    exported,
    operators,
)


def add_head(
    maker: GraphMaker,
    x: str,
    index: int,
    *,
    channels: int = 3,
    style_dim: int = 4,
    convolutions: int = 2,
    slope: float = 0.01,
    linear: dict[str, Any] | None = None,
    out_features: int = 5,
    pixels: int = 1,
    **attributes: Any,
) -> str:
    """Add a head of stride-2 convolutions and a linear layer: [N, C, H, W] -> [N, out_features]."""
    layer, in_channels = f"styles.{index}", channels
    for number in range(convolutions):
        inputs = (x, maker.weight(style_dim, in_channels, 3, 3), maker.weight(style_dim))
        given = {"strides": (2, 2), "pads": (1, 1, 1, 1), "kernel_shape": (3, 3), **attributes}
        x = maker.node("Conv", *inputs, layer=f"{layer}.convs.{2 * number}", **given)
        x = maker.node("LeakyRelu", x, layer=f"{layer}.convs.{2 * number + 1}", alpha=slope)
        in_channels = style_dim
    features = pixels * in_channels
    flat = maker.node("Reshape", x, maker.integers(-1, features), layer=layer)
    weights = maker.weight(out_features, features), maker.weight(out_features)
    return maker.node("Gemm", flat, *weights, layer=f"{layer}.linear", **{"transB": 1, **(linear or {})})


def two_heads(size: tuple[int, int] = (4, 3), **second: Any) -> ir.Model:
    """Return two heads on one map, the second of which is another in what is given."""
    maker = GraphMaker()
    x = maker.input("x", 3, *size)
    return maker.model(add_head(maker, x, 0), add_head(maker, x, 1, **second))


@settings(max_examples=30)
@given(
    heads=st.integers(2, 5),
    size=st.sampled_from([(4, 4), (3, 4), (4, 2), (1, 3)]),
    channels=st.integers(1, 5),
    style_dim=st.integers(1, 5),
    out_features=st.integers(1, 5),
    slope=st.sampled_from([0.01, 0.2]),
    seed=st.integers(0, 99),
)
def test_computes_the_same(
    heads: int, size: tuple[int, int], channels: int, style_dim: int, out_features: int, slope: float, seed: int
) -> None:
    maker = GraphMaker(seed)
    x = maker.input("x", channels, *size)
    form: dict[str, Any] = {"channels": channels, "style_dim": style_dim, "out_features": out_features}
    styles = [add_head(maker, x, index, slope=slope, **form) for index in range(heads)]
    rewritten = check_rewrite(merge_heads, maker.model(*styles))
    expected = {"Conv": 2, "LeakyRelu": 2, "Reshape": 1, "Transpose": 1, "MatMul": 1, "Add": 1, "Gather": heads}
    assert operators(rewritten) == expected


def test_maps_of_several_pixels_are_flattened_alike() -> None:
    maker = GraphMaker()
    x = maker.input("x", 3, 8, 6)
    model = maker.model(*(add_head(maker, x, index, pixels=4) for index in range(3)))
    assert operators(check_rewrite(merge_heads, model))["Gemm"] == 0


def test_a_value_that_is_read_before_the_last_head_is_known_in_time() -> None:
    maker = GraphMaker()
    x = maker.input("x", 3, 4, 4)
    first = maker.node("Neg", add_head(maker, x, 0))
    model = maker.model(first, maker.node("Add", first, add_head(maker, x, 1)))
    assert operators(check_rewrite(merge_heads, model))["Gemm"] == 0


def test_heads_of_one_form_and_map_are_merged() -> None:
    maker = GraphMaker()
    x, y = maker.input("x", 3, 4, 4), maker.input("y", 3, 4, 4)
    styles = [add_head(maker, (x, y)[index % 2], index, slope=(0.01, 0.2)[index // 6]) for index in range(9)]
    rewritten = check_rewrite(merge_heads, maker.model(*styles))
    assert operators(rewritten)["MatMul"] == 3
    assert operators(rewritten)["Gemm"] == 1  # the eighth is alone on y with its slope


def test_heads_that_share_a_convolution_are_merged_after_it() -> None:
    maker = GraphMaker()
    x = maker.input("x", 3, 8, 8)
    shared = maker.node("Conv", x, maker.weight(3, 3, 3, 3), maker.weight(3), strides=(2, 2), pads=(1, 1, 1, 1))
    shared = maker.node("LeakyRelu", shared, alpha=0.01)
    rewritten = check_rewrite(merge_heads, maker.model(*(add_head(maker, shared, index) for index in range(2))))
    assert operators(rewritten)["Conv"] == 3
    assert operators(rewritten)["Gemm"] == 0


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(two_heads(slope=0.2), id="other slope"),
        pytest.param(two_heads(style_dim=3), id="other width"),
        pytest.param(two_heads(out_features=4), id="other length"),
        pytest.param(two_heads((2, 2), convolutions=1), id="other depth"),
        pytest.param(two_heads((2, 2), strides=(1, 1), pads=(1, 1, 0, 0), pixels=1), id="other stride"),
        pytest.param(two_heads((1, 1), auto_pad="SAME_UPPER", pads=None), id="padding left to the runtime"),
        pytest.param(two_heads((1, 1), dilations=(2, 2), pads=(2, 2, 2, 2)), id="dilation"),
        pytest.param(two_heads(linear={"alpha": 0.5}), id="scaled product"),
        pytest.param(two_heads(linear={"beta": 0.5}), id="scaled bias"),
    ],
)
def test_a_head_without_a_partner_stays(model: ir.Model) -> None:
    check_nothing_changes(merge_heads, model)


def test_linear_layers_that_are_no_heads_stay() -> None:
    maker = GraphMaker()
    x = maker.input("x", 4)
    computed = maker.node("Mul", maker.weight(5, 4), maker.input("factor", batch=1))
    flat = maker.node("Reshape", maker.node("Relu", x), maker.integers(-1, 4))
    activated = maker.node("Reshape", maker.node("LeakyRelu", x, alpha=0.1), maker.integers(-1, 4))
    model = maker.model(
        maker.node("Gemm", x, maker.weight(5, 4), maker.weight(5), transB=1),
        maker.node("Gemm", flat, maker.weight(5, 4), maker.weight(5), transB=1),
        maker.node("Gemm", flat, maker.weight(4, 5), maker.weight(5)),
        maker.node("Gemm", flat, maker.weight(5, 4), transB=1),
        maker.node("Gemm", activated, maker.weight(5, 4), maker.weight(5), transB=1),
        maker.node("Gemm", activated, computed, maker.weight(5), transB=1),
    )
    assert find_heads(model) == []
    check_nothing_changes(merge_heads, model)


@pytest.mark.parametrize("encoder_type", ENCODER_TYPES)
def test_encoders_compute_the_same(encoder_type: str) -> None:
    check_encoder(exported("encoder", encoder_type=encoder_type), pyramid=encoder_type == FPN)


@pytest.mark.slow
@pytest.mark.parametrize("encoder_type", ENCODER_TYPES)
def test_encoders_of_cars_compute_the_same(encoder_type: str) -> None:
    model = exported("encoder", encoder_type=encoder_type, dataset_type="cars_encode")
    check_encoder(model, pyramid=encoder_type == FPN)


def check_encoder(model: ir.Model, *, pyramid: bool) -> None:
    heads = find_heads(model)
    assert [head.layer for head in heads] == ["encoder.styles"] * 10
    rewritten = check_rewrite(merge_heads, model)
    assert find_heads(rewritten) == []
    # All on one map, or three on the coarse one, four on the middle one and three on the fine one.
    assert operators(rewritten)["MatMul"] - operators(model)["MatMul"] == (3 if pyramid else 1)


def test_only_the_named_layer_changes() -> None:
    model = exported("encoder")
    check_nothing_changes(lambda given: merge_heads(given, layers=["encoder.styles.3"]), model)
    merge_heads(model, layers=["encoder.styles"])
    assert find_heads(model) == []


def test_generator_has_no_heads() -> None:
    check_nothing_changes(merge_heads, exported("generator"))
