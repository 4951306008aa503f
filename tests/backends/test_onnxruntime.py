import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from restyle_deploy.backends import load_backend
from restyle_deploy.backends.base import Runner, RunnerOptions
from restyle_deploy.bundle import Bundle, open_bundle
from restyle_deploy.errors import BuildError

ort = pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def bundle(toy_bundle: Path) -> Bundle:
    return open_bundle(toy_bundle)


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
