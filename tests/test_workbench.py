"""Single graphs on a device: the host, and a GPU's code path on a stand-in for the driver."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from restyle_deploy.backends.base import RunnerOptions
from restyle_deploy.tensors import TensorSpec
from restyle_deploy.workbench import Workbench
from tests.backends.host_driver.stand_in import HostDriver
from tests.fakes import MadeUpBackend

X, Y = (TensorSpec(name=name, dtype="float32", shape=("N", 2)) for name in "xy")
VALUES = np.array([[1, 2], [3, 4], [5, 6]], np.float32)


class CountingBackend(MadeUpBackend):
    """Loads graphs that copy x to y; notes what it is asked for."""

    def __init__(self) -> None:
        self.notes: list[Any] = []

    def load(self, file: Path, *rest: Any) -> "CountingRunner":
        self.notes.append(("load", file.name, *rest))
        return CountingRunner(self.notes)


class CountingRunner:
    is_capturable = True

    def __init__(self, notes: list[Any]) -> None:
        self._notes = notes

    def bind(self, buffers: Mapping[str, NDArray[Any]]) -> Callable[[], None]:
        def run() -> None:
            self._notes.append("run")
            np.copyto(buffers["y"], buffers["x"])

        return run

    def close(self) -> None:
        self._notes.append("close")


def test_graph_runs_once_a_call_on_the_host() -> None:
    backend, options = CountingBackend(), RunnerOptions(threads=2)
    with Workbench(options, gpu_runs=8) as bench:
        runner = bench.load(backend, Path("x.onnx"), (X,), (Y,), Path("weights.onnx"))  # type: ignore[arg-type]
        given = VALUES.copy()
        run = bench.bind(runner, (Y,), {"x": given})
        given[:] = 0
        assert (bench.runs_per_call, bench.options) == (1, options)
        for _ in range(3):
            run()
        result = run.result("y")
    np.testing.assert_array_equal(result, VALUES)
    loaded = ("load", "x.onnx", (X,), (Y,), options, Path("weights.onnx"))
    assert backend.notes == [loaded, "run", "run", "run", "close"]
    bench.close()


def test_unknown_device_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown device 'abacus'"):
        Workbench(RunnerOptions(device="abacus"))


ON_GPU = """
import logging
import sys
import numpy as np
from cuda.bindings import driver
from restyle_deploy.backends.base import RunnerOptions
from restyle_deploy.runtime.device import call
from restyle_deploy.tensors import TensorSpec
from restyle_deploy.workbench import Workbench

logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")

class Runner:
    def __init__(self, queue):
        self.queue, self.is_capturable = queue, {is_capturable}

    def bind(self, buffers):
        x, y = buffers["x"], buffers["y"]
        def run():
            driver.cuMemcpyAsync(y.address, x.address, x.nbytes, self.queue.stream)
            if {waits}:
                call("cuStreamSynchronize", self.queue.stream)
        return run

    def close(self):
        print("runner closed")

class Backend:
    def load(self, file, inputs, outputs, options, weights):
        return Runner(options.queue)

specs = [TensorSpec(name=name, dtype="float32", shape=("N", 2)) for name in "xy"]
values = np.array([[1, 2], [3, 4], [5, 6]], np.float32)
with Workbench(RunnerOptions(device="cuda:0"), gpu_runs=8) as bench:
    runner = bench.load(Backend(), None, specs[:1], specs[1:])
    run = bench.bind(runner, specs[1:], {{"x": values}})
    for _ in range(3):
        driver.cuProfilerStart()
        run()
    driver.cuProfilerStop()
    print(bench.runs_per_call, run.result("y").tolist())
"""
COPY = "cuMemcpyAsync"


@pytest.mark.parametrize(
    ("is_capturable", "waits", "calls"),
    [
        # Eight copies are captured at the end of the first call, and launched as one by the others.
        (True, False, [9, 0, 0]),
        (False, False, [1, 8, 8]),
        # What cannot be captured, though it says so, is found out by trying.
        (True, True, [2, 8, 8]),
    ],
    ids=["captured", "one by one", "capture refused"],
)
def test_graph_runs_in_one_launch_on_a_gpu(
    host_driver: HostDriver, is_capturable: bool, waits: bool, calls: list[int]
) -> None:
    pytest.importorskip("cuda.core", reason="cuda-core is not installed")
    run = host_driver.run(ON_GPU.format(is_capturable=is_capturable, waits=waits))
    lines = run.output.splitlines()
    assert "8 [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]" in lines
    assert lines[-1] == "runner closed"
    assert any("a run is not captured: " in line for line in lines) is (is_capturable and waits)
    copies = [call.name for call in run.calls if call.name in (COPY, "unsupported")]
    parts = " ".join(copies).split("unsupported")[1:4]  # what marks the calls is nothing that the stand-in knows
    assert [part.split().count(COPY) for part in parts] == calls
    assert len(run.named("cuGraphLaunch")) == (2 if is_capturable and not waits else 0)
    assert len(run.named("cuMemAlloc")) == len(run.named("cuMemFree")) > 0
    assert len(run.named("cuMemAllocHost")) == len(run.named("cuMemFreeHost")) > 0
