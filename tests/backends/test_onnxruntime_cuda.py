"""ONNX Runtime on a GPU: what the library is asked for, on a stand-in of it with a CUDA provider."""

import logging
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from restyle_deploy.backends.base import BuildRequest, EngineOptions, RunnerOptions
from restyle_deploy.bundle import Bundle, open_bundle
from restyle_deploy.device_array import DeviceArray
from restyle_deploy.errors import BackendUnavailableError, BuildError, DeviceError, ShapeError
from restyle_deploy.planner import random_inputs
from restyle_deploy.tensors import TensorSpec
from restyle_deploy.verify import TOLERANCES
from tests.backends.recording_library import RecordingQueue, array_at

ort = pytest.importorskip("onnxruntime")
backend: Any = pytest.importorskip("restyle_deploy.backends.onnxruntime")
cuda: Any = pytest.importorskip("restyle_deploy.backends.onnxruntime_cuda")

X, Y = (TensorSpec(name=name, dtype="float32", shape=("N", 2)) for name in "xy")
PROVIDERS = ["CUDAExecutionProvider", "CPUExecutionProvider"]


class FakeOrt:
    """What the backend takes of `onnxruntime`, with a CUDA provider; writes down what it is asked for.

    Attributes:
        calls: in order, with arguments.
        loaded: the providers that sessions have.
        refused: why sessions are refused, by the CUDA provider's option that they have.
        capture_fails: whether runs that capture are refused.
        run_fails: what all runs raise.
        contexts: of which devices the calling thread has entered the context.
    """

    def __init__(self) -> None:
        self.__version__ = "1.32.0"
        self.calls: list[tuple[Any, ...]] = []
        self.loaded = list(PROVIDERS)
        self.refused: dict[str, str] = {}
        self.capture_fails = False
        self.run_fails: Exception | None = None
        self.contexts: list[int] = []
        self.SessionOptions, self.RunOptions = _SessionOptions, _RunOptions

    def named(self, name: str) -> list[list[Any]]:
        """Return the arguments of all calls of a function."""
        return [arguments for called, *arguments in self.calls if called == name]

    def get_available_providers(self) -> list[str]:
        return list(PROVIDERS)

    def preload_dlls(self) -> None:
        sys.stdout.write("Failed to load libcudnn.so.9\n")
        self.calls.append(("preload",))

    def InferenceSession(self, path: str, settings: Any, *, providers: list[Any], enable_fallback: int) -> Any:
        ((name, options),) = providers
        assert (name, enable_fallback) == ("CUDAExecutionProvider", 0)
        self._change_device(int(options["device_id"]))
        self.calls.append(("open", path, settings, options))
        for option, reason in self.refused.items():
            if option in options:
                raise RuntimeError(f"{reason}\nand more")
        return SimpleNamespace(
            get_providers=lambda: self.loaded,
            io_binding=lambda: SimpleNamespace(
                bind_input=lambda *arguments: self.calls.append(("input", *arguments)),
                bind_output=lambda *arguments: self.calls.append(("output", *arguments)),
            ),
            run_with_iobinding=self._run,
        )

    @contextmanager
    def current_context(self, context: int) -> Iterator[None]:
        """Stand in for the one of `runtime.device`; a context is its device's number."""
        self.contexts.append(context)
        try:
            yield
        finally:
            self.contexts.pop()

    def _change_device(self, expected: int) -> None:
        """What the library does to the calling thread, which it does not undo."""
        assert self.contexts == [expected], "the caller's own device would be another one afterwards"

    def _run(self, binding: Any, options: "_RunOptions") -> None:
        self._change_device(1)
        self.calls.append(("run", options.entries["gpu_graph_id"]))
        assert options.entries["disable_synchronize_execution_providers"] == "1"
        if self.run_fails is not None:
            raise self.run_fails
        if self.capture_fails and options.entries["gpu_graph_id"] != "-1":
            raise RuntimeError("operation not permitted when stream is capturing")


class _SessionOptions:
    def __init__(self) -> None:
        self.entries: dict[str, str] = {}
        self.optimized_model_filepath = ""

    def add_session_config_entry(self, key: str, value: str) -> None:
        self.entries[key] = value


class _RunOptions:
    def __init__(self) -> None:
        self.entries: dict[str, str] = {}

    def add_run_config_entry(self, key: str, value: str) -> None:
        self.entries[key] = value


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeOrt:
    """Let the backend take the stand-in for its library, and see two GPUs."""
    made = FakeOrt()
    for module in (backend, cuda):
        monkeypatch.setattr(module, "ort", made)
        monkeypatch.setattr(module, "find_processor", lambda device: "sm_89")
    monkeypatch.setattr(cuda, "find_devices", lambda: (("cuda:0", "cuda:1"), ""))
    monkeypatch.setattr(cuda, "primary_context", lambda index: index)
    monkeypatch.setattr(cuda, "current_context", made.current_context)
    cuda._preload_libraries.cache_clear()
    return made


