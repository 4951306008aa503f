"""Reading and changing graphs."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import pytest

from restyle_deploy.graph.edit import (
    Edit,
    array_of,
    has_explicit_pads,
    integer_of,
    integers_of,
    layer_of,
    nodes_of_type,
    only_user,
    replace_value,
    sizes_of,
)
from tests.graph_models import GraphMaker, border, random_inputs, run


def chain() -> ir.Model:
    """Return y = -exp(x), whose nodes are of the layers `first` and `second`."""
    maker = GraphMaker()
    exp = maker.node("Exp", maker.input("x", 3), layer="first")
    return maker.model(maker.node("Neg", exp, layer="second"))


def test_new_nodes_stand_in_front_and_are_named_after_the_layer() -> None:
    model = chain()
    exp, neg = model.graph
    edit = Edit(model, neg, "scaling")
    y = edit.add("Mul", exp.outputs[0], edit.constant(np.full(3, 2, np.float32)))
    y = edit.add("ReduceSum", y, edit.integers(1), keepdims=1)
    neg.replace_input_with(0, y)
    assert [node.name for node in model.graph] == [exp.name, "second/scaling_1", "second/scaling_3", neg.name]
    assert list(model.graph.initializers) == ["second/scaling_0", "second/scaling_2"]
    inputs = random_inputs(model, batch=2)
    (found,) = run(model, inputs).values()
    np.testing.assert_allclose(found, -2 * np.exp(inputs["x"]).sum(1, keepdims=True), rtol=1e-6)


def test_names_are_taken_once() -> None:
    model = chain()
    exp, neg = model.graph
    for _ in range(2):
        edit = Edit(model, neg, "copy")
        neg.replace_input_with(0, edit.add("Mul", exp.outputs[0], edit.constant(np.ones(3, np.float32))))
    names = [node.name for node in model.graph] + list(model.graph.initializers)
    assert len(names) == len(set(names)) == 6


def test_constants_know_shape_and_type() -> None:
    model = chain()
    edit = Edit(model, model.graph[-1], "constants")
    value = edit.constant(np.arange(6, dtype=np.float32).reshape(2, 3).T)
    assert (tuple(value.shape or ()), value.dtype) == ((3, 2), ir.DataType.FLOAT)
    np.testing.assert_array_equal(array_of(value), [[0, 3], [1, 4], [2, 5]])
    integers = edit.integers(1, -1)
    assert (tuple(integers.shape or ()), integers.dtype) == ((2,), ir.DataType.INT64)


@pytest.mark.parametrize(
    ("name", "layer"), [("encoder.body.3/Conv_12", "encoder.body.3"), ("Conv_12", "Conv_12"), ("", ""), (None, "")]
)
def test_a_nodes_name_begins_with_its_layer(name: str | None, layer: str) -> None:
    assert layer_of(ir.node("Neg", [ir.Value()], name=name)) == layer


def test_only_constants_have_a_content() -> None:
    maker = GraphMaker()
    x = maker.input("x", 3)
    model = maker.model(maker.node("Add", maker.node("Neg", x), maker.constant([1.0, 2.0, 3.0])))
    neg, add = model.graph
    assert array_of(None) is None
    assert array_of(neg.inputs[0]) is None
    assert array_of(add.inputs[0]) is None
    np.testing.assert_array_equal(array_of(add.inputs[1]), [1, 2, 3])
    model.graph.inputs.append(add.inputs[1])  # type: ignore[arg-type]
    assert array_of(add.inputs[1]) is None, "a caller may feed another value"


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        (("N", 3, 4), (3, 4)),
        ((2, 3), (3,)),
        ((2,), ()),
        (("N", 3, "W"), None),
        (("N", None), None),
        ((), None),
        (None, None),
    ],
)
def test_sizes_are_known_or_not(shape: Sequence[int | str | None] | None, sizes: tuple[int, ...] | None) -> None:
    assert sizes_of(ir.Value(shape=None if shape is None else ir.Shape(shape))) == sizes


def test_no_value_has_no_sizes() -> None:
    assert sizes_of(None) is None


def test_attributes_have_defaults() -> None:
    node = ir.node("Conv", [ir.Value()], attributes={"pads": [1, 2, 3, 4], "group": 2})
    assert integers_of(node, "pads") == (1, 2, 3, 4)
    assert integers_of(node, "strides") == ()
    assert integers_of(node, "strides", (1, 1)) == (1, 1)
    assert integer_of(node, "group", 1) == 2
    assert integer_of(node, "axis", 1) == 1


@pytest.mark.parametrize(
    ("attributes", "explicit"), [({}, True), ({"auto_pad": "NOTSET"}, True), ({"auto_pad": "VALID"}, False)]
)
def test_padding_is_explicit_or_left_to_the_runtime(attributes: dict[str, str], explicit: bool) -> None:
    assert has_explicit_pads(ir.node("Conv", [ir.Value()], attributes=attributes)) == explicit


def test_a_value_has_one_reader_or_not() -> None:
    maker = GraphMaker()
    x = maker.input("x", 3)
    once, twice = maker.node("Exp", x), maker.node("Neg", x)
    square = maker.node("Mul", twice, twice)
    output = maker.node("Add", once, square)
    model = maker.model(output, maker.node("Abs", output))
    exp, neg, mul, add, absolute = model.graph
    assert only_user(exp.outputs[0]) is add
    assert only_user(neg.outputs[0]) is mul, "one node, though it reads the value twice"
    assert only_user(model.graph.inputs[0]) is None, "two nodes"
    assert only_user(add.outputs[0]) is None, "an output of the graph"
    assert only_user(absolute.outputs[0]) is None


def test_nodes_are_found_by_operator_and_layer() -> None:
    maker = GraphMaker()
    x = maker.input("x", 3)
    for layer in ("a", "b", "a.b"):
        x = maker.node("Neg", maker.node("Exp", x, layer=layer), layer=layer)
    model = maker.model(x)
    assert [layer_of(node) for node in nodes_of_type(model, "Neg")] == ["a", "b", "a.b"]
    assert [layer_of(node) for node in nodes_of_type(model, "Neg", iter(["a", "a.b", "c"]))] == ["a", "a.b"]
    assert list(nodes_of_type(model, "Neg", [])) == []
    for node in nodes_of_type(model, "Neg"):
        replace_value(node.outputs[0], Edit(model, node, "twin").add("Neg", node.inputs[0]))  # type: ignore[arg-type]
        model.graph.remove(node, safe=True)
    assert [layer_of(node) for node in nodes_of_type(model, "Neg")] == ["a", "b", "a.b"]


def test_a_replaced_value_keeps_name_type_and_shape() -> None:
    model = chain()
    before = border(model)
    for node in tuple(model.graph):
        old = node.outputs[0]
        name, shape, type_ = old.name, old.shape, old.type
        new = Edit(model, node, "twin").add(node.op_type, *node.inputs)  # type: ignore[arg-type]
        replace_value(old, new)
        model.graph.remove(node, safe=True)
        assert (new.name, new.shape, new.type) == (name, shape, type_)
    assert border(model) == before
    inputs = random_inputs(model, batch=2)
    (found,) = run(model, inputs).values()
    np.testing.assert_allclose(found, -np.exp(inputs["x"]), rtol=1e-6)
