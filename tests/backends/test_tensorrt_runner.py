"""Running TensorRT engines, on a stand-in of the library that writes down what it is asked for, and without a GPU."""

import contextlib
import gc
import logging
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from restyle_deploy.backends import tensorrt as backend_module
from restyle_deploy.backends import tensorrt_runner as runner_module
from restyle_deploy.backends.base import RunnerOptions
from restyle_deploy.backends.tensorrt import TensorRtBackend
from restyle_deploy.backends.tensorrt_library import TENSORRT
from restyle_deploy.device_array import DeviceArray
from restyle_deploy.errors import BuildError, DeviceError, ShapeError
from restyle_deploy.tensors import TensorSpec
from tests.backends.host_driver.stand_in import HostDriver
from tests.backends.recording_library import KEPT, MEASURED, RecordingLibrary, RecordingQueue, array_at, recorded

OPTIONS = RunnerOptions(device="cuda:0")
X = TensorSpec(name="x", dtype="float32", shape=("N", 2))
Y = TensorSpec(name="y", dtype="float32", shape=("N", 2))
ASYNCHRONOUS = {"set_tensor_address", "execute_async_v3"}


@pytest.fixture
def library() -> RecordingLibrary:
    return recorded()[1]


@pytest.fixture
def queue() -> RecordingQueue:
    return RecordingQueue()