@pytest.fixture
def options() -> RunnerOptions:
    return RunnerOptions(device="cuda:1", queue=RecordingQueue())


def load(options: RunnerOptions) -> Any:
    return backend.load(Path("graph.onnx"), (X,), (Y,), options)


def buffers_at(address: int, batch: int = 1) -> dict[str, DeviceArray]:
    shape = (batch, 2)
    return {"x": array_at(address, shape, device_index=1), "y": array_at(address + 256, shape, device_index=1)}


# Devices and precisions


def test_gpus_are_listed_where_the_provider_is(fake: FakeOrt) -> None:
    assert backend.devices() == ("cpu", "cuda:0", "cuda:1")
    assert backend.processors("cuda:1") == ("sm_89",)
    assert backend.processors("cpu") != ("sm_89",)


def test_without_the_provider_the_command_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "has_provider", lambda: False)
    assert backend.devices() == ("cpu",)
    expected = r"device 'cuda:0' cannot run here; available: cpu; .*pip install 'restyle-deploy\[onnxruntime-gpu\]'"
    with pytest.raises(BackendUnavailableError, match=expected):
        backend.check_options(RunnerOptions(device="cuda:0"))


@pytest.mark.parametrize(
    ("precision", "processor", "refusal"),
    [
        ("fp32", "sm_75", None),
        ("fp16", "sm_75", None),
        ("tf32", "sm_80", None),
        ("tf32", "sm_75", "sm_75 has no such instructions, sm_80 and newer have"),
        ("bf16", "sm_90", "on a GPU ONNX Runtime has fp32, tf32, fp16"),
    ],
)
@pytest.mark.usefixtures("fake")
def test_precisions_of_a_gpu(
    monkeypatch: pytest.MonkeyPatch, precision: str, processor: str, refusal: str | None
) -> None:
    monkeypatch.setattr(cuda, "find_processor", lambda device: processor)
    options = RunnerOptions(device="cuda:0", precision=precision)
    if refusal is None:
        backend.check_options(options)
        return
    with pytest.raises(BackendUnavailableError, match=f"precision {precision} cannot run here: {refusal}"):
        backend.check_options(options)


@pytest.mark.usefixtures("fake")
def test_engines_are_for_the_kind_of_gpu() -> None:
    target = backend.check_build(RunnerOptions(device="cuda:0"), EngineOptions())
    assert (target.processor, target.refusal, target.has_kernels) == ("sm_89", None, False)


# Opening


@pytest.mark.parametrize(("precision", "tf32"), [("fp32", "0"), ("tf32", "1")])
def test_provider_computes_on_the_sessions_stream(
    fake: FakeOrt, options: RunnerOptions, precision: str, tf32: str
) -> None:
    load(replace(options, precision=precision, threads=3))
    ((path, settings, provider),) = fake.named("open")
    assert path == "graph.onnx"
    assert settings.intra_op_num_threads == 3
    assert provider == {
        "device_id": "1",
        "use_tf32": tf32,
        "arena_extend_strategy": "kSameAsRequested",
        "cudnn_conv_algo_search": "EXHAUSTIVE",
        "user_compute_stream": "77",
        "enable_cuda_graph": "1",
    }


@pytest.mark.parametrize(("version", "captures"), [("1.20.1", False), ("1.27.0", False), ("1.28.0", True)])
def test_releases_whose_replays_wait_capture_nothing(
    fake: FakeOrt, options: RunnerOptions, version: str, captures: bool
) -> None:
    fake.__version__ = version
    run = load(options).bind(buffers_at(256))
    assert ("enable_cuda_graph" in fake.named("open")[0][2]) is captures
    run()
    assert fake.named("run") == [["1" if captures else "-1"]]


def test_graph_that_cannot_be_captured_is_opened_without(
    fake: FakeOrt, options: RunnerOptions, caplog: pytest.LogCaptureFixture
) -> None:
    fake.refused = {"enable_cuda_graph": "nodes are not partitioned to the CUDA EP"}
    with caplog.at_level(logging.INFO):
        run = load(options).bind(buffers_at(256))
    assert ["enable_cuda_graph" in provider for _, _, provider in fake.named("open")] == [True, False]
    assert "graph.onnx: without CUDA graphs of ONNX Runtime's own: nodes are not partitioned" in caplog.text
    run()
    assert fake.named("run") == [["-1"]]


