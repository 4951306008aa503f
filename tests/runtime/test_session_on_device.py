"""A whole session on a `CudaDevice`, through the real cuda-core and cuda-bindings on a stand-in for the driver.

Its graphs are copies on the device: the encoder leaves the latent as it is, the generator renders the target.
"""

from __future__ import annotations

from collections import Counter

import pytest

from restyle_deploy.errors import BackendUnavailableError
from restyle_deploy.ops import compiler
from tests.backends.host_driver.stand_in import HostDriver
from tests.runtime.device_scripts import ALLOCATIONS, FOREIGN_CAPTURE, WAITS, between, run

pytest.importorskip("cuda.core", reason="cuda-core is not installed")

START = """
import gc
import threading

import numpy as np
from cuda.bindings import driver
from cuda.core import Device
from cuda.core.utils import StridedMemoryView
from restyle_deploy.runtime.cuda_device import open_device
from tests.fakes import _session_of

class CopyRunner:
    is_capturable = True

    def __init__(self, device, copies):
        self.device, self.copies = device, copies

    def bind(self, buffers):
        pairs = [(buffers[target], buffers[source]) for target, source in self.copies]
        def run():
            for target, source in pairs:
                for offset in range(0, target.nbytes, source.nbytes):  # an image is four times as large
                    driver.cuMemcpyAsync(target.address + offset, source.address, source.nbytes, self.device.stream)
        return run

    def close(self):
        pass

def open_session(**options):
    device = open_device("cuda:0")
    runners = {
        "encoder": CopyRunner(device, [("latent_out", "latent"), ("current", "target")]),
        "generator": CopyRunner(device, [("image", "current")]),
    }
    session = _session_of(runners, domain="faces", batch=None, device=device, max_batch=4, **options)
    return session, device

def images_of(count, value):
    return np.full((count, 3, 32, 32), value, np.float32) + np.arange(count, dtype=np.float32)[:, None, None, None] / 8

def put(device, values):
    pinned, block = device.allocate_host(values.nbytes), device.allocate(values.nbytes)
    staged, array = (device.array(each, 0, values.shape, "float32") for each in (pinned, block))
    staged[:] = values
    device.copy(array, staged)
    return array

def rendered(result):
    return result.current[:, 0, 0, 0].tolist(), np.unique(result.latents).tolist()
"""


def test_images_on_the_device_are_one_launch_without_a_wait(host_driver: HostDriver) -> None:
    done = run(
        host_driver,
        START,
        """
session, device = open_session()
Device(0).set_current()
other = Device(0).create_stream()
handle = int(other.handle)
images = put(device, images_of(2, 0.5))
first = session.invert(images, steps=3)
again = session.invert(images, steps=3)
first.close()
driver.cuMemGetInfo()
result = session.invert(images, steps=3, stream=handle)
print(result.is_done())
view = StridedMemoryView.from_dlpack(result.current, stream_ptr=handle)
driver.cuMemGetInfo()
result.wait()
pinned = device.allocate_host(result.current.nbytes)
current = device.array(pinned, 0, result.current.shape, "float32")
device.copy(current, result.current)
device.synchronize()
print(current[:, 0, 0, 0], result.is_done())
session.close()
session.close()
print(view.shape)
""",
    )
    assert done.output.splitlines() == ["False", "[0.5   0.625] True", "(2, 3, 32, 32)"]
    calls = between(done, "cuMemGetInfo")
    assert calls["cuGraphLaunch"] == 1
    assert not calls.keys() & {*WAITS, *ALLOCATIONS}, calls
    assert calls["cuMemcpyAsync"] <= 3 + 3  # in: target and start; out: image, latent and current; none of a step


def test_images_on_the_host_are_split_and_waited_for(host_driver: HostDriver) -> None:
    done = run(
        host_driver,
        START,
        """
session, device = open_session(timing_enabled=True)
for count in (1, 4, 6, 6):
    result = session.invert(images_of(count, 0.0), steps=2)
    print(*rendered(result))
timings = result.timings
print(len(timings.encoder_ms), timings.total_ms >= timings.upload_ms >= 0)
kept = session.invert(images_of(2, 0.5), steps=3, every_step=True)
print(kept.images.shape, kept.current[:, 0, 0, 0])
pending = session.invert_async(images_of(1, 0.25), steps=2)
print(rendered(pending.result()))
session.close()
""",
    )
    assert done.output.splitlines() == [
        "[0.0] [1.0]",
        "[0.0, 0.125, 0.25, 0.375] [1.0]",
        *["[0.0, 0.125, 0.25, 0.375, 0.5, 0.625] [1.0]"] * 2,
        "2 True",
        "(3, 2, 3, 64, 64) [0.5   0.625]",
        "([0.25], [1.0])",
    ]


