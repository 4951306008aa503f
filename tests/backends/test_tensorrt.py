"""TensorRT for RTX really builds here, on the CPU; what needs a GPU or TensorRT itself is marked, and says so."""

import contextlib
import itertools
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from restyle_deploy.backends import load_backend
from restyle_deploy.backends import tensorrt as backend_module
from restyle_deploy.backends.base import MOST_IMAGES, BuildRequest, EngineOptions, RunnerOptions
from restyle_deploy.backends.tensorrt import TensorRtBackend
from restyle_deploy.backends.tensorrt_library import TENSORRT, batches_of
from restyle_deploy.build import BuildOptions, build_engine
from restyle_deploy.bundle import Bundle, check_engine, open_bundle, read_bundle
from restyle_deploy.errors import BackendUnavailableError, BuildError, BundleError, ShapeError
from restyle_deploy.graph.plan import TABLE, apply_choices, find_sites
from restyle_deploy.runtime.session import Session
from tests.backends.place import Place
from tests.bundles import add_engine

NO_DEVICE = ((), "there is no NVIDIA driver")
OPTIONS = RunnerOptions(device="cuda:0")
LEAST_SHARE_OF_WEIGHTS = 0.9


def backend_or_skip(name: str) -> TensorRtBackend:
    try:
        backend = load_backend(name)
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    assert isinstance(backend, TensorRtBackend)
    return backend


