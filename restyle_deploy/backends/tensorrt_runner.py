"""Running a TensorRT engine on arrays of the GPU, on the session's stream: nothing is copied, and nothing waits."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from restyle_deploy.backends.base import Queue, RunnerOptions, check_buffers
from restyle_deploy.backends.cuda_devices import device_arrays, device_error
from restyle_deploy.backends.tensorrt_interrupts import Interrupts
from restyle_deploy.backends.tensorrt_library import (
    Messages,
    construct,
    create_logger,
    describe_errors,
    describe_library,
)
from restyle_deploy.device_array import Array, DeviceArray
from restyle_deploy.errors import BuildError, ShapeError
from restyle_deploy.files import replace_when_complete
from restyle_deploy.runtime.device import current_context, index_of, primary_context, synchronize_stream
from restyle_deploy.tensors import TensorSpec

LOGGER = logging.getLogger(__name__)


class LoadedEngine:
    """A deserialised engine and what has to live as long as it does."""

    def __init__(self, trt: Any, messages: Messages, runtime: Any, engine: Any) -> None:
        self.trt, self.messages, self.runtime, self.engine = trt, messages, runtime, engine

    def batches(self, name: str) -> tuple[int, int]:
        """Return the fewest and the most images of one run, by the profile of an input."""
        least, _, most = self.engine.get_tensor_profile_shape(name, 0)
        return int(least[0]), int(most[0])

    def require(self, done: Any, what: str) -> None:
        """Raise `BuildError` with the last error that the library has logged, unless it has done what it was told."""
        if not done:
            reason = describe_errors(self.messages.errors[-1:])
            raise BuildError(f"{describe_library(self.trt)} cannot {what}: {reason}")

    def require_of_device(self, done: Any, what: str) -> None:
        """Raise `DeviceError` likewise: what is refused when the engine is used is mostly the GPU's memory."""
        if not done:
            raise device_error(describe_library(self.trt), describe_errors(self.messages.errors[-1:]), what=what)


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
        KeyboardInterrupt: there was a Ctrl-C meanwhile.
    """
    with Interrupts().put_off(), current_context(primary_context(index_of(options.device))):
        messages = Messages()
        logger = create_logger(trt, messages, warning_level=logging.WARNING)  # such as: of another model of GPU
        runtime = construct(trt, messages, trt.Runtime, logger)
        runtime.engine_host_code_allowed = options.host_code_allowed
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise BuildError(f"{describe_library(trt)} refuses {name}: {describe_errors(messages.errors)}")
        loaded = LoadedEngine(trt, messages, runtime, engine)
        if weights is not None:
            _refit(loaded, weights, logger, name=name)
    return loaded


def _refit(loaded: LoadedEngine, weights: Path, logger: Any, *, name: str) -> None:
    """Put all weights back; raise `BuildError` if one is missing.

    That none is missing is what the parser says, which counts those that it gives against all that the engine names:
    TensorRT for RTX may keep silent about missing ones (pytorch/TensorRT, pull request 4198). Of an engine that names
    none the parser says so too.
    """
    trt, errors = loaded.trt, loaded.messages.errors
    refitter = construct(trt, loaded.messages, trt.Refitter, loaded.engine, logger)
    parser = construct(trt, loaded.messages, trt.OnnxParserRefitter, refitter, logger)
    if not refitter.get_all_weights():
        reason = "it names none that it takes"
    elif not parser.refit_from_file(str(weights)):
        told = [parser.get_error(index).desc() for index in range(parser.num_errors)]
        reason = describe_errors([*told, *errors])
    elif missing := refitter.get_missing_weights():
        reason = f"no weights for {', '.join(missing[:3])}"
    elif not refitter.refit_cuda_engine():
        reason = describe_errors(errors)
    else:
        return
    raise BuildError(f"{describe_library(trt)} cannot put the weights back into {name}: {reason}")


class TensorRtRunner:
    """An engine loaded on a GPU; satisfies `Runner`.

    There is one execution context for each batch size that is bound: a context that changes its shapes would spoil the
    CUDA graphs that its runs were captured in. Their activations lie in the queue's working memory, which all contexts
    of all graphs share, as a session runs one graph after the other.

    Attributes:
        is_capturable: false once a run has shown that the library has to ask for memory in between.
    """

    def __init__(
        self,
        loaded: LoadedEngine,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        *,
        device: str,
        queue: Queue,
        cache: Path | None,
    ) -> None:
        """Ask the queue for as much working memory as a run takes.

        Args:
            loaded: owned by the runner from now on.
            inputs, outputs: its border.
            device: that it was loaded on.
            queue: that it runs on.
            cache: the file that keeps what TensorRT for RTX compiles on the device; None for no such file.
        """
        self.is_capturable = True
        self._inputs, self._outputs = inputs, outputs
        self._device, self._cuda = device, primary_context(index_of(device))
        self._queue = queue
        with current_context(self._cuda):
            self._settings: _ContextSettings | None = _ContextSettings(loaded, cache)
        self._contexts: WeakValueDictionary[int, _Context] = WeakValueDictionary()
        queue.reserve_scratch(int(loaded.engine.device_memory_size_v2))

    def bind(self, buffers: Mapping[str, Array]) -> Callable[[], None]:
        """Bind arrays of the GPU; see `Runner.bind`. TensorRT for RTX compiles for a new batch size (seconds).

        Raises:
            ShapeError: a buffer does not fit, or the batch lies outside the engine's profile.
            BuildError: the library refuses the shape.
            DeviceError: there is no execution context to be had, for want of memory mostly.
        """
        if self._settings is None:
            raise ValueError("the runner is closed")
        check_buffers(buffers, self._inputs + self._outputs)
        least, most = self._settings.loaded.batches(self._inputs[0].name)
        batch = buffers[self._inputs[0].name].shape[0]
        if not least <= batch <= most:
            raise ShapeError(
                f"a run of {batch} images: the engine was built for {least} to {most}; build one for other batches: "
                f"restyle-deploy build, with --min-batch or --max-batch"
            )
        arrays = device_arrays(buffers, self._device)
        context = self._contexts.get(batch)
        if context is None:
            shapes = {spec.name: spec.concrete_shape(batch) for spec in self._inputs}
            with current_context(self._cuda):
                context = self._contexts[batch] = _Context(self._settings, shapes, queue=self._queue)
        return _BoundRun(self, context, arrays, cuda=self._cuda)

    def close(self) -> None:
        """Wait, release the engine, and keep what the device compiled for the next time; safe to call twice."""
        if self._settings is None:
            return
        settings, self._settings = self._settings, None  # whatever fails below, it is closed
        with current_context(self._cuda):
            synchronize_stream(self._queue.stream)
            settings.save()
            del settings  # the engine goes while its device is current


class _Context:
    """An execution context for one batch size, in the queue's working memory."""

    def __init__(self, settings: "_ContextSettings", shapes: Mapping[str, tuple[int, ...]], *, queue: Queue) -> None:
        self._loaded, self._queue = settings.loaded, queue
        self._context = settings.create_context()
        for name, shape in shapes.items():
            self._loaded.require(self._context.set_input_shape(name, shape), f"take {list(shape)} for {name}")
        self._has_memory = False
        self._bound: object = None

    def enqueue(self, arrays: Mapping[str, DeviceArray], run: object) -> None:
        """Enqueue a run on its arrays; their addresses are set unless the same run was the last one here.

        Args:
            arrays: by name.
            run: tells runs apart.
        Raises:
            DeviceError: the library cannot run the engine, or refuses an address.
        """
        if not self._has_memory:
            # At the first run: by now all graphs that share the memory are loaded.
            size = int(self._loaded.engine.device_memory_size_v2)
            if size:
                self._context.set_device_memory(self._queue.scratch_address(), size)
            self._has_memory = True
        if self._bound is not run:
            self._bound = None
            for name, array in arrays.items():
                done = self._context.set_tensor_address(name, array.address)
                self._loaded.require_of_device(done, f"take the address of {name}")
            self._bound = run
        self._loaded.require_of_device(self._context.execute_async_v3(self._queue.stream), "run the engine")

    def is_capturable(self) -> bool:
        """Whether the library says that a stream's capture can record its runs; those that do not tell can."""
        ask = getattr(self._context, "is_stream_capturable", None)
        return ask is None or bool(ask(self._queue.stream))


