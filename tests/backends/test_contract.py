"""What every backend keeps to, on each device that it has here. A new backend only adds its row to `BACKENDS`."""

import importlib
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from restyle_deploy.backends import BACKENDS, default_device, load_backend
from restyle_deploy.backends.base import EXACT_PRECISION, PRECISIONS, Backend, Runner, RunnerOptions
from restyle_deploy.bundle import Bundle, open_bundle
from restyle_deploy.device_array import Array, DeviceArray
from restyle_deploy.errors import BackendUnavailableError, BuildError, ShapeError
from restyle_deploy.runtime.session import Session
from restyle_deploy.verify import (
    TOLERANCES,
    check_parity,
    compare_with_expectation,
    load_expectation,
)
from tests.backends.place import Place

Buffers = dict[str, NDArray[Any]]

OF_THE_CPU_ALONE = {"openvino"}
APPROXIMATE_PRECISIONS = [precision for precision in PRECISIONS if precision != EXACT_PRECISION]


def tolerances_of(precision: str) -> dict[str, float]:
    """Return the largest difference that passes, by output."""
    row = TOLERANCES[precision]
    return {"latent_out": row.latents, "image": row.images, "current": row.images}


EXACT = tolerances_of(EXACT_PRECISION)


def list_cases() -> list[Any]:
    """Return (backend, device) of all that can run here; and of each that could on a GPU, though it cannot here.

    Those of a GPU are marked so, and skip with what is missing: `pytest -m gpu` tells what has been tried.
    """
    cases: list[Any] = []
    for name in BACKENDS:
        try:
            devices = load_backend(name).devices()
        except BackendUnavailableError:
            devices = (default_device(name),)
        if name not in OF_THE_CPU_ALONE and not any(map(is_gpu, devices)):
            devices = (*devices, "cuda:0")
        cases += [pytest.param((name, device), marks=[pytest.mark.gpu] * is_gpu(device)) for device in devices]
    return cases


def is_gpu(device: str) -> bool:
    return device.startswith("cuda")


def name_of(case: tuple[str, str]) -> str:
    return "-".join(case)


@pytest.fixture(scope="module", params=list_cases(), ids=name_of)
def case(request: pytest.FixtureRequest) -> tuple[str, str]:
    """Name and device of a backend."""
    name, device = request.param
    try:
        load_backend(name).check_options(RunnerOptions(device=device))
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    return name, device


@pytest.fixture(scope="module")
def backend(case: tuple[str, str]) -> Backend:
    return load_backend(case[0])


@pytest.fixture(scope="module")
def bundle(toy_bundle: Path) -> Bundle:
    return open_bundle(toy_bundle)


@pytest.fixture(scope="module")
def shared_place(case: tuple[str, str]) -> Iterator[Place]:
    """Where `runners` are: on a GPU nothing is loaded there once they have run, as all share working memory."""
    place = Place(case[1])
    yield place
    place.close()


@pytest.fixture
def place(case: tuple[str, str]) -> Iterator[Place]:
    """For a test that loads graphs of its own."""
    place = Place(case[1])
    yield place
    place.close()


@pytest.fixture(scope="module")
def runners(backend: Backend, shared_place: Place, bundle: Bundle) -> Mapping[str, Runner]:
    """Both graphs, loaded once for all tests that close nothing."""
    return {name: shared_place.load(backend, bundle, name) for name in bundle.graphs}


def create_buffers(bundle: Bundle, graph: str, batch: int, seed: int = 0) -> Buffers:
    """Return random inputs and outputs full of NaN."""
    record = bundle.graphs[graph]
    random = np.random.default_rng(seed)
    inputs = {spec.name: random.normal(0, 0.5, spec.concrete_shape(batch)).astype(spec.dtype) for spec in record.inputs}
    return inputs | {spec.name: np.full(spec.concrete_shape(batch), np.nan, spec.dtype) for spec in record.outputs}


def outputs_of(bundle: Bundle, graph: str, buffers: Buffers) -> Buffers:
    return {spec.name: buffers[spec.name].copy() for spec in bundle.graphs[graph].outputs}


