"""Matrix products as convolutions, run by ONNX Runtime: the same numbers."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from restyle_deploy.backends.tensorrt_network import inline_functions, write_typed_graph
from restyle_deploy.backends.tensorrt_products import convolve_products
from restyle_deploy.bundle import Bundle, open_bundle
from restyle_deploy.graph.plan import TABLE, apply_choices, find_sites

PRODUCTS = {"Gemm", "MatMul"}


@pytest.fixture(scope="module")
def demo(project_root: Path) -> Bundle:
    return open_bundle(project_root / "engines" / "demo-faces")


def planned(demo: Bundle, name: str, **changes: str) -> ir.Model:
    model = ir.load(demo.graphs[name].path)
    sites = find_sites(model)
    table = {**TABLE["tensorrt-rtx"], **changes}
    apply_choices(model, sites, {site.name: table[site.family] for site in sites})
    return inline_functions(model)


def run(model: ir.Model, demo: Bundle, name: str, folder: Path) -> list[NDArray[np.float32]]:
    ir.save(model, folder / "graph.onnx")
    session = ort.InferenceSession(folder / "graph.onnx", providers=["CPUExecutionProvider"])
    random = np.random.default_rng(0)
    feeds = {
        spec.name: random.standard_normal(spec.concrete_shape(3)).astype(np.float32)
        for spec in demo.graphs[name].inputs
    }
    return [np.asarray(output) for output in session.run(None, feeds)]


@pytest.mark.parametrize(
    ("name", "heads", "products"),
    [
        ("encoder", "merged", {"MatMul": 1}),
        ("encoder", "separate", {"Gemm": 10}),
        ("generator", "merged", {"Gemm": 23}),
    ],
)
def test_products_become_convolutions_of_the_same_results(
    demo: Bundle, tmp_path: Path, name: str, heads: str, products: dict[str, int]
) -> None:
    model = planned(demo, name, heads=heads)
    operators = [node.op_type for node in model.graph]
    assert {operator: operators.count(operator) for operator in PRODUCTS & set(operators)} == products
    expected = run(model, demo, name, tmp_path)
    convolve_products(model)
    after = [node.op_type for node in model.graph]
    assert not PRODUCTS & set(after)
    assert after.count("Conv") == operators.count("Conv") + sum(products.values())
    for found, exact in zip(run(model, demo, name, tmp_path), expected, strict=True):
        np.testing.assert_allclose(found, exact, rtol=0, atol=1e-5 * np.abs(exact).max())


@pytest.mark.parametrize("is_for_turing", [False, True])
def test_typed_graph_has_no_products_for_turing(demo: Bundle, tmp_path: Path, is_for_turing: bool) -> None:
    typed = write_typed_graph(
        demo.graphs["encoder"].path,
        tmp_path,
        precision="fp16",
        route="functions",
        arch=None,
        max_batch=8,
        is_for_turing=is_for_turing,
    )
    model = ir.load(typed)
    assert bool(PRODUCTS & {node.op_type for node in model.graph}) is not is_for_turing
    used = {value.name for node in model.graph for value in node.inputs if value is not None}
    assert set(model.graph.initializers) <= used  # no weights twice


@pytest.mark.parametrize(
    ("operator", "attributes", "shape", "dtype"),
    [
        ("Gemm", {"alpha": 2.0}, (4, 4), np.float32),
        ("Gemm", {"beta": 2.0}, (4, 4), np.float32),
        ("Gemm", {"transA": 1}, (4, 4), np.float32),
        ("Gemm", {}, (4, 4), np.float16),
        ("Gemm", {}, None, np.float32),
        ("MatMul", {}, (4, 4), np.float32),
    ],
    ids=str,
)
def test_other_products_stay(
    operator: str, attributes: dict[str, float], shape: tuple[int, ...] | None, dtype: type[np.floating]
) -> None:
    x = ir.Value(name="x", shape=ir.Shape((4, 4)), type=ir.TensorType(ir.DataType.FLOAT))
    weight = ir.Value(name="weight", shape=ir.Shape((4, 4)), type=x.type)
    inputs = [x] if shape else [x, weight]
    if shape:
        weight.const_value = ir.tensor(np.ones(shape, dtype), name="weight")
    node = ir.node(operator, [x, weight], attributes=attributes, name="linear/product")
    graph = ir.Graph(inputs, node.outputs, nodes=[node], opset_imports={"": 20}, name="graph")
    if shape:
        graph.register_initializer(weight)
    convolve_products(ir.Model(graph, ir_version=10))
    assert [each.op_type for each in graph] == [operator]
