"""Constants folded, nothing unused left, each weight once."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from restyle_deploy.graph.rewrites.depthwise_filter import depthwise_filter
from restyle_deploy.graph.rewrites.skip_upsample import skip_upsample
from restyle_deploy.graph.rewrites.tidy import tidy
from tests.graph_models import ENCODER_TYPES, GraphMaker, check_rewrite, exported, operators, up_convolution


def functions(model: ir.Model) -> set[str]:
    return {function.name for function in model.functions.values()}


def test_computes_the_same() -> None:
    check_rewrite(tidy, up_convolution())


def test_constants_are_folded() -> None:
    maker = GraphMaker()
    x = maker.input("x", 3, 4, 4)
    weight = maker.node("Mul", maker.weight(2, 3, 1, 1), maker.node("Sqrt", maker.weight(1, positive=True)))
    rewritten = check_rewrite(tidy, maker.model(maker.node("Conv", x, weight)))
    assert operators(rewritten) == {"Conv": 1}
    assert len(rewritten.graph.initializers) == 1


def test_large_constants_are_folded() -> None:
    maker = GraphMaker()
    x = maker.input("x", 2048)
    weight = maker.node("Transpose", maker.weight(2048, 2048), perm=(1, 0))
    rewritten = check_rewrite(tidy, maker.model(maker.node("MatMul", x, weight)))
    assert operators(rewritten) == {"MatMul": 1}


def test_what_nothing_reads_is_removed() -> None:
    maker = GraphMaker()
    x = maker.input("x", 3)
    maker.node("Add", maker.node("Exp", x), maker.weight(3))
    rewritten = check_rewrite(tidy, maker.model(maker.node("Neg", x)))
    assert operators(rewritten) == {"Neg": 1}
    assert not rewritten.graph.initializers


def test_copies_are_merged() -> None:
    maker = GraphMaker()
    x, weight = maker.input("x", 3), np.arange(1.0, 10.0).reshape(3, 3)
    for _ in range(3):
        x = maker.node("MatMul", x, maker.constant(weight))
    x = maker.node("Mul", maker.node("Identity", x), maker.constant(weight[:1]))
    rewritten = check_rewrite(tidy, maker.model(x))
    assert operators(rewritten) == {"MatMul": 3, "Mul": 1}
    assert len(rewritten.graph.initializers) == 2


def test_a_node_in_front_of_its_inputs_is_moved() -> None:
    maker = GraphMaker()
    model = maker.model(maker.node("Neg", maker.node("Exp", maker.input("x", 3))))
    exp, neg = model.graph
    model.graph.remove(exp)
    model.graph.append(exp)
    tidy(model)
    assert list(model.graph) == [exp, neg]


def test_bodies_go_with_the_last_node_that_has_them() -> None:
    model = exported("generator")
    assert functions(tidy(model)) == {"FusedBiasAct", "UpFirDn2d"}
    skip_upsample(depthwise_filter(model))
    assert functions(tidy(model)) == {"FusedBiasAct"}


@pytest.mark.parametrize("encoder_type", ENCODER_TYPES)
def test_encoders_compute_the_same(encoder_type: str, tmp_path: Path) -> None:
    check_file(check_rewrite(tidy, exported("encoder", encoder_type=encoder_type)), tmp_path / "tidied.onnx")


@pytest.mark.parametrize("dataset_type", ["ffhq_encode", "cars_encode"])
def test_generator_computes_the_same(dataset_type: str, tmp_path: Path) -> None:
    check_file(check_rewrite(tidy, exported("generator", dataset_type=dataset_type)), tmp_path / "tidied.onnx")


def test_rewritten_generator_holds_each_weight_once(tmp_path: Path) -> None:
    """Depthwise filters are the same for all layers of a width: they stand once."""
    model = skip_upsample(depthwise_filter(exported("generator")))
    check_file(tidy(model), tmp_path / "rewritten.onnx")


def check_file(model: ir.Model, path: Path) -> None:
    """Assert that each of a file's weights is read, and that no two have the same content."""
    ir.save(model, path)
    graph = onnx.load(path).graph
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    read = {name for node in graph.node for name in node.input}
    assert set(arrays) <= read
    assert not [node.name for node in graph.node if node.op_type in ("Constant", "Identity")]
    contents = {(str(array.dtype), array.shape, array.tobytes()) for array in arrays.values()}
    assert sum(array.nbytes for array in arrays.values()) == sum(len(data) for _, _, data in contents)
