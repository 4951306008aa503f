"""A session's calls on a GPU: what the driver does inside one, by the profiler's trace and by our own calls of it."""

from __future__ import annotations

import gc
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.dlpack import from_dlpack

from restyle_deploy import Session
from restyle_deploy.backends import BACKENDS, load_backend
from restyle_deploy.backends.base import RunnerOptions
from restyle_deploy.errors import BackendUnavailableError
from restyle_deploy.gpu_loop_checks import LOOP_BACKENDS, check_memory
from restyle_deploy.ops.torch_gpu import why_torch_sees_no_gpu
from restyle_deploy.runtime import device as device_module
from restyle_deploy.runtime.device import call, current_context, primary_context
from restyle_deploy.runtime.results import DeviceInversion, InversionResult

pytestmark = pytest.mark.gpu
WAITS = {"cuStreamSynchronize", "cuEventSynchronize", "cuCtxSynchronize"}
ALLOCATIONS = {"cuMemAlloc", "cuMemAllocHost", "cuMemFree", "cuMemFreeHost"}
# Synchronisation by the host, as CUPTI names it. "Stream Wait Event" is none: streams wait there, not the host.
HOST_WAIT = re.compile(r"(Context|Stream|Event) Sync$|Synchronize")
MEBIBYTE = 2**20


@pytest.fixture(scope="module", autouse=True)
def gpu() -> None:
    if reason := why_torch_sees_no_gpu():
        pytest.skip(reason)


@pytest.fixture
def session(toy_bundle: Path) -> Iterator[Session]:
    with Session.open(toy_bundle, backend="pytorch", device="cuda:0") as opened:
        yield opened


@pytest.fixture
def images(session: Session) -> torch.Tensor:
    height, width = session.config.input_shape
    return torch.randint(0, 256, (2, height, width, 3), dtype=torch.uint8, device="cuda:0")


def invert(session: Session, images: torch.Tensor, *, steps: int, stream: int | None = None) -> DeviceInversion:
    inversion = session.invert(images, steps=steps, stream=stream)
    assert isinstance(inversion, DeviceInversion)
    return inversion


class CountedDriver:
    """The driver's functions, whose calls are counted."""

    def __init__(self, module: Any) -> None:
        self.module, self.calls = module, Counter[str]()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("cu"):
            self.calls[name] += 1
        return getattr(self.module, name)


def test_a_call_is_one_graph_launch_by_our_own_calls(
    session: Session, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    invert(session, images, steps=3).wait()  # binds, captures
    counted = CountedDriver(device_module.driver())
    monkeypatch.setattr(device_module, "driver", lambda: counted)
    inversion = invert(session, images, steps=3)
    calls = Counter(counted.calls)
    assert calls["cuGraphLaunch"] == 1
    assert not calls.keys() & (WAITS | ALLOCATIONS), calls
    inversion.wait()


def test_the_trace_of_a_call_has_no_copy_to_the_host_and_no_wait(
    session: Session, images: torch.Tensor, tmp_path: Path
) -> None:
    for _ in range(2):
        invert(session, images, steps=3).wait()
    torch.cuda.synchronize()
    profiler: Any = torch.profiler
    with profiler.profile(
        activities=[profiler.ProfilerActivity.CPU, profiler.ProfilerActivity.CUDA],
        experimental_config=torch._C._profiler._ExperimentalConfig(enable_cuda_sync_events=True),
    ) as profile:
        with torch.profiler.record_function("call"):
            inversion = invert(session, images, steps=3)
        inversion.wait()
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    events = [event for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"] if "dur" in event]
    span = next(event for event in events if event["name"] == "call" and event.get("cat") == "user_annotation")
    end = span["ts"] + span["dur"]
    names = [event["name"] for event in events]
    assert any(event.get("cat") == "kernel" for event in events), "the trace has no work of the GPU"
    assert [name for name in names if "DtoH" in name] == []
    inside = [event["name"] for event in events if span["ts"] <= event["ts"] < end]
    assert [name for name in inside if HOST_WAIT.search(name)] == []
    # All kernels of a launched graph have the launch's correlation, and each other kernel one of its own.
    kernels = Counter(event["args"]["correlation"] for event in events if event.get("cat") == "kernel")
    launched = [count for count in kernels.values() if count > 1]
    assert len(launched) == 1, f"the kernels of a call come from {len(launched)} graph launches, not one"
    assert launched[0] >= 2 * 3, "there are fewer kernels in the graph than passes of encoder and generator"


def test_results_on_the_device_are_those_on_the_host(session: Session, images: torch.Tensor) -> None:
    expected = session.invert(images.cpu().numpy(), steps=3)
    assert isinstance(expected, InversionResult)
    inversion = invert(session, images, steps=3, stream=torch.cuda.current_stream().cuda_stream)
    np.testing.assert_array_equal(from_dlpack(inversion.latents).cpu().numpy(), expected.latents)
    np.testing.assert_array_equal(from_dlpack(inversion.images).cpu().numpy(), expected.images)


@pytest.mark.slow
def test_10000_calls_without_growth(session: Session, images: torch.Tensor) -> None:
    def free_bytes() -> int:
        with current_context(primary_context(0)):
            return int(call("cuMemGetInfo")[0])

    for _ in range(100):
        invert(session, images, steps=2).close()
    torch.cuda.synchronize()
    gc.collect()
    before, blocks = free_bytes(), len(gc.get_objects())
    for _ in range(10_000):
        invert(session, images, steps=2).close()
    torch.cuda.synchronize()
    gc.collect()
    assert before - free_bytes() < MEBIBYTE
    assert len(gc.get_objects()) - blocks < 1000


@pytest.mark.slow
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "openvino"])  # which has no device of CUDA
def test_sessions_of_each_backend_give_all_memory_back(toy_bundle: Path, backend: str) -> None:
    # Without an engine TensorRT builds one at each opening.
    rounds = 200 if backend in LOOP_BACKENDS else 10
    try:
        load_backend(backend).check_options(RunnerOptions(device="cuda:0"))
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    check_memory(toy_bundle, backend=backend, device="cuda:0", rounds=rounds)