graphs = pytest.mark.parametrize("graph", ["encoder", "generator"])


def test_devices_and_versions_are_named(backend: Backend, case: tuple[str, str]) -> None:
    assert case[1] in backend.devices()
    assert backend.library_versions()
    assert all(version for version in backend.library_versions().values())


@graphs
def test_results_land_in_the_bound_buffers(
    bundle: Bundle, shared_place: Place, runners: Mapping[str, Runner], graph: str
) -> None:
    buffers = create_buffers(bundle, graph, 2)
    given = {name: array.copy() for name, array in buffers.items()}
    arrays = shared_place.upload(buffers)
    run = runners[graph].bind(arrays)
    run()
    shared_place.read(arrays, buffers)
    first = outputs_of(bundle, graph, buffers)
    assert all(np.isfinite(array).all() for array in first.values())
    for spec in bundle.graphs[graph].inputs:
        np.testing.assert_array_equal(buffers[spec.name], given[spec.name])
    for spec in bundle.graphs[graph].outputs:
        buffers[spec.name].fill(np.nan)
    shared_place.write(arrays, buffers)
    run()
    shared_place.read(arrays, buffers)
    for name, array in first.items():
        np.testing.assert_array_equal(buffers[name], array)


@graphs
def test_recorded_run_gives_the_same_bits(
    bundle: Bundle, shared_place: Place, runners: Mapping[str, Runner], graph: str
) -> None:
    buffers = create_buffers(bundle, graph, 2)
    arrays = shared_place.upload(buffers)
    run = runners[graph].bind(arrays)
    run()
    shared_place.read(arrays, buffers)
    expected = outputs_of(bundle, graph, buffers)
    assert shared_place.device.is_host <= runners[graph].is_capturable
    if not runners[graph].is_capturable:
        pytest.skip("this backend's runs are enqueued one by one")
    replay = shared_place.device.capture(run)
    for _ in range(2):
        for spec in bundle.graphs[graph].outputs:
            buffers[spec.name].fill(np.nan)
        shared_place.write(arrays, buffers)
        replay()
        shared_place.read(arrays, buffers)
        for name, array in expected.items():
            np.testing.assert_array_equal(buffers[name], array)
    replay.close()


@graphs
def test_inputs_are_read_anew_at_every_run(
    bundle: Bundle, shared_place: Place, runners: Mapping[str, Runner], graph: str
) -> None:
    buffers, other = create_buffers(bundle, graph, 2), create_buffers(bundle, graph, 2, seed=1)
    arrays = shared_place.upload(buffers)
    run = runners[graph].bind(arrays)
    run()
    shared_place.read(arrays, buffers)
    before = outputs_of(bundle, graph, buffers)
    for spec in bundle.graphs[graph].inputs:
        np.copyto(buffers[spec.name], other[spec.name])
    shared_place.write(arrays, buffers)
    run()
    shared_place.read(arrays, buffers)
    shared_place.run(runners[graph], other)
    for name, array in outputs_of(bundle, graph, other).items():
        assert not np.array_equal(buffers[name], before[name])
        np.testing.assert_allclose(buffers[name], array, rtol=0, atol=EXACT[name])


@graphs
def test_batches_equal_single_images(
    bundle: Bundle, shared_place: Place, runners: Mapping[str, Runner], graph: str
) -> None:
    whole = create_buffers(bundle, graph, 8)
    for batch in (1, 3, 8):
        part = {name: np.ascontiguousarray(array[:batch]) for name, array in whole.items()}
        shared_place.run(runners[graph], part)
        for index in range(batch):
            single = {name: np.ascontiguousarray(array[index : index + 1]) for name, array in whole.items()}
            shared_place.run(runners[graph], single)
            for name, array in outputs_of(bundle, graph, single).items():
                np.testing.assert_allclose(part[name][index], array[0], rtol=0, atol=EXACT[name], err_msg=name)