@pytest.fixture(scope="module")
def rtx() -> TensorRtBackend:
    return backend_or_skip("tensorrt-rtx")


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no GPU, even where there is one."""
    monkeypatch.setattr(backend_module, "find_devices", lambda: NO_DEVICE)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """There seem to be two GPUs; nothing can run on them."""
    monkeypatch.setattr(backend_module, "find_devices", lambda: (("cuda:0", "cuda:1"), ""))
    monkeypatch.setattr(backend_module, "find_processor", lambda device: "sm_89")
    monkeypatch.setattr(backend_module, "find_name", lambda device: "NVIDIA L4")
    monkeypatch.setattr(backend_module, "current_device", lambda device: contextlib.nullcontext())


@pytest.fixture(scope="module")
def demo(project_root: Path) -> Bundle:
    return open_bundle(project_root / "engines" / "demo-faces")


class FakeLibrary:
    """What the options' checks read of a library's module."""

    __version__ = "10.9.0"
    __name__ = "tensorrt"
    QuickPluginCreationRequest = object


@pytest.fixture
def tensorrt() -> TensorRtBackend:
    """The backend on a library that is not there: for what is decided before it is asked."""
    return TensorRtBackend(TENSORRT, FakeLibrary())


# Devices and options


@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu_nothing_runs_and_the_reason_is_told(tensorrt: TensorRtBackend) -> None:
    expected = r"device 'cuda:0' cannot run here; available: none \(there is no NVIDIA driver\)"
    with pytest.raises(BackendUnavailableError, match=expected):
        tensorrt.check_options(OPTIONS)
    with pytest.raises(BackendUnavailableError, match=expected):
        tensorrt.check_build(OPTIONS, EngineOptions())


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("device", ["cpu", "cuda:2", ""])
def test_other_devices_are_refused(tensorrt: TensorRtBackend, device: str) -> None:
    with pytest.raises(BackendUnavailableError, match=f"device '{device}' cannot run here; available: cuda:0, cuda:1"):
        tensorrt.check_options(RunnerOptions(device=device))
    tensorrt.check_options(RunnerOptions(device="cuda:1", precision="fp16"))


@pytest.mark.parametrize(("precision", "runs"), [("fp32", True), ("fp16", True), ("tf32", False), ("bf16", False)])
def test_precision_needs_the_instructions(
    tensorrt: TensorRtBackend, monkeypatch: pytest.MonkeyPatch, precision: str, runs: bool
) -> None:
    monkeypatch.setattr(backend_module, "find_devices", lambda: (("cuda:0",), ""))
    monkeypatch.setattr(backend_module, "find_processor", lambda device: "sm_75")
    if runs:
        tensorrt.check_options(replace(OPTIONS, precision=precision))
        return
    with pytest.raises(BackendUnavailableError, match=f"precision {precision} cannot run here: sm_75 has no such"):
        tensorrt.check_options(replace(OPTIONS, precision=precision))


@pytest.mark.usefixtures("gpu")
def test_unknown_precision_is_refused(tensorrt: TensorRtBackend) -> None:
    with pytest.raises(
        BackendUnavailableError, match="^backend tensorrt has no precision fp8; it has fp32, tf32, fp16, bf16$"
    ):
        tensorrt.check_options(replace(OPTIONS, precision="fp8"))


@pytest.mark.usefixtures("gpu")
def test_target_of_tensorrt_is_the_gpu_or_all_from_ampere_on(tensorrt: TensorRtBackend) -> None:
    own = tensorrt.check_build(OPTIONS, EngineOptions())
    any_ = tensorrt.check_build(OPTIONS, EngineOptions(hardware_compatible=True))
    assert (own.processor, own.refusal, own.has_kernels) == ("NVIDIA L4 (sm_89)", None, True)
    assert own.facts["compute_capability"] == ["sm_89"]
    assert any_.processor == "sm_80+"
    assert {own.processor, any_.processor} == set(tensorrt.processors("cuda:0"))
    assert own.facts["plugin_route"] == "aot"
    assert own.facts["plugin_hash"] == tensorrt.plugin_hash() is not None


@pytest.mark.usefixtures("gpu")
def test_kernels_come_in_the_way_that_is_wanted(tensorrt: TensorRtBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """For trials of a device: no command line asks for one."""
    launched = tensorrt.check_build(replace(OPTIONS, plugin_route="jit"), EngineOptions())
    assert (launched.facts["plugin_route"], launched.has_kernels) == ("jit", True)
    assert launched.facts["plugin_hash"] == tensorrt.plugin_hash()
    monkeypatch.delattr(FakeLibrary, "QuickPluginCreationRequest")
    with pytest.raises(BackendUnavailableError, match="tensorrt: no plugins by the route aot: .* cannot embed kernels"):
        tensorrt.check_build(replace(OPTIONS, plugin_route="aot"), EngineOptions())
    without = replace(OPTIONS, plugin_route="functions")
    assert tensorrt.check_build(without, EngineOptions(no_plugins=True)).facts["plugin_route"] == "functions"


@pytest.mark.tensorrt
@pytest.mark.usefixtures("gpu")
def test_rtx_takes_no_plugins(rtx: TensorRtBackend) -> None:
    with pytest.raises(BackendUnavailableError, match="tensorrt-rtx: no plugins by the route jit: .* takes no Python"):
        rtx.check_build(replace(OPTIONS, plugin_route="jit"), EngineOptions())


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("compatible", [False, True])
def test_engine_of_another_model_of_the_same_compute_capability_is_refused(
    tensorrt: TensorRtBackend, toy_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compatible: bool
) -> None:
    bundle = Path(shutil.copytree(toy_bundle, tmp_path / "bundle"))
    target = tensorrt.check_build(OPTIONS, EngineOptions(hardware_compatible=compatible))
    build = {"verified": True, "reason": None, "options": ["--hardware-compatible"] if compatible else []}
    versions = dict(tensorrt.library_versions())
    changes: dict[str, Any] = {"backend": "tensorrt", "processor": target.processor, "library_versions": versions}
    engine = add_engine(bundle, **changes, build=build)
    facts: dict[str, Any] = {"library_versions": versions, "processors": tensorrt.processors("cuda:0")}
    check_engine(read_bundle(bundle), engine, **facts)
    monkeypatch.setattr(backend_module, "find_name", lambda device: "NVIDIA L40S")
    facts["processors"] = tensorrt.processors("cuda:0")
    if compatible:
        check_engine(read_bundle(bundle), engine, **facts)
        return
    expected = r"built for NVIDIA L4 \(sm_89\), this is NVIDIA L40S \(sm_89\), .*; build it again: restyle-deploy build"
    with pytest.raises(BundleError, match=expected):
        check_engine(read_bundle(bundle), engine, **facts)


@pytest.mark.usefixtures("gpu")
def test_no_plugins_leaves_our_kernels_out(tensorrt: TensorRtBackend) -> None:
    target = tensorrt.check_build(OPTIONS, EngineOptions(no_plugins=True))
    assert (target.facts["plugin_route"], target.facts["plugin_hash"], target.has_kernels) == ("functions", None, False)


def test_hardware_compatibility_needs_ampere(tensorrt: TensorRtBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_module, "find_devices", lambda: (("cuda:0",), ""))
    monkeypatch.setattr(backend_module, "find_processor", lambda device: "sm_75")
    monkeypatch.setattr(backend_module, "find_name", lambda device: "NVIDIA T4")
    assert tensorrt.processors("cuda:0") == ("NVIDIA T4 (sm_75)",)
    with pytest.raises(BackendUnavailableError, match="--hardware-compatible needs sm_80, this is sm_75"):
        tensorrt.check_build(OPTIONS, EngineOptions(hardware_compatible=True))


@pytest.mark.parametrize(
    ("engine", "batches"),
    [
        (EngineOptions(), (1, 1, 8)),
        (EngineOptions(max_batch=2), (1, 1, 2)),
        (EngineOptions(opt_batch=16), (1, 16, 16)),
        (EngineOptions(min_batch=4), (4, 4, 8)),
        (EngineOptions(min_batch=2), (2, 2, 8)),
        (EngineOptions(opt_batch=32), (1, 32, 32)),
        (EngineOptions(max_batch=MOST_IMAGES), (1, 1, MOST_IMAGES)),
        (EngineOptions(min_batch=1, opt_batch=4, max_batch=32), (1, 4, 32)),
    ],
)
def test_batches_left_out_follow_the_others(engine: EngineOptions, batches: tuple[int, int, int]) -> None:
    assert batches_of(engine) == batches


@pytest.mark.parametrize(
    "changes",
    [
        {"min_batch": 3, "opt_batch": 2},
        {"opt_batch": 4, "max_batch": 2},
        {"max_batch": MOST_IMAGES + 1},
        {"max_batch": 2**63},
    ],
)
def test_batches_out_of_order_or_too_large_are_refused(changes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="expected 1 <= least <= best <= most <= 65535$"):
        batches_of(EngineOptions(**changes))  # type: ignore[arg-type]


@pytest.mark.tensorrt
@pytest.mark.usefixtures("no_gpu")
def test_rtx_builds_for_several_gpus_without_one(rtx: TensorRtBackend) -> None:
    target = rtx.check_build(OPTIONS, EngineOptions())
    assert target.processor == "sm_80 or sm_86 or sm_89 or sm_120"
    assert target.refusal == "no GPU can run the engine here: there is no NVIDIA driver"
    assert (target.facts["plugin_route"], target.facts["plugin_hash"], rtx.plugin_hash()) == ("functions", None, None)
    named = rtx.check_build(OPTIONS, EngineOptions(compute_capabilities=("12.0", "7.5", "12.0")))
    assert named.processor == "sm_120 or sm_75"
    assert named.facts["compute_capability"] == ["sm_120", "sm_75"]


@pytest.mark.tensorrt
@pytest.mark.usefixtures("gpu")
def test_rtx_engine_is_for_the_gpu_unless_others_are_named(rtx: TensorRtBackend) -> None:
    own = rtx.check_build(OPTIONS, EngineOptions())
    assert (own.processor, own.facts["compute_capability"], own.refusal) == ("sm_89", ["sm_89"], None)
    assert rtx.processors("cuda:0") == ("sm_89",)  # of any model: what is for one is compiled when it is loaded
    other = rtx.check_build(OPTIONS, EngineOptions(compute_capabilities=("7.5",)))
    assert other.refusal == "the engine is for sm_75, this GPU is sm_89"


@pytest.mark.tensorrt
@pytest.mark.usefixtures("gpu")
def test_rtx_says_so_where_it_cannot_build_for_the_gpu(rtx: TensorRtBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_module, "find_processor", lambda device: "sm_90")
    expected = r"TensorRT for RTX [\d.]+ cannot build for this GPU, sm_90; .*: --compute-capability with 7\.5, 8\.0"
    with pytest.raises(BackendUnavailableError, match=expected):
        rtx.check_build(OPTIONS, EngineOptions())
    named = rtx.check_build(OPTIONS, EngineOptions(compute_capabilities=("8.9", "12.0")))
    assert named.refusal == "the engine is for sm_89 or sm_120, this GPU is sm_90"
    with pytest.raises(BackendUnavailableError, match="device 'cuda:7' cannot run here; available: cuda:0, cuda:1"):
        rtx.check_build(RunnerOptions(device="cuda:7"), EngineOptions())


@pytest.mark.tensorrt
@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compute_capabilities": ("9.0", "1.0")}, "cannot build for compute capability '9.0', '1.0'; it can for 7.5"),
        ({"optimization_level": 0}, "has no --optimization-level; it has --min-batch, --opt-batch"),
        ({"hardware_compatible": True, "version_compatible": True}, "no --hardware-compatible, --version"),
    ],
    ids=str,
)
def test_options_that_rtx_has_not_are_a_caller_s_mistake(
    rtx: TensorRtBackend, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^backend tensorrt-rtx .*{message}"):
        rtx.check_build(OPTIONS, EngineOptions(**options))


@pytest.mark.tensorrt
@pytest.mark.usefixtures("gpu")
def test_weights_are_put_back_in_one_shape(rtx: TensorRtBackend) -> None:
    """Products are convolutions for sm_75, and the GPU that opens an engine tells which it has."""
    for fitting in (("7.5",), ("8.0", "8.9")):
        rtx.check_build(OPTIONS, EngineOptions(stripped=True, compute_capabilities=fitting))
    with pytest.raises(ValueError, match="--stripped contradicts sm_75 beside other GPUs: .*; leave out one of both"):
        rtx.check_build(OPTIONS, EngineOptions(stripped=True, compute_capabilities=("7.5", "8.9")))


@pytest.mark.tensorrt
@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(
    ("options", "engine", "message"),
    [
        (OPTIONS, {"stripped": True}, "--stripped needs a GPU to build on, .*: there is no NVIDIA driver"),
        *[
            (RunnerOptions(device=device), {}, f"device '{device}' cannot run here; available: none, but engines .* cu")
            for device in ("cpu", "cuda:1", "cuda:99", "cuda:00")
        ],
        (replace(OPTIONS, precision="mixed"), {}, "tensorrt-rtx has no precision mixed; it has fp32, tf32, fp16, bf16"),
        (replace(OPTIONS, precision="bf16"), {"compute_capabilities": ("7.5",)}, "bf16 cannot run here: sm_75 has no"),
    ],
    ids=str,
)
def test_rtx_refuses_what_it_cannot_build(
    rtx: TensorRtBackend, options: RunnerOptions, engine: dict[str, Any], message: str
) -> None:
    with pytest.raises(BackendUnavailableError, match=message):
        rtx.check_build(options, EngineOptions(**engine))


# Building on the CPU


def build(backend: TensorRtBackend, graph: Path, folder: Path, precision: str = "fp32", **engine: Any) -> Path:
    target = folder / f"{graph.stem}.engine"
    request = BuildRequest(engine=EngineOptions(**engine))
    backend.build(graph, target, replace(OPTIONS, precision=precision), request)
    return target


def planned_generator(bundle: Bundle, folder: Path) -> Path:
    """Write the generator as both libraries take it in each precision: without transposed convolutions of maps."""
    model = ir.load(bundle.graphs["generator"].path)
    sites = find_sites(model)
    apply_choices(model, sites, {site.name: TABLE["tensorrt-rtx"][site.family] for site in sites}, epilogues=True)
    ir.save(model, folder / "generator.onnx")
    return folder / "generator.onnx"


def layers_of(engine: Path) -> dict[str, Any]:
    content = json.loads(engine.with_suffix(".layers.json").read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content


def weight_bytes(graph: Path) -> int:
    model = onnx.load(graph)
    return sum(tensor.ByteSize() for tensor in model.graph.initializer)


@pytest.mark.tensorrt
@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(
    ("graph", "precision"),
    # As exported the generator has transposed convolutions, which TensorRT for RTX does not take of bfloat16 maps.
    [*itertools.product(["encoder", "generator"], ["fp32", "tf32", "fp16"]), ("encoder", "bf16")],
)
def test_exported_graphs_of_the_demo_become_engines(
    rtx: TensorRtBackend, demo: Bundle, tmp_path: Path, graph: str, precision: str
) -> None:
    source = demo.graphs[graph].path
    engine = build(rtx, source, tmp_path, precision)
    share = 0.5 if precision in ("fp16", "bf16") else 1.0
    assert engine.stat().st_size > LEAST_SHARE_OF_WEIGHTS * share * weight_bytes(source)
    content = layers_of(engine)
    assert content["of"] == "engine"
    convolutions = [layer for layer in content["layers"] if layer["type"] in ("correlation", "deconv")]
    assert convolutions
    types = {layer["precision"] for layer in convolutions}
    short = {"fp16": "Half", "bf16": "BFloat16"}.get(precision)
    assert (short in types) if short else (types == {"Float"})
    assert all(layer["format"] for layer in convolutions)
    assert {path.name for path in tmp_path.iterdir()} == {f"{graph}.engine", f"{graph}.layers.json"}


@pytest.mark.tensorrt
@pytest.mark.usefixtures("no_gpu")
def test_plain_bf16_names_a_remedy(rtx: TensorRtBackend, demo: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """As exported the generator is refused; with a GPU here, that is where it ends."""
    monkeypatch.setattr(backend_module, "queue_of", lambda options: None)
    monkeypatch.setattr(TensorRtBackend, "check_options", lambda self, options: None)
    record = demo.graphs["generator"]
    options = replace(OPTIONS, precision="bf16")
    expected = r"refuses generator\.onnx: .*; as exported, .* leave out --plain .*build BUNDLE --backend tensorrt-rtx"
    with pytest.raises(BuildError, match=expected):
        rtx.load(record.path, record.inputs, record.outputs, options)


@pytest.mark.tensorrt
@pytest.mark.usefixtures("no_gpu")
def test_planned_generator_is_built_in_bfloat16(rtx: TensorRtBackend, demo: Bundle, tmp_path: Path) -> None:
    assert build(rtx, planned_generator(demo, tmp_path), tmp_path, "bf16").stat().st_size > 0


@pytest.mark.tensorrt
@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("graph", ["encoder", "generator"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_exported_graphs_are_built_for_turing(
    rtx: TensorRtBackend, demo: Bundle, tmp_path: Path, graph: str, precision: str
) -> None:
    """Which takes no float32 product of matrices; and for others at once."""
    engine = build(rtx, demo.graphs[graph].path, tmp_path, precision, compute_capabilities=("8.9", "7.5"))
    assert "gemm" not in {layer["type"] for layer in layers_of(engine)["layers"]}


@pytest.mark.tensorrt
@pytest.mark.usefixtures("no_gpu")
def test_every_layer_of_an_engine_says_what_it_computes(rtx: TensorRtBackend, demo: Bundle, tmp_path: Path) -> None:
    """Also where several are fused to one."""
    layers = layers_of(build(rtx, demo.graphs["generator"].path, tmp_path))["layers"]
    named = {name for layer in layers for name in layer["model_layers"]}
    expected = {f"decoder.convs.{index}.conv" for index in range(8)}
    expected |= {f"decoder.to_rgbs.{index}.conv" for index in range(4)}
    assert named > expected
    nameless = [layer["type"] for layer in layers if not layer["model_layers"]]
    assert len(nameless) < 0.05 * len(layers)
    assert not {"correlation", "deconv", "gemm"} & set(nameless)


@pytest.mark.tensorrt
@pytest.mark.usefixtures("no_gpu")
def test_layers_are_named_after_the_model(rtx: TensorRtBackend, demo: Bundle, tmp_path: Path) -> None:
    layers = rtx._network(demo.graphs["generator"].path, tmp_path, OPTIONS, BuildRequest()).layers()
    computing = [layer for layer in layers if layer["type"] != "CONSTANT"]
    names = [layer["name"] for layer in computing]
    assert len(set(names)) == len(names)
    modules = ("decoder", "model", "generator")
    assert {layer["model_layers"][0].partition(".")[0] for layer in layers} <= set(modules)
    assert all(layer["name"].startswith(layer["model_layers"][0]) for layer in computing)
    assert {"decoder.conv1", "decoder.convs.0"} <= {
        name for layer in computing if layer["type"] == "ACTIVATION" for name in layer["model_layers"]
    }


@pytest.mark.tensorrt
@pytest.mark.usefixtures("no_gpu")
def test_tf32_is_off_unless_it_is_asked_for(
    rtx: TensorRtBackend, demo: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine does not tell it: the flag is read where the configuration is made."""
    from restyle_deploy.backends.tensorrt_network import Network

    flags = []
    configure = Network._configure

    def note(network: Network) -> Any:
        config = configure(network)
        flags.append(config.get_flag(network._trt.BuilderFlag.TF32))
        return config

    monkeypatch.setattr(Network, "_configure", note)
    for precision in ("fp32", "tf32", "fp16"):
        rtx.check_graph(demo.graphs["generator"].path, replace(OPTIONS, precision=precision), BuildRequest())
    assert flags == [False, True, False]