@pytest.mark.parametrize("capture", [True, False])
def test_threads_get_their_own_results(host_driver: HostDriver, capture: bool) -> None:
    done = run(
        host_driver,
        START,
        f"""
session, device = open_session(capture={capture})
wrong = []
def work(number):
    for turn in range(4):
        count, value = 1 + (number + turn) % 4, number + turn / 16
        result = session.invert(images_of(count, value), steps=2)
        if rendered(result)[0] != images_of(count, value)[:, 0, 0, 0].tolist():
            wrong.append((number, turn))
threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(wrong)
session.close()
""",
    )
    assert done.output == "[]\n"
    assert bool(done.named("cuGraphLaunch")) == capture


def test_200_sessions_give_all_memory_back(host_driver: HostDriver) -> None:
    done = run(
        host_driver,
        START,
        """
def once():
    session, device = open_session()
    for count in (1, 6):
        session.invert(images_of(count, 0.0), steps=2)
    session.invert(images_of(2, 0.0), steps=2, every_step=True)
    session.close()

for _ in range(200):
    once()
gc.collect()
""",
    )
    counts = Counter(call.name for call in done.calls)
    assert counts["cuMemAlloc"] == counts["cuMemFree"] > 0
    assert counts["cuMemAllocHost"] == counts["cuMemFreeHost"] > 0
    assert counts["cuGraphInstantiateWithFlags"] == counts["cuGraphExecDestroy"] > 0
    assert counts["cuEventCreate"] == counts["cuEventDestroy"]
    assert counts["cuStreamCreateWithPriority"] == 1  # they take turns with it


LAZY = """
class LazyRunner(CopyRunner):
    # Allocates when it is bound and when it runs first, as libraries do.
    def bind(self, buffers):
        run, left = super().bind(buffers), ["run"]
        self.allocate("bind")
        def run_lazily():
            if left:
                self.allocate(left.pop())
            run()
        return run_lazily

    def allocate(self, when):
        allocated.add((when, driver.cuMemAlloc(16)[0].name))

    def close(self):
        allocated.add(("close", driver.cuMemAlloc(16)[0].name))

CopyRunner, allocated = LazyRunner, set()
session, device = open_session()
Device(0).set_current()
floats = put(device, images_of(2, 0.5))
pixels = device.array(device.allocate(2 * 48 * 40 * 3), 0, (2, 48, 40, 3), "uint8")
"""


@pytest.mark.parametrize(("images", "image_type", "kernels"), [("floats", "float32", 0), ("pixels", "uint8", 2)])
def test_what_is_done_once_does_not_mind_captures_of_others(
    host_driver: HostDriver, images: str, image_type: str, kernels: int
) -> None:
    """Graphs are bound and run first, and kernels are loaded, while another thread captures in the mode "global"."""
    if kernels:
        try:
            compiler.check_available()
        except BackendUnavailableError as error:
            pytest.skip(str(error))
    done = run(
        host_driver,
        START + LAZY + FOREIGN_CAPTURE,
        f"""
thread.start()
begun.wait(60)
for _ in range(3):
    session.invert({images}, steps=2, image_type="{image_type}").wait()
session.invert_async(images_of(3, 0.5), steps=1).result()
print(driver.cuMemAlloc(16)[0].name)  # a call of someone else's
session.close()
done.set()
thread.join()
print(*sorted(allocated))
""",
    )
    assert done.output.splitlines() == [
        "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED",
        "CUDA_SUCCESS",
        "('bind', 'CUDA_SUCCESS') ('close', 'CUDA_SUCCESS') ('run', 'CUDA_SUCCESS')",
    ]
    assert len(done.named("cuLibraryLoadData")) == kernels