def test_several_bound_runs_take_turns(bundle: Bundle, shared_place: Place, runners: Mapping[str, Runner]) -> None:
    first, second = create_buffers(bundle, "generator", 1), create_buffers(bundle, "generator", 2, seed=1)
    arrays = [shared_place.upload(buffers) for buffers in (first, second)]
    run_first, run_second = (runners["generator"].bind(each) for each in arrays)
    run_first()
    shared_place.read(arrays[0], first)
    expected = first["image"].copy()
    run_second()
    shared_place.read(arrays[0], first)
    np.testing.assert_array_equal(first["image"], expected)
    first["image"].fill(np.nan)
    shared_place.write(arrays[0], first)
    run_first()
    shared_place.read(arrays[0], first)
    np.testing.assert_array_equal(first["image"], expected)


def test_thread_count_changes_no_result(backend: Backend, case: tuple[str, str], bundle: Bundle) -> None:
    results = []
    for threads in (1, 2):
        place = Place(case[1])
        buffers = create_buffers(bundle, "generator", 2)
        place.run(place.load(backend, bundle, "generator", threads=threads), buffers)
        place.close()
        results.append(buffers["image"])
    np.testing.assert_allclose(results[0], results[1], rtol=0, atol=EXACT["image"])


def test_buffers_of_another_device_are_refused(
    bundle: Bundle, shared_place: Place, runners: Mapping[str, Runner]
) -> None:
    buffers: dict[str, Array] = dict(create_buffers(bundle, "generator", 1))
    if shared_place.device.is_host:
        buffers["latent"] = DeviceArray(address=256, shape=buffers["latent"].shape, dtype=np.dtype(np.float32))
    with pytest.raises(TypeError, match=r"^got (arrays of a GPU for latent|NumPy arrays for latent, image), expected"):
        runners["generator"].bind(buffers)


def strided(array: NDArray[Any]) -> NDArray[Any]:
    return np.repeat(array, 2, axis=-1)[..., ::2]


WRONG_BUFFERS = {
    "wrong channels": lambda array: np.zeros((2, 4, *array.shape[2:]), array.dtype),
    "one axis more": lambda array: array[None],
    "one axis less": lambda array: array[0],
    "no axis": lambda array: np.float32(0) + array[(0,) * array.ndim][()] * np.ones((), array.dtype),
    "another batch": lambda array: array[:1],
    "float64": lambda array: array.astype(np.float64),
    "integers": lambda array: array.astype(np.int32),
    "other byte order": lambda array: array.astype(">f4"),
    "strided": strided,
    "Fortran order": np.asfortranarray,
}


@pytest.mark.parametrize("name", ["target", "current", "latent", "latent_out"])
@pytest.mark.parametrize("change", WRONG_BUFFERS.values(), ids=WRONG_BUFFERS.keys())
def test_wrong_buffers_are_refused(bundle: Bundle, runners: Mapping[str, Runner], name: str, change: Any) -> None:
    buffers = create_buffers(bundle, "encoder", 2)
    buffers[name] = change(np.zeros_like(buffers[name]))
    with pytest.raises(ShapeError, match=r": got (contiguous|strided) .*, expected contiguous float32 \["):
        runners["encoder"].bind(buffers)


@graphs
def test_missing_buffers_are_all_named(bundle: Bundle, runners: Mapping[str, Runner], graph: str) -> None:
    buffers = create_buffers(bundle, graph, 1)
    latent = {"latent": buffers.pop("latent")}
    with pytest.raises(ShapeError, match="no buffer for latent; got "):
        runners[graph].bind(buffers)
    others = ", ".join(buffers)
    with pytest.raises(ShapeError, match=f"no buffer for {others}; got latent"):
        runners[graph].bind(latent)
    with pytest.raises(ShapeError, match="got none"):
        runners[graph].bind({})


def test_closed_runner_binds_no_more(backend: Backend, place: Place, bundle: Bundle) -> None:
    runner = place.load(backend, bundle, "generator")
    runner.close()
    runner.close()
    with pytest.raises(ValueError, match="closed"):
        runner.bind(place.upload(create_buffers(bundle, "generator", 1)))