@pytest.mark.tensorrt
@pytest.mark.usefixtures("no_gpu")
def test_profile_and_targets_reach_the_builder(
    rtx: TensorRtBackend, demo: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from restyle_deploy.backends.tensorrt_network import Network

    networks: list[Network] = []
    build_plan = Network.build

    def note(network: Network) -> Any:
        networks.append(network)
        return build_plan(network)

    monkeypatch.setattr(Network, "build", note)
    options: dict[str, Any] = {"min_batch": 2, "opt_batch": 3, "max_batch": 5, "workspace_bytes": 1 << 28}
    build(rtx, demo.graphs["encoder"].path, tmp_path, compute_capabilities=("8.9", "12.0"), **options)
    (network,) = networks
    trt, config, profile = network._trt, network._config, network._profile()
    for name, sizes in (("target", (3, 64, 64)), ("latent", demo.latent_avg.shape)):
        assert [tuple(shape) for shape in profile.get_shape(name)] == [(batch, *sizes) for batch in (2, 3, 5)]
    assert [config.get_compute_capability(index).name for index in range(config.num_compute_capabilities)] == [
        "SM89",
        "SM120",
    ]
    assert config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 1 << 28
    assert config.num_optimization_profiles == 1
    assert config.get_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)  # so that runs can be captured


