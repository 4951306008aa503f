"""A session's graphs as ONNX files whose layers can be compared, and the search for the first layer that differs."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

from restyle_deploy.backends import load_backend
from restyle_deploy.backends.base import Backend, RunnerOptions
from restyle_deploy.bundle import Bundle, EngineRecord, find_engine
from restyle_deploy.engine_graphs import graphs_by_role, needs_epilogues, save_graph
from restyle_deploy.errors import BackendUnavailableError
from restyle_deploy.runtime.session import Session
from restyle_deploy.tensors import TensorSpec
from restyle_deploy.verify import TOLERANCES
from restyle_deploy.verify_layers import GraphRun, LayerSearch, find_first_layer, run_on_backend
from restyle_deploy.verify_reference import ReferenceRun

Arrays = Mapping[str, NDArray[Any]]

# Backends that run the graphs as ONNX files have them.
ONNX_BACKENDS = ("onnxruntime", "openvino")


def search_session(session: Session, expected: ReferenceRun, *, step: int) -> tuple[LayerSearch, ...]:
    """Look for the first layer of a session's graphs that differs, each graph on what the reference gives it.

    An engine that is an ONNX file is searched itself. Of another one, the graphs that it was built from are run on the
    backend; of a session without an engine, the exported graphs.

    Args:
        session: open, on an ONNX backend.
        expected: gives the inputs.
        step: whose inputs; the first is 1.
    Returns:
        A search of each graph in the order of computation; the last one has what differs, if anything does.
    Raises:
        BackendUnavailableError: the session runs on another backend.
        BackendUnavailableError, BuildError, VerificationError: see `find_first_layer`.
    """
    about = session.describe()
    if about["backend"] not in ONNX_BACKENDS:
        raise BackendUnavailableError(
            f"layers of backend {about['backend']} cannot be read; they can with {', '.join(ONNX_BACKENDS)}"
        )
    options = RunnerOptions(device=about["device"], threads=about["threads"], precision=about["precision"])
    backend = load_backend(about["backend"])
    before, after = expected.state_before(step), expected.state_before(step + 1)
    searches: list[LayerSearch] = []
    with _tested_graphs(session) as tested:
        taken = slice(0, tested.batch)
        encoded = {"target": expected.targets, "current": before.current, "latent": before.latents}
        for name, arrays in (("encoder", encoded), ("generator", {"latent": after.latents})):
            inputs = {key: array[taken] for key, array in arrays.items()}
            features = _target_features(tested, inputs, backend, options) if name == "encoder" else {}
            run = GraphRun(
                file=tested.files[name],
                inputs={**inputs, **features},
                backend=backend,
                options=options.for_graph(name),
            )
            tolerance = TOLERANCES[run.options.precision].layers
            search = find_first_layer(name, session.bundle.graphs[name].path, inputs, run, tolerance=tolerance)
            searches.append(replace(search, tested=tested.name))
            if search.first:
                break
    return tuple(searches)


@dataclass(frozen=True, kw_only=True)
class TestedGraphs:
    """The graphs that are searched in a session's place.

    Attributes:
        name: what they are, for people.
        files: ONNX files, by role.
        batch: 1 where they take one image at a time, None for any number.
        features: the border of the graph `target`, where there is one.
    """

    name: str
    files: Mapping[str, Path]
    batch: int | None = None
    features: tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]] | None = None


@contextmanager
def _tested_graphs(session: Session) -> Iterator[TestedGraphs]:
    """Yield the graphs to search for a session, as ONNX files."""
    about, bundle = session.describe(), session.bundle
    key = {name: about[name] for name in ("backend", "device", "precision")}
    engine = None if about["plan"] == "plain" else find_engine(bundle, **key)
    if engine is None:
        files = {name: graph.path for name, graph in bundle.graphs.items()}
        yield TestedGraphs(name="the exported graphs", files=files)
        return
    target = engine.graphs.get("target")
    tested = TestedGraphs(
        name="the engine",
        files={role: graph.path for role, graph in engine.graphs.items()},
        batch=engine.batch,
        features=(target.inputs, target.outputs) if target else None,
    )
    if all(file.suffix == ".onnx" for file in tested.files.values()):
        yield tested
        return
    with tempfile.TemporaryDirectory(prefix="restyle-deploy-", ignore_cleanup_errors=True) as folder:
        files = _planned_graphs(bundle, engine, Path(folder))
        yield replace(tested, name="the graphs that the engine was built from", files=files)


def _planned_graphs(bundle: Bundle, engine: EngineRecord, folder: Path) -> dict[str, Path]:
    """Rewrite the exported graphs by an engine's plan, as its build did, and return the files by role."""
    epilogues = needs_epilogues(engine.precision, has_kernels=engine.build.get("plugin_hash") is not None)
    files: dict[str, Path] = {}
    for name, record in bundle.graphs.items():
        parts = graphs_by_role(
            name, ir.load(record.path), bundle.config, choices=engine.plan["choices"], epilogues=epilogues
        )
        files |= {role: save_graph(part, role, folder, batch=engine.batch) for role, part in parts.items()}
    return files


def _target_features(
    tested: TestedGraphs, inputs: Arrays, backend: Backend, options: RunnerOptions
) -> dict[str, NDArray[Any]]:
    """Return what the graph `target` gives the encoder, nothing where there is none."""
    if tested.features is None:
        return {}
    given, made = tested.features
    files, taken = tested.files["target"], {"target": inputs["target"]}
    return run_on_backend(files, taken, given, made, backend, options.for_graph("target"))
