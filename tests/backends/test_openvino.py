import gc
import itertools
import re
import shutil
import sys
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from restyle_deploy.backends import load_backend
from restyle_deploy.backends.base import Runner, RunnerOptions
from restyle_deploy.build import BuildOptions, build_engine
from restyle_deploy.bundle import Bundle, open_bundle
from restyle_deploy.errors import BackendUnavailableError, BuildError
from restyle_deploy.ops import fused_bias_act, upfirdn2d
from restyle_deploy.ops.onnx_functions import DOMAIN, OPSET
from restyle_deploy.runtime.session import Session
from restyle_deploy.tensors import TensorSpec
from restyle_deploy.verify import TOLERANCES, check_parity, compare_with_expectation, load_expectation

ov = pytest.importorskip("openvino")
backend = load_backend("openvino")

Arrays = dict[str, NDArray[Any]]


@pytest.fixture(scope="module")
def bundle(toy_bundle: Path) -> Bundle:
    return open_bundle(toy_bundle)


@pytest.fixture(scope="module")
def engine(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy generator as a blob, of a free batch."""
    path = tmp_path_factory.mktemp("engine") / "generator.blob"
    backend.build(bundle.graphs["generator"].path, path, RunnerOptions())
    return path


def load(bundle: Bundle, file: Path | None = None, **options: Any) -> Runner:
    record = bundle.graphs["generator"]
    return backend.load(file or record.path, record.inputs, record.outputs, RunnerOptions(**options))


def create_buffers(bundle: Bundle, batch: int) -> Arrays:
    record = bundle.graphs["generator"]
    random = np.random.default_rng(0)
    inputs = {spec.name: random.normal(0, 0.5, spec.concrete_shape(batch)).astype(spec.dtype) for spec in record.inputs}
    return inputs | {spec.name: np.full(spec.concrete_shape(batch), np.nan, spec.dtype) for spec in record.outputs}


def write_graph(
    path: Path, nodes: list[onnx.NodeProto], shapes: Mapping[str, tuple[int | str, ...]], constants: Arrays
) -> Path:
    """Write a graph whose inputs are all names of `shapes` but the last one, its output."""
    *inputs, output = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items())
    initializers = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "graph", inputs, [output], initializers)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    bodies = [fused_bias_act.onnx_function(), upfirdn2d.onnx_function()]
    model = helper.make_model(graph, opset_imports=opsets, functions=bodies, ir_version=10)
    onnx.save(model, path)
    return path


def run_graph(path: Path, inputs: Arrays, output: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    specs = tuple(TensorSpec(name=name, dtype="float32", shape=array.shape) for name, array in inputs.items())
    outputs = (TensorSpec(name=output, dtype="float32", shape=shape),)
    result = np.full(shape, np.nan, np.float32)
    backend.load(path, specs, outputs, RunnerOptions(threads=1)).bind({**inputs, output: result})()
    return result


PADS = [
    (0, 0, 0, 0),
    (1, 1, 1, 1),
    (2, 1, 1, 2),
    (2, 2, 1, 1),
    (3, 2, 1, 2),
    (5, 0, 4, 6),
    (-1, 2, 0, -2),
    (1, -1, -1, 1),
]


@pytest.mark.parametrize(("up", "down"), list(itertools.product([1, 2, 3], repeat=2)))
@pytest.mark.parametrize("kernel_is_constant", [True, False], ids=["constant", "computed"])
def test_upfirdn2d_equals_its_reference(tmp_path: Path, up: int, down: int, kernel_is_constant: bool) -> None:
    random = np.random.default_rng(up * 10 + down)
    x = random.normal(size=(2, 3, 7, 8)).astype(np.float32)
    kernel = random.normal(size=(4, 3)).astype(np.float32)
    for pads in PADS:
        expected = upfirdn2d.upfirdn2d(torch.from_numpy(x), torch.from_numpy(kernel), up=up, down=down, pads=pads)
        node = helper.make_node(
            "UpFirDn2d", ["x", "kernel"], ["y"], domain=DOMAIN, up=[up] * 2, down=[down] * 2, pads=pads, channels=3
        )
        shapes: dict[str, tuple[int | str, ...]] = {"x": ("N", 3, 7, 8), "kernel": (4, 3), "y": ("N", 3, "H", "W")}
        inputs = {"x": x, "kernel": kernel}
        if kernel_is_constant:
            del shapes["kernel"], inputs["kernel"]
        constants = {"kernel": kernel} if kernel_is_constant else {}
        path = write_graph(tmp_path / "graph.onnx", [node], shapes, constants)
        found = run_graph(path, inputs, "y", tuple(expected.shape))
        np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-5, err_msg=str(pads))


def test_axes_of_upfirdn2d_are_apart(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    x, kernel = (random.normal(size=shape).astype(np.float32) for shape in ((1, 2, 6, 5), (3, 4)))
    node = helper.make_node(
        "UpFirDn2d", ["x", "kernel"], ["y"], domain=DOMAIN, up=[2, 1], down=[1, 3], pads=[1, 2, 2, 1], channels=2
    )
    path = write_graph(tmp_path / "graph.onnx", [node], {"x": (1, 2, 6, 5), "y": (1, 2, 13, 2)}, {"kernel": kernel})
    tall = torch.from_numpy(x).reshape(1, 2, 6, 1, 5)
    padded = torch.nn.functional.pad(torch.cat([tall, torch.zeros_like(tall)], 3).reshape(1, 2, 12, 5), (2, 1, 1, 2))
    weight = torch.from_numpy(kernel).flip(0, 1).expand(2, 1, 3, 4)
    expected = torch.nn.functional.conv2d(padded, weight, stride=(1, 3), groups=2)
    found = run_graph(path, {"x": x}, "y", tuple(expected.shape))
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-5)


def test_fused_bias_act_equals_its_reference(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    x, bias = (random.normal(size=shape).astype(np.float32) for shape in ((2, 5, 4, 3), (5,)))
    node = helper.make_node("FusedBiasAct", ["x", "bias"], ["y"], domain=DOMAIN, negative_slope=0.3, gain=1.7)
    path = write_graph(tmp_path / "graph.onnx", [node], {"x": ("N", 5, 4, 3), "y": ("N", 5, 4, 3)}, {"bias": bias})
    expected = fused_bias_act.fused_bias_act(torch.from_numpy(x), torch.from_numpy(bias), negative_slope=0.3, gain=1.7)
    np.testing.assert_allclose(run_graph(path, {"x": x}, "y", x.shape), expected.numpy(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("second", ["Add", "Multiply"])
def test_constants_do_not_grow(tmp_path: Path, second: str) -> None:
    """Noise [1,1,H,W] and bias [1,C,1,1] stay what they are, and NaN passes between them."""
    random = np.random.default_rng(0)
    noise, channel, x = (
        random.normal(size=shape).astype(np.float32) for shape in ((1, 1, 64, 64), (1, 64, 1, 1), (1, 64, 64, 64))
    )
    x[0, 0, 0, 0] = np.nan
    operator = {"Add": "Add", "Multiply": "Mul"}[second]
    nodes = [helper.make_node("Add", ["x", "noise"], ["z"]), helper.make_node(operator, ["channel", "z"], ["y"])]
    shapes: dict[str, tuple[int | str, ...]] = {"x": x.shape, "y": x.shape}
    path = write_graph(tmp_path / "graph.onnx", nodes, shapes, {"noise": noise, "channel": channel})
    expected = (x + noise) + channel if second == "Add" else (x + noise) * channel
    np.testing.assert_allclose(run_graph(path, {"x": x}, "y", x.shape), expected, rtol=0, atol=1e-6)
    backend.build(path, tmp_path / "engine.blob", RunnerOptions())
    assert (tmp_path / "engine.blob").stat().st_size < x.nbytes / 8


@pytest.mark.parametrize("free_batch", [False, True])
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_bound_buffers_are_the_only_ones(tmp_path: Path, free_batch: bool) -> None:
    """The first run of a graph that only reads and writes takes less memory than one more output."""
    x = np.ones((1, 2**24), np.float32)  # 64 MiB
    shape = ("N" if free_batch else 1, 2**24)
    path = write_graph(tmp_path / "graph.onnx", [helper.make_node("Relu", ["x"], ["y"])], {"x": shape, "y": shape}, {})
    specs = [TensorSpec(name=name, dtype="float32", shape=shape) for name in ("x", "y")]
    y = np.full_like(x, np.nan)
    run = backend.load(path, (specs[0],), (specs[1],), RunnerOptions(threads=1)).bind({"x": x, "y": y})
    before = measure_resident_bytes()
    run()
    assert measure_resident_bytes() - before < y.nbytes / 2
    assert (y == 1).all()
    x *= -1
    run()
    assert (y == 0).all()


def measure_resident_bytes() -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(re.findall(r"RssAnon:\s+(\d+) kB", lines)[0])


def test_blob_computes_what_its_graph_computes(bundle: Bundle, engine: Path) -> None:
    for batch in (1, 3):
        ours, expected = create_buffers(bundle, batch), create_buffers(bundle, batch)
        load(bundle, engine).bind(ours)()
        load(bundle).bind(expected)()
        for name, array in expected.items():
            np.testing.assert_allclose(ours[name], array, rtol=0, atol=1e-5)


def test_blob_of_one_image(bundle: Bundle, tmp_path: Path) -> None:
    record = bundle.graphs["generator"]
    model = onnx.load(record.path)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    del model.graph.value_info[:]
    onnx.save(model, tmp_path / "single.onnx")
    backend.build(tmp_path / "single.onnx", tmp_path / "single.blob", RunnerOptions())
    ours, expected = create_buffers(bundle, 1), create_buffers(bundle, 1)
    load(bundle, tmp_path / "single.blob").bind(ours)()
    load(bundle).bind(expected)()
    np.testing.assert_allclose(ours["image"], expected["image"], rtol=0, atol=1e-5)


Damage = Callable[[bytes], bytes]

DAMAGES: Mapping[str, Damage] = {
    "empty": lambda blob: b"",
    "another file": lambda blob: b"no engine" * 1000,
    "first half": lambda blob: blob[: len(blob) // 2],
    "without its end": lambda blob: blob[:-100],
    "zeros": lambda blob: bytes(len(blob)),
    "another version": lambda blob: blob.replace(ov.__version__.partition("-")[0].encode(), b"1999.9.9", 1),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_blob_is_refused(bundle: Bundle, engine: Path, tmp_path: Path, damage: Damage) -> None:
    (tmp_path / "broken.blob").write_bytes(damage(engine.read_bytes()))
    with pytest.raises(BuildError, match=r"^OpenVINO \d+\.\d+\.\d+ refuses broken\.blob: \S.+") as caught:
        load(bundle, tmp_path / "broken.blob")
    assert "\n" not in str(caught.value)


def test_missing_blob_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"refuses absent\.blob: .*No such file"):
        load(bundle, tmp_path / "absent.blob")


def test_refusal_names_the_unknown_operation(bundle: Bundle, tmp_path: Path) -> None:
    node = helper.make_node("Abacus", ["x"], ["y"], domain=DOMAIN)
    path = write_graph(tmp_path / "graph.onnx", [node], {"x": (1, 2), "y": (1, 2)}, {})
    message = r"^OpenVINO \S+ refuses graph\.onnx: No conversion rule found for operations: restyle_deploy\.Abacus$"
    with pytest.raises(BuildError, match=message):
        load(bundle, path)
    with pytest.raises(BuildError, match=message):
        backend.build(path, tmp_path / "engine.blob", RunnerOptions())
    assert not (tmp_path / "engine.blob").exists()


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("Exception from a.cpp:1:\nCheck 'x' failed at b.cpp:2:\n[CPU] too small\n\n", "[CPU] too small"),
        ("Exception from a.cpp:1:\n", "Exception from a.cpp:1:"),
        ("", "it gives no reason"),
    ],
)
def test_refusal_to_compile_is_one_line(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, message: str, reason: str
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError(message)

    runner = load(bundle)
    monkeypatch.setattr(ov.Core, "compile_model", refuse)
    with pytest.raises(BuildError) as caught:
        runner.bind(create_buffers(bundle, 1))
    assert str(caught.value).endswith(f"refuses generator.onnx: {reason}")


class FakeCore:
    """An OpenVINO core that only notes the settings it is given.

    Attributes:
        capabilities: what the CPU can compute in.
        settings: of each call.
    """

    def __init__(self, *capabilities: str) -> None:
        self.capabilities = list(capabilities)
        self.settings: list[dict[str, Any]] = []

    def get_property(self, device: str, name: str) -> list[str]:
        assert (device, name) == ("CPU", "OPTIMIZATION_CAPABILITIES")
        return self.capabilities

    def compile_model(self, model: Any, device: str, settings: dict[str, Any]) -> SimpleNamespace:
        assert device == "CPU"
        self.settings.append(settings)
        return SimpleNamespace(export_model=lambda stream: stream.write(b"blob"))

    def import_model(self, blob: Any, device: str, settings: dict[str, Any]) -> None:
        self.compile_model(blob, device, settings)


LATENCY = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        (RunnerOptions(), {"INFERENCE_PRECISION_HINT": "f32"}),
        (RunnerOptions(threads=3), {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 3}),
        (RunnerOptions(precision="bf16"), {"INFERENCE_PRECISION_HINT": "bf16"}),
    ],
)
def test_options_reach_the_library(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: RunnerOptions, settings: dict[str, Any]
) -> None:
    core = FakeCore("FP32", "BF16")
    monkeypatch.setattr(ov, "Core", lambda: core)
    backend.check_options(options)
    backend.build(bundle.graphs["generator"].path, tmp_path / "engine.blob", options)
    assert (tmp_path / "engine.blob").read_bytes() == b"blob"
    backend.load(tmp_path / "engine.blob", (), (), options)
    assert core.settings == [{**settings, **LATENCY}] * 2


def test_threads_and_precision_are_kept(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    compile_model = ov.Core.compile_model

    def record(*arguments: Any) -> Any:
        compiled.append(compile_model(*arguments))
        return compiled[-1]

    monkeypatch.setattr(ov.Core, "compile_model", record)
    runner = load(bundle, threads=1)
    for batch in (2, 1, 2):
        runner.bind(create_buffers(bundle, batch))()
    assert [list(model.input("latent").shape)[0] for model in compiled] == [2, 1]  # each batch size once
    assert {model.get_property("INFERENCE_NUM_THREADS") for model in compiled} == {1}
    assert {model.get_property("INFERENCE_PRECISION_HINT") for model in compiled} == {ov.Type.f32}


def test_bf16_is_refused_without_its_instructions(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ov, "Core", lambda: FakeCore("FP32", "INT8"))
    options = RunnerOptions(precision="bf16")
    record = bundle.graphs["generator"]
    message = r"precision bf16 cannot run here: this CPU has no bfloat16 instructions \(avx512_bf16 or amx_bf16\)$"
    with pytest.raises(BackendUnavailableError, match=message):
        backend.check_options(options)
    with pytest.raises(BackendUnavailableError, match=message):
        backend.build(record.path, tmp_path / "engine.blob", options)
    with pytest.raises(BackendUnavailableError, match=message):
        backend.load(record.path, record.inputs, record.outputs, options)


HAS_BF16 = "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


@pytest.mark.skipif(not HAS_BF16, reason="this CPU has neither avx512_bf16 nor amx_bf16")
@pytest.mark.parametrize("precision", ["bf16", "mixed"])
def test_short_precision_keeps_its_tolerance(project_root: Path, tmp_path: Path, precision: str) -> None:
    bundle = tmp_path / "demo-faces"
    shutil.copytree(project_root / "engines" / "demo-faces", bundle)
    build_engine(bundle, BuildOptions(backend="openvino", precision=precision))  # verifies
    with Session.open(bundle, backend="openvino", precision=precision) as session:
        parity = compare_with_expectation(session, load_expectation(session.bundle.expectation))
    assert parity.is_within_tolerance
    assert max(parity.image_errors) > TOLERANCES["fp32"].images  # it was computed in bfloat16
    # The first latents come from the encoder alone.
    assert (parity.latent_errors[0] < TOLERANCES["fp32"].latents) is (precision == "mixed")


@pytest.mark.parametrize("precision", ["bf16", "mixed"])
def test_bf16_needs_its_instructions(monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    monkeypatch.setattr(ov, "Core", lambda: FakeCore("FP32"))
    with pytest.raises(BackendUnavailableError, match=f"precision {precision} cannot run here: this CPU has no bfloat"):
        backend.check_options(RunnerOptions(precision=precision))


def test_unknown_options_are_refused() -> None:
    with pytest.raises(BackendUnavailableError, match="precision fp4 cannot run here: known are fp32, bf16, mixed"):
        backend.check_options(RunnerOptions(precision="fp4"))
    with pytest.raises(BackendUnavailableError, match="device 'abacus' cannot run here; available: cpu"):
        backend.check_options(RunnerOptions(device="abacus"))


@pytest.mark.parametrize("from_blob", [False, True], ids=["graph", "blob"])
def test_bound_run_keeps_its_buffers_alive(bundle: Bundle, engine: Path, from_blob: bool) -> None:
    runner = load(bundle, engine if from_blob else None)
    buffers = create_buffers(bundle, 1)
    alive = [weakref.ref(array) for array in buffers.values()]
    run = runner.bind(buffers)
    buffers.clear()
    gc.collect()
    assert all(reference() is not None for reference in alive)
    run()
    del run
    gc.collect()
    assert all(reference() is None for reference in alive)


@pytest.mark.parametrize("from_blob", [False, True], ids=["graph", "blob"])
def test_bound_run_outlives_the_runner(bundle: Bundle, engine: Path, from_blob: bool) -> None:
    runner = load(bundle, engine if from_blob else None)
    buffers = create_buffers(bundle, 1)
    run = runner.bind(buffers)
    runner.close()
    del runner
    gc.collect()
    run()
    assert np.isfinite(buffers["image"]).all()


def test_demo_model_meets_its_expectation(project_root: Path) -> None:
    with Session.open(project_root / "engines" / "demo-faces", backend="openvino") as session:
        check_parity(compare_with_expectation(session, load_expectation(session.bundle.expectation)), "demo-faces")


@pytest.mark.skipif(not Path("/proc/self/smaps").is_file(), reason="this system does not tell what is resident")
def test_loaded_blob_does_not_stay_in_memory_twice(project_root: Path, tmp_path: Path) -> None:
    encoder = open_bundle(project_root / "engines" / "demo-faces").graphs["encoder"]
    blob = tmp_path / "encoder.blob"
    backend.build(encoder.path, blob, RunnerOptions())
    runner = backend.load(blob, encoder.inputs, encoder.outputs, RunnerOptions())
    assert resident_bytes(blob) < 0.1 * blob.stat().st_size
    runner.close()
    gc.collect()
    assert str(blob) not in Path("/proc/self/smaps").read_text(encoding="utf-8")


def resident_bytes(file: Path) -> int:
    """Return how much of a file's mappings is in this process's memory; there has to be one."""
    lines = Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines()
    begins = [index for index, line in enumerate(lines) if line.endswith(str(file))]
    assert begins
    sizes = (next(line for line in lines[index:] if line.startswith("Rss:")).split()[1] for index in begins)
    return 1024 * sum(map(int, sizes))
