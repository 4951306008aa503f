"""What the TensorRT backend asks the library for, on a stand-in that writes it down: no GPU, and no TensorRT."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import onnx
import onnx_ir as ir
import pytest

from restyle_deploy.backends import tensorrt as backend_module
from restyle_deploy.backends import tensorrt_network
from restyle_deploy.backends.base import OPTION_NAMES, BuildRequest, EngineOptions, RunnerOptions
from restyle_deploy.backends.tensorrt import TensorRtBackend
from restyle_deploy.backends.tensorrt_layers import describe_inspected
from restyle_deploy.backends.tensorrt_library import TENSORRT, TENSORRT_RTX
from restyle_deploy.backends.tensorrt_network import check_planes, write_typed_graph
from restyle_deploy.cli.options import engine_options
from restyle_deploy.errors import BuildError
from restyle_deploy.graph.plan import apply_choices, find_sites, table_of
from tests.backends.recording_library import KEPT, MEASURED, RecordingLibrary, RecordingQueue, recorded

OPTIONS = RunnerOptions(device="cuda:1", queue=RecordingQueue())
NO_PLUGINS = EngineOptions(no_plugins=True)


@pytest.fixture(autouse=True)
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """There seem to be two GPUs; the list has those that are current."""
    current: list[str] = []

    @contextmanager
    def current_device(device: str) -> Iterator[None]:
        current.append(device)
        try:
            yield
        finally:
            current.pop()

    monkeypatch.setattr(backend_module, "find_devices", lambda: (("cuda:0", "cuda:1"), ""))
    monkeypatch.setattr(backend_module, "find_processor", lambda device: "sm_89")
    monkeypatch.setattr(backend_module, "find_name", lambda device: {"cuda:1": "NVIDIA RTX 4000 (Ada)"}[device])
    monkeypatch.setattr(backend_module, "current_device", current_device)
    return current


@pytest.fixture(scope="module")
def graph(project_root: Path) -> Path:
    return project_root / "engines" / "demo-faces" / "generator.onnx"


@pytest.fixture
def library() -> RecordingLibrary:
    return recorded()[1]


def build(library: RecordingLibrary, graph: Path, folder: Path, *, cache: bool = False, **engine: Any) -> Any:
    """Build without plugins; return what lies beside the engine about its layers."""
    backend = TensorRtBackend(TENSORRT, library)
    request = BuildRequest(engine=replace(NO_PLUGINS, **engine), cache=folder if cache else None)
    backend.build(graph, folder / "generator.engine", OPTIONS, request)
    return json.loads((folder / "generator.layers.json").read_text(encoding="utf-8"))


# Layers


@pytest.mark.parametrize("version_compatible", [False, True])
def test_layers_are_asked_of_an_engine_that_may_bring_host_code(
    library: RecordingLibrary, graph: Path, tmp_path: Path, version_compatible: bool
) -> None:
    content = build(library, graph, tmp_path, version_compatible=version_compatible)
    assert library.named("deserialize") == [[version_compatible]]
    assert (content["of"], [layer["name"] for layer in content["layers"]]) == ("engine", ["decoder.conv/Conv_0"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine_is_taken": False}, r"TensorRT 10\.9\.0 refuses the engine that it built: the engine holds host code"),
        ({"layers": "no JSON"}, "tells the layers in another way: JSONDecodeError"),
        ({"layers": "{}"}, "tells the layers in another way: KeyError: 'Layers'"),
    ],
    ids=str,
)
def test_layers_that_are_not_told_cost_no_engine(
    library: RecordingLibrary,
    graph: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    changes: Mapping[str, Any],
    message: str,
) -> None:
    for name, value in changes.items():
        setattr(library, name, value)
    content = build(library, graph, tmp_path)
    assert content == {"of": "network", "layers": []}  # the stand-in's network is empty
    assert (tmp_path / "generator.engine").read_bytes() == b"plan"
    assert re.search(f"generator.engine: its layers are listed as they were parsed: .*{message}", caplog.text)


TWO_TEXTS = {"Name": "y", "Dimensions": [2, 8, 4, 4], "Format": "NHWC8", "DataType": "Half"}
ONE_TEXT = {
    "Name": "y",
    "Dimensions": [2, 8, 4, 4],
    "Format/Datatype": "Channel major FP16 format where channel % 8 == 0",
}


@pytest.mark.parametrize(
    ("output", "dtype", "form"),
    [
        (TWO_TEXTS, "Half", "NHWC8"),
        ({**TWO_TEXTS, "DataType": "BFloat16"}, "BFloat16", "NHWC8"),
        (ONE_TEXT, "FP16", ONE_TEXT["Format/Datatype"]),
        ({**ONE_TEXT, "Format/Datatype": "Half"}, "Half", "Half"),
    ],
    ids=["11 Half", "11 BFloat16", "10 FP16", "10 Half"],
)
def test_inspector_of_each_version_is_understood(output: Mapping[str, Any], dtype: str, form: str) -> None:
    layer = {
        "Name": "decoder.conv1.conv/Conv_0 + decoder.conv1/Relu_0",
        "LayerType": "CaskConvolution",
        "Inputs": [{"Name": "x", "Format": "NCHW", "DataType": "Float"}],
        "Outputs": [output, output],
        "Metadata": "[ONNX Layer: decoder.conv1.conv/Conv_0]\x1e[ONNX Layer: decoder.conv1/Relu_0]",
    }
    assert describe_inspected(layer) == {
        "name": layer["Name"],
        "type": "CaskConvolution",
        "precision": dtype,
        "format": form,
        "shapes": [[2, 8, 4, 4]] * 2,
        "model_layers": ["decoder.conv1.conv", "decoder.conv1"],
    }


def test_inspector_may_tell_a_name_alone() -> None:
    told = describe_inspected("decoder.conv1")
    assert (told["name"], told["precision"], told["format"], told["shapes"]) == ("decoder.conv1", "", "", [])


# Timing cache and device


CACHE = "timing-tensorrt-10.9.0-NVIDIA-RTX-4000-Ada.cache"


def test_timing_cache_is_of_the_gpus_name(library: RecordingLibrary, graph: Path, tmp_path: Path) -> None:
    (tmp_path / CACHE).write_bytes(KEPT)
    build(library, graph, tmp_path, cache=True)
    assert library.named("set_timing_cache") == [[KEPT, False]]
    assert (tmp_path / CACHE).read_bytes() == MEASURED
    assert [path.name for path in tmp_path.glob("*.cache")] == [CACHE]


def test_timing_cache_that_does_not_fit_is_begun_anew(library: RecordingLibrary, graph: Path, tmp_path: Path) -> None:
    (tmp_path / CACHE).write_bytes(KEPT)
    library.cache_fits = False
    build(library, graph, tmp_path, cache=True)
    assert library.named("set_timing_cache") == [[KEPT, False], [b"", False]]
    assert (tmp_path / CACHE).read_bytes() == MEASURED


def test_refusal_gives_no_former_mismatch_as_its_reason(library: RecordingLibrary, graph: Path, tmp_path: Path) -> None:
    (tmp_path / CACHE).write_bytes(KEPT)
    library.cache_fits, library.plan = False, None
    with pytest.raises(BuildError, match=r"refuses generator\.onnx: no memory is left"):
        build(library, graph, tmp_path, cache=True)
    assert (tmp_path / CACHE).read_bytes() == KEPT


def test_no_timing_cache_after_a_build_is_none_to_keep(library: RecordingLibrary, graph: Path, tmp_path: Path) -> None:
    library.cache_is_kept = False
    build(library, graph, tmp_path, cache=True)
    assert not list(tmp_path.glob("*.cache"))


def test_device_is_current_while_the_library_is_asked_and_the_callers_afterwards(
    library: RecordingLibrary, graph: Path, tmp_path: Path, gpus: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    current = []

    def note_device(ask: Callable[..., Any]) -> Callable[..., Any]:
        def asked(*given: Any) -> Any:
            current.append([*gpus])
            return ask(*given)

        return asked

    for name in ("Builder", "Runtime"):
        monkeypatch.setattr(library, name, note_device(getattr(library, name)))
    build(library, graph, tmp_path)
    backend = TensorRtBackend(TENSORRT, library)
    backend.check_graph(graph, OPTIONS, BuildRequest(engine=NO_PLUGINS))
    library.plan = None
    with pytest.raises(BuildError, match="no memory is left"):
        backend.load(graph, (), (), replace(OPTIONS, plugin_route="functions"))
    assert current == [["cuda:1"]] * 4
    assert gpus == []


# Kernels


@pytest.mark.parametrize(("recorded_route", "expected"), [("functions", "functions"), ("jit", "jit"), (None, "aot")])
def test_weights_are_typed_by_the_route_of_the_engine(
    library: RecordingLibrary,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recorded_route: str | None,
    expected: str,
) -> None:
    routes: list[str] = []

    def note(graph: Path, folder: Path, *, route: str, **_: Any) -> Path:
        routes.append(route)
        raise BuildError("enough is known")

    monkeypatch.setattr(tensorrt_network, "write_typed_graph", note)
    monkeypatch.setattr(backend_module, "_plugins", lambda: SimpleNamespace(**PLUGINS))
    backend = TensorRtBackend(TENSORRT, library)
    with pytest.raises(BuildError, match="enough"):
        backend.load(tmp_path / "x.engine", (), (), replace(OPTIONS, plugin_route=recorded_route), tmp_path / "x.onnx")
    assert routes == [expected]


PLUGINS: Mapping[str, Any] = {"choose_route": lambda trt: ("aot", ""), "register_plugins": lambda trt, route: route}


@pytest.mark.parametrize(("max_batch", "fits"), [(511, True), (512, False)])
def test_more_feature_maps_than_the_filter_takes_are_refused(
    graph: Path, tmp_path: Path, max_batch: int, fits: bool
) -> None:
    """The demo's widest filter has 128 channels."""

    def write(route: str) -> Path:
        return write_typed_graph(graph, tmp_path, precision="fp32", route=route, arch="sm_89", max_batch=max_batch)

    assert write("functions").is_file()
    if fits:
        assert write("aot").is_file()
        return
    expected = "512 images of 128 channels are 65536 feature maps, .* 65535 .*; use --max-batch 511 or less, or --no-pl"
    with pytest.raises(BuildError, match=expected):
        write("aot")


