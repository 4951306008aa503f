import json
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

import restyle_deploy.build as build_module
import restyle_deploy.building as building_module
import restyle_deploy.engine_graphs as graphs_module
import restyle_deploy.graph.plan as plan_module
from restyle_deploy.backends import BACKENDS, load_backend
from restyle_deploy.backends.base import (
    DEFAULT_REQUEST,
    OPTION_NAMES,
    Backend,
    BuildRequest,
    BuildTarget,
    EngineOptions,
    Runner,
    RunnerOptions,
)
from restyle_deploy.build import BuildOptions, build_engine, describe_build
from restyle_deploy.bundle import EngineRecord, how_to_build_again, open_bundle, read_bundle
from restyle_deploy.cli.build import build as build_command
from restyle_deploy.device_array import Array
from restyle_deploy.engines import Batches, batches_of_build
from restyle_deploy.errors import BackendUnavailableError, BuildError, BundleError, VerificationError
from restyle_deploy.files import sha256_of_file
from restyle_deploy.graph.plan import AS_EXPORTED, FAMILIES, TABLE, Site, find_sites
from restyle_deploy.graph.preview import preview_graph
from restyle_deploy.runtime import opening as opening_module
from restyle_deploy.runtime.session import Session
from restyle_deploy.tensors import TensorSpec
from restyle_deploy.verify import check_parity, compare_with_expectation, load_expectation, verify_bundle
from tests.bundles import edit_manifest

TUNING = Path("engines") / "tuning.json"


class SpyBackend:
    """ONNX Runtime, watched: satisfies `Backend`.

    Attributes:
        built: stems of the engine files, in order.
        measured: how many small graphs were built to be measured.
        versions: as `library_versions` returns them.
        target: as `check_build` returns it.
        facts: as `build` and `check_graph` return them.
        requests: of the builds of engines.
        loaded: how graphs were loaded.
        checked: stems of the graphs that `check_graph` was asked about.
        before_build: called with an engine's path before it is built.
        delay: the seconds by which a run of a graph takes longer, by the names of its nodes.
    """

    ENGINE_SUFFIX = ".onnx"
    ENGINE_BATCH: int | None = None
    ENGINE_OPTIONS = frozenset({"max_batch", "stripped", "no_plugins"})

    def __init__(self) -> None:
        self._backend: Backend = load_backend("onnxruntime")
        self.target = self._backend.check_build(RunnerOptions(), EngineOptions())
        self.facts: dict[str, Any] = {}
        self.requests: list[BuildRequest] = []
        self.loaded: list[RunnerOptions] = []
        self.checked: list[str] = []
        self.built: list[str] = []
        self.versions = dict(self._backend.library_versions())
        self.before_build: Callable[[Path], None] = lambda engine: None
        self.delay: Callable[[str], float] = lambda names: 0.0
        self._names: dict[Path, str] = {}

    @property
    def measured(self) -> int:
        return sum(stem.isdigit() for stem in self.built)

    def devices(self) -> tuple[str, ...]:
        return self._backend.devices()

    def library_versions(self) -> Mapping[str, str]:
        return self.versions

    def check_options(self, options: RunnerOptions) -> None:
        self._backend.check_options(options)

    def processors(self, device: str) -> tuple[str, ...]:
        return self._backend.processors(device)

    def plugin_hash(self) -> str | None:
        return None

    def check_build(self, options: RunnerOptions, engine: EngineOptions) -> BuildTarget:
        self._backend.check_options(options)
        return self.target

    def check_graph(self, graph: Path, options: RunnerOptions, request: BuildRequest) -> Mapping[str, Any]:
        assert graph.is_file()
        self.checked.append(graph.stem)
        return self.facts

    def build(
        self, graph: Path, engine: Path, options: RunnerOptions, request: BuildRequest = DEFAULT_REQUEST
    ) -> Mapping[str, Any]:
        self.before_build(engine)
        self.built.append(engine.stem)
        self.requests.append(request)
        self._names[engine] = _node_names(graph)
        self._backend.build(graph, engine, options)
        return self.facts

    def load(
        self,
        file: Path,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        options: RunnerOptions,
        weights: Path | None = None,
    ) -> "SpyRunner":
        if self.target.facts.get("weights") == "stripped":
            assert weights is not None
            assert weights.is_file()
        names = self._names.get(file) or _node_names(file)
        self.loaded.append(options)
        batches = batches_of_build(self.target.facts)
        return SpyRunner(self._backend.load(file, inputs, outputs, options), self.delay(names), batches)


class SpyRunner:
    """Satisfies `Runner`; takes no other batches than it was built for."""

    is_capturable = True

    def __init__(self, runner: Any, seconds: float, batches: Batches) -> None:
        self._runner, self._seconds, self._batches = runner, seconds, batches

    def bind(self, buffers: Mapping[str, Array]) -> Callable[[], None]:
        (least, most), sizes = self._batches, {len(array) for array in buffers.values()}
        assert all(least <= size <= (most or size) for size in sizes)
        run = self._runner.bind(buffers)

        def run_slowly() -> None:
            time.sleep(self._seconds)
            run()

        return run_slowly

    def close(self) -> None:
        self._runner.close()


def _node_names(graph: Path) -> str:
    return " ".join(node.name for node in onnx.load(graph, load_external_data=False).graph.node)