@pytest.mark.parametrize("device", ["", "abacus", "cpu:99"])
def test_unknown_device_is_refused(backend: Backend, bundle: Bundle, device: str) -> None:
    record = bundle.graphs["generator"]
    with pytest.raises(BackendUnavailableError, match=f"device '{device}' cannot run here; available: "):
        backend.load(record.path, record.inputs, record.outputs, RunnerOptions(device=device))


def test_options_that_cannot_run_are_refused_before_a_graph_is_there(backend: Backend, case: tuple[str, str]) -> None:
    backend.check_options(RunnerOptions(device=case[1]))
    backend.check_options(RunnerOptions(device=case[1], threads=2, precision=EXACT_PRECISION))
    for device in ("", "abacus", "cpu:99"):
        with pytest.raises(BackendUnavailableError, match=f"device '{device}' cannot run here; available: .*{case[1]}"):
            backend.check_options(RunnerOptions(device=device))
    for precision in ("", "abacus", "fp64"):
        with pytest.raises(
            BackendUnavailableError, match=f"precision {precision}( cannot run here|; it has)"
        ) as caught:
            backend.check_options(RunnerOptions(device=case[1], precision=precision))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"no graph", None])
def test_file_that_is_no_graph_is_refused(
    backend: Backend, place: Place, bundle: Bundle, tmp_path: Path, content: bytes | None
) -> None:
    if content is not None:
        (tmp_path / "broken.onnx").write_bytes(content)
    record = bundle.graphs["encoder"]
    with pytest.raises(BuildError, match=r"refuses broken\.onnx: ") as caught:
        backend.load(tmp_path / "broken.onnx", record.inputs, record.outputs, place.options())
    assert "\n" not in str(caught.value)


def build(backend: Backend, bundle: Bundle, graph: str, folder: Path, options: RunnerOptions) -> Path:
    engine = folder / f"{graph}{backend.ENGINE_SUFFIX}"
    backend.build(bundle.graphs[graph].path, engine, options)
    return engine


@graphs
def test_engine_computes_what_its_graph_does(
    backend: Backend,
    place: Place,
    shared_place: Place,
    bundle: Bundle,
    runners: Mapping[str, Runner],
    tmp_path: Path,
    graph: str,
) -> None:
    built = tmp_path / "built"
    built.mkdir()
    engine = build(backend, bundle, graph, built, place.options())
    assert engine.is_file()
    assert all(path.name.startswith(engine.stem) for path in built.iterdir())
    moved = built.rename(tmp_path / "moved") / engine.name
    record = bundle.graphs[graph]
    runner = backend.load(moved, record.inputs, record.outputs, place.options())
    for batch in (1, 3):
        found, expected = create_buffers(bundle, graph, batch), create_buffers(bundle, graph, batch)
        place.run(runner, found)
        shared_place.run(runners[graph], expected)
        for name, array in outputs_of(bundle, graph, found).items():
            np.testing.assert_allclose(array, expected[name], rtol=0, atol=EXACT[name], err_msg=name)
    runner.close()


@pytest.mark.parametrize("part", [0.0, 0.5, 0.99])
def test_truncated_engine_is_refused(
    backend: Backend, place: Place, bundle: Bundle, tmp_path: Path, part: float
) -> None:
    options, record = place.options(), bundle.graphs["generator"]
    engine = build(backend, bundle, "generator", tmp_path, options)
    content = engine.read_bytes()
    engine.write_bytes(content[: int(part * len(content))])
    with pytest.raises(BuildError, match=rf"refuses {re.escape(engine.name)}: ") as caught:
        backend.load(engine, record.inputs, record.outputs, options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"no graph", None])
