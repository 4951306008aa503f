"""Running a TensorRT engine on host buffers: copied to the GPU, run, and copied back, on one stream."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cuda.core import Buffer, Device, Stream
from numpy.typing import NDArray

from restyle_deploy.backends.base import RunnerOptions, check_buffers
from restyle_deploy.backends.tensorrt_device import index_of
from restyle_deploy.backends.tensorrt_library import create_logger, describe_errors, describe_library
from restyle_deploy.errors import BuildError, ShapeError
from restyle_deploy.files import replace_when_complete
from restyle_deploy.tensors import TensorSpec

LOGGER = logging.getLogger(__name__)


class LoadedEngine:
    """A deserialised engine and what has to live as long as it does."""

    def __init__(self, trt: Any, logger: Any, runtime: Any, engine: Any) -> None:
        self.trt, self.logger, self.runtime, self.engine = trt, logger, runtime, engine

    def batches(self, name: str) -> tuple[int, int]:
        """Return the fewest and the most images of one run, by the profile of an input."""
        least, _, most = self.engine.get_tensor_profile_shape(name, 0)
        return int(least[0]), int(most[0])


def load_engine(trt: Any, plan: Any, options: RunnerOptions, *, name: str, weights: Path | None) -> LoadedEngine:
    """Deserialise an engine on a device.

    Args:
        trt: `tensorrt` or `tensorrt_rtx`.
        plan: the serialised engine, a buffer.
        options: the device; and whether code in the engine may run on the host.
        name: of the file, for messages.
        weights: the typed graph that a stripped engine was built from; None for one that has its weights.
    Raises:
        BuildError: the library refuses the engine, or the weights do not fit it.
    """
    Device(index_of(options.device)).set_current()
    logger = create_logger(trt)
    runtime = trt.Runtime(logger)
    runtime.engine_host_code_allowed = options.host_code_allowed
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise BuildError(f"{describe_library(trt)} refuses {name}: {describe_errors(logger.errors)}")
    loaded = LoadedEngine(trt, logger, runtime, engine)
    if weights is not None:
        _refit(loaded, weights, name=name)
    return loaded


def _refit(loaded: LoadedEngine, weights: Path, *, name: str) -> None:
    trt, logger = loaded.trt, loaded.logger
    refitter = trt.Refitter(loaded.engine, logger)
    parser = trt.OnnxParserRefitter(refitter, logger)
    fits = parser.refit_from_file(str(weights)) and not refitter.get_missing_weights() and refitter.refit_cuda_engine()
    if not fits:
        missing = refitter.get_missing_weights()
        reason = f"no weights for {', '.join(missing[:3])}" if missing else describe_errors(logger.errors)
        raise BuildError(f"{describe_library(trt)} cannot put the weights back into {name}: {reason}")


class TensorRtRunner:
    """An engine loaded on a GPU; satisfies `Runner`.

    All that is bound shares one execution context and one stream: a session runs one graph at a time.
    """

    def __init__(
        self,
        loaded: LoadedEngine,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        *,
        device: str,
        cache: Path | None,
    ) -> None:
        """Create the execution context.

        Args:
            loaded: owned by the runner from now on.
            inputs, outputs: its border.
            device: that it was loaded on.
            cache: the file that keeps what TensorRT for RTX compiles on the device; None for TensorRT.
        Raises:
            BuildError: the context cannot be created, for want of memory mostly.
        """
        self._inputs, self._outputs = inputs, outputs
        self._device = Device(index_of(device))
        self._device.set_current()
        self._loaded: LoadedEngine | None = loaded
        self._cache = _RuntimeCache(loaded.engine, cache) if cache is not None else None
        settings = (self._cache.config,) if self._cache is not None else ()
        self._context: Any = loaded.engine.create_execution_context(*settings)
        if self._context is None:
            reason = describe_errors(loaded.logger.errors)
            raise BuildError(f"{describe_library(loaded.trt)} cannot create an execution context: {reason}")
        self._stream = self._device.create_stream()

    def bind(self, buffers: Mapping[str, NDArray[Any]]) -> Callable[[], None]:
        """Bind host buffers, and allocate as much on the GPU; see `Runner.bind`.

        Raises:
            ShapeError: a buffer does not fit, or the batch lies outside the engine's profile.
        """
        if self._loaded is None:
            raise ValueError("the runner is closed")
        check_buffers(buffers, self._inputs + self._outputs)
        least, most = self._loaded.batches(self._inputs[0].name)
        batch = len(buffers[self._inputs[0].name])
        if not least <= batch <= most:
            raise ShapeError(
                f"a run of {batch} images: the engine was built for {least} to {most}; build one for other batches: "
                f"restyle-deploy build, with --min-batch or --max-batch"
            )
        self._device.set_current()
        return _BoundRun(
            self._loaded, self._context, buffers, device=self._device, stream=self._stream, inputs=self._inputs
        )

    def close(self) -> None:
        """Release the engine, and keep what the device compiled for the next time; safe to call twice."""
        if self._loaded is None:
            return
        self._device.set_current()
        if self._cache is not None:
            self._cache.save()
        self._stream.sync()
        self._context, self._cache, self._loaded = None, None, None
        self._stream.close()


class _BoundRun:
    """A run on fixed host buffers. It owns as much memory on the GPU."""

    def __init__(
        self,
        loaded: LoadedEngine,
        context: Any,
        buffers: Mapping[str, NDArray[Any]],
        *,
        device: Device,
        stream: Stream,
        inputs: tuple[TensorSpec, ...],
    ) -> None:
        self._loaded, self._context, self._stream, self._device = loaded, context, stream, device
        self._arrays = dict(buffers)
        self._host = {
            name: Buffer.from_handle(array.ctypes.data, array.nbytes, owner=array) for name, array in buffers.items()
        }
        self._on_device = {name: device.allocate(array.nbytes, stream=stream) for name, array in buffers.items()}
        self._input_names = tuple(spec.name for spec in inputs)
        self._output_names = tuple(name for name in buffers if name not in self._input_names)

    def __call__(self) -> None:
        self._device.set_current()  # a session's threads take turns
        for name, memory in self._on_device.items():
            self._require(self._context.set_tensor_address(name, int(memory.handle)), f"take the address of {name}")
        for name in self._input_names:
            shape = self._arrays[name].shape
            self._require(self._context.set_input_shape(name, shape), f"take {list(shape)} for {name}")
            self._on_device[name].copy_from(self._host[name], stream=self._stream)
        self._require(self._context.execute_async_v3(int(self._stream.handle)), "run the engine")
        for name in self._output_names:
            self._on_device[name].copy_to(self._host[name], stream=self._stream)
        self._stream.sync()

    def _require(self, done: bool, what: str) -> None:
        """Raise `BuildError` with the last error that the library has logged, unless it has done what it was told."""
        if not done:
            reason = describe_errors(self._loaded.logger.errors[-1:])
            raise BuildError(f"{describe_library(self._loaded.trt)} cannot {what}: {reason}")


class _RuntimeCache:
    """What TensorRT for RTX compiles for a device when a context is created or first runs, kept in a file."""

    def __init__(self, engine: Any, path: Path) -> None:
        self._path = path
        self.config = engine.create_runtime_config()
        self._cache = self.config.create_runtime_cache()
        self._kept = path.read_bytes() if path.is_file() else b""
        if self._kept and not self._cache.deserialize(self._kept):
            LOGGER.info("%s: of another device or version; it is made anew", path)
        self.config.set_runtime_cache(self._cache)

    def save(self) -> None:
        """Write the file if there is more to keep than it has; a bundle that cannot be written stays as it is."""
        content = bytes(memoryview(self._cache.serialize()))
        if content == self._kept:
            return
        try:
            with replace_when_complete(self._path) as temporary:
                temporary.write_bytes(content)
        except OSError as error:
            LOGGER.warning("%s: cannot be written (%s); the next opening compiles again", self._path, error)
