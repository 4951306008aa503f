import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest

from restyle_deploy.backends import BACKENDS
from restyle_deploy.backends.base import DEFAULT_REQUEST, BuildRequest, EngineOptions, RunnerOptions
from restyle_deploy.bundle import Bundle, open_bundle
from restyle_deploy.device_array import Array
from restyle_deploy.errors import BuildError, DeviceError
from restyle_deploy.graph.edit import fix_batch
from restyle_deploy.graph.plan import FAMILIES, TABLE, Site, find_sites
from restyle_deploy.planner import (
    LEAST_REPEATS,
    MOST_REPEATS,
    STEPS,
    Clock,
    choose,
    measure_sites,
    measure_whole,
    repeats_for,
    specs_of,
)
from tests.fakes import MadeUpBackend

TABLE_OF_TESTS = {family: FAMILIES[family].exported for family in FAMILIES} | {"upsampling": "depthwise"}


class TimedBackend(MadeUpBackend):
    """Satisfies `Backend`; a graph does nothing and takes as long as its nodes' names say.

    Attributes:
        delays: seconds of a run, by the rewrite that a node's name tells; "" for a graph of no rewrite.
        built: node names of the graphs, in the order of building.
        ran: how many runs there were.
        open: runners not closed yet.
    """

    def __init__(self, delays: Mapping[str, float] | None = None) -> None:
        self.delays = {"": 0.0, **(delays or {})}
        self.built: list[str] = []
        self.ran = 0
        self.open = 0

    def build(
        self, graph: Path, engine: Path, options: RunnerOptions, request: BuildRequest = DEFAULT_REQUEST
    ) -> Mapping[str, Any]:
        names = " ".join(node.name for node in onnx.load(graph, load_external_data=False).graph.node)
        self.built.append(names)
        engine.write_text(names, encoding="utf-8")
        return {}

    def load(self, file: Path, *rest: Any, weights: Path | None = None) -> "TimedRunner":
        names = file.read_text(encoding="utf-8")
        self.open += 1
        return TimedRunner(self, max(delay for rewrite, delay in self.delays.items() if f"/{rewrite}" in names))


class TimedRunner:
    """Satisfies `Runner`."""

    is_capturable = True

    def __init__(self, backend: TimedBackend, seconds: float) -> None:
        self._backend, self._seconds = backend, seconds

    def bind(self, buffers: Mapping[str, Array]) -> Callable[[], None]:
        def run() -> None:
            self._backend.ran += 1
            time.sleep(self._seconds)

        return run

    def close(self) -> None:
        self._backend.open -= 1