@pytest.mark.tensorrt
@pytest.mark.usefixtures("no_gpu")
def test_progress_is_told(rtx: TensorRtBackend, demo: Bundle, tmp_path: Path) -> None:
    told: list[str] = []
    request = BuildRequest(progress=told.append)
    rtx.build(demo.graphs["generator"].path, tmp_path / "generator.engine", OPTIONS, request)
    assert told[0] == "Building engine"
    assert any(re.fullmatch(r".+ \d+%", text) for text in told)
    assert len(told) < 50


@pytest.mark.tensorrt
@pytest.mark.usefixtures("no_gpu")
def test_graph_is_checked_without_building(rtx: TensorRtBackend, demo: Bundle, tmp_path: Path) -> None:
    facts = rtx.check_graph(demo.graphs["generator"].path, OPTIONS, BuildRequest())
    assert facts["layers"] > 100


@pytest.mark.tensorrt
@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("content", [b"", b"no graph", None])
def test_what_is_no_graph_is_refused(rtx: TensorRtBackend, tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "broken.onnx").write_bytes(content)
    with pytest.raises(BuildError, match=r"refuses broken\.onnx: it is no ONNX file") as caught:
        build(rtx, tmp_path / "broken.onnx", tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "broken.engine").exists()


@pytest.mark.tensorrt
@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("method", ["build", "check_graph"])
def test_unknown_operator_is_named(rtx: TensorRtBackend, tmp_path: Path, method: str) -> None:
    x = ir.Value(name="x", shape=ir.Shape(("N", 3)), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node("Abacus", [x], domain="beads", name="decoder.abacus/Abacus_0")
    node.outputs[0].shape, node.outputs[0].type = x.shape, x.type
    graph = ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 20, "beads": 1}, name="graph")
    ir.save(ir.Model(graph, ir_version=10), tmp_path / "unknown.onnx")
    path = tmp_path / "unknown.onnx"
    calls: dict[str, Callable[[], object]] = {
        "build": lambda: build(rtx, path, tmp_path),
        "check_graph": lambda: rtx.check_graph(path, OPTIONS, BuildRequest()),
    }
    expected = r"TensorRT for RTX [\d.]+ refuses unknown\.onnx: decoder\.abacus/Abacus_0 \(Abacus\): .*not found"
    with pytest.raises(BuildError, match=expected):
        calls[method]()


