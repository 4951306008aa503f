"""Layers of a graph: their products, weights and activations."""

import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner

from benchmarks import operators
from benchmarks.operators import layers_of
from restyle_deploy.backends.base import RunnerOptions
from restyle_deploy.engines import EngineRecord
from tests.bundles import add_engine


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """A convolution to 5 channels, a transposed one to 3, and a linear layer; and one operation that is no layer."""
    floats = ir.TensorType(ir.DataType.FLOAT)

    def value(name: str, *sizes: int) -> ir.Value:
        return ir.Value(name=name, shape=ir.Shape(["N", *sizes]), type=floats)

    def weight(name: str, *sizes: int) -> ir.Value:
        return ir.Value(
            name=name, shape=ir.Shape(sizes), type=floats, const_value=ir.tensor(np.zeros(sizes, np.float32))
        )

    image, vector = value("image", 2, 8, 8), value("vector", 4)
    weights = [weight("w0", 5, 2, 3, 3), weight("w1", 5, 3, 2, 2), weight("w2", 4, 6)]
    conv = ir.node("Conv", (image, weights[0]), {"pads": [1, 1, 1, 1]}, outputs=[value("a", 5, 8, 8)])
    active = ir.node("Relu", conv.outputs, outputs=[value("b", 5, 8, 8)])
    up = ir.node("ConvTranspose", (active.outputs[0], weights[1]), {"strides": [2, 2]}, outputs=[value("c", 3, 16, 16)])
    linear = ir.node("Gemm", (vector, weights[2]), outputs=[value("d", 6)])
    content = ir.Graph(
        (image, vector),
        (up.outputs[0], linear.outputs[0]),
        nodes=(conv, active, up, linear),
        initializers=weights,
        opset_imports={"": 20},
        name="layers",
    )
    ir.save(ir.Model(content, ir_version=10), tmp_path / "layers.onnx")
    return tmp_path / "layers.onnx"


def test_layers_of_a_graph(graph: Path) -> None:
    conv, up, linear = layers_of(graph)
    assert (conv.products, conv.weights, conv.activations) == (5 * 2 * 9 * 64, 90, (2 + 5) * 64)
    assert (up.products, up.weights, up.activations) == (5 * 3 * 4 * 64, 60, 5 * 64 + 3 * 256)
    assert (linear.products, linear.weights, linear.activations) == (24, 24, 10)


def test_engines_of_all_precisions_are_profiled(
    toy_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str, str]] = []

    def profile(engine: EngineRecord, role: str, options: RunnerOptions) -> dict[str, float]:
        asked.append((engine.precision, role, options.precision))
        return {"Convolution": 2.0, "Add": 1.0}

    bundle = shutil.copytree(toy_bundle, tmp_path / "bundle")
    for backend, precision in (("onnxruntime", "fp32"), ("openvino", "bf16"), ("openvino", "mixed")):
        add_engine(bundle, backend=backend, precision=precision)
    for name in ("onnxruntime", "openvino"):
        monkeypatch.setattr(operators, f"_profile_{name}", profile)
    monkeypatch.setattr(operators, "_measure_ceiling", lambda options: 1e9)
    result = CliRunner().invoke(operators.main, [str(bundle)])
    assert result.exit_code == 0, result.output
    heads = [line for line in result.output.splitlines() if line.endswith("| ms | share |")]
    labels = ("onnxruntime fp32", "openvino bf16", "openvino mixed")
    assert heads == [f"| {label}, 3 ms | ms | share |" for label in labels] * 2
    assert asked == [
        *(("fp32", "encoder", "fp32"), ("bf16", "encoder", "bf16"), ("mixed", "encoder", "fp32")),
        *(("fp32", "generator", "fp32"), ("bf16", "generator", "bf16"), ("mixed", "generator", "bf16")),
    ]
