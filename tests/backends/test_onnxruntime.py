import gc
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from restyle_deploy.backends import load_backend
from restyle_deploy.backends.base import Runner, RunnerOptions
from restyle_deploy.bundle import Bundle, GraphRecord, open_bundle
from restyle_deploy.errors import BuildError

ort = pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def bundle(toy_bundle: Path) -> Bundle:
    return open_bundle(toy_bundle)


@pytest.fixture(scope="module", params=["encoder", "generator"])
def record(bundle: Bundle, request: pytest.FixtureRequest) -> GraphRecord:
    """A graph of the bundle."""
    return bundle.graphs[request.param]


@pytest.fixture
def engine(record: GraphRecord, tmp_path: Path) -> Path:
    """An engine of `record`, alone in its folder with its weights."""
    path = tmp_path / "engine" / record.path.name
    path.parent.mkdir()
    load_backend("onnxruntime").build(record.path, path, RunnerOptions())
    return path


def results_of(file: Path, record: GraphRecord) -> dict[str, NDArray[Any]]:
    random = np.random.default_rng(0)
    buffers = {spec.name: spec.allocate(2) for spec in record.inputs + record.outputs}
    for spec in record.inputs:
        random.standard_normal(out=buffers[spec.name], dtype=np.float32)
    runner = load_backend("onnxruntime").load(file, record.inputs, record.outputs, RunnerOptions())
    runner.bind(buffers)()
    runner.close()
    return {spec.name: buffers[spec.name] for spec in record.outputs}


def load(bundle: Bundle, options: RunnerOptions) -> Runner:
    record = bundle.graphs["generator"]
    return load_backend("onnxruntime").load(record.path, record.inputs, record.outputs, options)


@pytest.mark.parametrize(("threads", "passed"), [(None, 0), (1, 1), (3, 3)])
def test_threads_and_provider_reach_the_library(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, threads: int | None, passed: int
) -> None:
    seen: list[Any] = []

    def record(path: str, settings: Any, providers: list[str]) -> None:
        seen.append((path, settings.intra_op_num_threads, providers))

    monkeypatch.setattr(ort, "InferenceSession", record)
    load(bundle, RunnerOptions(threads=threads))
    assert seen == [(str(bundle.graphs["generator"].path), passed, ["CPUExecutionProvider"])]


def test_bound_run_keeps_its_buffers_alive(bundle: Bundle) -> None:
    runner = load(bundle, RunnerOptions())
    record = bundle.graphs["generator"]
    buffers = {spec.name: spec.allocate(1) for spec in record.inputs + record.outputs}
    alive = [weakref.ref(array) for array in buffers.values()]
    run = runner.bind(buffers)
    buffers.clear()
    gc.collect()
    assert all(reference() is not None for reference in alive)
    run()
    del run
    gc.collect()
    assert all(reference() is None for reference in alive)


def test_bound_run_outlives_the_runner(bundle: Bundle) -> None:
    runner = load(bundle, RunnerOptions())
    record = bundle.graphs["generator"]
    buffers = {spec.name: np.full(spec.concrete_shape(1), 0.5, spec.dtype) for spec in record.inputs + record.outputs}
    run = runner.bind(buffers)
    runner.close()
    run()
    assert not (buffers["image"] == 0.5).all()


def test_refusal_names_the_version(tmp_path: Path) -> None:
    (tmp_path / "graph.onnx").write_bytes(b"\x08\x08")
    with pytest.raises(BuildError, match=rf"ONNX Runtime {ort.__version__} refuses graph\.onnx"):
        load_backend("onnxruntime").load(tmp_path / "graph.onnx", (), (), RunnerOptions())


def test_refusal_is_one_line(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("unknown node\n1. details\n2. more of them\n")

    monkeypatch.setattr(ort, "InferenceSession", refuse)
    with pytest.raises(BuildError, match=r"refuses generator\.onnx: unknown node\Z"):
        load(bundle, RunnerOptions())


def test_engine_is_a_graph_and_its_weights(engine: Path) -> None:
    assert {path.name for path in engine.parent.iterdir()} == {engine.name, f"{engine.stem}.weights"}
    assert engine.stat().st_size < engine.with_suffix(".weights").stat().st_size


def test_weights_are_mapped(engine: Path, record: GraphRecord) -> None:
    """Opening an engine reads no weights: the system maps their file."""
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        pytest.skip("only Linux lists what is mapped")
    runner = load_backend("onnxruntime").load(engine, record.inputs, record.outputs, RunnerOptions())
    assert str(engine.with_suffix(".weights")) in maps.read_text(encoding="utf-8")
    runner.close()


def test_engine_replaces_an_engine(engine: Path, record: GraphRecord) -> None:
    """The file of the weights is written anew, not continued. The graph's file differs in the order of its opsets."""
    weights, size = engine.with_suffix(".weights"), engine.stat().st_size
    before = weights.read_bytes()
    load_backend("onnxruntime").build(record.path, engine, RunnerOptions())
    assert weights.read_bytes() == before
    assert engine.stat().st_size == size
    assert len(list(engine.parent.iterdir())) == 2


def test_engine_computes_what_its_graph_does(engine: Path, record: GraphRecord) -> None:
    expected = results_of(record.path, record)
    for name, found in results_of(engine, record).items():
        np.testing.assert_allclose(found, expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("level", ["ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED"])
def test_engine_is_optimised_already(
    engine: Path, record: GraphRecord, monkeypatch: pytest.MonkeyPatch, level: str
) -> None:
    """Optimising it once more when it is opened changes no bit."""
    expected = results_of(engine, record)
    open_session = ort.InferenceSession

    def open_at_level(path: str, settings: Any, **others: Any) -> Any:
        settings.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
        return open_session(path, settings, **others)

    monkeypatch.setattr(ort, "InferenceSession", open_at_level)
    for name, found in results_of(engine, record).items():
        np.testing.assert_array_equal(found, expected[name])


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    "damage", [Path.unlink, _truncate, lambda path: path.write_bytes(b"")], ids=["missing", "cut off", "empty"]
)
def test_damaged_weights_are_refused(engine: Path, record: GraphRecord, damage: Callable[[Path], object]) -> None:
    damage(engine.with_suffix(".weights"))
    with pytest.raises(BuildError, match=rf"ONNX Runtime {ort.__version__} refuses {engine.name}: "):
        results_of(engine, record)


def test_engine_that_cannot_be_written_is_a_build_error(record: GraphRecord, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=rf"ONNX Runtime {ort.__version__} refuses {record.path.name}: "):
        load_backend("onnxruntime").build(record.path, tmp_path / "none" / "engine.onnx", RunnerOptions())


def test_engine_may_be_moved(engine: Path, record: GraphRecord, tmp_path: Path) -> None:
    expected = results_of(engine, record)
    moved = shutil.move(engine.parent, tmp_path / "moved")
    for name, found in results_of(Path(moved) / engine.name, record).items():
        np.testing.assert_array_equal(found, expected[name])