@pytest.mark.tensorrt
@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_demo_bundle_gets_an_engine_for_turing(
    rtx: TensorRtBackend, demo: Bundle, tmp_path: Path, precision: str
) -> None:
    bundle = Path(shutil.copytree(demo.path, tmp_path / "bundle"))
    engine = EngineOptions(compute_capabilities=("7.5",))
    record = build_engine(bundle, BuildOptions(backend="tensorrt-rtx", precision=precision, engine=engine))
    assert record.processor == "sm_75"


@pytest.mark.tensorrt
@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_demo_bundle_gets_an_engine(rtx: TensorRtBackend, demo: Bundle, tmp_path: Path, precision: str) -> None:
    bundle = Path(shutil.copytree(demo.path, tmp_path / "bundle"))
    record = build_engine(bundle, BuildOptions(backend="tensorrt-rtx", precision=precision))
    (engine,) = read_bundle(bundle).engines
    assert engine == record
    assert engine.directory == bundle / "engines" / f"tensorrt-rtx-cuda0-{precision}"
    assert engine.processor == "sm_80 or sm_86 or sm_89 or sm_120"
    assert (engine.build["verified"], engine.build["reason"]) == (
        False,
        "no GPU can run the engine here: there is no NVIDIA driver",
    )
    assert engine.build["profile"] == {"min": 1, "opt": 1, "max": 8}
    assert set(engine.files) == {f"{role}{suffix}" for role in engine.graphs for suffix in (".engine", ".layers.json")}
    with pytest.raises(BackendUnavailableError, match="device 'cuda:0' cannot run here; available: none"):
        Session.open(bundle, backend="tensorrt-rtx", precision=precision)


