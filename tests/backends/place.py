"""Where backends run in tests: an opened device, and NumPy's values in its memory."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import NDArray

from restyle_deploy.backends.base import EXACT_PRECISION, Backend, Runner, RunnerOptions
from restyle_deploy.bundle import Bundle
from restyle_deploy.device_array import Array
from restyle_deploy.runtime.cuda_device import open_device

Buffers = dict[str, NDArray[Any]]


class Place:
    """An opened device, and arrays in its memory; on the host these are the NumPy arrays themselves."""

    def __init__(self, name: str) -> None:
        self._owned = ExitStack()
        self.device = open_device(name)
        self._owned.callback(self.device.close)

    def options(self, *, threads: int | None = None, precision: str = EXACT_PRECISION) -> RunnerOptions:
        """How graphs are loaded to run here."""
        queue = None if self.device.is_host else self.device
        return RunnerOptions(device=self.device.name, threads=threads, precision=precision, queue=queue)

    def load(self, backend: Backend, bundle: Bundle, graph: str, *, threads: int | None = None) -> Runner:
        """Load a graph of a bundle, which is closed with the place."""
        record = bundle.graphs[graph]
        runner = backend.load(record.path, record.inputs, record.outputs, self.options(threads=threads))
        self._owned.callback(runner.close)
        return runner

    def upload(self, buffers: Buffers) -> dict[str, Array]:
        """Return arrays here with these values."""
        if self.device.is_host:
            return dict(buffers)
        arrays = {}
        for name, buffer in buffers.items():
            block = self.device.allocate(buffer.nbytes)
            self._owned.callback(block.close)
            arrays[name] = self.device.array(block, 0, buffer.shape, buffer.dtype.name)
        self.write(arrays, buffers)
        return arrays

    def write(self, arrays: Mapping[str, Array], buffers: Buffers) -> None:
        """Copy values into arrays here."""
        self._copy(arrays, buffers, Place._write_one)

    def read(self, arrays: Mapping[str, Array], buffers: Buffers) -> None:
        """Copy values out of arrays here, when what was enqueued has ended."""
        self._copy(arrays, buffers, Place._read_one)

    def run(self, runner: Runner, buffers: Buffers) -> None:
        """Run a graph once, on arrays here; the outputs come back."""
        arrays = self.upload(buffers)
        runner.bind(arrays)()
        self.read(arrays, buffers)

    def close(self) -> None:
        self.device.synchronize()
        self._owned.close()

    def _copy(
        self,
        arrays: Mapping[str, Array],
        buffers: Buffers,
        copy_one: "Callable[[Place, Array, NDArray[Any], NDArray[Any]], None]",
    ) -> None:
        for name, buffer in buffers.items():
            if arrays[name] is not buffer:
                block = self.device.allocate_host(buffer.nbytes)
                staged = self.device.array(block, 0, buffer.shape, buffer.dtype.name)
                assert isinstance(staged, np.ndarray)
                copy_one(self, arrays[name], buffer, staged)
                block.close()

    def _write_one(self, array: Array, buffer: NDArray[Any], staged: NDArray[Any]) -> None:
        np.copyto(staged, buffer)
        self.device.copy(array, staged)
        self.device.synchronize()

    def _read_one(self, array: Array, buffer: NDArray[Any], staged: NDArray[Any]) -> None:
        self.device.copy(staged, array)
        self.device.synchronize()
        np.copyto(buffer, staged)