@pytest.fixture
def bundle(toy_bundle: Path, tmp_path: Path) -> Path:
    return shutil.copytree(toy_bundle, tmp_path / "bundle")


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> SpyBackend:
    spy = SpyBackend()
    monkeypatch.setattr(build_module, "load_backend", lambda name: spy)
    return spy


@pytest.fixture(scope="module", params=[name for name, row in BACKENDS.items() if row.device == "cpu"])
def built(request: pytest.FixtureRequest, toy_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with an engine after the table, for each backend. Only to be read."""
    try:
        load_backend(request.param)
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    bundle = shutil.copytree(toy_bundle, tmp_path_factory.mktemp("built") / "bundle")
    build_engine(bundle, BuildOptions(backend=request.param))
    return bundle


@pytest.fixture(scope="module")
def table_bundle(toy_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with an engine for ONNX Runtime after the table. Only to be read."""
    bundle = shutil.copytree(toy_bundle, tmp_path_factory.mktemp("table") / "bundle")
    build_engine(bundle, BuildOptions(backend="onnxruntime"))
    return bundle


def engine_of(bundle: Path) -> EngineRecord:
    (engine,) = read_bundle(bundle).engines
    return engine


def content_of(bundle: Path, *, without: tuple[Path, ...] = (TUNING,)) -> dict[str, str]:
    """Return the hash of every file, and the folders."""
    return {
        path.relative_to(bundle).as_posix(): sha256_of_file(path) if path.is_file() else "folder"
        for path in bundle.rglob("*")
        if path.relative_to(bundle) not in without
    }


def options(**changes: Any) -> BuildOptions:
    return replace(BuildOptions(backend="onnxruntime", threads=1), **changes)


def tune(bundle: Path, **changes: Any) -> EngineRecord:
    return build_engine(bundle, options(tune=True, **changes))


def test_engine_has_all_roles_and_its_plan(built: Path) -> None:
    bundle, engine = open_bundle(built), engine_of(built)
    splits_target = TABLE[engine.backend]["target"] == "once"
    assert set(engine.graphs) == {"encoder", "generator", "preview"} | ({"target"} if splits_target else set())
    assert engine.directory == built / "engines" / f"{engine.backend}-cpu-fp32"
    assert set(engine.files) == {path.name for path in engine.directory.iterdir()}
    assert engine.sources == {name: graph.sha256 for name, graph in bundle.graphs.items()}
    assert engine.batch == load_backend(engine.backend).ENGINE_BATCH
    sites = [site for graph in bundle.graphs.values() for site in find_sites(ir.load(graph.path))]
    table = TABLE[engine.backend]
    assert engine.plan == {
        "origin": "table",
        "choices": {site.name: table[site.family] for site in sites},
        "measurements": {},
        "seconds": 0.0,
    }
    assert {site.family for site in sites} >= {"upsampling", "skip", "heads", "target"}
    assert not (built / TUNING).exists()


def test_engine_meets_the_expectation_and_is_used(built: Path) -> None:
    backend = engine_of(built).backend
    with Session.open(built, backend=backend) as session:
        assert session.describe()["plan"] == "table"
        parity = compare_with_expectation(session, load_expectation(session.bundle.expectation))
    check_parity(parity, "the engine")
    with Session.open(built, backend=backend, plain=True) as session:
        assert session.describe()["plan"] == "plain"
    check_parity(verify_bundle(built, backend=backend, device="cpu", threads=None), "the bundle")


def test_engine_takes_other_batches(built: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    backend = engine_of(built).backend
    with Session.open(built, backend=backend) as engine, Session.open(built, plain=True) as plain:
        found, expected = engine.invert(images, steps=2), plain.invert(images, steps=2)
    np.testing.assert_allclose(found.latents, expected.latents, atol=1e-4)
    np.testing.assert_allclose(found.images, expected.images, atol=1e-3)


def test_preview_is_that_of_the_exported_generator(built: Path, tmp_path: Path) -> None:
    bundle, engine = open_bundle(built), engine_of(built)
    record = engine.graphs["preview"]
    ir.save(preview_graph(ir.load(bundle.graphs["generator"].path), bundle.config), tmp_path / "preview.onnx")
    latent = load_expectation(bundle.expectation).latents[0, :1].copy()
    results = []
    for backend, file in ((engine.backend, record.path), ("onnxruntime", tmp_path / "preview.onnx")):
        buffers = {"latent": latent, "current": record.outputs[0].allocate(1)}
        runner = load_backend(backend).load(file, record.inputs, record.outputs, RunnerOptions())
        runner.bind(buffers)()
        runner.close()
        results.append(buffers["current"])
    np.testing.assert_allclose(results[0], results[1], atol=1e-4)


def test_preview_steps_run_on_the_engine(built: Path) -> None:
    images = np.zeros((1, 32, 32, 3), np.uint8)
    with Session.open(built, backend=engine_of(built).backend, preview_steps=True) as session:
        assert np.isfinite(session.invert(images, steps=2).images).all()


def test_weights_stand_once_in_the_engine(table_bundle: Path) -> None:
    """ONNX Runtime leaves no copy of a weight in the old layout, and none of an earlier graph."""
    engine = engine_of(table_bundle)
    for role, graph in engine.graphs.items():
        model = onnx.load(graph.path, load_external_data=False)
        stored = [tensor for tensor in model.graph.initializer if tensor.external_data]
        places = [{entry.key: entry.value for entry in tensor.external_data} for tensor in stored]
        assert {place["location"] for place in places} <= {f"{role}.weights"}
        spans = sorted((int(place["offset"]), int(place["length"])) for place in places)
        assert all(begin + size <= after for (begin, size), (after, _) in zip(spans, spans[1:], strict=False))
        size = (engine.directory / f"{role}.weights").stat().st_size if places else 0
        page = 65536  # each large weight begins a page
        assert size <= sum(length for _, length in spans) + page * len(spans)
        used = {name for node in model.graph.node for name in node.input}
        assert {tensor.name for tensor in model.graph.initializer} <= used


@pytest.mark.slow
def test_model_without_skipped_layers_has_no_preview(tmp_path: Path) -> None:
    from restyle_deploy.export import export_checkpoint
    from tests.toy import write_toy_checkpoint

    bundle = tmp_path / "bundle"
    export_checkpoint(write_toy_checkpoint(tmp_path / "toy.pt", output_size=32), bundle)
    assert set(build_engine(bundle, options()).graphs) == {"target", "encoder", "generator"}


def test_tuned_engine_has_the_fastest_choices_and_all_times(bundle: Path, spy: SpyBackend) -> None:
    spy.delay = lambda names: 0.01 if "/depthwise_filter" in names or "/merge_heads" in names else 0.0
    engine = tune(bundle, seconds=1e9)
    plan = engine.plan
    assert (plan["origin"], plan["seconds"] > 0) == ("tuned", True)
    for site, choice in plan["choices"].items():
        family = site.rpartition(" ")[2]
        times = plan["measurements"][site]
        assert set(times) == set(FAMILIES[family].choices)
        assert (family, choice) not in (("upsampling", "depthwise"), ("heads", "merged"))
    assert plan["choices"]
    assert {"whole encoder", "whole generator"} <= set(plan["measurements"])
    assert read_bundle(bundle).engines == (engine,)
    with Session.open(bundle) as session:
        assert session.describe()["plan"] == "tuned"
    check_parity(verify_bundle(bundle, backend="onnxruntime", device="cpu", threads=1), "the engine")


def test_second_tuning_measures_nothing(bundle: Path, spy: SpyBackend) -> None:
    first = tune(bundle, seconds=1e9)
    assert spy.measured > 0
    said: list[str] = []
    spy.built.clear()
    second = build_engine(bundle, options(tune=True), progress=said.append)
    assert spy.measured == 0
    assert not [text for text in said if text.startswith(("measuring", "comparing"))]
    assert second.plan == {**first.plan, "seconds": 0.0}


@pytest.mark.parametrize("change", ["retune", "threads", "library", "processor", "damaged", "choices"])
def test_other_conditions_are_measured_again(
    bundle: Path, spy: SpyBackend, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _prepare_times(bundle, spy)
    changes: dict[str, Any] = {}
    if change == "retune":
        changes = {"retune": True}
    elif change == "threads":
        changes = {"threads": 2}
    elif change == "library":
        spy.versions["onnxruntime"] = "0.1"
    elif change == "processor":
        spy.target = replace(spy.target, processor="Abacus")
    elif change == "damaged":
        (bundle / TUNING).write_bytes(b"\x00")
    else:  # of a release that did not have one of the choices
        content = json.loads((bundle / TUNING).read_text(encoding="utf-8"))
        for entry in content["entries"]:
            entry["times"] = {key: dict(list(times.items())[1:]) for key, times in entry["times"].items()}
        (bundle / TUNING).write_text(json.dumps(content), encoding="utf-8")
    measured = _measured_keys(bundle, monkeypatch, **changes)
    assert measured


def test_same_conditions_are_not_measured_again(bundle: Path, spy: SpyBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    _prepare_times(bundle, spy)
    assert not _measured_keys(bundle, monkeypatch)


def _prepare_times(bundle: Path, spy: SpyBackend) -> None:
    """Write times for all sites, without measuring."""
    opened = read_bundle(bundle)
    sites = [site for graph in opened.graphs.values() for site in find_sites(ir.load(graph.path))]
    times = {site.key: dict.fromkeys(FAMILIES[site.family].choices, 1.0) for site in sites}
    building = building_module.Building(opened, spy, options(), target=spy.target, progress=lambda stage: None)
    building._kept["fp32"].update(times, {})


def _measured_keys(bundle: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> set[str]:
    """Tune, and return the kinds of sites that would have been measured."""
    keys: set[str] = set()

    def measure(model: ir.Model, sites: list[Any], **_: Any) -> dict[str, Any]:
        keys.update(site.key for site in sites)
        return {}

    monkeypatch.setattr(building_module, "measure_sites", measure)
    tune(bundle, **changes)
    return keys


def test_no_time_leaves_the_choice_to_the_table(bundle: Path, spy: SpyBackend, table_bundle: Path) -> None:
    engine = tune(bundle, seconds=0)
    assert spy.measured == 0
    assert engine.plan == engine_of(table_bundle).plan
    assert engine.plan["origin"] == "table"


def test_retuning_keeps_the_times_that_there_was_no_time_to_measure(bundle: Path, spy: SpyBackend) -> None:
    _prepare_times(bundle, spy)
    before = (bundle / TUNING).read_bytes()
    tune(bundle, retune=True, seconds=0)
    kept = json.loads((bundle / TUNING).read_text(encoding="utf-8"))["entries"][0]["times"]
    assert kept.items() >= json.loads(before)["entries"][0]["times"].items()


@pytest.mark.parametrize("slower", ["encoder", "generator"])
def test_plan_that_makes_a_graph_slower_is_left(
    bundle: Path, spy: SpyBackend, slower: str, caplog: pytest.LogCaptureFixture
) -> None:
    _prepare_times(bundle, spy)
    marks = {"encoder": "/target_features", "generator": "/scale_constants"}

    def delay(names: str) -> float:
        """As exported, both graphs take longer than planned by more than this machine's noise; but one plan more so."""
        if not any(mark in names for mark in marks.values()):
            return 0.05
        return 0.1 if marks[slower] in names else 0.0

    spy.delay = delay
    engine = tune(bundle)
    graph = open_bundle(bundle).graphs[slower]
    sites = {site.name for site in find_sites(ir.load(graph.path))}
    choices = engine.plan["choices"]
    assert {choices[site] for site in sites} == {AS_EXPORTED}
    assert AS_EXPORTED not in {choice for site, choice in choices.items() if site not in sites}
    assert (engine.graphs[slower].inputs, engine.graphs[slower].outputs) == (graph.inputs, graph.outputs)
    assert ("target" in engine.graphs) == (slower == "generator")
    roles = {name.partition(".")[0] for name in engine.files}
    assert roles == set(engine.graphs)
    times = engine.plan["measurements"][f"whole {slower}"]
    assert times["planned"] > times["exported"]
    assert f"{slower}: the plan makes it slower" in caplog.text
    check_parity(verify_bundle(bundle, backend="onnxruntime", device="cpu", threads=1), "the engine")
    spy.built.clear()
    assert tune(bundle).plan["choices"] == choices  # by the kept times


def test_time_of_the_target_counts_for_the_plan(bundle: Path, spy: SpyBackend) -> None:
    _prepare_times(bundle, spy)
    spy.delay = lambda names: 0.05 if " " not in names else 0.0  # the target's graph has one node
    assert "target" not in tune(bundle).graphs


def test_engine_is_replaced(bundle: Path, table_bundle: Path) -> None:
    shutil.copytree(table_bundle, bundle, dirs_exist_ok=True)
    stale = engine_of(bundle).directory / "stale.weights"
    stale.write_bytes(b"stale")
    engine = tune(bundle, seconds=0)
    assert read_bundle(bundle).engines == (engine,)
    assert not stale.exists()
    assert {path.name for path in (bundle / "engines").iterdir()} == {"onnxruntime-cpu-fp32", "tuning.json"}


def fail_in_build(spy: SpyBackend, error: BaseException) -> None:
    def fail(engine: Path) -> None:
        if engine.stem == "generator":
            raise error

    spy.before_build = fail


@pytest.fixture(params=["without engine", "with engine"])
def unchanged(request: pytest.FixtureRequest, bundle: Path, table_bundle: Path) -> Iterator[Path]:
    """A bundle that a test must leave as it is."""
    if request.param == "with engine":
        shutil.copytree(table_bundle, bundle, dirs_exist_ok=True)
    before = content_of(bundle)
    yield bundle
    after = content_of(bundle)
    if not (bundle / TUNING).exists():
        assert after == before
    assert {**before, "engines": "folder"} == {**after, "engines": "folder"}


@pytest.mark.parametrize("tuned", [False, True], ids=["table", "tuned"])
@pytest.mark.parametrize("error", [BuildError("the library refuses"), KeyboardInterrupt()], ids=["refused", "Ctrl-C"])
def test_failing_build_changes_nothing(unchanged: Path, spy: SpyBackend, error: BaseException, tuned: bool) -> None:
    fail_in_build(spy, error)
    with pytest.raises(type(error)):
        build_engine(unchanged, options(tune=True, seconds=0) if tuned else options())


def test_wrong_engine_changes_nothing(unchanged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def shift(model: ir.Model, *_: object, **__: object) -> None:
        for value in model.graph.initializers.values():
            assert value.const_value is not None
            array = value.const_value.numpy()
            if array.dtype == np.float32 and array.ndim == 4:
                value.const_value = ir.tensor(array * np.float32(1.01), name=value.name)

    monkeypatch.setattr(graphs_module, "apply_choices", shift)
    with pytest.raises(VerificationError, match="engine for onnxruntime: differs from the reference model"):
        build_engine(unchanged, options())


def test_preview_that_is_not_finite_changes_nothing(unchanged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(generator: ir.Model, config: Any) -> ir.Model:
        model = preview_graph(generator, config)
        before = model.graph.outputs[0]
        node = ir.node("Div", [before, before], name="spoilt")
        zero = ir.node("Sub", [before, before], name="zero")
        node.replace_input_with(0, zero.outputs[0])
        node.replace_input_with(1, zero.outputs[0])
        model.graph.extend([zero, node])
        before.name, after = "before", node.outputs[0]
        after.name, after.shape, after.type = "current", before.shape, before.type
        model.graph.outputs[0] = after
        return model

    monkeypatch.setattr(graphs_module, "preview_graph", spoil)
    with pytest.raises(VerificationError, match="preview is not finite"):
        build_engine(unchanged, options())


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "Ctrl-C"])
def test_manifest_that_cannot_be_written_changes_nothing(
    unchanged: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(build_module, "write_engine", fail)
    with pytest.raises(type(error)):
        build_engine(unchanged, options())


def test_engines_that_is_no_folder_is_refused(bundle: Path) -> None:
    (bundle / "engines").write_bytes(b"")
    before = content_of(bundle)
    with pytest.raises(OSError, match="engines"):
        build_engine(bundle, options())
    assert content_of(bundle) == before


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"backend": "abacus"}, ValueError, "unknown backend 'abacus'; known are onnxruntime"),
        ({"threads": 0}, ValueError, "threads is 0, expected at least 1"),
        ({"precision": "bf16"}, BackendUnavailableError, "precision bf16 cannot run here"),
        ({"device": "abacus"}, BackendUnavailableError, "device 'abacus' cannot run here"),
        ({"seconds": 7.0}, ValueError, "--seconds is the time for --tune and --retune; add one of them, or leave it"),
        ({"engine": EngineOptions(max_batch=4)}, ValueError, "onnxruntime has no --max-batch, nor any other option"),
    ],
    ids=str,
)
def test_options_that_cannot_be_are_refused(
    toy_bundle: Path, changes: Mapping[str, Any], error: type[Exception], message: str
) -> None:
    before = content_of(toy_bundle)
    with pytest.raises(error, match=message):
        build_engine(toy_bundle, options(**changes))
    assert content_of(toy_bundle) == before


def test_damaged_bundle_is_refused(bundle: Path) -> None:
    (bundle / "encoder.onnx").write_bytes(b"")
    before = content_of(bundle)
    with pytest.raises(BundleError, match="encoder.onnx"):
        build_engine(bundle, options())
    assert content_of(bundle) == before


def test_stages_are_told(bundle: Path) -> None:
    said: list[str] = []
    build_engine(bundle, options(), progress=said.append)
    assert said == [
        "checking the bundle",
        "reading the encoder",
        "building the encoder",
        "reading the generator",
        "building the generator",
        "verifying",
    ]


# What some backends alone have


NO_GPU = "no GPU can run the engine here: there is no NVIDIA driver"


@pytest.fixture
def unverifiable(spy: SpyBackend) -> SpyBackend:
    """A backend whose engines cannot run here."""
    spy.target = BuildTarget(processor="sm_89", refusal=NO_GPU, has_kernels=False, facts={"weights": "full"})
    spy.facts = {"layers": 3}
    return spy


def test_engine_that_cannot_run_here_is_kept_and_says_so(
    bundle: Path, unverifiable: SpyBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_module, "load_expectation", None)  # nothing is run
    said: list[str] = []
    engine = build_engine(bundle, options(), progress=said.append)
    assert "verifying" not in said
    assert engine.processor == "sm_89"
    assert engine.build == {
        "verified": False,
        "reason": NO_GPU,
        "options": ["--threads", "1"],
        "weights": "full",
        "graphs": {role: {"layers": 3} for role in engine.graphs},
    }
    assert engine_of(bundle).build == engine.build


@pytest.mark.usefixtures("unverifiable")
@pytest.mark.parametrize("build", [build_engine, describe_build])
def test_tuning_needs_the_device(bundle: Path, build: Callable[..., Any]) -> None:
    before = content_of(bundle)
    with pytest.raises(BackendUnavailableError, match=f"--tune measures on the device, but {NO_GPU}; leave it out"):
        build(bundle, options(tune=True))
    assert content_of(bundle) == before


def test_engine_options_reach_the_backend_and_the_record(bundle: Path, spy: SpyBackend) -> None:
    engine = build_engine(bundle, options(engine=EngineOptions(max_batch=4)))
    assert {request.engine.max_batch for request in spy.requests} == {4}
    assert {request.cache for request in spy.requests} == {bundle / "engines"}
    assert engine.build == {"verified": True, "reason": None, "options": ["--threads", "1", "--max-batch", "4"]}


def test_command_that_builds_again_has_all_options(bundle: Path) -> None:
    """But --dry-run, --json and --retune, which are of one call."""
    engine = tune(bundle, threads=2, seconds=0, engine=EngineOptions())
    assert engine.build["options"] == ["--threads", "2", "--seconds", "0"]
    again = how_to_build_again(read_bundle(bundle), replace(engine, plan={**engine.plan, "origin": "tuned"}))
    assert f"restyle-deploy build {bundle} --backend onnxruntime --tune --threads 2 --seconds 0, or" in again
    options_of_build = {parameter.opts[0] for parameter in build_command.params if parameter.opts[0].startswith("--")}
    known = {"--backend", "--device", "--precision", "--threads", "--tune", "--seconds"}
    known |= {f"--{name}" for name in OPTION_NAMES.values()}
    assert options_of_build == known | {"--retune", "--dry-run", "--json"}


class RefusingSpy(SpyBackend):
    """Takes no transposed convolution but the skip image's, unless it has no reason."""

    reason = "transposed convolutions are refused"

    def build(
        self, graph: Path, engine: Path, options: RunnerOptions, request: BuildRequest = DEFAULT_REQUEST
    ) -> Mapping[str, Any]:
        nodes = onnx.load(graph, load_external_data=False).graph.node
        refused = [node for node in nodes if node.op_type == "ConvTranspose" and "skip_upsample" not in node.name]
        if refused and self.reason:
            raise BuildError(self.reason)
        return super().build(graph, engine, options, request)


def test_refused_choices_and_a_refused_exported_graph_end_no_tuning(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As with TensorRT for RTX in bfloat16."""
    spy = RefusingSpy()
    monkeypatch.setattr(build_module, "load_backend", lambda name: spy)
    monkeypatch.setattr(building_module, "table_of", lambda backend, precision: TABLE["tensorrt-rtx"])
    engine = tune(bundle, seconds=1e9)
    choices = {choice for site, choice in engine.plan["choices"].items() if site.endswith(" upsampling")}
    assert choices <= {"phases", "polyphase"}
    assert set(engine.plan["measurements"]["whole generator"]) == {"planned"}
    assert set(engine.plan["measurements"]["whole encoder"]) == {"exported", "planned"}
    assert "is left out: transposed convolutions are refused" in caplog.text
    spy.built.clear()
    assert tune(bundle).plan["choices"] == engine.plan["choices"]
    assert spy.measured == 0  # what was refused is not tried again


def test_choices_that_memory_lacked_for_are_tried_again(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spy = RefusingSpy()
    spy.reason = "PyTorch refuses it: CUDA out of memory"
    monkeypatch.setattr(build_module, "load_backend", lambda name: spy)
    monkeypatch.setattr(building_module, "table_of", lambda backend, precision: TABLE["tensorrt-rtx"])
    assert set(tune(bundle, seconds=1e9).plan["measurements"]["whole generator"]) == {"planned"}
    spy.reason = ""
    times = tune(bundle, seconds=1e9).plan["measurements"]
    kinds = [set(each) for site, each in times.items() if site.endswith(" upsampling")]
    assert kinds == [set(FAMILIES["upsampling"].choices)] * len(kinds)
    assert set(times["whole generator"]) == {"exported", "planned"}
    spy.built.clear()
    tune(bundle)
    assert spy.measured == 0


def test_times_are_of_one_model_of_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building_module, "find_devices", lambda: (("cuda:0",), ""))
    monkeypatch.setattr(building_module, "find_name", lambda device: "NVIDIA L4")
    processor = building_module._processor_of_times
    assert processor("sm_89", "cuda:0") == "sm_89 on NVIDIA L4"
    assert processor("NVIDIA L4 (sm_89)", "cuda:0") == "NVIDIA L4 (sm_89)"
    assert processor("Abacus", "cpu") == "Abacus"


@pytest.mark.parametrize(("least", "most"), [(1, 1), (3, 8), (2, 2)])
def test_engine_is_verified_and_runs_in_the_batches_that_it_takes(
    bundle: Path, spy: SpyBackend, monkeypatch: pytest.MonkeyPatch, least: int, most: int
) -> None:
    """The expectation has two images, and a preview is checked with one."""
    spy.target = replace(spy.target, facts={"profile": {"min": least, "opt": least, "max": most}})
    engine = build_engine(bundle, options())
    assert engine.build["verified"] is True
    assert "preview" in engine.graphs
    monkeypatch.setattr(opening_module, "load_backend", lambda name: spy)
    images = np.random.default_rng(0).integers(0, 256, (10, 32, 32, 3), dtype=np.uint8)
    with Session.open(bundle) as session:
        found = session.invert(images, steps=2)
    with Session.open(bundle, plain=True) as session:
        small = session.invert(images, steps=2, max_batch=2)
    for result in (found, small):
        np.testing.assert_allclose(result.latents, _inverted_plainly(bundle, images), atol=1e-4)


def _inverted_plainly(bundle: Path, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opening_module, "load_backend", load_backend)
        with Session.open(bundle, plain=True) as session:
            return session.invert(images, steps=2).latents


@pytest.mark.parametrize("stripped", [False, True])
def test_tuning_measures_what_is_built(bundle: Path, spy: SpyBackend, stripped: bool) -> None:
    """In the batches that the engine takes, and with its options; a stripped one has its weights put back."""
    facts = {"profile": {"min": 3, "opt": 3, "max": 8}, "weights": "stripped" if stripped else "full"}
    spy.target = replace(spy.target, facts={**facts, "plugin_hash": None})
    engine_options = EngineOptions(min_batch=3, stripped=stripped)
    _prepare_times(bundle, spy)
    engine = tune(bundle, engine=engine_options)
    assert engine.plan["origin"] == "tuned"
    assert {"whole encoder", "whole generator"} <= set(engine.plan["measurements"])
    assert {request.engine for request in spy.requests} == {engine_options}


@pytest.mark.parametrize(("no_plugins", "route"), [(False, None), (True, "functions")])
def test_graphs_without_plugins_are_loaded_as_they_were_built(
    bundle: Path, spy: SpyBackend, no_plugins: bool, route: str | None
) -> None:
    build_engine(bundle, options(engine=EngineOptions(no_plugins=no_plugins)))
    assert {loaded.plugin_route for loaded in spy.loaded} == {route}


def test_arguments_are_those_of_the_command_line() -> None:
    given = EngineOptions(
        optimization_level=0, workspace_bytes=1024, compute_capabilities=("8.9", "12.0"), no_plugins=True
    )
    assert given.arguments == [
        *("--workspace", "1024", "--optimization-level", "0"),
        *("--compute-capability", "8.9", "--compute-capability", "12.0", "--no-plugins"),
    ]
    assert EngineOptions().arguments == []


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_cpu_backends_refuse_what_they_have_not(toy_bundle: Path, backend: str) -> None:
    pytest.importorskip(backend)
    engine = EngineOptions(max_batch=4, stripped=True)
    expected = f"^backend {backend} has no --max-batch, --stripped, nor any other option of engines; leave out what"
    with pytest.raises(ValueError, match=expected):
        build_engine(toy_bundle, BuildOptions(backend=backend, engine=engine))


def test_stripped_engine_takes_the_same_weights_when_it_is_opened(
    bundle: Path, spy: SpyBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = {"weights": "stripped", "plugin_hash": None}
    spy.target = replace(spy.target, facts=facts)
    engine = build_engine(bundle, options(engine=EngineOptions(stripped=True)))
    assert set(engine.build["graphs"]) == set(engine.graphs)
    assert all(set(stated) == {"digest"} for stated in engine.build["graphs"].values())
    assert not list((bundle / "engines").glob(".*"))
    monkeypatch.setattr(opening_module, "load_backend", lambda name: spy)
    with Session.open(bundle) as session:
        check_parity(compare_with_expectation(session, load_expectation(session.bundle.expectation)), "the engine")


def test_stripped_engine_refuses_other_weights(bundle: Path, spy: SpyBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    spy.target = replace(spy.target, facts={"weights": "stripped", "plugin_hash": None})
    build_engine(bundle, options(engine=EngineOptions(stripped=True)))
    monkeypatch.setattr(opening_module, "load_backend", lambda name: spy)
    edit_manifest(bundle, lambda manifest: manifest["engines"][0]["build"]["graphs"]["generator"].update(digest="ab"))
    expected = (
        rf"as the generator has changed; build it again: restyle-deploy build {re.escape(str(bundle))} .*--stripped"
    )
    with pytest.raises(BundleError, match=expected):
        Session.open(bundle)


# Dry run


def test_dry_run_tells_what_would_be_built_and_changes_nothing(
    bundle: Path, spy: SpyBackend, table_bundle: Path
) -> None:
    spy.facts = {"layers": 3}
    before = content_of(bundle)
    facts = describe_build(bundle, options())
    assert content_of(bundle) == before
    built = engine_of(table_bundle)
    assert facts["plan"] == built.plan
    assert (facts["backend"], facts["device"], facts["precision"]) == built.key
    assert facts["directory"] == str(bundle / "engines" / "onnxruntime-cpu-fp32")
    assert (facts["replaces"], facts["verification"], facts["batch"]) == (None, "on this machine", None)
    assert {role: graph["file"] for role, graph in facts["graphs"].items()} == {
        role: f"{role}.onnx" for role in built.graphs
    }
    assert all(graph["layers"] == 3 and graph["nodes"] > 0 for graph in facts["graphs"].values())
    assert (sorted(spy.checked), spy.built) == (sorted(built.graphs), [])


def test_dry_run_tells_of_former_measurements(bundle: Path, spy: SpyBackend) -> None:
    _prepare_times(bundle, spy)
    assert describe_build(bundle, options())["plan"]["origin"] == "table"
    assert describe_build(bundle, options(tune=True))["plan"]["origin"] == "tuned"
    assert spy.measured == 0


def test_dry_run_tells_what_is_replaced(table_bundle: Path, unverifiable: SpyBackend) -> None:
    facts = describe_build(table_bundle, options())
    (engine,) = read_bundle(table_bundle).engines
    assert facts["replaces"] == f"the engine for {engine.processor}"
    assert (facts["verification"], facts["processor"]) == (NO_GPU, "sm_89")


def test_dry_run_tells_of_a_profile_instead_of_a_batch(bundle: Path, spy: SpyBackend) -> None:
    spy.target = replace(spy.target, facts={"profile": {"min": 1, "opt": 1, "max": 8}})
    facts = describe_build(bundle, options())
    assert "batch" not in facts
    assert facts["build"]["profile"]["max"] == 8


# What a build replaces


@pytest.mark.parametrize(
    ("changes", "processor", "is_told"),
    [
        ({}, "sm_89", False),
        ({"engine": EngineOptions(max_batch=4)}, "sm_89", True),
        ({"threads": 2}, "sm_89", True),
        ({}, "sm_80 or sm_120", True),
    ],
    ids=str,
)
def test_another_engine_that_is_replaced_is_told(
    bundle: Path,
    unverifiable: SpyBackend,
    caplog: pytest.LogCaptureFixture,
    changes: Mapping[str, Any],
    processor: str,
    is_told: bool,
) -> None:
    profile = {"profile": {"min": 1, "opt": 2, "max": 8}}
    unverifiable.target = replace(unverifiable.target, facts=profile)
    build_engine(bundle, options())
    assert "replaces" not in caplog.text
    unverifiable.target = replace(unverifiable.target, processor=processor)
    assert describe_build(bundle, options(**changes))["replaces"] == FORMER
    assert "replaces" not in caplog.text
    build_engine(bundle, options(**changes))
    told = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert told == ([f"this build replaces {FORMER}"] if is_told else [])


FORMER = "the engine for sm_89, batches 1 to 8, built with --threads 1"


def test_engine_of_another_key_is_not_replaced(bundle: Path, unverifiable: SpyBackend) -> None:
    build_engine(bundle, options())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unverifiable, "check_build", lambda *_: unverifiable.target)
        assert describe_build(bundle, options(precision="bf16"))["replaces"] is None


def test_threads_mean_nothing_on_a_gpu(bundle: Path, unverifiable: SpyBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unverifiable, "check_build", lambda *_: unverifiable.target)
    before = content_of(bundle)
    for build in (build_engine, describe_build):
        with pytest.raises(ValueError, match="--threads is for engines on the CPU, this one is for cuda:0; leave it"):
            build(bundle, options(device="cuda:0"))
    assert content_of(bundle) == before
    assert describe_build(bundle, options(device="cuda:0", threads=None))["replaces"] is None


# Several builds


def test_directories_of_killed_builds_are_removed(bundle: Path) -> None:
    abandoned = bundle / "engines" / ".building-killed"
    abandoned.mkdir(parents=True)
    (abandoned / "generator.onnx").write_bytes(b"half")
    engine = build_engine(bundle, options())
    assert {path.name for path in (bundle / "engines").iterdir()} == {engine.directory.name}


def test_two_builds_at_once_lose_no_record(bundle: Path, spy: SpyBackend) -> None:
    """The second begins and ends while the first builds."""
    second: list[EngineRecord] = []

    def build_second(engine: Path) -> None:
        if engine.stem == "generator" and not second:
            spy.before_build = lambda engine: None
            key = {"precision": "bf16"}
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(spy, "check_build", lambda *_: replace(spy.target, refusal=NO_GPU))
                patch.setattr(spy, "_backend", BuildAnything(spy._backend))
                second.append(build_engine(bundle, options(**key)))

    spy.before_build = build_second
    first = build_engine(bundle, options())
    assert {engine.key for engine in read_bundle(bundle).engines} == {first.key, second[0].key}
    assert first.directory.is_dir()
    assert second[0].directory.is_dir()
    assert not list((bundle / "engines").glob(".*"))


@pytest.mark.parametrize("tune", [False, True])
def test_mixed_precision_is_float32_in_the_encoder_only(
    bundle: Path, spy: SpyBackend, monkeypatch: pytest.MonkeyPatch, tune: bool
) -> None:
    anything = BuildAnything(spy._backend)
    monkeypatch.setattr(spy, "check_build", lambda *_: spy.target)
    monkeypatch.setattr(spy, "_backend", anything)
    record = build_engine(bundle, options(precision="mixed", tune=tune))
    assert record.precision == "mixed"
    assert record.build["verified"]
    engines = {role: precision for role, precision in anything.built if role in record.graphs}
    assert engines == {role: "bf16" if role in ("generator", "preview") else "fp32" for role in record.graphs}
    # Of small graphs and exported ones, those of the encoder are measured in float32, those of the generator in bf16.
    measured = [precision for role, precision in anything.built if role not in record.graphs]
    assert measured == sorted(measured, reverse=True)
    assert set(measured) == ({"fp32", "bf16"} if tune else set())


def test_mixed_precision_has_times_of_each_graphs_own_precision(
    bundle: Path, spy: SpyBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both graphs have convolutions of one kind, to which bfloat16 has fewer ways."""
    measured: list[tuple[str, str]] = []

    def measure(model: ir.Model, sites: list[Site], *, options: RunnerOptions, **_: Any) -> dict[str, Any]:
        measured.extend((options.precision, key) for key in {site.key for site in sites})
        time_ms = 1.0 if options.precision == "fp32" else 2.0
        choices = {site.key: FAMILIES[site.family].choices_for(options.precision) for site in sites}
        return {key: dict.fromkeys(each, time_ms) for key, each in choices.items()}

    def compare(*_: Any, options: RunnerOptions, **__: Any) -> dict[str, float]:
        measured.append((options.precision, "whole"))
        return {"exported": 2.0, "planned": 1.0}

    monkeypatch.setattr(spy, "check_build", lambda *_: spy.target)
    monkeypatch.setattr(spy, "_backend", BuildAnything(spy._backend))
    monkeypatch.setattr(plan_module, "WINOGRAD_CHANNELS", 1)
    monkeypatch.setattr(plan_module, "WINOGRAD_LEAST_PIXELS", 1)
    monkeypatch.setattr(Site, "key", property(lambda site: site.family))
    monkeypatch.setattr(building_module, "measure_sites", measure)
    monkeypatch.setattr(building_module, "measure_whole", compare)
    plan = tune(bundle, precision="mixed").plan
    assert {("fp32", "convolution"), ("bf16", "convolution"), ("fp32", "whole"), ("bf16", "whole")} <= set(measured)
    graphs = read_bundle(bundle).graphs
    sites = {name: find_sites(ir.load(graph.path)) for name, graph in graphs.items()}
    for name, time_ms in (("encoder", 1.0), ("generator", 2.0)):
        assert {time for site in sites[name] for time in plan["measurements"][site.name].values()} == {time_ms}
    entries = json.loads((bundle / TUNING).read_text(encoding="utf-8"))["entries"]
    assert {entry["conditions"]["precision"] for entry in entries} == {"fp32", "bf16"}
    measured.clear()
    assert tune(bundle, precision="mixed").plan["measurements"] == plan["measurements"]
    assert measured == []
    tune(bundle)  # in float32: the encoder's are known
    families = {name: {site.family for site in found} for name, found in sites.items()}
    assert set(measured) == {("fp32", key) for key in {*(families["generator"] - families["encoder"]), "whole"}}


class BuildAnything:
    """A backend that builds in whatever precision it is asked for.

    Attributes:
        built: stem of the engine, and the precision that was asked for.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.built: list[tuple[str, str]] = []

    def library_versions(self) -> Mapping[str, str]:
        return self._backend.library_versions()

    def build(self, graph: Path, engine: Path, options: RunnerOptions) -> Mapping[str, Any]:
        self.built.append((engine.stem, options.precision))
        return self._backend.build(graph, engine, replace(options, precision="fp32"))

    def load(
        self, file: Path, inputs: Any, outputs: Any, options: RunnerOptions, weights: Path | None = None
    ) -> Runner:
        return self._backend.load(file, inputs, outputs, replace(options, precision="fp32"), weights)