class _BoundRun:
    """A run on fixed arrays, which it keeps alive, as it does the engine."""

    def __init__(
        self, runner: TensorRtRunner, context: _Context, arrays: Mapping[str, DeviceArray], *, cuda: int
    ) -> None:
        self._runner, self._context, self._arrays, self._cuda = runner, context, arrays, cuda
        self._token = object()
        self._has_run = False

    def __call__(self) -> None:
        with current_context(self._cuda):  # any thread may call, with another device of its own
            self._context.enqueue(self._arrays, self._token)
            if not self._has_run:
                self._has_run = True
                self._runner.is_capturable = self._runner.is_capturable and self._context.is_capturable()


class _ContextSettings:
    """How contexts are made, and what TensorRT for RTX compiles for a device meanwhile, kept in a file."""

    def __init__(self, loaded: LoadedEngine, path: Path | None) -> None:
        trt, self.loaded, self._path = loaded.trt, loaded, path
        self._given = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        self._cache: Any = None
        if not hasattr(trt, "DynamicShapesKernelSpecializationStrategy"):
            return
        config = loaded.engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(self._given)
        # Otherwise a run starts with other kernels, until those for its shapes have been compiled beside it: a captured
        # graph would keep the slow ones, and results would change between two runs.
        config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        self._given = config
        if path is not None:
            self._cache = config.create_runtime_cache()
            self._kept = path.read_bytes() if path.is_file() else b""
            if self._kept and not self._cache.deserialize(self._kept):
                LOGGER.info("%s: of another device or version; it is made anew", path)
            config.set_runtime_cache(self._cache)

    def create_context(self) -> Any:
        """Return a new execution context without memory; raise `DeviceError` if the library refuses."""
        with Interrupts().put_off():
            context = self.loaded.engine.create_execution_context(self._given)
            self.loaded.require_of_device(context is not None, "create an execution context")
        return context

    def save(self) -> None:
        """Write the file if there is more to keep than it has; a bundle that cannot be written stays as it is."""
        if self._cache is None or self._path is None:
            return
        content = bytes(memoryview(self._cache.serialize()))
        if content == self._kept:
            return
        try:
            with replace_when_complete(self._path) as temporary:
                temporary.write_bytes(content)
        except OSError as error:
            LOGGER.warning("%s: cannot be written (%s); the next opening compiles again", self._path, error)
