"""Styles and weights of order one, multiplied back behind the convolution."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from restyle_deploy.graph.edit import array_of
from restyle_deploy.graph.rewrites.depthwise_filter import separable_filter
from restyle_deploy.graph.rewrites.fuse_epilogue import fuse_epilogue
from restyle_deploy.graph.rewrites.merged_upsampling import merged_upsampling
from restyle_deploy.graph.rewrites.normalize_styles import normalize_styles
from restyle_deploy.graph.rewrites.phase_upsampling import phase_upsampling
from restyle_deploy.graph.rewrites.polyphase_upsampling import polyphase_upsampling
from restyle_deploy.graph.rewrites.scale_constants import scale_constants
from tests.graph_models import (
    TOLERANCE,
    Array,
    GraphMaker,
    check_nothing_changes,
    check_rewrite,
    exported,
    operators,
    run,
)

EPSILON = 1e-8
# Zeros, far below epsilon's root, about it, official ones, adversarial ones, and the last whose squares are in float32.
NORMS = (0.0, 1e-32, 1e-20, 1e-6, 1e-4, 1.0, 1e4, 1e9, 1e17)
CHANNELS = (4, 3)


def layer(
    *,
    demodulated: bool = True,
    up: bool = False,
    fused: bool = False,
    weight: Array | None = None,
    computed_weight: bool = False,
    bias: bool = False,
    group: int = 1,
    second_user: str | None = None,
    style_axes: tuple[int, int] = (2, 3),
    demod_axes: tuple[int, int] = (2, 3),
    seed: int = 0,
) -> ir.Model:
    """Return a modulated convolution whose style is an input, as the exporter writes it."""
    maker, (inputs, outputs) = GraphMaker(seed), CHANNELS
    random = np.random.RandomState(seed)
    x, style = maker.input("x", inputs, 4, 4), maker.input("style", inputs)
    if fused:  # the style in an epilogue, behind an activation
        x = maker.node("FusedBiasAct", x, maker.weight(inputs), negative_slope=0.2, gain=1.5)
    factor = maker.node("Unsqueeze", style, maker.integers(*style_axes), layer="conv")
    values = {"modulated": maker.node("Mul", x, factor, layer="conv")}
    shape = (inputs, outputs, 3, 3) if up else (outputs, inputs // group, 3, 3)
    array = random.standard_normal(shape).astype(np.float32) if weight is None else weight
    kernel = maker.constant(array)
    if computed_weight:
        kernel = maker.node("Mul", kernel, maker.input("factor", batch=1))
    parameters = (kernel, maker.weight(outputs)) if bias else (kernel,)
    if up:
        y = maker.node("ConvTranspose", values["modulated"], *parameters, layer="conv", strides=(2, 2))
        y = maker.filter(y, maker.weight(4, 4), channels=outputs, pads=(1, 1, 1, 1), layer="conv")
    else:
        y = maker.node("Conv", values["modulated"], *parameters, layer="conv", pads=(1, 1, 1, 1), group=group)
    values["convolved"] = y
    if demodulated:
        energy = np.square(array, dtype=np.float32).sum(axis=(2, 3))
        energy = energy if up else energy.T  # [I, O]
        squares = maker.node("Mul", style, style, layer="conv")
        total = maker.node("Gemm", squares, maker.constant(energy), maker.constant([EPSILON]), layer="conv")
        root = maker.node("Reciprocal", maker.node("Sqrt", total, layer="conv"), layer="conv")
        values["demod"] = maker.node("Unsqueeze", root, maker.integers(*demod_axes), layer="conv")
        y = maker.node("Mul", y, values["demod"], layer="conv")
    others = [maker.node("Neg", values[second_user])] if second_user else []
    return maker.model(y, *others)


def styles_of(norms: tuple[float, ...], *, seed: int = 0) -> dict[str, Array]:
    """Return one sample per norm; a style's largest magnitude is its norm."""
    random = np.random.RandomState(seed)
    style = random.standard_normal((len(norms), CHANNELS[0]))
    style *= np.array(norms)[:, None] / np.abs(style).max(axis=1, keepdims=True)
    return {
        "x": random.standard_normal((len(norms), CHANNELS[0], 4, 4)).astype(np.float32),
        "style": style.astype(np.float32),
    }