@pytest.mark.tensorrt
@pytest.mark.slow
@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("case", ["e4e_church_256", "psp_ffhq_1024"])
def test_golden_models_become_engines(rtx: TensorRtBackend, shared_dir: Path, tmp_path: Path, case: str) -> None:
    from restyle_deploy.export import export_checkpoint  # needs torch
    from tests.golden import open_case

    (tmp_path / "official").mkdir()
    with open_case(case, shared_dir, tmp_path / "official") as golden:
        export_checkpoint(golden.checkpoint, tmp_path / "bundle")
    for precision in ("fp32", "fp16", "bf16"):
        engine = build_engine(tmp_path / "bundle", BuildOptions(backend="tensorrt-rtx", precision=precision))
        assert engine.build["verified"] is False
        for role in ("encoder", "generator"):
            content = layers_of(engine.graphs[role].path)
            assert engine.build["graphs"][role]["layers"] == len(content["layers"]) > 40
    engines = {engine.precision: engine for engine in read_bundle(tmp_path / "bundle").engines}
    sizes = {precision: engine.graphs["encoder"].path.stat().st_size for precision, engine in engines.items()}
    assert sizes["fp16"] < 0.6 * sizes["fp32"]
    assert sizes["bf16"] < 0.6 * sizes["fp32"]
    turing = EngineOptions(compute_capabilities=("7.5",))
    build_engine(tmp_path / "bundle", BuildOptions(backend="tensorrt-rtx", precision="fp16", engine=turing))


