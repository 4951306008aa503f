from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from restyle_deploy.graph.layer_values import LayeredGraph
from tests.graph_models import GraphMaker, content, exported, random_inputs, run


def save(model: ir.Model, path: Path) -> Path:
    path.write_bytes(content(model))
    return path


@pytest.fixture
def branches() -> ir.Model:
    """x -> a -> b -> out, and y -> c, which joins at the end; a shape on the way is of whole numbers."""
    maker = GraphMaker()
    x, y = maker.input("x", 4, 4, 4), maker.input("y", 4, 4, 4)
    a = maker.node("Abs", x, layer="a")
    b = maker.node("Conv", a, maker.weight(4, 4, 3, 3), layer="b", pads=(1, 1, 1, 1))
    c = maker.node("Neg", y, layer="c")
    maker.node("Shape", c, layer="c")
    return maker.model(maker.node("Add", b, c, layer="out"))


def test_values_are_those_of_floating_point_in_order(branches: ir.Model, tmp_path: Path) -> None:
    graph = LayeredGraph(save(branches, tmp_path / "graph.onnx"), tmp_path / "parts")
    assert [node.op_type for node in graph.values.values()] == ["Abs", "Conv", "Neg", "Add"]


def test_part_computes_its_values_and_takes_no_more_than_it_needs(branches: ir.Model, tmp_path: Path) -> None:
    graph = LayeredGraph(save(branches, tmp_path / "graph.onnx"), tmp_path / "parts")
    values = {node.op_type: value for value, node in graph.values.items()}
    inputs = random_inputs(branches, batch=2)
    whole = run(branches, inputs)
    outputs = [values["Abs"], values["Conv"]]
    assert set(graph.inputs_for(outputs, inputs)) == {"x"}
    part = onnx.load(graph.write(outputs))
    assert [node.op_type for node in part.graph.node] == ["Abs", "Conv"]
    assert [info.name for info in part.graph.input] == ["x"]
    found = run(ir.from_proto(part), {"x": inputs["x"]})
    np.testing.assert_array_equal(found[values["Abs"]], np.abs(inputs["x"]))
    again = run(ir.from_proto(onnx.load(graph.write([values["Add"]]))), inputs)  # after another part was written
    np.testing.assert_array_equal(again[values["Add"]], next(iter(whole.values())))


def test_weights_are_written_once_beside_the_parts(tmp_path: Path) -> None:
    maker = GraphMaker()
    value = maker.node("Conv", maker.input("x", 16, 4, 4), maker.weight(64, 16, 3, 3), layer="wide")
    model = maker.model(value)
    path = save(model, tmp_path / "graph.onnx")
    graph = LayeredGraph(path, tmp_path / "parts")
    part = graph.write([value])
    assert path.stat().st_size > 64 * 16 * 9 * 4 > 20 * part.stat().st_size
    inputs = random_inputs(model, batch=1)
    np.testing.assert_array_equal(run(ir.from_proto(onnx.load(part)), inputs)[value], run(model, inputs)[value])


def test_sizes_and_types_are_those_of_the_file(branches: ir.Model, tmp_path: Path) -> None:
    graph = LayeredGraph(save(branches, tmp_path / "graph.onnx"), tmp_path / "parts")
    value = next(iter(graph.values))
    assert graph.bytes_of(value, 3) == 3 * 4 * 4 * 4 * 4
    assert graph.dtype_of(value) == "float32"
    model = onnx.load(tmp_path / "graph.onnx")
    del model.graph.value_info[:]
    onnx.save(model, tmp_path / "bare.onnx")
    bare = LayeredGraph(tmp_path / "bare.onnx", tmp_path / "bare")
    assert bare.bytes_of(value, 3) == float("inf")
    assert bare.dtype_of(value) == "float32"
    assert bare.can_stand_for(value, graph)


def test_value_of_another_shape_or_without_input_stands_for_none(tmp_path: Path) -> None:
    graphs = []
    for channels in (4, 8):
        maker = GraphMaker()
        convolved = maker.node("Conv", maker.input("x", 4, 4, 4), maker.weight(channels, 4, 1, 1), layer="first")
        constant = maker.node("Exp", maker.weight(1, channels, 1, 1), layer="constant")
        path = save(maker.model(maker.node("Mul", convolved, constant, layer="last")), tmp_path / f"{channels}.onnx")
        graphs.append(LayeredGraph(path, tmp_path / str(channels)))
    ours, theirs = graphs
    same = [ours.can_stand_for(value, ours) for value in ours.values]
    assert dict(zip((node.op_type for node in ours.values.values()), same, strict=True)) == {
        "Conv": True,
        "Exp": False,
        "Mul": True,
    }
    assert not any(ours.can_stand_for(value, theirs) for value in theirs.values)
    assert not ours.can_stand_for("missing", theirs)


def test_layers_between_compared_values_are_named(tmp_path: Path) -> None:
    maker = GraphMaker()
    x = maker.input("x", 4, 4, 4)
    values = [x]
    for layer in ("one", "two", "three", "four"):
        values.append(maker.node("Abs", values[-1], layer=layer))
    graph = LayeredGraph(save(maker.model(values[-1]), tmp_path / "graph.onnx"), tmp_path / "parts")
    assert graph.merged_into(values[4], {values[1]}) == ("two", "three")
    assert graph.merged_into(values[4], set(values)) == ()
    assert graph.merged_into(values[2], set()) == ("one",)


def test_every_value_of_an_exported_graph_can_be_an_output(tmp_path: Path) -> None:
    generator = exported("generator")
    graph = LayeredGraph(save(generator, tmp_path / "generator.onnx"), tmp_path / "parts")
    inputs = random_inputs(generator, batch=2)
    found = run(ir.from_proto(onnx.load(graph.write(list(graph.values)))), inputs)
    assert len(found) == len(graph.values) > 50
    for value, array in found.items():
        assert graph.bytes_of(value, 2) == array.nbytes
    np.testing.assert_allclose(found["image"], run(generator, inputs)["image"], atol=1e-5)