def test_graph_without_filters_takes_any_batch() -> None:
    x = ir.Value(name="x", shape=ir.Shape(("N", 512, 4, 4)), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node("Relu", [x], name="relu")
    graph = ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 20}, name="graph")
    check_planes(ir.Model(graph, ir_version=10), 60_000)


# Options


def test_help_names_the_libraries_that_have_an_option() -> None:
    command = click.command()(engine_options(lambda **_: None))
    helps = {parameter.name: getattr(parameter, "help", "") for parameter in command.params}
    for name in OPTION_NAMES:
        beginnings = {
            (True, True): "Both TensorRT libraries: ",
            (True, False): "TensorRT: ",
            (False, True): "TensorRT for RTX: ",
        }
        beginning = beginnings[name in TENSORRT.options, name in TENSORRT_RTX.options]
        assert helps[name].startswith(beginning), name


@pytest.mark.parametrize(
    ("engine", "expected"),
    [
        ({}, set()),
        ({"hardware_compatible": True}, {("hardware_compatibility_level", "ampere+")}),
        ({"version_compatible": True}, {("set_flag", "compatible")}),
        ({"optimization_level": 5}, {("builder_optimization_level", 5)}),
        ({"optimization_level": 0}, {("builder_optimization_level", 0)}),
        ({"stripped": True}, {("set_flag", "strip")}),
        ({"workspace_bytes": 1 << 31}, {("set_memory_pool_limit", "workspace", 1 << 31)}),
    ],
    ids=str,
)
def test_options_reach_the_builder(
    library: RecordingLibrary,
    graph: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    engine: Mapping[str, Any],
    expected: set[tuple[Any, ...]],
) -> None:
    """Each of them, and nothing else."""
    build(library, graph, tmp_path, **engine)
    (config,) = library.configs
    names = ("hardware_compatibility_level", "builder_optimization_level")
    found: set[tuple[Any, ...]] = {(name, getattr(config, name)) for name in names if hasattr(config, name)}
    for name in ("set_flag", "set_memory_pool_limit"):
        found |= {(name, *arguments) for arguments in library.named(name)}
    assert found == expected


