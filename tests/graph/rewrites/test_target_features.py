"""The target's half of the first convolution as a graph of its own."""

from typing import Any

import onnx_ir as ir
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from restyle_deploy.graph.rewrites.target_features import first_convolution, target_graph, target_once
from tests.graph_models import (
    BATCHES,
    ENCODER_TYPES,
    GraphMaker,
    assert_equal_in_range,
    border,
    check_nothing_changes,
    content,
    exported,
    random_inputs,
    run,
)


def beginning(
    *,
    size: tuple[int, int] = (6, 7),
    channels: int = 4,
    weight_size: tuple[int, int] = (3, 3),
    bias: bool = True,
    names: tuple[str, ...] = ("target", "current"),
    axis: int = 1,
    group: int = 1,
    computed_weight: bool = False,
    computed_bias: bool = False,
    activation: bool = False,
    reader: str | None = None,
    seed: int = 0,
    **attributes: Any,
) -> ir.Model:
    """Return the first layer of an encoder; `reader` names a value that another node reads too."""
    maker = GraphMaker(seed)
    images = [maker.input(name, 3, *size) for name in names]
    y = concat = maker.node("Concat", *images, axis=axis)
    y = maker.node("Relu", y) if activation else y
    in_channels = 3 * len(names) if axis == 1 else 3
    weight, biases = maker.weight(channels, in_channels // group, *weight_size), [maker.weight(channels)]
    if computed_weight:
        weight = maker.node("Mul", weight, maker.input("factor", batch=1))
    if computed_bias:
        biases = [maker.node("Mul", *biases, maker.input("factor", batch=1))]
    y = maker.node("Conv", y, weight, *(biases if bias else []), layer="first", group=group, **attributes)
    others = [maker.node("Neg", concat if reader == "concat" else reader)] if reader else []
    return maker.model(maker.node("Relu", y), *others)


def check_split(model: ir.Model) -> None:
    """Compare a model with the two graphs that it is split into."""
    before = content(model)
    target = target_graph(model)
    assert target is not None
    assert content(model) == before
    rewritten = model.clone()
    assert target_once(rewritten) is rewritten
    features = target.graph.outputs[0]
    assert [value.name for value in target.graph.inputs] == ["target"]
    assert features.name == "target_features"
    assert border(rewritten) == [(features.name, str(features.type), str(features.shape)), *border(model)[1:]]
    for batch in BATCHES:
        inputs = random_inputs(model, batch=batch, seed=batch)
        fed = {**run(target, {"target": inputs["target"]}), **inputs}
        fed.pop("target")
        assert_equal_in_range(run(rewritten, fed), run(model, inputs))


@settings(max_examples=40)
@given(
    size=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    channels=st.integers(1, 5),
    weight_size=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    pads=st.tuples(*[st.integers(0, 3)] * 4),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilations=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_computes_the_same(
    size: tuple[int, int],
    channels: int,
    weight_size: tuple[int, int],
    pads: tuple[int, ...],
    strides: tuple[int, int],
    dilations: tuple[int, int],
    bias: bool,
    seed: int,
) -> None:
    for axis in (0, 1):
        assume(size[axis] + pads[axis] + pads[axis + 2] > dilations[axis] * (weight_size[axis] - 1))
    check_split(
        beginning(
            size=size,
            channels=channels,
            weight_size=weight_size,
            bias=bias,
            seed=seed,
            pads=pads,
            strides=strides,
            dilations=dilations,
        )
    )


@pytest.mark.parametrize("encoder_type", ENCODER_TYPES)
def test_encoders_compute_the_same(encoder_type: str) -> None:
    check_split(exported("encoder", encoder_type=encoder_type))


@pytest.mark.slow
@pytest.mark.parametrize("encoder_type", ENCODER_TYPES)
def test_encoders_of_cars_compute_the_same(encoder_type: str) -> None:
    check_split(exported("encoder", encoder_type=encoder_type, dataset_type="cars_encode"))


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"names": ("image", "current")}, id="no target"),
        pytest.param({"names": ("current", "target")}, id="other order"),
        pytest.param({"names": ("target", "current", "mask")}, id="three images"),
        pytest.param({"axis": 2}, id="images one above the other"),
        pytest.param({"group": 2}, id="groups"),
        pytest.param({"computed_weight": True}, id="computed weight"),
        pytest.param({"computed_bias": True}, id="computed bias"),
        pytest.param({"activation": True}, id="no convolution follows"),
        pytest.param({"reader": "target"}, id="target that is read twice"),
        pytest.param({"reader": "concat"}, id="images that are read twice"),
        pytest.param({"auto_pad": "SAME_UPPER"}, id="padding left to the runtime"),
    ],
)
def test_other_beginnings_stay(changes: dict[str, Any]) -> None:
    if changes.get("group") == 2:
        changes = {**changes, "channels": 4}
    model = beginning(**changes)
    assert first_convolution(model) is None
    assert target_graph(model) is None
    check_nothing_changes(target_once, model)


def test_only_the_named_layer_changes() -> None:
    model = beginning()
    check_nothing_changes(lambda given: target_once(given, layers=["no such layer"]), model)
    assert target_once(model, layers=["first"]).graph.inputs[0].name == "target_features"


def test_generator_has_no_target() -> None:
    model = exported("generator")
    assert target_graph(model) is None
    check_nothing_changes(target_once, model)
