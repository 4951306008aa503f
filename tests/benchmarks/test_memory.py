"""Memory that is counted, and memory that must be there."""

import mmap
import os
from pathlib import Path

import numpy as np
import onnx
import pytest

from benchmarks.memory import ModelMemory, memory_of_graphs, read_status_mib
from restyle_deploy.bench.memory import reset_peak

LINUX = Path("/proc/self/status").is_file()


def chain(path: Path, *, annotated: bool = True) -> Path:
    """x [N, 4] -> a [N, 8] -> b [N, 8] -> y = a + b, with a weight of [4, 8]."""

    def value(name: str, width: int) -> onnx.ValueInfoProto:
        return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N", width])

    nodes = [
        onnx.helper.make_node("MatMul", ["x", "weight"], ["a"]),
        onnx.helper.make_node("Relu", ["a"], ["b"]),
        onnx.helper.make_node("Add", ["a", "b"], ["y"]),
    ]
    graph = onnx.helper.make_graph(
        nodes,
        "chain",
        [value("x", 4)],
        [value("y", 8)],
        initializer=[onnx.numpy_helper.from_array(np.zeros((4, 8), np.float32), "weight")],
        value_info=[value("a", 8), value("b", 8)] if annotated else [],
    )
    onnx.save(onnx.helper.make_model(graph), path)
    return path


def test_weights_add_up_and_the_largest_live_set_counts(tmp_path: Path) -> None:
    graph = chain(tmp_path / "chain.onnx")
    # x, a, b and y are alive when y is made: inputs and outputs of the graph are kept by the caller.
    assert memory_of_graphs(graph) == ModelMemory(weight_bytes=4 * 32, activation_bytes=4 * (4 + 8 + 8 + 8))
    assert memory_of_graphs(graph, graph) == ModelMemory(weight_bytes=8 * 32, activation_bytes=4 * 28)


def test_graph_without_shapes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not tell the shape of a"):
        memory_of_graphs(chain(tmp_path / "chain.onnx", annotated=False))


def test_exported_graphs_tell_all_shapes(toy_bundle: Path) -> None:
    found = memory_of_graphs(toy_bundle / "encoder.onnx", toy_bundle / "generator.onnx")
    assert found.weight_bytes > 0
    assert found.activation_bytes >= 4 * 8 * 64 * 64  # the generator's last map


@pytest.mark.skipif(not LINUX, reason="the peak is Linux's")
def test_peak_starts_anew() -> None:
    # Memory of its own: what malloc gives may come from, and go back to, memory that former tests left in the process.
    with mmap.mmap(-1, 64 * 2**20) as block:
        block.write(bytes(len(block)))
        high = read_status_mib("VmHWM")
    assert high >= 64
    reset_peak()
    if os.access("/proc/self/clear_refs", os.W_OK):
        assert read_status_mib("VmHWM") < high


def test_what_the_kernel_does_not_tell_is_zero() -> None:
    assert read_status_mib("NoSuchField") == 0
