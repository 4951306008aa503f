"""Single graphs run on a device outside of a session: to time them, or to see what they give."""

import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from restyle_deploy.backends.base import Backend, Runner, RunnerOptions
from restyle_deploy.device_array import Array
from restyle_deploy.errors import DeviceError
from restyle_deploy.runtime.base import Device
from restyle_deploy.runtime.opening import on_device, open_device
from restyle_deploy.tensors import TensorSpec

LOGGER = logging.getLogger(__name__)


class Workbench:
    """An opened device, graphs loaded on it, and buffers that they are bound to. It owns them all.

    All graphs are loaded before the first of them runs, as they share working memory.

    Attributes:
        options: how graphs are run, on the device's queue.
        runs_per_call: how often a graph runs when what `bind` returns is called again.
    """

    def __init__(self, options: RunnerOptions, *, gpu_runs: int = 1) -> None:
        """Open the device.

        Args:
            options: how graphs are run; their queue is the device's.
            gpu_runs: `runs_per_call` on a GPU, where else launching and waiting would be a part of a short run's time.
        Raises:
            BackendUnavailableError: there is no such device.
        """
        self._owned = ExitStack()
        self._device: Device = open_device(options.device)
        self._owned.callback(self._device.close)
        self.options = on_device(options, self._device)
        self.runs_per_call = 1 if self._device.is_host else gpu_runs

    def load(
        self,
        backend: Backend,
        file: Path,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        weights: Path | None = None,
    ) -> Runner:
        """Load a graph; see `Backend.load`."""
        runner = backend.load(file, inputs, outputs, self.options, weights)
        self._owned.callback(runner.close)
        return runner

    def bind(
        self, runner: Runner, outputs: tuple[TensorSpec, ...], values: Mapping[str, NDArray[Any]]
    ) -> "WorkbenchRun":
        """Bind a loaded graph to buffers of its own.

        Args:
            runner: from `load`.
            outputs: of the graph.
            values: its inputs, by name; copied.
        """
        batch = len(next(iter(values.values())))
        buffers = {name: self._upload(value) for name, value in values.items()}
        for spec in outputs:
            buffers[spec.name] = self._allocate(spec.concrete_shape(batch), spec.dtype)
        run = WorkbenchRun(self._device, runner, buffers, runs=self.runs_per_call)
        self._owned.callback(run.close)
        return run

    def close(self) -> None:
        """Close what it owns, the last one first; safe to call twice."""
        self._owned.close()

    def __enter__(self) -> "Workbench":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _allocate(self, shape: tuple[int, ...], dtype: str) -> Array:
        block = self._device.allocate(int(np.prod(shape)) * np.dtype(dtype).itemsize)
        self._owned.callback(block.close)
        return self._device.array(block, 0, shape, dtype)

    def _upload(self, value: NDArray[Any]) -> Array:
        array = self._allocate(value.shape, value.dtype.name)
        with ExitStack() as staging:
            staged = _stage(self._device, array, staging)
            np.copyto(staged, value)
            self._device.copy(array, staged)
            self._device.synchronize()
        return array


class WorkbenchRun:
    """A bound graph."""

    def __init__(self, device: Device, runner: Runner, buffers: Mapping[str, Array], *, runs: int) -> None:
        self._device, self._runner, self._buffers, self._runs = device, runner, buffers, runs
        self._run = runner.bind(buffers)
        self._again: Callable[[], None] | None = None
        self._owned = ExitStack()

    def __call__(self) -> None:
        """Run it, and return when the results are complete.

        The first call runs it once, and later ones on a GPU `Workbench.runs_per_call` times: as one CUDA graph where a
        run can be captured, else one by one.
        """
        if self._again is not None:
            self._again()
        else:
            self._run()
        self._device.synchronize()
        if self._again is None:
            self._again = self._prepare()

    def result(self, name: str) -> NDArray[Any]:
        """Return a copy of an output."""
        with ExitStack() as staging:
            staged = _stage(self._device, self._buffers[name], staging)
            self._device.copy(staged, self._buffers[name])
            self._device.synchronize()
            return staged.copy()

    def close(self) -> None:
        """Wait, and release what was captured; safe to call twice."""
        self._device.synchronize()
        self._owned.close()

    def _prepare(self) -> Callable[[], None]:
        """Return what later calls do; not before the first run, which resolves what is compiled late."""
        if self._device.is_host:
            return self._run
        if self._runner.is_capturable:
            try:
                replay = self._device.capture(self._enqueue)
            except DeviceError as error:
                LOGGER.info("a run is not captured: %s", error)
            else:
                self._owned.callback(replay.close)
                return replay
        return self._enqueue

    def _enqueue(self) -> None:
        for _ in range(self._runs):
            self._run()


def _stage(device: Device, like: Array, staging: ExitStack) -> NDArray[Any]:
    """Return host memory that the device copies from and to, of an array's shape and dtype, until `staging` closes."""
    block = device.allocate_host(like.nbytes)
    staging.callback(block.close)
    staged = device.array(block, 0, like.shape, like.dtype.name)
    assert isinstance(staged, np.ndarray)
    return staged