@settings(max_examples=20)
@given(
    flags=st.fixed_dictionaries({name: st.booleans() for name in ("demodulated", "up", "fused")}),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    seed=st.integers(0, 99),
)
def test_every_norm_computes_the_same(flags: dict[str, Any], scale: float, seed: int) -> None:
    shape = CHANNELS if flags["up"] else CHANNELS[::-1]
    weight = scale * np.random.RandomState(seed).standard_normal((*shape, 3, 3)).astype(np.float32)
    model = layer(**flags, weight=weight, seed=seed)
    before = fuse_epilogue(model.clone()) if flags["fused"] else model
    after = normalize_styles(before.clone())
    assert operators(after)["Div"] == 1
    inputs = styles_of(NORMS, seed=seed)
    (expected,), (found,) = run(before, inputs).values(), run(after, inputs).values()
    for norm, wanted, got in zip(NORMS, expected, found, strict=True):
        error, largest = np.abs(got - wanted).max(), np.abs(wanted).max()
        assert np.isfinite(wanted).all()
        # Below 1e-30 of the range, what is left of a tiny style may be rounded to zero.
        assert error <= max(TOLERANCE * largest, 1e-27), f"norm {norm:g}: error {error:.2g} of {largest:.2g}"
    np.testing.assert_array_equal(found[0], 0)


def test_nothing_is_left_of_size() -> None:
    """Weights times √fan_in end in (1/2, 1], styles at 1; the powers of two are taken out without rounding."""
    weight = np.random.RandomState(0).standard_normal((3, 4, 3, 3)).astype(np.float32)
    weight *= np.array([1e-4, 1.0, 1e4], np.float32).reshape(-1, 1, 1, 1)
    rewritten = normalize_styles(layer(weight=weight))
    (convolution,) = (node for node in rewritten.graph if node.op_type == "Conv")
    constant = convolution.inputs[1]
    assert constant is not None
    assert constant.const_value is not None
    normalized = constant.const_value.numpy()
    largest = np.abs(normalized).max(axis=(1, 2, 3)) * 6  # √(4·9)
    assert (largest > 0.5).all()
    assert (largest <= 1).all()
    quotients = weight / normalized
    np.testing.assert_array_equal(quotients, np.exp2(np.round(np.log2(quotients))))
    (division,) = (node for node in rewritten.graph if node.op_type == "Div")
    rewritten.graph.outputs.append(division.outputs[0])
    rewritten.graph.outputs[-1].type = ir.TensorType(ir.DataType.FLOAT)
    style = list(run(rewritten, styles_of(NORMS)).values())[-1]
    np.testing.assert_allclose(np.abs(style[2:]).max(axis=1), 1, rtol=1e-6)
    assert np.abs(style).max() <= 1


def test_channel_without_weights_stays_zero() -> None:
    weight = np.random.RandomState(0).standard_normal((3, 4, 3, 3)).astype(np.float32)
    weight[1] = 0
    (found,) = run(normalize_styles(layer(weight=weight)), styles_of(NORMS)).values()
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found[:, 1], 0)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"computed_weight": True}, id="computed weight"),
        pytest.param({"bias": True}, id="bias"),
        pytest.param({"group": 2, "weight": np.ones((4, 2, 3, 3), np.float32), "demodulated": False}, id="groups"),
        pytest.param({"second_user": "modulated"}, id="modulated map that is read twice"),
        pytest.param({"style_axes": (0, 1)}, id="style of other axes"),
    ],
)
def test_other_convolutions_stay(changes: dict[str, Any]) -> None:
    check_nothing_changes(normalize_styles, layer(**changes))