def test_refused_graph_is_an_error_of_one_line(fake: FakeOrt, options: RunnerOptions) -> None:
    fake.refused = {"device_id": "unknown node"}
    with pytest.raises(BuildError, match=r"ONNX Runtime 1\.32\.0 refuses graph\.onnx: unknown node\Z"):
        load(options)


class Fail(Exception):  # as the library names it
    pass


class InvalidArgument(Exception):
    pass


@pytest.mark.parametrize("capture_failed", [False, True])
def test_what_the_gpu_refuses_during_a_run_is_a_device_error(
    fake: FakeOrt, options: RunnerOptions, monkeypatch: pytest.MonkeyPatch, capture_failed: bool
) -> None:
    monkeypatch.setattr(cuda, "end_capture", lambda stream: None)
    run = load(options).bind(buffers_at(256))
    fake.capture_fails = capture_failed
    run()
    fake.run_fails = Fail("[ONNXRuntimeError] : 1 : FAIL : CUDA failure 2: out of memory\nmore")
    expected = r"^ONNX Runtime 1\.32\.0 cannot run the graph: .* out of memory; where memory lacks, a smaller max_batch"
    with pytest.raises(DeviceError, match=expected) as caught:
        run()
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is fake.run_fails
    fake.run_fails = InvalidArgument("a program's error")
    with pytest.raises(InvalidArgument):
        run()


def test_provider_that_is_not_loaded_is_an_error(fake: FakeOrt, options: RunnerOptions) -> None:
    """ONNX Runtime itself would go on, on the CPU."""
    fake.loaded = ["CPUExecutionProvider"]
    expected = r"CUDAExecutionProvider cannot be loaded, .*pip install 'restyle-deploy\[onnxruntime-gpu\]'"
    with pytest.raises(BackendUnavailableError, match=expected):
        load(options)


