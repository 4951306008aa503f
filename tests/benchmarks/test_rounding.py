"""The graphs whose tensors are rounded: every product's operands, or all."""

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner

from benchmarks import rounding
from tests.graph_models import GraphMaker, operators, run


def product(value: float) -> ir.Model:
    """x · weight + 1 of one channel and pixel, twice added to itself afterwards."""
    maker = GraphMaker()
    x = maker.input("x", 1, 1, 1)
    weight = maker.constant(np.full((1, 1, 1, 1), value, np.float32))
    y = maker.node("Conv", x, weight)
    return maker.model(maker.node("Add", y, y))


@pytest.mark.parametrize(("extent", "expected"), [("operands", 2 * 1.0078125), ("all", 2 * 1.0078125)])
def test_operands_are_rounded_to_bf16(extent: str, expected: float) -> None:
    model = rounding.round_tensors(product(1.005), ir.DataType.BFLOAT16, extent=extent)
    (found,) = run(model, {"x": np.ones((1, 1, 1, 1), np.float32)}).values()
    assert found.item() == expected


@pytest.mark.parametrize(("extent", "expected"), [("weights", 1.0078125 * 1.005), ("maps", 1.005 * 1.0078125)])
def test_one_of_a_products_operands_is_rounded(extent: str, expected: float) -> None:
    """The weight is 1.005, and so is the map; each rounds to 1.0078125, and a cast tells which of them did."""
    model = rounding.round_tensors(product(1.005), ir.DataType.BFLOAT16, extent=extent)
    (rounded,) = (node.inputs[0] for node in model.graph if node.op_type == "Cast" and is_first_cast(node))
    assert rounded is not None
    assert (rounded.const_value is not None) is (extent == "weights")
    (found,) = run(model, {"x": np.full((1, 1, 1, 1), 1.005, np.float32)}).values()
    assert found.item() == pytest.approx(2 * expected, rel=1e-6)


def is_first_cast(node: ir.Node) -> bool:
    return node.attributes["to"].as_int() == ir.DataType.BFLOAT16


def test_all_rounds_what_a_node_writes_too() -> None:
    inputs = {"x": np.full((1, 1, 1, 1), 1.0078125, np.float32)}  # of 8 bits; its square has 15
    (operands,) = run(
        rounding.round_tensors(product(1.0078125), ir.DataType.BFLOAT16, extent="operands"), inputs
    ).values()
    (everything,) = run(rounding.round_tensors(product(1.0078125), ir.DataType.BFLOAT16, extent="all"), inputs).values()
    assert operands.item() == 2 * 1.0078125**2
    assert everything.item() == 2 * 1.015625


def test_one_rounding_serves_all_products_that_read_a_value() -> None:
    maker = GraphMaker()
    x = maker.input("x", 1, 1, 1)
    weight = maker.constant(np.ones((1, 1, 1, 1), np.float32))
    model = maker.model(maker.node("Add", maker.node("Conv", x, weight), maker.node("Conv", x, weight)))
    assert operators(rounding.round_tensors(model, ir.DataType.FLOAT16, extent="operands"))["Cast"] == 4


def test_command_writes_the_differences(tmp_path: Path) -> None:
    output = tmp_path / "rounding.json"
    result = CliRunner().invoke(rounding.main, ["--steps", "1", "-o", str(output)])
    assert result.exit_code == 0, result.output
    rows = json.loads(output.read_text(encoding="utf-8"))["models"]["demo"]
    assert [(row["type"], row["extent"]) for row in rows] == [
        (name, extent) for name in rounding.TYPES for extent in rounding.EXTENTS
    ]
    psnr = {(row["type"], row["extent"]): row["psnr_db"] for row in rows}
    for name in rounding.TYPES:  # the more is rounded, the worse
        assert min(psnr[name, "weights"], psnr[name, "maps"]) > psnr[name, "operands"] > psnr[name, "all"]
    assert psnr["fp16", "operands"] > psnr["bf16", "operands"]  # it has three bits more