class WatchedBackend(TimedBackend):
    """Writes down what it is asked for.

    Attributes:
        operators: of the graphs that were built, in order.
        requests: of the builds.
        weights: what was given with each engine that was loaded, by stem.
        batches: of the arrays that were bound.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[list[str]] = []
        self.requests: list[BuildRequest] = []
        self.weights: dict[str, Path | None] = {}
        self.batches: set[int] = set()

    def build(
        self, graph: Path, engine: Path, options: RunnerOptions, request: BuildRequest = DEFAULT_REQUEST
    ) -> Mapping[str, Any]:
        nodes = onnx.load(graph, load_external_data=False).graph.node
        self.operators.append([node.op_type for node in nodes])
        self.requests.append(request)
        return super().build(graph, engine, options, request)

    def load(self, file: Path, *rest: Any, weights: Path | None = None) -> "TimedRunner":
        given = weights or (rest[3] if len(rest) > 3 else None)
        assert given is None or given.is_file()
        self.weights[file.stem] = given
        runner = super().load(file)
        bind = runner.bind

        def watch(buffers: Mapping[str, Array]) -> Callable[[], None]:
            self.batches.update(len(buffer) for buffer in buffers.values())
            return bind(buffers)

        runner.bind = watch  # type: ignore[method-assign]
        return runner


@pytest.fixture(scope="module")
def bundle(toy_bundle: Path) -> Bundle:
    return open_bundle(toy_bundle)


@pytest.fixture(scope="module", params=["encoder", "generator"])
def model(bundle: Bundle, request: pytest.FixtureRequest) -> ir.Model:
    return ir.load(bundle.graphs[request.param].path)


@pytest.fixture(scope="module")
def generator(bundle: Bundle) -> ir.Model:
    return ir.load(bundle.graphs["generator"].path)


@pytest.fixture(scope="module")
def encoder(bundle: Bundle) -> ir.Model:
    return ir.load(bundle.graphs["encoder"].path)


def site(family: str = "upsampling", layer: str = "layer", shape: str = "8→8") -> Site:
    return Site(family=family, layer=layer, shape=shape, inputs=(), outputs=(), work=1.0)


def sites_of(model: ir.Model, family: str) -> list[Site]:
    return [found for found in find_sites(model) if found.family == family]


def measure(model: ir.Model, sites: list[Site], backend: Any, seconds: float = 1e9) -> dict[str, dict[str, float]]:
    return measure_sites(model, sites, backend=backend, options=RunnerOptions(), clock=Clock(seconds=seconds))


@pytest.mark.parametrize("backend", list(BACKENDS))
def test_table_has_a_choice_for_each_family(backend: str) -> None:
    assert set(TABLE[backend]) == set(FAMILIES)
    assert all(choice in FAMILIES[family].choices for family, choice in TABLE[backend].items())


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({}, "depthwise"),
        ({"depthwise": 2.0, "node": 1.0}, "node"),
        ({"depthwise": 2.0, "node": 1.95}, "depthwise"),  # within what measuring errs
        ({"depthwise": 2.0, "node": 1.93}, "node"),
        ({"depthwise": 1.0, "node": 2.0}, "depthwise"),
        ({"merged": 2.0, "node": 2.1}, "merged"),  # the table's was not measured
        ({"sideways": 0.1, "node": 2.0, "depthwise": 3.0}, "node"),  # of a later release
        ({"sideways": 0.1}, "depthwise"),
    ],
    ids=str,
)
def test_fastest_choice_is_taken(times: Mapping[str, float], expected: str) -> None:
    found = site()
    assert choose([found], {found.key: times}, TABLE_OF_TESTS) == {"layer upsampling": expected}


def test_sites_of_one_kind_get_one_choice() -> None:
    sites = [site(layer="a"), site(layer="b"), site(layer="c", shape="16→16"), site(family="skip", layer="a")]
    choices = choose(sites, {sites[0].key: {"depthwise": 2.0, "polyphase": 1.0}}, TABLE_OF_TESTS)
    assert choices == {
        "a upsampling": "polyphase",
        "b upsampling": "polyphase",
        "c upsampling": "depthwise",
        "a skip": "node",
    }


@pytest.mark.parametrize("fastest", FAMILIES["upsampling"].choices)
def test_fastest_rewrite_wins(generator: ir.Model, fastest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "restyle_deploy.planner._candidate", lambda model, site, choice, **_: (_named_graph(choice), None)
    )
    delays = {choice: 0.004 for choice in FAMILIES["upsampling"].choices} | {fastest: 0.0}
    backend = TimedBackend(delays)
    sites = sites_of(generator, "upsampling")
    times = measure(generator, sites, backend)
    assert set(choose(sites, times, TABLE_OF_TESTS).values()) == {fastest}
    assert backend.open == 0


def test_slow_choices_are_dropped_early(generator: ir.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "restyle_deploy.planner._candidate", lambda model, site, choice, **_: (_named_graph(choice), None)
    )
    ran: dict[str, int] = dict.fromkeys(FAMILIES["upsampling"].choices, 0)
    backend = TimedBackend({**dict.fromkeys(ran, 0.002), "merged": 0.05})
    (times,) = measure(generator, sites_of(generator, "upsampling")[:1], backend).values()
    assert set(times) == set(ran)
    assert times["merged"] > 40
    assert backend.ran <= 2 + (len(ran) - 1) * (2 + MOST_REPEATS)


def _named_graph(choice: str) -> ir.Model:
    x = ir.Value(name="x", shape=ir.Shape(("N", 1)), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node("Relu", [x], name=f"layer/{choice}")
    node.outputs[0].name, node.outputs[0].shape, node.outputs[0].type = "y", x.shape, x.type
    graph = ir.Graph((x,), node.outputs, nodes=(node,), opset_imports={"": 18}, name="graph")
    return ir.Model(graph, ir_version=10)


def test_each_kind_is_measured_once_with_all_its_choices(model: ir.Model) -> None:
    sites, backend, said = find_sites(model), TimedBackend(), list[str]()
    times = measure_sites(
        model,
        sites,
        backend=backend,
        options=RunnerOptions(),
        clock=Clock(seconds=1e9),
        progress=said.append,
    )
    assert len(said) == len(set(said)) == len({found.key for found in sites})
    assert set(said) == set(times)
    for found in sites:
        assert set(times[found.key]) == set(FAMILIES[found.family].choices)
        assert all(time_ms > 0 for time_ms in times[found.key].values())
    assert backend.open == 0


def test_measuring_leaves_the_graph_as_it_was(bundle: Bundle, tmp_path: Path) -> None:
    loaded = ir.load(bundle.graphs["encoder"].path)
    ir.save(loaded, tmp_path / "before.onnx")
    measure(loaded, find_sites(loaded), TimedBackend())
    ir.save(loaded, tmp_path / "after.onnx")
    assert (tmp_path / "before.onnx").read_bytes() == (tmp_path / "after.onnx").read_bytes()


def test_no_time_measures_nothing(model: ir.Model) -> None:
    backend = TimedBackend()
    assert measure(model, find_sites(model), backend, seconds=0) == {}
    assert (backend.built, backend.ran) == ([], 0)


def test_measuring_ends_with_its_time(generator: ir.Model) -> None:
    ticks = itertools.count()
    clock = Clock(seconds=3, now=lambda: float(next(ticks)))  # a second for each look
    sites = find_sites(generator)
    times = measure_sites(generator, sites, backend=TimedBackend(), options=RunnerOptions(), clock=clock)
    heaviest = max(sites, key=lambda found: found.work * sum(other.key == found.key for other in sites))
    assert len(times) == 2
    assert next(iter(times)) == heaviest.key


def test_runners_are_closed_after_an_error(generator: ir.Model) -> None:
    class Interrupted(TimedBackend):
        def build(self, *arguments: Any) -> Mapping[str, Any]:
            if self.open == 2:
                raise KeyboardInterrupt
            return super().build(*arguments)

    backend = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        measure(generator, sites_of(generator, "upsampling"), backend)
    assert backend.open == 0


def test_filter_is_measured_with_what_one_kernel_computes_with_it(generator: ir.Model) -> None:
    sites, backend = sites_of(generator, "upsampling")[:1], WatchedBackend()
    clock = Clock(seconds=1e9)
    measure_sites(generator, sites, backend=backend, options=RunnerOptions(), clock=clock, epilogues=True)
    node, *others = backend.operators
    assert node == ["ConvTranspose", "UpFirDn2dEpilogue"]
    assert [operators[-1] for operators in others] == ["BiasActEpilogue"] * (len(FAMILIES["upsampling"].rewrites))


def test_filter_is_measured_alone_where_no_kernel_of_ours_is(generator: ir.Model) -> None:
    backend = WatchedBackend()
    measure(generator, sites_of(generator, "upsampling")[:1], backend)
    assert backend.operators[0] == ["ConvTranspose", "UpFirDn2d"]


STRIPPED = BuildRequest(engine=EngineOptions(stripped=True, min_batch=3))


def test_sites_are_built_as_the_engine_is(generator: ir.Model) -> None:
    sites, backend = sites_of(generator, "skip")[:1], WatchedBackend()
    clock = Clock(seconds=1e9)
    measure_sites(generator, sites, backend=backend, options=RunnerOptions(), clock=clock, request=STRIPPED)
    assert backend.requests == [STRIPPED] * len(FAMILIES["skip"].choices)
    assert None not in backend.weights.values()
    assert backend.batches == {3}


def test_exported_graph_is_built_as_the_planned_one_was(bundle: Bundle, tmp_path: Path) -> None:
    exported, backend = bundle.graphs["encoder"], WatchedBackend()
    weights = {role: tmp_path / f"{role}.weights" for role in ("encoder", "target", "generator")}
    records = {}
    for role, file in weights.items():
        file.touch()
        records[role] = replace(exported, path=tmp_path / f"{role}.engine")
        records[role].path.write_text("/node", encoding="utf-8")
    options = RunnerOptions()
    times = measure_whole(
        exported,
        records["encoder"],
        records["target"],
        backend=backend,
        options=options,
        request=STRIPPED,
        weights=weights,
    )
    assert set(times) == {"exported", "planned"}
    assert backend.requests == [STRIPPED]
    own = backend.weights.pop("exported")
    assert own is not None
    assert own.suffix == ".onnx"
    assert backend.weights == {role: weights[role] for role in ("encoder", "target")}
    assert backend.batches == {3}
    assert backend.open == 0


def test_graph_that_runs_once_per_image_counts_by_step(encoder: ir.Model) -> None:
    (found,) = sites_of(encoder, "target")

    class SlowTarget(TimedBackend):
        def load(self, file: Path, *rest: Any, weights: Path | None = None) -> TimedRunner:
            super().load(file, *rest, weights=weights)
            names = file.read_text(encoding="utf-8")
            is_target = " " not in names  # one node
            return TimedRunner(self, 0.05 if is_target else 0.0)

    backend = SlowTarget()
    (times,) = measure(encoder, [found], backend).values()
    assert 50 / STEPS <= times["once"] < 50
    assert times["every step"] < 50 / STEPS


@pytest.mark.parametrize(
    ("run_ms", "repeats"), [(1e-3, MOST_REPEATS), (300.0, LEAST_REPEATS), (20.0, 15), (1e6, LEAST_REPEATS)]
)
def test_short_runs_are_repeated_more_often(run_ms: float, repeats: int) -> None:
    assert repeats_for(run_ms) == repeats


@pytest.mark.parametrize("batch", [None, 1])
def test_specs_are_those_of_the_bundle(bundle: Bundle, batch: int | None) -> None:
    for record in bundle.graphs.values():
        loaded = ir.load(record.path)
        fix_batch(loaded, batch)
        found = specs_of(loaded)
        assert [[spec.name for spec in specs] for specs in found] == [
            [spec.name for spec in specs] for specs in (record.inputs, record.outputs)
        ]
        first = "N" if batch is None else batch
        for spec, stored in zip(found[0] + found[1], record.inputs + record.outputs, strict=True):
            assert spec.shape == (first, *stored.shape[1:])


def test_shorter_precision_has_no_choice_that_amplifies_rounding() -> None:
    site = Site(family="convolution", layer="layer", shape="shape", inputs=(), outputs=(), work=1.0)
    times = {site.key: {"direct": 2.0, "winograd": 1.0}}
    for table in ({"convolution": "direct"}, {"convolution": "winograd"}):
        assert choose([site], times, table) == {site.name: "winograd"}
        assert choose([site], times, table, precision="bf16") == {site.name: "direct"}
        assert choose([site], {}, table, precision="bf16") == {site.name: "direct"}
    assert FAMILIES["convolution"].choices_for("fp32") == ("direct", "winograd")


@pytest.mark.parametrize(("winograd", "chosen"), [(0.86, "direct"), (0.84, "winograd")])
def test_choice_that_takes_more_memory_must_gain_more(winograd: float, chosen: str) -> None:
    site = Site(family="convolution", layer="layer", shape="shape", inputs=(), outputs=(), work=1.0)
    times = {site.key: {"direct": 1.0, "winograd": winograd}}
    assert choose([site], times, {"convolution": "direct"}) == {site.name: chosen}


class RefusingBackend(TimedBackend):
    """Refuses graphs that have an operator."""

    def __init__(self, *operators: str) -> None:
        super().__init__()
        self._operators = set(operators)

    def build(
        self, graph: Path, engine: Path, options: RunnerOptions, request: BuildRequest = DEFAULT_REQUEST
    ) -> Mapping[str, Any]:
        refused = self._operators & {node.op_type for node in onnx.load(graph, load_external_data=False).graph.node}
        if refused:
            raise BuildError(f"no {refused.pop()} here")
        return super().build(graph, engine, options, request)


def test_choice_that_is_refused_is_left_out(generator: ir.Model, caplog: pytest.LogCaptureFixture) -> None:
    """As TensorRT for RTX refuses transposed convolutions of bfloat16 maps."""
    sites, told = sites_of(generator, "upsampling")[:1], list[tuple[str, str]]()
    times = measure_sites(
        generator,
        sites,
        backend=RefusingBackend("ConvTranspose"),
        options=RunnerOptions(),
        clock=Clock(seconds=1e9),
        refused=lambda key, choice: told.append((key, choice)),
    )
    key = sites[0].key
    assert set(times[key]) == {"phases", "polyphase"}
    assert {choice for _, choice in told} == set(FAMILIES["upsampling"].choices) - {"phases", "polyphase"}
    assert f"{key}: merged is left out: no ConvTranspose here" in caplog.text
    assert set(choose(sites, times, TABLE_OF_TESTS).values()) <= {"phases", "polyphase"}


def test_no_choice_left_is_an_error(generator: ir.Model) -> None:
    backend = RefusingBackend("Conv", "ConvTranspose")
    with pytest.raises(BuildError, match="upsampling .*: no way to compute it is taken; the last one: no Conv"):
        measure(generator, sites_of(generator, "upsampling")[:1], backend)
    assert backend.open == 0


def test_exported_graph_that_is_refused_is_no_alternative(
    bundle: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    planned = replace(bundle.graphs["generator"], path=tmp_path / "generator.engine")
    planned.path.write_text("/node", encoding="utf-8")
    backend = RefusingBackend("ConvTranspose")
    times = measure_whole(
        bundle.graphs["generator"], planned, None, backend=backend, options=RunnerOptions(), request=DEFAULT_REQUEST
    )
    assert set(times) == {"planned"}
    assert times["planned"] > 0
    assert "the exported graph is no alternative to the plan: no ConvTranspose here" in caplog.text
    assert backend.open == 0


class ShortOfMemoryBackend(TimedBackend):
    """Lacks memory for graphs with a transposed convolution: when it builds them, or when a run is bound."""

    def __init__(self, error: BuildError | DeviceError) -> None:
        super().__init__()
        self._error = error

    def build(
        self, graph: Path, engine: Path, options: RunnerOptions, request: BuildRequest = DEFAULT_REQUEST
    ) -> Mapping[str, Any]:
        super().build(graph, engine, options, request)
        operators = {node.op_type for node in onnx.load(graph, load_external_data=False).graph.node}
        if "ConvTranspose" in operators and isinstance(self._error, BuildError):
            raise self._error
        engine.write_text(" ".join([engine.read_text(encoding="utf-8"), *operators]), encoding="utf-8")
        return {}

    def load(self, file: Path, *rest: Any, weights: Path | None = None) -> TimedRunner:
        runner = super().load(file, *rest, weights=weights)
        if "ConvTranspose" in file.read_text(encoding="utf-8"):
            runner.bind = self._refuse  # type: ignore[method-assign]
        return runner

    def _refuse(self, buffers: Mapping[str, Array]) -> Callable[[], None]:
        raise self._error


SHORT_OF_MEMORY = pytest.mark.parametrize(
    "error", [BuildError("PyTorch refuses it: CUDA out of memory"), DeviceError("cuMemAlloc: whatever")], ids=repr
)


@SHORT_OF_MEMORY
def test_choice_that_memory_lacks_for_is_left_out_this_time_only(
    generator: ir.Model, caplog: pytest.LogCaptureFixture, error: BuildError | DeviceError
) -> None:
    sites, told = sites_of(generator, "upsampling")[:1], list[tuple[str, str]]()
    backend = ShortOfMemoryBackend(error)
    times = measure_sites(
        generator,
        sites,
        backend=backend,
        options=RunnerOptions(),
        clock=Clock(seconds=1e9),
        refused=lambda key, choice: told.append((key, choice)),
    )
    assert set(times[sites[0].key]) == {"phases", "polyphase"}
    assert told == []
    assert f"merged is left out: {error}" in caplog.text
    assert backend.open == 0


@SHORT_OF_MEMORY
def test_exported_graph_that_memory_lacks_for_is_not_refused(
    bundle: Bundle, tmp_path: Path, error: BuildError | DeviceError
) -> None:
    planned = replace(bundle.graphs["generator"], path=tmp_path / "generator.engine")
    planned.path.write_text("/node", encoding="utf-8")
    refused: list[str] = []
    for backend, expected in (
        (ShortOfMemoryBackend(error), []),
        (RefusingBackend("ConvTranspose"), ["exported"]),
    ):
        times = measure_whole(
            bundle.graphs["generator"],
            planned,
            None,
            backend=backend,
            options=RunnerOptions(),
            refused=refused.append,
        )
        assert (set(times), refused) == ({"planned"}, expected)
