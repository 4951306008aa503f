"""Ctrl-C while a library works: on a stand-in that swallows it as the bindings do, and in a real build."""

import contextlib
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from restyle_deploy.backends import tensorrt as backend_module
from restyle_deploy.backends import tensorrt_runner as runner_module
from restyle_deploy.backends.base import BuildRequest, EngineOptions, RunnerOptions
from restyle_deploy.backends.tensorrt import TensorRtBackend
from restyle_deploy.backends.tensorrt_interrupts import Interrupts
from restyle_deploy.backends.tensorrt_library import TENSORRT
from restyle_deploy.files import sha256_of_file
from tests.backends.recording_library import RecordingLibrary, RecordingQueue, array_at, recorded
from tests.backends.test_tensorrt_runner import X, Y

OPTIONS = RunnerOptions(device="cuda:0")
REQUEST = BuildRequest(engine=EngineOptions(no_plugins=True))


@pytest.fixture(autouse=True)
def usual_handler() -> Iterator[None]:
    """That of Python, also where the tests were started with Ctrl-C ignored."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """There seems to be a GPU."""
    monkeypatch.setattr(backend_module, "find_devices", lambda: (("cuda:0",), ""))
    monkeypatch.setattr(backend_module, "find_processor", lambda device: "sm_89")
    monkeypatch.setattr(backend_module, "find_name", lambda device: "NVIDIA L4")
    monkeypatch.setattr(backend_module, "current_device", lambda device: contextlib.nullcontext())


@pytest.fixture(scope="module")
def graph(project_root: Path) -> Path:
    return project_root / "engines" / "demo-faces" / "generator.onnx"


@pytest.fixture
def library() -> RecordingLibrary:
    return recorded()[1]


# On a stand-in


@pytest.mark.parametrize(
    ("interrupted", "plan"),
    [
        ("parse_from_file", b"plan"),
        ("build_serialized_network", b"plan"),
        ("build_serialized_network", None),
        ("deserialize", b"plan"),  # to look for its layers
    ],
)
def test_interrupted_build_writes_nothing_more(
    library: RecordingLibrary, graph: Path, tmp_path: Path, interrupted: str, plan: bytes | None
) -> None:
    library.interrupted, library.plan = interrupted, plan
    with pytest.raises(KeyboardInterrupt):
        TensorRtBackend(TENSORRT, library).build(graph, tmp_path / "generator.engine", OPTIONS, REQUEST)
    assert not (tmp_path / "generator.layers.json").exists()
    assert (tmp_path / "generator.engine").exists() is (interrupted == "deserialize")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(("interrupted", "goes_on"), [("build_serialized_network", False), ("", True)])
def test_builder_is_told_to_stop(
    library: RecordingLibrary, graph: Path, tmp_path: Path, interrupted: str, goes_on: bool
) -> None:
    library.interrupted = interrupted
    with contextlib.suppress(KeyboardInterrupt):
        TensorRtBackend(TENSORRT, library).build(graph, tmp_path / "generator.engine", OPTIONS, REQUEST)
    assert library.named("step_complete") == [[goes_on]]


def test_interrupted_check_takes_no_graph(library: RecordingLibrary, graph: Path) -> None:
    library.interrupted = "is_network_supported"
    with pytest.raises(KeyboardInterrupt):
        TensorRtBackend(TENSORRT, library).check_graph(graph, OPTIONS, REQUEST)


def test_interrupted_loading_runs_nothing(library: RecordingLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "primary_context", lambda index: 1)
    monkeypatch.setattr(runner_module, "current_context", lambda context: contextlib.nullcontext())
    loaded = runner_module.load_engine(library, b"plan", OPTIONS, name="x.engine", weights=None)
    runner = runner_module.TensorRtRunner(loaded, (X,), (Y,), device="cuda:0", queue=RecordingQueue(), cache=None)
    library.interrupted = "create_execution_context"
    with pytest.raises(KeyboardInterrupt):
        runner.bind({"x": array_at(256), "y": array_at(512)})
    library.interrupted = "deserialize"
    with pytest.raises(KeyboardInterrupt):
        runner_module.load_engine(library, b"plan", OPTIONS, name="x.engine", weights=None)


def interrupt(done: list[str]) -> None:
    signal.raise_signal(signal.SIGINT)
    done.append("all of it")


def test_interrupt_is_put_off_and_comes_once() -> None:
    interrupts, done = Interrupts(), list[str]()
    with pytest.raises(KeyboardInterrupt), interrupts.put_off():
        interrupt(done)
    assert (done, interrupts.is_pending) == (["all of it"], True)
    with Interrupts().put_off():
        pass


def test_a_program_s_own_handler_stays() -> None:
    called: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: called.append(number))
    with Interrupts().put_off():
        signal.raise_signal(signal.SIGINT)
        assert called == [signal.SIGINT]


def test_other_threads_have_no_handler() -> None:
    done: list[str] = []

    def work() -> None:
        with Interrupts().put_off():
            done.append("worked")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == ["worked"]


# In a real build

# A shell may have started the tests with Ctrl-C ignored, which the process would inherit.
SCRIPT = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from restyle_deploy.backends import tensorrt
tensorrt.find_devices = lambda: ((), "there is no NVIDIA driver")
from restyle_deploy.cli.main import main
main()
"""


@pytest.mark.tensorrt
@pytest.mark.parametrize(
    "moment",
    [
        "reading the encoder …",
        "building the encoder …",
        "building the encoder: Optimizing graph …",
        "building the generator: Cloning network graph 50% …",
        "building the generator: Optimizing graph 80% …",
    ],
)
def test_interrupted_build_leaves_the_bundle_as_it_was(project_root: Path, tmp_path: Path, moment: str) -> None:
    pytest.importorskip("tensorrt_rtx")
    bundle = Path(shutil.copytree(project_root / "engines" / "demo-faces", tmp_path / "bundle"))
    before = content_of(bundle)
    command = [sys.executable, "-c", SCRIPT, "build", str(bundle), "--backend", "tensorrt-rtx"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as build:
        assert build.stderr is not None
        for line in build.stderr:
            if line.strip() == moment:
                break
        build.send_signal(signal.SIGINT)
        output, errors = build.communicate(timeout=120)
    assert output == ""
    assert errors.endswith("\nAborted!\n"), errors
    assert "Exception caught" not in errors
    assert build.returncode != 0
    assert content_of(bundle) == before


def content_of(bundle: Path) -> dict[str, str]:
    return {str(path): sha256_of_file(path) for path in sorted(bundle.rglob("*")) if path.is_file()}