def test_weights_cannot_be_put_back_by_another_versions_runtime(library: RecordingLibrary) -> None:
    engine = replace(NO_PLUGINS, stripped=True, version_compatible=True)
    with pytest.raises(ValueError, match="--stripped contradicts --version-compatible: .* leave out one of both"):
        TensorRtBackend(TENSORRT, library).check_build(OPTIONS, engine)


PLAN = "; with --tune, the plan has only what it can compute"
MEMORY = "; use a larger --workspace, or a smaller --max-batch than 400"


@pytest.mark.parametrize(
    ("reason", "remedy"),
    [
        ("Error Code 10: Internal Error (Could not find any implementation for node up.)", PLAN),
        ("ConvTranspose2d: no valid tactic", PLAN),
        ("Error Code 2: OutOfMemory (Requested size was 68733933952 bytes.)", MEMORY),
        ("Error Code 2: OutOfMemory (no more)", MEMORY),
        ("the weather", ""),
    ],
)
def test_refusal_names_the_way_around(
    library: RecordingLibrary, graph: Path, tmp_path: Path, reason: str, remedy: str
) -> None:
    library.plan, library.refusal = None, reason
    with pytest.raises(BuildError) as caught:
        build(library, graph, tmp_path, max_batch=400)
    assert str(caught.value) == f"TensorRT 10.9.0 refuses generator.onnx: {reason}{remedy}"