# On a GPU


@pytest.fixture(params=["tensorrt", "tensorrt-rtx"])
def on_gpu(request: pytest.FixtureRequest) -> TensorRtBackend:
    """Each library that has a GPU that it can run on."""
    backend = backend_or_skip(request.param)
    try:
        target = backend.check_build(OPTIONS, EngineOptions())
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    if target.refusal is not None:
        pytest.skip(f"backend {request.param}: {target.refusal}")
    return backend


@pytest.mark.gpu
@pytest.mark.tensorrt
@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16", "bf16"])
def test_engine_runs_and_stripped_one_gives_the_same(
    on_gpu: TensorRtBackend, demo: Bundle, tmp_path: Path, precision: str
) -> None:
    record = demo.graphs["generator"]
    graph = planned_generator(demo, tmp_path)
    results, sizes = [], []
    place = Place(OPTIONS.device)
    for stripped in (False, True):
        folder = tmp_path / str(stripped)
        folder.mkdir()
        engine = build(on_gpu, graph, folder, precision, stripped=stripped, max_batch=3)
        sizes.append(engine.stat().st_size)
        weights = graph if stripped else None
        runner = on_gpu.load(engine, record.inputs, record.outputs, place.options(precision=precision), weights)
        latents = np.stack([demo.latent_avg] * 2)
        buffers = {"latent": latents} | {spec.name: spec.allocate(2) for spec in record.outputs}
        place.run(runner, buffers)
        runner.close()
        assert np.isfinite(buffers["image"]).all()
        results.append(buffers["image"])
    place.close()
    share = 0.5 if precision in ("fp16", "bf16") else 1.0
    assert sizes[0] - sizes[1] > LEAST_SHARE_OF_WEIGHTS * share * weight_bytes(graph)
    np.testing.assert_allclose(results[0], results[1], atol=1e-3 if precision == "fp32" else 0.1)


