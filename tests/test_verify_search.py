import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from openvino import opset15 as ops

from restyle_deploy import Session, verify_search
from restyle_deploy.backends import openvino
from restyle_deploy.backends.openvino_nodes import CONVERSIONS
from restyle_deploy.build import BuildOptions, build_engine
from restyle_deploy.engine_graphs import save_graph
from restyle_deploy.errors import BackendUnavailableError
from restyle_deploy.verify import TOLERANCES, create_inputs
from restyle_deploy.verify_reference import ReferenceRun, run_reference
from restyle_deploy.verify_search import ONNX_BACKENDS, search_session
from tests.faults import add_faulty_engine, plant_fault


def expected_run(session: Session, *, steps: int = 2) -> ReferenceRun:
    return run_reference(session.bundle, create_inputs(session.config), steps=steps, threads=1)


@pytest.mark.parametrize(
    ("role", "layer"),
    [
        ("encoder", "encoder.input_layer.1"),
        ("encoder", "encoder.body.3.res_layer.4"),
        ("generator", "decoder.conv1.conv.modulation"),
        ("generator", "decoder.convs.5.conv"),
        ("generator", "decoder.to_rgbs.3"),
    ],
)
def test_fault_in_an_engine_is_found_by_its_layer(toy_bundle: Path, tmp_path: Path, role: str, layer: str) -> None:
    bundle = shutil.copytree(toy_bundle, tmp_path / "bundle")
    add_faulty_engine(bundle, role, layer)
    with Session.open(bundle, threads=1) as session:
        searches = search_session(session, expected_run(session), step=2)
    assert [search.graph for search in searches] == ["encoder", "generator"][: len(searches)]
    assert all(search.tested == "the engine" for search in searches)
    first = searches[-1].first
    assert first is not None
    assert (first.graph, first.layer) == (role, layer)


@pytest.fixture(scope="module")
def built(toy_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with an engine for each backend; only to be read."""
    bundle = shutil.copytree(toy_bundle, tmp_path_factory.mktemp("built") / "bundle")
    for backend in ONNX_BACKENDS:
        build_engine(bundle, BuildOptions(backend=backend, threads=1))
    return bundle


@pytest.mark.parametrize("backend", ONNX_BACKENDS)
def test_engine_that_was_built_is_compared_as_far_as_names_last(built: Path, backend: str) -> None:
    with Session.open(built, backend=backend, threads=1) as session:
        (engine,) = (engine for engine in session.bundle.engines if engine.backend == backend)
        searches = search_session(session, expected_run(session), step=1)
    assert ("target" in engine.graphs) == (backend == "onnxruntime")
    ours = "the engine" if backend == "onnxruntime" else "the graphs that the engine was built from"
    assert [search.tested for search in searches] == [ours] * 2
    assert all(search.first is None and search.compared > 20 for search in searches)


def test_fault_of_a_backend_is_found_by_its_layer(toy_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(node: Any) -> Any:
        (correct,) = CONVERSIONS["FusedBiasAct"](node)
        return ops.multiply(correct, np.float32(1.05)).outputs()

    monkeypatch.setattr(openvino, "CONVERSIONS", {**CONVERSIONS, "FusedBiasAct": convert})
    with Session.open(toy_bundle, backend="openvino", threads=1) as session:
        encoder, generator = search_session(session, expected_run(session), step=1)
    assert encoder.first is None
    assert generator.first is not None
    assert (generator.first.layer, generator.first.op_type) == ("decoder.conv1", "FusedBiasAct")


def test_fault_of_a_rewrite_is_found_in_an_engine_that_is_no_graph(
    built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save_faulty(model: ir.Model, role: str, *arguments: Any, **options: Any) -> Path:
        path = save_graph(model, role, *arguments, **options)
        if role == "encoder":
            plant_fault(path, "encoder.body.1.res_layer.1")
        return path

    monkeypatch.setattr(verify_search, "save_graph", save_faulty)
    with Session.open(built, backend="openvino", threads=1) as session:
        (encoder,) = search_session(session, expected_run(session), step=1)
    assert encoder.first is not None
    assert encoder.first.layer == "encoder.body.1.res_layer.1"


def test_layers_that_cannot_be_read_are_refused(toy_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Session.open(toy_bundle, threads=1) as session:
        expected = expected_run(session, steps=1)
        description = {**session.describe(), "backend": "tensorrt"}
        monkeypatch.setattr(session, "describe", lambda: description)
        with pytest.raises(BackendUnavailableError, match=r"tensorrt cannot be read; they can with onnxruntime, openv"):
            search_session(session, expected, step=1)


def test_tolerance_is_that_of_the_precision(toy_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    strict = {**TOLERANCES, "fp32": replace(TOLERANCES["fp32"], layers=0.0)}
    monkeypatch.setattr(verify_search, "TOLERANCES", strict)
    with Session.open(toy_bundle, threads=1) as session:
        (search,) = search_session(session, expected_run(session, steps=1), step=1)
    assert search.first is not None
    assert 0 < search.first.error < TOLERANCES["fp32"].layers