@pytest.mark.parametrize("plan", ["tensorrt", "tensorrt-rtx"])
def test_no_transposed_convolution_of_bfloat16_maps(graph: Path, tmp_path: Path, plan: str) -> None:
    """Neither library has one."""
    model = ir.load(graph)
    sites = find_sites(model)
    table = table_of(plan, "bf16")
    apply_choices(model, sites, {site.name: table[site.family] for site in sites}, epilogues=True)
    ir.save(model, tmp_path / "generator.onnx")
    typed = write_typed_graph(
        tmp_path / "generator.onnx", tmp_path, precision="bf16", route="functions", arch=None, max_batch=8
    )
    inferred = onnx.shape_inference.infer_shapes(onnx.load(typed)).graph
    types = {value.name: value.type.tensor_type.elem_type for value in inferred.value_info}
    found = {(node.op_type, types[node.input[0]]) for node in inferred.node if "Conv" in node.op_type}
    assert ("Conv", onnx.TensorProto.BFLOAT16) in found
    assert ("ConvTranspose", onnx.TensorProto.BFLOAT16) not in found


def test_kernels_of_a_compatible_engine_are_for_the_oldest_gpu_that_it_runs_on(
    library: RecordingLibrary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arches: list[str] = []

    def note(graph: Path, folder: Path, *, arch: str, **_: Any) -> Path:
        arches.append(arch)
        raise BuildError("enough is known")

    monkeypatch.setattr(tensorrt_network, "write_typed_graph", note)
    monkeypatch.setattr(backend_module, "_plugins", lambda: SimpleNamespace(**PLUGINS))
    backend = TensorRtBackend(TENSORRT, library)
    for compatible in (False, True):
        request = BuildRequest(engine=EngineOptions(hardware_compatible=compatible))
        with pytest.raises(BuildError, match="enough"):
            backend.build(tmp_path / "x.onnx", tmp_path / "x.engine", OPTIONS, request)
    assert arches == ["sm_89", "sm_80"]