@pytest.mark.gpu
@pytest.mark.tensorrt
def test_batch_outside_the_profile_is_refused(on_gpu: TensorRtBackend, demo: Bundle, tmp_path: Path) -> None:
    record = demo.graphs["generator"]
    engine = build(on_gpu, record.path, tmp_path, max_batch=2)
    place = Place(OPTIONS.device)
    runner = on_gpu.load(engine, record.inputs, record.outputs, place.options())
    buffers = {spec.name: spec.allocate(3) for spec in record.inputs + record.outputs}
    with pytest.raises(ShapeError, match="a run of 3 images: the engine was built for 1 to 2; build"):
        runner.bind(place.upload(buffers))
    runner.close()
    place.close()


@pytest.mark.gpu
@pytest.mark.tensorrt
@pytest.mark.parametrize("batches", [{"max_batch": 1}, {"min_batch": 3}], ids=str)
def test_engine_for_other_batches_is_verified_and_inverts(
    on_gpu: TensorRtBackend, demo: Bundle, tmp_path: Path, batches: dict[str, Any]
) -> None:
    bundle = Path(shutil.copytree(demo.path, tmp_path / "bundle"))
    name = "tensorrt-rtx" if "compute_capabilities" in on_gpu.ENGINE_OPTIONS else "tensorrt"
    assert build_engine(bundle, BuildOptions(backend=name, engine=replace(EngineOptions(), **batches))).build[
        "verified"
    ]
    images = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    with Session.open(bundle, backend=name) as session, Session.open(bundle, plain=True) as plain:
        found, expected = session.invert(images, steps=1, max_batch=2), plain.invert(images, steps=1)
    np.testing.assert_allclose(found.latents, expected.latents, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.tensorrt
def test_layers_are_those_of_the_engine(on_gpu: TensorRtBackend, demo: Bundle, tmp_path: Path) -> None:
    content = layers_of(build(on_gpu, demo.graphs["generator"].path, tmp_path))
    assert content["of"] == "engine"
    assert any(name.startswith("decoder.") for layer in content["layers"] for name in layer["model_layers"])


@pytest.mark.gpu
@pytest.mark.tensorrt
def test_cache_is_kept_beside_the_bundle(on_gpu: TensorRtBackend, project_root: Path, tmp_path: Path) -> None:
    """TensorRT's timing cache, and what TensorRT for RTX compiles when an engine is first run."""
    bundle = shutil.copytree(project_root / "engines" / "demo-faces", tmp_path / "bundle")
    name = "tensorrt-rtx" if "compute_capabilities" in on_gpu.ENGINE_OPTIONS else "tensorrt"
    engine = build_engine(bundle, BuildOptions(backend=name))
    assert engine.build["verified"] is True
    with Session.open(bundle, backend=name) as session:
        session.invert(np.zeros((1, *session.config.input_shape, 3), np.uint8), steps=1)
    assert list((bundle / "engines").rglob("*.cache"))
    assert set(engine.files) == {path.name for path in engine.directory.iterdir() if path.suffix != ".cache"}