@pytest.fixture
def load(library: RecordingLibrary, queue: RecordingQueue, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Load an engine on the library's stand-in; waiting for the stream is noted among the calls."""
    monkeypatch.setattr(runner_module, "primary_context", lambda index: 1)
    monkeypatch.setattr(runner_module, "current_context", lambda context: contextlib.nullcontext())
    monkeypatch.setattr(
        runner_module, "synchronize_stream", lambda stream: library.calls.append(("synchronize_stream", stream))
    )

    def load(cache: Path | None = None) -> Any:
        options = replace(OPTIONS, queue=queue)
        loaded = runner_module.load_engine(library, b"plan", options, name="x.engine", weights=None)
        return runner_module.TensorRtRunner(loaded, (X,), (Y,), device="cuda:0", queue=queue, cache=cache)

    return load


def buffers_at(address: int, batch: int = 1) -> dict[str, DeviceArray]:
    return {"x": array_at(address, (batch, 2)), "y": array_at(address + 256, (batch, 2))}


def test_run_is_enqueued_on_the_queue_and_nothing_waits(
    library: RecordingLibrary, queue: RecordingQueue, load: Callable[..., Any]
) -> None:
    run = load().bind(buffers_at(256))
    library.calls.clear()
    run()
    assert library.calls == [
        ("set_device_memory", 1, queue.ADDRESS, 4096),
        ("set_tensor_address", 1, "x", 256),
        ("set_tensor_address", 1, "y", 512),
        ("execute_async_v3", 1, queue.stream),
    ]
    library.calls.clear()
    run()
    assert library.calls == [("execute_async_v3", 1, queue.stream)]


def test_runs_that_take_turns_set_only_their_addresses(library: RecordingLibrary, load: Callable[..., Any]) -> None:
    runner = load()
    runs = [runner.bind(buffers_at(address)) for address in (1024, 2048)]
    for run in runs:
        run()
    library.calls.clear()
    for run in runs:
        run()
    assert {name for name, *_ in library.calls} == ASYNCHRONOUS
    addresses = [address for _, name, address in library.named("set_tensor_address") if name == "x"]
    assert addresses == [1024, 2048]
    assert {context for context, *_ in library.named("execute_async_v3")} == {1}


def test_each_batch_has_a_context_whose_shapes_stay(library: RecordingLibrary, load: Callable[..., Any]) -> None:
    runner = load()
    runs = [runner.bind(buffers_at(1024 * (1 + index), batch)) for index, batch in enumerate((1, 4, 1))]
    assert library.named("create_execution_context") == [["user"], ["user"]]
    assert library.named("set_input_shape") == [[1, "x", (1, 2)], [2, "x", (4, 2)]]
    for _ in range(2):
        for run in runs:
            run()
    assert [context for context, *_ in library.named("execute_async_v3")] == [1, 2, 1] * 2
    assert len(library.named("set_input_shape")) == len(library.named("set_device_memory")) == 2


def test_context_goes_with_the_last_run_of_its_batch(library: RecordingLibrary, load: Callable[..., Any]) -> None:
    runner = load()
    runs = [runner.bind(buffers_at(256, batch)) for batch in (1, 4)]
    for run in runs:
        run()
    assert len(library.contexts) == 2
    del run, runs[1]
    gc.collect()
    assert len(library.contexts) == 1
    runs[0]()
    runner.bind(buffers_at(256, 4))
    assert len(library.named("create_execution_context")) == 3


def test_graphs_share_the_working_memory_placed_at_the_first_run(
    library: RecordingLibrary, queue: RecordingQueue, load: Callable[..., Any]
) -> None:
    library.memory_bytes = 100
    first = load()
    run_first = first.bind(buffers_at(256))
    library.memory_bytes = 300
    run_second = load().bind(buffers_at(1024))
    assert (queue.reserved, queue.is_placed) == ([100, 300], False)
    run_first()
    run_second()
    assert library.named("set_device_memory") == [[1, queue.ADDRESS, 100], [2, queue.ADDRESS, 300]]


def test_engine_without_activations_asks_for_no_memory(
    library: RecordingLibrary, queue: RecordingQueue, load: Callable[..., Any]
) -> None:
    library.memory_bytes = 0
    load().bind(buffers_at(256))()
    assert not queue.is_placed
    assert library.named("set_device_memory") == []


@pytest.mark.parametrize(("told", "expected"), [(None, True), (True, True), (False, False)])
def test_runs_can_be_captured_unless_the_library_says_otherwise(
    library: RecordingLibrary, load: Callable[..., Any], told: bool | None, expected: bool
) -> None:
    library.runs_are_capturable = told
    runner = load()
    run = runner.bind(buffers_at(256))
    assert runner.is_capturable  # it is not known yet
    run()
    assert runner.is_capturable is expected


@pytest.mark.parametrize(
    ("refused", "error", "what", "reason"),
    [
        (
            "create_execution_context",
            DeviceError,
            "create an execution context",
            "no memory is left; where memory lack",
        ),
        ("set_input_shape", BuildError, r"take \[1, 2\] for x", "set_input_shape: not so"),
        ("set_tensor_address", DeviceError, "take the address of x", "set_tensor_address: not so; where memory lack"),
        ("execute_async_v3", DeviceError, "run the engine", "execute_async_v3: not so; where memory lacks, a smaller"),
    ],
)
def test_failing_call_names_library_and_last_error(
    library: RecordingLibrary,
    load: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
    refused: str,
    error: type[Exception],
    what: str,
    reason: str,
) -> None:
    runner = load()
    runner._settings.loaded.messages.errors.append("an old error")
    library.refused = refused
    with (
        caplog.at_level(logging.INFO),
        pytest.raises(error, match=rf"^TensorRT 10\.9\.0 cannot {what}: {reason}"),
    ):
        runner.bind(buffers_at(256))()
    assert f"error: {reason.partition(';')[0]}" in caplog.text


def test_addresses_are_set_anew_after_a_refusal(library: RecordingLibrary, load: Callable[..., Any]) -> None:
    run = load().bind(buffers_at(256))
    library.refused = "set_tensor_address"
    with pytest.raises(DeviceError, match="cannot take the address of x"):
        run()
    library.refused = ""
    run()
    assert library.named("set_tensor_address")[-2:] == [[1, "x", 256], [1, "y", 512]]


@pytest.mark.parametrize(
    ("buffers", "error", "message"),
    [
        ({**buffers_at(256), "y": array_at(512, (1, 3))}, ShapeError, r"y: got contiguous float32 \[1, 3\], expected"),
        (buffers_at(256, 9), ShapeError, "a run of 9 images: the engine was built for 2 to 8; build one"),
        (buffers_at(256, 1), ShapeError, "a run of 1 images: the engine was built for 2 to 8"),
        (
            {name: np.zeros((4, 2), np.float32) for name in "xy"},
            TypeError,
            "got NumPy arrays for x, y, expected arrays",
        ),
        (
            {name: array_at(256, (4, 2), device_index=1) for name in "xy"},
            ValueError,
            "x is on cuda:1, the graph runs on cuda:0",
        ),
    ],
    ids=["shape", "too many", "too few", "host", "other device"],
)
def test_buffers_that_do_not_fit_are_refused(
    library: RecordingLibrary, load: Callable[..., Any], buffers: Any, error: type[Exception], message: str
) -> None:
    library.batches = (2, 8)
    runner = load()
    with pytest.raises(error, match=message):
        runner.bind(buffers)
    assert library.named("create_execution_context") == []


def test_close_waits_once_and_then_nothing_is_bound(
    library: RecordingLibrary, queue: RecordingQueue, load: Callable[..., Any]
) -> None:
    runner = load()
    run = runner.bind(buffers_at(256))
    run()
    assert library.named("synchronize_stream") == []
    runner.close()
    runner.close()
    assert library.named("synchronize_stream") == [[queue.stream]]
    with pytest.raises(ValueError, match="the runner is closed"):
        runner.bind(buffers_at(256))


def test_closing_after_a_failure_is_done_once(load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(function: str, *_: object) -> None:
        raise DeviceError(f"{function}: made up")

    runner = load()
    monkeypatch.setattr(runner_module, "synchronize_stream", fail)
    with pytest.raises(DeviceError, match="made up"):
        runner.close()
    runner.close()
    with pytest.raises(ValueError, match="the runner is closed"):
        runner.bind(buffers_at(256))


def test_engine_goes_when_the_runner_is_closed_and_no_run_is_left(load: Callable[..., Any]) -> None:
    runner = load()
    engine = weakref.ref(runner._settings.loaded)
    run = runner.bind(buffers_at(256))
    run()
    runner.close()
    gc.collect()
    assert engine() is not None
    run()
    del run
    gc.collect()
    assert engine() is None


def test_nothing_is_loaded_without_a_queue(library: RecordingLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_module, "find_devices", lambda: (("cuda:0",), ""))
    monkeypatch.setattr(backend_module, "find_processor", lambda device: "sm_89")
    with pytest.raises(ValueError, match=r"RunnerOptions\.queue is None; open one: .*open_device\('cuda:0'\)"):
        TensorRtBackend(TENSORRT, library).load(Path("x.engine"), (X,), (Y,), OPTIONS)
    assert library.calls == []


# What only TensorRT for RTX has


@pytest.fixture
def rtx(library: RecordingLibrary) -> RecordingLibrary:
    """The stand-in, with the settings of contexts that TensorRT for RTX has."""
    library.DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="eager")  # type: ignore[attr-defined]
    return library


def test_kernels_for_a_shape_are_compiled_before_it_runs(rtx: RecordingLibrary, load: Callable[..., Any]) -> None:
    load().bind(buffers_at(256))
    ((config,),) = rtx.named("create_execution_context")
    assert config.dynamic_shapes_kernel_specialization_strategy == "eager"
    assert rtx.named("allocation") == [["user"]]
    assert rtx.named("set_runtime_cache") == []


@pytest.mark.parametrize("fits", [True, False])
def test_what_was_compiled_is_kept(
    rtx: RecordingLibrary, load: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture, fits: bool
) -> None:
    cache = tmp_path / "x.runtime.cache"
    cache.write_bytes(KEPT)
    rtx.cache_fits = fits
    with caplog.at_level(logging.INFO):
        runner = load(cache)
    assert rtx.named("deserialize_cache") == [[KEPT]]
    assert ("of another device or version" in caplog.text) is not fits
    runner.close()
    assert cache.read_bytes() == MEASURED


def test_cache_that_cannot_be_written_is_told(
    rtx: RecordingLibrary, load: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    load(tmp_path / "file" / "x.runtime.cache").close()
    assert "cannot be written" in caplog.text


# On a device of the runtime, with a stand-in for the driver


ON_DEVICE = """
import numpy as np
from cuda.bindings import driver
from restyle_deploy.backends.base import RunnerOptions
from restyle_deploy.backends.tensorrt_runner import TensorRtRunner, load_engine
from restyle_deploy.runtime.cuda_device import open_device
from restyle_deploy.tensors import TensorSpec
from tests.backends.recording_library import RecordingContext, RecordingLibrary

def execute(context, stream):
    '''Copy x to y and then into the working memory, as an engine would leave its activations there.'''
    addresses = {name: address for number, name, address in library.named("set_tensor_address")
                 if number == context.number}
    scratch = {number: address for number, address, _ in library.named("set_device_memory")}[context.number]
    for source, target in ((addresses["x"], addresses["y"]), (addresses["y"], scratch)):
        driver.cuMemcpyAsync(target, source, 8, stream)
    return True

RecordingContext.execute_async_v3 = execute
library, device = RecordingLibrary(), open_device("cuda:0")
options = RunnerOptions(device="cuda:0", queue=device)
x, y = (TensorSpec(name=name, dtype="float32", shape=("N", 2)) for name in "xy")
runners = []
for _ in ("encoder", "generator"):
    loaded = load_engine(library, b"plan", options, name="x.engine", weights=None)
    runners.append(TensorRtRunner(loaded, (x,), (y,), device="cuda:0", queue=device, cache=None))
blocks = [device.allocate(8) for _ in range(3)]
arrays = [device.array(block, 0, (1, 2), "float32") for block in blocks]
pinned = device.allocate_host(8)
host = device.array(pinned, 0, (1, 2), "float32")
runs = [runner.bind({"x": source, "y": target}) for runner, source, target in zip(runners, arrays, arrays[1:])]

def enqueue():
    for _ in range(3):
        for run in runs:
            run()

def result(replay, *values):
    host[:] = values
    device.copy(arrays[0], host)
    driver.cuProfilerStart()
    replay()
    driver.cuProfilerStop()
    device.copy(host, arrays[-1])
    device.synchronize()
    return host.tolist()

print(result(enqueue, 1, 2), result(enqueue, 3, 4))
replay = device.capture(enqueue)
print(result(replay, 5, 6), result(replay, 7, 8))
replay.close()
for each in (*runners, *blocks, pinned, device):
    each.close()
"""
CONTEXT_CALLS = {"cuCtxGetCurrent", "cuCtxPushCurrent", "cuCtxPopCurrent", "cuThreadExchangeStreamCaptureMode"}


def test_runs_are_captured_and_no_run_copies_to_the_host_or_waits(host_driver: HostDriver) -> None:
    pytest.importorskip("cuda.core", reason="cuda-core is not installed")
    run = host_driver.run(ON_DEVICE)
    assert run.output.splitlines() == ["[[1.0, 2.0]] [[3.0, 4.0]]", "[[5.0, 6.0]] [[7.0, 8.0]]"]
    names = [call.name for call in run.calls]
    marks = [index for index, name in enumerate(names) if name == "unsupported"]
    spans = [set(names[begin + 1 : end]) for begin, end in zip(marks[::2], marks[1::2], strict=True)]
    assert spans[0] == {"cuMemAlloc", "cuMemcpyAsync"} | (spans[0] & CONTEXT_CALLS)  # the working memory, once
    assert spans[1] == {"cuMemcpyAsync"} | (spans[1] & CONTEXT_CALLS)
    assert [span - CONTEXT_CALLS for span in spans[2:]] == [{"cuGraphLaunch"}] * 2
    assert len(run.named("cuMemAlloc")) == len(run.named("cuMemFree")) == 4


# Weights put back, and what the library says meanwhile


@pytest.fixture
def load_stripped(library: RecordingLibrary, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    monkeypatch.setattr(runner_module, "primary_context", lambda index: 1)
    monkeypatch.setattr(runner_module, "current_context", lambda context: contextlib.nullcontext())
    weights = Path("generator.typed.onnx")
    return lambda: runner_module.load_engine(library, b"plan", OPTIONS, name="x.engine", weights=weights)


def test_weights_are_put_back(library: RecordingLibrary, load_stripped: Callable[[], Any]) -> None:
    load_stripped()
    assert [name for name, *_ in library.calls] == ["deserialize", "refit_from_file", "refit_cuda_engine"]
    assert library.named("refit_from_file") == [["generator.typed.onnx"]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": []}, "it names none that it takes"),
        # TensorRT for RTX may say that none is missing.
        ({"refused": "refit_from_file"}, "Only successfully refitted 0 weights out of 1"),
        ({"missing": ["a", "b", "c", "d"]}, "no weights for a, b, c$"),
        ({"refused": "refit_cuda_engine"}, "the sizes differ"),
    ],
    ids=str,
)
def test_engine_without_all_its_weights_is_refused(
    library: RecordingLibrary, load_stripped: Callable[[], Any], changes: dict[str, Any], message: str
) -> None:
    for name, value in changes.items():
        setattr(library, name, value)
    with pytest.raises(BuildError, match=f"cannot put the weights back into x.engine: {message}"):
        load_stripped()
    assert (library.named("refit_cuda_engine") != []) == (library.refused == "refit_cuda_engine")


def test_warnings_of_loading_are_passed_on(
    library: RecordingLibrary, load_stripped: Callable[[], Any], caplog: pytest.LogCaptureFixture
) -> None:
    warning = "Using an engine plan file across different models of devices is not recommended"
    refitter = library.Refitter

    def warn(engine: Any, logger: Any) -> Any:
        logger.log(library.ILogger.Severity.WARNING, warning)
        return refitter(engine, logger)

    library.Refitter = warn  # type: ignore[method-assign]
    load_stripped()
    assert [(record.levelname, record.message) for record in caplog.records] == [("WARNING", warning)]