def test_nothing_is_built_from_what_is_no_graph(
    backend: Backend, case: tuple[str, str], tmp_path: Path, content: bytes | None
) -> None:
    if content is not None:
        (tmp_path / "broken.onnx").write_bytes(content)
    engine = tmp_path / f"engine{backend.ENGINE_SUFFIX}"
    with pytest.raises(BuildError, match=r"refuses broken\.onnx: ") as caught:
        backend.build(tmp_path / "broken.onnx", engine, RunnerOptions(device=case[1]))
    assert "\n" not in str(caught.value)
    assert not engine.exists()


def test_nothing_is_built_for_what_cannot_run(
    backend: Backend, case: tuple[str, str], bundle: Bundle, tmp_path: Path
) -> None:
    for options in (RunnerOptions(device="abacus"), RunnerOptions(device=case[1], precision="abacus")):
        with pytest.raises(BackendUnavailableError, match="abacus('? cannot run here|; it has)"):
            build(backend, bundle, "generator", tmp_path, options)
    assert not list(tmp_path.iterdir())


def refusal_of(backend: Backend, options: RunnerOptions) -> str | None:
    try:
        backend.check_options(options)
    except BackendUnavailableError as error:
        return str(error)
    return None


@pytest.mark.parametrize("precision", APPROXIMATE_PRECISIONS)
def test_approximate_precision_is_refused_or_near(
    backend: Backend,
    case: tuple[str, str],
    place: Place,
    shared_place: Place,
    bundle: Bundle,
    runners: Mapping[str, Runner],
    precision: str,
) -> None:
    options = place.options(precision=precision)
    record = bundle.graphs["generator"]
    refusal = refusal_of(backend, options)
    if refusal is not None:
        reasons = (
            f"backend {case[0]}(: precision {precision} cannot run here: | has no precision {precision}; it has ).+"
        )
        assert re.fullmatch(reasons, refusal)
        with pytest.raises(BackendUnavailableError, match=re.escape(refusal)):
            backend.load(record.path, record.inputs, record.outputs, options)
        with pytest.raises(BackendUnavailableError, match=re.escape(refusal)):
            Session.open(bundle.path, backend=case[0], device=case[1], precision=precision)
        return
    runner = backend.load(record.path, record.inputs, record.outputs, options.for_graph("generator"))
    found, expected = create_buffers(bundle, "generator", 2), create_buffers(bundle, "generator", 2)
    place.run(runner, found)
    runner.close()
    shared_place.run(runners["generator"], expected)
    for name, array in outputs_of(bundle, "generator", found).items():
        np.testing.assert_allclose(array, expected[name], rtol=0, atol=tolerances_of(precision)[name], err_msg=name)
    with Session.open(bundle.path, backend=case[0], device=case[1], precision=precision, plain=True) as session:
        check_parity(compare_with_expectation(session, load_expectation(session.bundle.expectation)), case[0])


def test_session_meets_the_stored_expectation(case: tuple[str, str], toy_bundle: Path) -> None:
    name, device = case
    with Session.open(toy_bundle, backend=name, device=device) as session:
        check_parity(compare_with_expectation(session, load_expectation(session.bundle.expectation)), name)


@pytest.mark.parametrize("name", BACKENDS)
def test_missing_library_names_the_command(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    row = BACKENDS[name]
    monkeypatch.delitem(sys.modules, row.module, raising=False)
    monkeypatch.setitem(sys.modules, row.library, None)
    with pytest.raises(BackendUnavailableError) as caught:
        load_backend(name)
    assert f"backend {name} needs {row.library}, which is not installed" in str(caught.value)
    assert f"pip install 'restyle-deploy[{row.extra}]'" in str(caught.value)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(
    "error", [ModuleNotFoundError("No module named 'other'", name="other"), ImportError("libfoo.so: wrong ELF class")]
)
def test_other_import_errors_pass_through(monkeypatch: pytest.MonkeyPatch, name: str, error: ImportError) -> None:
    def fail(module: str) -> None:
        raise error

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(type(error)) as caught:
        load_backend(name)
    assert caught.value is error


def test_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match=f"unknown backend 'abacus'; known are {', '.join(BACKENDS)}"):
        load_backend("abacus")