def test_libraries_are_loaded_once_and_silently(
    fake: FakeOrt, options: RunnerOptions, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        load(options)
        load(options)
    assert fake.named("preload") == [[]]
    assert capsys.readouterr().out == ""
    assert "Failed to load libcudnn.so.9" in caplog.text


def test_nothing_is_loaded_without_a_queue(fake: FakeOrt) -> None:
    with pytest.raises(ValueError, match=r"RunnerOptions\.queue is None; open one: .*open_device\('cuda:0'\)"):
        load(RunnerOptions(device="cuda:0"))
    assert fake.calls == []


def test_engine_is_optimised_for_the_gpu_and_not_captured(fake: FakeOrt, tmp_path: Path) -> None:
    backend.build(Path("graph.onnx"), tmp_path / "graph.onnx", RunnerOptions(device="cuda:0"), BuildRequest())
    ((path, settings, provider),) = fake.named("open")
    assert (path, settings.optimized_model_filepath) == ("graph.onnx", str(tmp_path / "graph.onnx"))
    assert not {"user_compute_stream", "enable_cuda_graph"} & set(provider)


# Running


def test_arrays_are_bound_where_they_are(fake: FakeOrt, options: RunnerOptions) -> None:
    run = load(options).bind(buffers_at(256, batch=3))
    float32 = np.dtype(np.float32)
    assert fake.named("input") == [["x", "cuda", 1, float32, [3, 2], 256]]
    assert fake.named("output") == [["y", "cuda", 1, float32, [3, 2], 512]]
    run()
    run()
    assert fake.named("run") == [["1"], ["1"]]


@pytest.mark.parametrize("capture_fails", [False, True])
def test_the_callers_device_stays_current(
    fake: FakeOrt, options: RunnerOptions, monkeypatch: pytest.MonkeyPatch, capture_fails: bool
) -> None:
    """ONNX Runtime makes its device the thread's when it opens a graph and in each run, captured or not."""
    monkeypatch.setattr(cuda, "end_capture", lambda stream: fake._change_device(1))
    fake.capture_fails = capture_fails
    run = load(options).bind(buffers_at(256))
    run()
    run()
    assert fake.contexts == []
    assert len(fake.named("run")) == (3 if capture_fails else 2)


def test_each_bound_run_has_a_graph_of_its_own(fake: FakeOrt, options: RunnerOptions) -> None:
    """ONNX Runtime does not check that a graph is replayed on the arrays that it was captured on."""
    runner = load(options)
    runs = [runner.bind(buffers_at(1024 * index)) for index in range(1, cuda.MOST_GRAPHS + 3)]
    for run in runs:
        run()
    numbers = [number for (number,) in fake.named("run")]
    assert numbers == [str(index + 1) for index in range(cuda.MOST_GRAPHS)] + ["-1", "-1"]


def test_threads_beside_the_first_one_capture_nothing(fake: FakeOrt, options: RunnerOptions) -> None:
    """ONNX Runtime keeps graphs by thread: each further one would capture anew, which waits."""
    run = load(options).bind(buffers_at(256))
    run()
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    run()
    assert fake.named("run") == [["1"], ["-1"], ["1"]]


def test_failed_capture_is_ended_and_the_run_done_without(
    fake: FakeOrt, options: RunnerOptions, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cuda, "end_capture", lambda stream: fake.calls.append(("end", stream)))
    fake.capture_fails = True
    run = load(options).bind(buffers_at(256))
    run()
    run()
    assert [call for call in fake.calls if call[0] in ("run", "end")] == [
        ("run", "1"),
        ("end", 77),
        ("run", "-1"),
        ("run", "-1"),
    ]
    assert "ONNX Runtime 1.32.0 cannot capture a run in a CUDA graph: operation not permitted" in caplog.text


@pytest.mark.usefixtures("fake")
def test_session_launches_the_runs_one_by_one(options: RunnerOptions) -> None:
    assert load(options).is_capturable is False


@pytest.mark.parametrize(
    ("buffers", "error", "message"),
    [
        ({"x": array_at(256)}, ShapeError, "no buffer for y; got x"),
        ({**buffers_at(256), "y": array_at(512, (1, 3))}, ShapeError, r"y: got contiguous float32 \[1, 3\]"),
        (
            {name: np.zeros((1, 2), np.float32) for name in "xy"},
            TypeError,
            "expected arrays of cuda:1, where the graph",
        ),
        ({name: array_at(256) for name in "xy"}, ValueError, "x is on cuda:0, the graph runs on cuda:1"),
    ],
    ids=["missing", "shape", "host", "other device"],
)
def test_buffers_that_do_not_fit_are_refused(
    fake: FakeOrt, options: RunnerOptions, buffers: Mapping[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        load(options).bind(buffers)
    assert fake.named("input") == []


@pytest.mark.usefixtures("fake")
def test_closed_runner_binds_no_more(options: RunnerOptions) -> None:
    runner = load(options)
    runner.close()
    runner.close()
    with pytest.raises(ValueError, match="the runner is closed"):
        runner.bind(buffers_at(256))


# float16, by the graph's types: these run on the real library, on the CPU


@pytest.fixture(scope="module")
def demo(project_root: Path) -> Bundle:
    return open_bundle(project_root / "engines" / "demo-faces")


@pytest.mark.parametrize("graph", ["encoder", "generator"])
def test_typed_graph_computes_in_float16_what_the_graph_does(demo: Bundle, graph: str) -> None:
    record = demo.graphs[graph]
    fed = {name: 0.5 * array for name, array in random_inputs(record.inputs, batch=2).items()}
    expected = ort.InferenceSession(str(record.path), providers=["CPUExecutionProvider"]).run(None, fed)
    with cuda.typed_graph(record.path, "fp16") as typed:
        assert typed != record.path
        stored = {tensor.data_type for tensor in onnx.load(typed, load_external_data=False).graph.initializer}
        assert onnx.TensorProto.FLOAT16 in stored
        found = ort.InferenceSession(str(typed), providers=["CPUExecutionProvider"]).run(None, fed)
    assert not typed.exists()
    tolerance = TOLERANCES["fp16"].latents if graph == "encoder" else TOLERANCES["fp16"].images
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == np.float32
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance)
        assert not np.array_equal(one, other)


def test_engine_of_float16_is_not_typed_again(demo: Bundle, tmp_path: Path) -> None:
    settings = ort.SessionOptions()
    settings.optimized_model_filepath = str(tmp_path / "engine.onnx")
    with cuda.typed_graph(demo.graphs["encoder"].path, "fp16") as typed:
        ort.InferenceSession(str(typed), settings, providers=["CPUExecutionProvider"])
    with cuda.typed_graph(tmp_path / "engine.onnx", "fp16") as again:
        assert again == tmp_path / "engine.onnx"


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_other_precisions_take_the_file_itself(precision: str) -> None:
    with cuda.typed_graph(Path("graph.onnx"), precision) as typed:
        assert typed == Path("graph.onnx")


def test_what_is_no_graph_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    ir.save(ir.Model(ir.Graph([], [], nodes=[]), ir_version=10), tmp_path / "empty.onnx")
    for name in ("broken", "empty", "missing"):
        with (
            pytest.raises(BuildError, match=rf"ONNX Runtime [\d.]+ refuses {name}\.onnx: it is no ONNX file"),
            cuda.typed_graph(tmp_path / f"{name}.onnx", "fp16"),
        ):
            pass
