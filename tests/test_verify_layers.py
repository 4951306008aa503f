import shutil
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest

from restyle_deploy import verify_layers
from restyle_deploy.backends import load_backend
from restyle_deploy.backends.base import RunnerOptions
from restyle_deploy.errors import VerificationError
from restyle_deploy.verify import TOLERANCES
from restyle_deploy.verify_layers import GraphRun, LayerSearch, find_first_layer
from restyle_deploy.verify_reference import run_graph
from restyle_deploy.verify_search import ONNX_BACKENDS
from tests.faults import plant_fault
from tests.graph_models import GraphMaker, content, random_inputs

TOLERANCE = TOLERANCES["fp32"].layers
BACKENDS = ONNX_BACKENDS
CHAIN = ("first", "second", "third", "fourth")


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """Four convolutions in a row."""
    maker = GraphMaker()
    value = maker.input("x", 4, 8, 8)
    for layer in CHAIN:
        value = maker.node("Conv", value, maker.weight(4, 4, 3, 3), layer=layer, pads=(1, 1, 1, 1))
    path = tmp_path / "chain.onnx"
    path.write_bytes(content(maker.model(value)))
    return path


def compare(reference: Path, tested: Path, *, backend: str = "onnxruntime", **options: Any) -> LayerSearch:
    """Search a graph of one or more inputs with random numbers."""
    inputs = random_inputs(ir.load(reference), batch=2)
    run = GraphRun(file=tested, inputs=inputs, backend=load_backend(backend), options=RunnerOptions(threads=1))
    return find_first_layer("encoder", reference, inputs, run, **{"tolerance": TOLERANCE, **options})


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_graphs_differ_nowhere(chain: Path, backend: str) -> None:
    search = compare(chain, chain, backend=backend)
    assert search.first is None
    assert search.compared == len(CHAIN)
    assert search.largest is not None
    assert search.largest.error < TOLERANCE / 10


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("group_bytes", [1, 10_000, 10**9])
@pytest.mark.parametrize("layer", CHAIN)
def test_layer_of_a_fault_is_found(chain: Path, backend: str, layer: str, group_bytes: int) -> None:
    faulty = Path(shutil.copy(chain, chain.with_name("faulty.onnx")))
    plant_fault(faulty, layer)
    search = compare(chain, faulty, backend=backend, group_bytes=group_bytes)
    assert search.first is not None
    assert (search.first.graph, search.first.layer, search.first.op_type) == ("encoder", layer, "Conv")
    assert search.first.error == pytest.approx(0.05, rel=0.01)
    assert search.first.merged == ()
    assert search.compared == CHAIN.index(layer) + 1


def test_memory_of_a_run_is_bounded(chain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def note(graph: Path, inputs: Any) -> Any:
        arrays = run_graph(graph, inputs)
        sizes.append(sum(array.nbytes for array in arrays.values()))
        return arrays

    monkeypatch.setattr(verify_layers, "run_graph", note)
    one = 2 * 4 * 8 * 8 * 4
    assert compare(chain, chain, group_bytes=2 * one).compared == len(CHAIN)
    assert sizes == [2 * one, 2 * one]
    sizes.clear()
    assert compare(chain, chain, group_bytes=one - 1).compared == len(CHAIN)
    assert sizes == [one] * 4


def test_value_that_is_not_finite_differs(chain: Path) -> None:
    faulty = Path(shutil.copy(chain, chain.with_name("faulty.onnx")))
    plant_fault(faulty, "third", factor=float("nan"))
    search = compare(chain, faulty)
    assert search.first is not None
    assert (search.first.layer, search.first.error) == ("third", float("inf"))


def test_noise_around_zero_is_no_difference(tmp_path: Path) -> None:
    paths = []
    for shift in (0.0, 1e-8):
        maker = GraphMaker()
        zero = maker.node("Mul", maker.input("x", 4, 4, 4), maker.constant([0.0]), layer="zero")
        path = tmp_path / f"{shift}.onnx"
        path.write_bytes(content(maker.model(maker.node("Add", zero, maker.constant([shift]), layer="shift"))))
        paths.append(path)
    assert compare(*paths).first is None


def test_layers_that_were_merged_away_are_named(chain: Path) -> None:
    model = onnx.load(chain)
    second, third = model.graph.node[1], model.graph.node[2]
    second.output[0] = third.input[0] = "another name"
    faulty = chain.with_name("faulty.onnx")
    onnx.save(model, faulty)
    plant_fault(faulty, "second")
    search = compare(chain, faulty)
    assert search.first is not None
    assert (search.first.layer, search.first.merged) == ("third", ("second",))


def test_graphs_with_nothing_in_common_are_refused(chain: Path, tmp_path: Path) -> None:
    maker = GraphMaker()
    other = tmp_path / "other.onnx"
    other.write_bytes(content(maker.model(maker.node("Abs", maker.input("x", 4, 8, 8)))))
    with pytest.raises(VerificationError, match=r"other\.onnx: has no layer of the exported graph chain\.onnx"):
        compare(chain, other)


@pytest.mark.parametrize("name", ["encoder", "generator"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_all_layers_of_exported_graphs_can_be_compared(toy_bundle: Path, backend: str, name: str) -> None:
    path = toy_bundle / f"{name}.onnx"
    search = compare(path, path, backend=backend)
    assert search.first is None
    assert search.compared > 50