@pytest.mark.parametrize(
    "changes", [{"second_user": "convolved"}, {"second_user": "demod"}, {"up": True, "second_user": "convolved"}]
)
def test_norms_follow_the_convolution_if_the_demodulation_is_not_its_own(changes: dict[str, Any]) -> None:
    rewritten = check_rewrite(normalize_styles, layer(**changes))
    (convolution,) = (node for node in rewritten.graph if node.op_type in ("Conv", "ConvTranspose"))
    (product,) = (use.node for use in convolution.outputs[0].uses())
    assert product.op_type == "Mul"
    assert product.inputs[1] is not None
    factor = product.inputs[1].producer()
    assert factor is not None
    assert factor.op_type == "Unsqueeze"


@pytest.mark.parametrize(
    ("rewrites", "layers"),
    [
        ((), 14),
        ((fuse_epilogue,), 14),
        ((separable_filter, fuse_epilogue), 14),
        ((polyphase_upsampling, fuse_epilogue), 14),
        ((scale_constants, merged_upsampling), 14),
        ((phase_upsampling,), 14),
        ((phase_upsampling, fuse_epilogue), 14),
    ],
)
def test_generator_of_any_plan(rewrites: tuple[Callable[[ir.Model], ir.Model], ...], layers: int) -> None:
    """Nine demodulated layers and five ToRGB."""
    model = exported("generator")
    for rewrite in rewrites:
        rewrite(model)
    rewritten = check_rewrite(normalize_styles, model)
    assert operators(rewritten)["Div"] == layers


def test_encoder_has_nothing_to_normalize() -> None:
    model = exported("encoder")
    before = operators(model)
    assert operators(normalize_styles(model)) == before


def two_convolutions(*, meeting: str) -> ir.Model:
    """Return two convolutions of one modulated map, and what meets behind them, scaled by a demodulation."""
    maker, (inputs, outputs) = GraphMaker(), CHANNELS
    x, style = maker.input("x", inputs, 4, 4), maker.input("style", inputs)
    modulated = maker.node("Mul", x, maker.node("Unsqueeze", style, maker.integers(2, 3)))
    maps = [
        maker.node("Conv", modulated, maker.weight(outputs, inputs, size, size), pads=[size // 2] * 4)
        for size in (1, 3)
    ]
    axis = 0 if meeting == "samples" else 1
    y = maker.node("Add", *maps) if meeting == "sum" else maker.node("Concat", *maps, axis=axis)
    if meeting == "thrice":
        y = maker.node("Concat", y, maps[0], axis=1)
    elif meeting == "reordered":
        y = maker.node("Transpose", maker.node("Reshape", y, maker.integers(-1, 2, 3 * 16)), perm=(0, 2, 1))
        y = maker.node("Reshape", y, maker.integers(-1, 6, 4, 4))
    elif meeting == "mixed":  # across samples
        y = maker.node("Reshape", y, maker.integers(-1, 2, 4, 4))
    root = maker.node("Unsqueeze", maker.input("demod", 1), maker.integers(2, 3))
    if meeting not in ("samples", "mixed"):
        y = maker.node("Mul", y, root)
    return maker.model(y)


@pytest.mark.parametrize("meeting", ["concatenated", "reordered", "sum", "thrice", "samples", "mixed"])
def test_several_convolutions_of_one_map_share_its_norm(meeting: str) -> None:
    """What scales the whole of them, and nothing else, takes the norms; otherwise each is multiplied by itself."""
    rewritten = check_rewrite(normalize_styles, two_convolutions(meeting=meeting))
    assert operators(rewritten)["Div"] == 1
    convolutions = [node for node in rewritten.graph if node.op_type == "Conv"]
    multiplied = [node for node in convolutions if {use.node.op_type for use in node.outputs[0].uses()} == {"Mul"}]
    assert len(multiplied) == (0 if meeting in ("concatenated", "reordered") else 2)
    weights = [array_of(node.inputs[1]) for node in convolutions]
    assert all(weight is not None and np.abs(weight.astype(np.float32)).max() <= 1 for weight in weights)
