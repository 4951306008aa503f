"""The checks of the loop: on the CPU, on a made-up GPU whose graphs the CPU computes, and on a GPU."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from restyle_deploy import gpu_loop_checks, gpu_trial
from restyle_deploy.backends import load_backend
from restyle_deploy.backends.base import Runner, RunnerOptions
from restyle_deploy.device_array import Array
from restyle_deploy.errors import BackendUnavailableError, VerificationError
from restyle_deploy.gpu_loop_checks import LOOP_BACKENDS, check_images, check_loop, check_memory
from restyle_deploy.runtime.deployment import Deployment
from restyle_deploy.runtime.host_device import HostDevice
from restyle_deploy.runtime.loop import LoadedGraph
from restyle_deploy.runtime.opening import Opened, open_deployment
from tests.backends.host_driver.stand_in import HostDriver
from tests.recording import RecordingDevice, array_from

GPU = "cuda:0"


class QueuedRunner:
    """A runner of the CPU whose runs wait in the queue of a made-up GPU.

    With `drift`, each run gives that much more than the one before, as algorithms do that add in any order.
    """

    def __init__(self, runner: Runner, device: RecordingDevice, *, is_capturable: bool, drift: float) -> None:
        self.is_capturable = is_capturable
        self._runner, self._device, self._drift = runner, device, drift
        self._ran = 0

    def bind(self, buffers: Mapping[str, Array]) -> Callable[[], None]:
        arrays = {name: array_from(buffer) for name, buffer in buffers.items()}
        bound = self._runner.bind(arrays)

        def run() -> None:
            bound()
            if "image" in arrays:
                arrays["image"] += self._drift * self._ran
                self._ran += 1

        return lambda: self._device.enqueue("run", run)

    def close(self) -> None:
        self._runner.close()


class MadeUpGpu:
    """What trials are opened on, each on a device of its own.

    Attributes:
        devices: of all trials.
        refused, is_capturable, drift: of those to come; see `RecordingDevice` and `QueuedRunner`.
    """

    def __init__(self) -> None:
        self.devices: list[RecordingDevice] = []
        self.refused, self.is_capturable, self.drift = 0, True, 0.0

    def open_deployment(self, deployment: Deployment) -> Opened:
        assert deployment.device == GPU
        device = RecordingDevice()
        device.refused = self.refused
        self.devices.append(device)
        opened = open_deployment(replace(deployment, device="cpu"))
        graphs = {
            role: LoadedGraph(
                record=graph.record,
                runner=QueuedRunner(graph.runner, device, is_capturable=self.is_capturable, drift=self.drift),
            )
            for role, graph in opened.graphs.items()
        }
        return replace(opened, graphs=graphs, device=device)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> MadeUpGpu:
    made_up = MadeUpGpu()
    monkeypatch.setattr(gpu_trial, "open_deployment", made_up.open_deployment)
    return made_up


def parts_of(detail: str) -> dict[str, str]:
    """Return what became of each part, by name."""
    found = re.split(r"(?:^|; )([\w =]+ (?:passed|failed|not run)): ", detail)
    return dict(zip(found[1::2], found[2::2], strict=True))


@pytest.mark.parametrize("backend", [pytest.param("pytorch", marks=pytest.mark.slow), "onnxruntime"])
def test_on_the_cpu_all_runs_but_launches(toy_bundle: Path, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    monkeypatch.setattr(gpu_loop_checks, "REPEATS", 1)  # for torch on a busy machine
    monkeypatch.setattr(gpu_loop_checks, "WARMUP", 0)
    parts = parts_of(check_loop(toy_bundle, backend=backend, device="cpu"))
    assert parts["expectation passed"].startswith("latents within ")
    assert parts["images on the device passed"] == "the same bits"
    assert parts["one launch not run"] == "there are no launches on the CPU"
    assert parts["capture=False passed"] == "the same bits"
    assert parts["times passed"].startswith("5 steps of one image ")


def test_on_a_gpu_a_call_is_one_launch(toy_bundle: Path, gpu: MadeUpGpu) -> None:
    parts = parts_of(check_loop(toy_bundle, backend="onnxruntime", device=GPU))
    assert list(parts) == [
        f"{name} passed" for name in ("expectation", "images on the device", "one launch", "capture=False", "times")
    ]
    assert parts["one launch passed"] == "no run of 5 steps is enqueued by itself"
    recorded, unrecorded, timed = gpu.devices
    assert (recorded.count()["capture"] > 0, unrecorded.count()["capture"]) == (True, 0)
    assert timed.count()["record timing"] > 0
    assert [device.is_open or device.open_blocks for device in gpu.devices] == 3 * [[]], "all memory is given back"


def test_a_loop_that_cannot_be_recorded_fails(toy_bundle: Path, gpu: MadeUpGpu) -> None:
    gpu.refused = 1
    with pytest.raises(VerificationError, match="one launch failed: the loop is not recorded: a call enqueues 10 runs"):
        check_loop(toy_bundle, backend="onnxruntime", device=GPU)


def test_a_backend_that_lets_nothing_be_recorded_may_differ_by_rounding(toy_bundle: Path, gpu: MadeUpGpu) -> None:
    gpu.is_capturable, gpu.drift = False, 1e-6
    parts = parts_of(check_loop(toy_bundle, backend="onnxruntime", device=GPU))
    assert parts["one launch not run"] == "this backend lets nothing be recorded, a call enqueues 10 runs"
    assert parts["capture=False passed"].startswith("latents differ by 0.0e+00, images differ by ")


@pytest.mark.parametrize(
    ("is_capturable", "drift", "reason"),
    [(True, 1e-6, "expected the same bits"), (False, 1.0, "more than rounding"), (False, np.nan, "not finite")],
)
def test_results_that_differ_fail_and_the_rest_goes_on(
    toy_bundle: Path, gpu: MadeUpGpu, is_capturable: bool, drift: float, reason: str
) -> None:
    gpu.is_capturable, gpu.drift = is_capturable, drift
    with pytest.raises(VerificationError) as raised:
        check_loop(toy_bundle, backend="onnxruntime", device=GPU)
    parts = parts_of(str(raised.value))
    assert reason in parts["images on the device failed"]
    assert "times passed" in parts


def test_another_models_results_fail(toy_bundle: Path, gpu: MadeUpGpu) -> None:
    gpu.drift = 1.0
    with pytest.raises(VerificationError, match="expectation failed: backend onnxruntime on cuda:0: differs"):
        check_loop(toy_bundle, backend="onnxruntime", device=GPU)


@pytest.mark.parametrize("backend", LOOP_BACKENDS)
def test_without_the_device_nothing_is_run(toy_bundle: Path, backend: str) -> None:
    device = "cuda:99"  # no machine has it
    with pytest.raises(BackendUnavailableError, match=f"backend {backend}: device '{device}' cannot run here"):
        check_loop(toy_bundle, backend=backend, device=device)


def test_images_are_those_of_pillow() -> None:
    assert check_images("cpu") == "3024 x 4032 pixels, the largest difference is 0 levels"


@pytest.mark.parametrize("error", [2 / 127.5, np.nan])
def test_images_that_are_not_fail(monkeypatch: pytest.MonkeyPatch, error: float) -> None:
    exact = HostDevice.prepare_images

    def prepare_images(device: HostDevice, source: Any, target: Any) -> None:
        exact(device, source, target)
        target[0, 0, 0, 0] += error

    monkeypatch.setattr(HostDevice, "prepare_images", prepare_images)
    with pytest.raises(VerificationError, match=r"the largest difference is (2|nan) levels, not one at most"):
        check_images("cpu")


@pytest.mark.parametrize("lost", [0, 2**20])
def test_memory_that_does_not_come_back_fails(toy_bundle: Path, monkeypatch: pytest.MonkeyPatch, lost: int) -> None:
    figures: Iterator[int] = iter([2**30, 2**30 - 3 * lost])
    monkeypatch.setattr(gpu_loop_checks, "free_bytes", lambda device: next(figures))
    monkeypatch.setattr(gpu_loop_checks, "ROUNDS", 3)
    if lost:
        with pytest.raises(VerificationError, match=r"3 times open, .*: 3\.0 MiB less are free, expected 2 at most"):
            check_memory(toy_bundle, backend="onnxruntime", device="cpu")
    else:
        assert check_memory(toy_bundle, backend="onnxruntime", device="cpu").endswith("0.0 MiB less are free")


def test_free_memory_is_the_drivers(host_driver: HostDriver) -> None:
    output = host_driver.run(
        "from restyle_deploy.gpu_loop_checks import free_bytes\n"
        "from restyle_deploy.runtime.cuda_device import open_device\n"
        "before = free_bytes('cuda:0')\n"
        "block = open_device('cuda:0').allocate(2**24)\n"
        "print(before - free_bytes('cuda:0'))"
    ).output
    assert int(output) == 2**24


@pytest.mark.gpu
@pytest.mark.parametrize("backend", LOOP_BACKENDS)
def test_loop_on_a_gpu(toy_bundle: Path, backend: str) -> None:
    try:
        load_backend(backend).check_options(RunnerOptions(device=GPU))
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    assert "expectation passed" in check_loop(toy_bundle, backend=backend, device=GPU)
    check_images(GPU)


@pytest.mark.gpu
def test_memory_of_a_gpu_comes_back(toy_bundle: Path) -> None:
    try:
        load_backend(LOOP_BACKENDS[0]).check_options(RunnerOptions(device=GPU))
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    assert f"{gpu_loop_checks.ROUNDS} times open" in check_memory(toy_bundle, backend=LOOP_BACKENDS[0], device=GPU)
