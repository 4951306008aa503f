"""A session opened to be tried on a device: what it enqueues is noted, and images go in from the device's memory."""

from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from restyle_deploy.device_array import Array
from restyle_deploy.runtime.base import Device
from restyle_deploy.runtime.deployment import Deployment
from restyle_deploy.runtime.loop import LoadedGraph, Run
from restyle_deploy.runtime.opening import open_deployment
from restyle_deploy.runtime.results import Inversion, InversionResult
from restyle_deploy.runtime.session import Session

STEPS = 5

Images = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class NotedGraph(LoadedGraph):
    """A graph whose runs are noted as they are enqueued.

    Attributes:
        enqueued: the graph's file name, once for each run.
    """

    enqueued: list[str]

    def bind(self, buffers: Mapping[str, Array]) -> list[Run]:
        """See `LoadedGraph.bind`."""
        return [self._noted(run) for run in super().bind(buffers)]

    def _noted(self, run: Run) -> Run:
        def noted() -> None:
            self.enqueued.append(self.record.path.name)
            run()

        return noted


class Trial:
    """A session on the exported graphs, whose runs are noted as they are enqueued, and arrays on its device.

    Attributes:
        session: owned.
        device: the session's.
        enqueued: an entry for each run that was enqueued one by one; a replay adds none.
    """

    def __init__(self, deployment: Deployment, *, capture: bool = True, timing_enabled: bool = False) -> None:
        """Open a session; see `Session.open` for what it takes and raises."""
        opened = open_deployment(deployment)
        self.enqueued: list[str] = []
        self.device = opened.device
        self._graphs = {
            role: NotedGraph(record=graph.record, runner=graph.runner, enqueued=self.enqueued)
            for role, graph in opened.graphs.items()
        }
        self.session = Session(
            opened.bundle,
            self._graphs,
            opened.description,
            batches=opened.batches,
            device=opened.device,
            max_batch=deployment.max_batch,
            timing_enabled=timing_enabled,
            capture=capture,
        )
        self._arrays = DeviceArrays(opened.device)

    @property
    def is_recorded(self) -> bool:
        """Whether the session records its loops, which then give the same bits each time; some backends refuse."""
        return all(graph.runner.is_capturable for graph in self._graphs.values())

    def upload(self, images: Images) -> Array:
        """Return images on the device; they go with the trial."""
        return self._arrays.upload(images)

    def invert_on_device(self, images: Images) -> InversionResult:
        """Invert images from the device's memory, and bring the results to the host."""
        inversion: Inversion = self.session.invert(self.upload(images), steps=STEPS)
        if isinstance(inversion, InversionResult):  # on the CPU
            return inversion
        with inversion:
            return InversionResult(
                images=self._arrays.download(inversion.images),
                latents=self._arrays.download(inversion.latents),
                current=self._arrays.download(inversion.current),
            )

    def close(self) -> None:
        """Release the arrays, then the session; safe to call twice."""
        self._arrays.close()
        self.session.close()


class DeviceArrays:
    """Arrays on a device, and their way there and back. Owns their memory, not the device."""

    def __init__(self, device: Device) -> None:
        self._device, self._blocks = device, ExitStack()

    def upload(self, values: NDArray[Any]) -> Array:
        """Return a copy of values on the device."""
        block = self._device.allocate(values.nbytes)
        self._blocks.callback(block.close)
        array = self._device.array(block, 0, values.shape, values.dtype.name)
        with closing(self._device.allocate_host(values.nbytes)) as pinned:
            staged = self._device.array(pinned, 0, values.shape, values.dtype.name)
            assert isinstance(staged, np.ndarray)
            np.copyto(staged, values)
            self._device.copy(array, staged)
            self._device.synchronize()
        return array

    def download(self, array: Array) -> NDArray[Any]:
        """Return a copy on the host, once what was enqueued has ended."""
        with closing(self._device.allocate_host(array.nbytes)) as pinned:
            staged = self._device.array(pinned, 0, array.shape, array.dtype.name)
            assert isinstance(staged, np.ndarray)
            self._device.copy(staged, array)
            self._device.synchronize()
            return staged.copy()

    def close(self) -> None:
        """Release their memory; safe to call twice."""
        self._blocks.close()
