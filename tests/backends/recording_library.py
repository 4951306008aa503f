"""A stand-in for the module `tensorrt` that builds and loads nothing, and writes down what it is asked for."""

import contextlib
import json
import signal
from types import SimpleNamespace
from typing import Any
from weakref import WeakSet

import numpy as np

from restyle_deploy.backends.tensorrt import TensorRtBackend
from restyle_deploy.backends.tensorrt_library import TENSORRT
from restyle_deploy.device_array import DeviceArray

KEPT, MEASURED = b"what a former build has measured", b"what this build has measured"


class RecordingLibrary:
    """What `tensorrt_network` and `layers_of_engine` take of the module.

    Attributes:
        calls: what was asked for, in order, with arguments.
        cache_fits: whether a timing cache that is not empty is taken.
        cache_is_kept: whether there is a timing cache after a build.
        plan: what a build returns; None for a refusal.
        refusal: the reason that is logged for it.
        engine_is_taken: whether a runtime takes an engine.
        layers: what the inspector tells.
        memory_bytes: that a run of the next engine takes.
        batches: the fewest and the most images of a run.
        interrupted: the call during which there is a Ctrl-C; as the bindings do, it swallows what Python raises.
        refused: the call of an execution context that is refused, `create_execution_context`, or one of a refit.
        weights: the names of those that an engine takes; and those that a refitter says to be missing.
        configs: the builder's, whose attributes are what was set, in order.
        runs_are_capturable: what contexts say of it; None for a library that does not tell.
        contexts: in the order in which they were created, as long as they are alive.
    """

    __version__ = "10.9.0"
    __name__ = "tensorrt"
    QuickPluginCreationRequest = object
    ProfilingVerbosity = SimpleNamespace(DETAILED="detailed")
    BuilderFlag = SimpleNamespace(TF32="tf32", STRIP_PLAN="strip", VERSION_COMPATIBLE="compatible")
    HardwareCompatibilityLevel = SimpleNamespace(AMPERE_PLUS="ampere+")
    MemoryPoolType = SimpleNamespace(WORKSPACE="workspace")
    NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=1)
    LayerInformationFormat = SimpleNamespace(JSON="json")
    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user")
    IProgressMonitor = type("IProgressMonitor", (), {})

    class ILogger:
        Severity = SimpleNamespace(ERROR=1, WARNING=2)

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.cache_fits = self.cache_is_kept = self.engine_is_taken = True
        self.plan: bytes | None = b"plan"
        self.refusal = "no memory is left"
        self.memory_bytes, self.batches = 4096, (1, 8)
        self.refused = self.interrupted = ""
        self.runs_are_capturable: bool | None = None
        self.contexts: WeakSet[RecordingContext] = WeakSet()
        self.layers = json.dumps({"Layers": [{"Name": "decoder.conv/Conv_0"}]})
        self.weights, self.missing = ["decoder.weight"], list[str]()
        self.configs: list[Any] = []
        self._cache = b""

    def note(self, name: str, returned: Any = None) -> Any:
        """Return a function that notes its call and returns this."""

        def noted(*arguments: Any, **_: Any) -> Any:
            self.calls.append((name, *arguments))
            return returned

        return noted

    def named(self, name: str) -> list[list[Any]]:
        """Return the arguments of all calls of a function."""
        return [arguments for called, *arguments in self.calls if called == name]

    def Builder(self, logger: Any) -> Any:
        """Return a builder, whose network is empty."""
        self.calls.append(("Builder",))

        def build(network: Any, config: Any) -> bytes | None:
            self._interrupt("build_serialized_network")
            self.calls.append(("step_complete", config.progress_monitor.step_complete("Building engine", 0)))
            if self.plan is None:
                logger.log(1, self.refusal)
            return self.plan

        return SimpleNamespace(
            create_network=lambda flags: SimpleNamespace(num_layers=0, num_inputs=0),
            create_builder_config=lambda: self._config(logger),
            create_optimization_profile=object,
            build_serialized_network=build,
            is_network_supported=lambda network, config: self._interrupt("is_network_supported"),
        )

    def _interrupt(self, name: str) -> bool:
        if name == self.interrupted:
            with contextlib.suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        return True

    def _config(self, logger: Any) -> Any:
        def attach(cache: bytes, *, ignore_mismatch: bool) -> bool:
            self.calls.append(("set_timing_cache", cache, ignore_mismatch))
            if cache and not self.cache_fits:
                logger.log(1, "the timing cache is of another device")
                return False
            return True

        config = SimpleNamespace(
            set_flag=self.note("set_flag"),
            clear_flag=self.note("clear_flag"),
            set_memory_pool_limit=self.note("set_memory_pool_limit"),
            add_optimization_profile=self.note("add_optimization_profile"),
            create_timing_cache=lambda content: content,
            set_timing_cache=attach,
            get_timing_cache=lambda: SimpleNamespace(serialize=lambda: MEASURED) if self.cache_is_kept else None,
        )
        self.configs.append(config)
        return config

    def OnnxParser(self, network: Any, logger: Any) -> Any:
        """Return a parser that takes any file."""
        return SimpleNamespace(parse_from_file=lambda path: self._interrupt("parse_from_file"))

    def Refitter(self, engine: Any, logger: Any) -> Any:
        """Return what puts weights back."""

        def refit() -> bool:
            self.calls.append(("refit_cuda_engine",))
            if self.refused == "refit_cuda_engine":
                logger.log(1, "the sizes differ")
            return self.refused != "refit_cuda_engine"

        return SimpleNamespace(
            get_all_weights=lambda: self.weights, get_missing_weights=lambda: self.missing, refit_cuda_engine=refit
        )

    def OnnxParserRefitter(self, refitter: Any, logger: Any) -> Any:
        """Return what reads weights from an ONNX file."""

        def read(path: str) -> bool:
            self.calls.append(("refit_from_file", path))
            return self.refused != "refit_from_file"

        error = SimpleNamespace(desc=lambda: "Only successfully refitted 0 weights out of 1")
        count = int(self.refused == "refit_from_file")
        return SimpleNamespace(refit_from_file=read, num_errors=count, get_error=lambda index: error)

    def Runtime(self, logger: Any) -> Any:
        """Return a runtime; what it allows is noted when it takes an engine."""

        def deserialize(plan: bytes) -> Any:
            self.calls.append(("deserialize", runtime.engine_host_code_allowed))
            self._interrupt("deserialize")
            if not self.engine_is_taken:
                logger.log(1, "the engine holds host code")
                return None
            inspector = SimpleNamespace(get_engine_information=lambda form: self.layers)
            return SimpleNamespace(
                create_engine_inspector=lambda: inspector,
                device_memory_size_v2=self.memory_bytes,
                get_tensor_profile_shape=lambda name, profile: [
                    (batch, 2) for batch in (self.batches[0], 1, self.batches[1])
                ],
                create_runtime_config=self._runtime_config,
                create_execution_context=lambda settings: self._context(settings, logger),
            )

        runtime = SimpleNamespace(engine_host_code_allowed=False, deserialize_cuda_engine=deserialize)
        return runtime

    def _context(self, settings: Any, logger: Any) -> Any:
        self.calls.append(("create_execution_context", settings))
        self._interrupt("create_execution_context")
        if self.refused == "create_execution_context":
            logger.log(1, "no memory is left")
            return None
        made = RecordingContext(self, logger)
        self.contexts.add(made)
        return made

    def _runtime_config(self) -> Any:
        cache = SimpleNamespace(deserialize=self.note("deserialize_cache", self.cache_fits), serialize=lambda: MEASURED)
        return SimpleNamespace(
            set_execution_context_allocation_strategy=self.note("allocation"),
            create_runtime_cache=lambda: cache,
            set_runtime_cache=self.note("set_runtime_cache"),
        )


class RecordingContext:
    """An execution context; its calls are noted in the library's, with its number as the first argument."""

    def __init__(self, library: RecordingLibrary, logger: Any) -> None:
        self._library, self._logger = library, logger
        self.number = len(library.named("create_execution_context"))
        if library.runs_are_capturable is not None:
            self.is_stream_capturable = lambda stream: bool(library.runs_are_capturable)

    def _answer(self, name: str, *arguments: Any) -> bool:
        self._library.calls.append((name, self.number, *arguments))
        if name == self._library.refused:
            self._logger.log(1, f"{name}: not so")
        return name != self._library.refused

    def set_device_memory(self, address: int, nbytes: int) -> None:
        self._answer("set_device_memory", address, nbytes)

    def set_tensor_address(self, name: str, address: int) -> bool:
        return self._answer("set_tensor_address", name, address)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        return self._answer("set_input_shape", name, shape)

    def execute_async_v3(self, stream: int) -> bool:
        return self._answer("execute_async_v3", stream)


class RecordingQueue:
    """Satisfies `Queue`.

    Attributes:
        stream: a made-up one.
        reserved: the bytes that were asked for.
        is_placed: whether the address was asked for.
    """

    ADDRESS = 1 << 20

    def __init__(self) -> None:
        self.stream = 77
        self.reserved: list[int] = []
        self.is_placed = False

    def reserve_scratch(self, nbytes: int) -> None:
        assert not self.is_placed, "working memory is asked for after it was placed"
        self.reserved.append(nbytes)

    def scratch_address(self) -> int:
        self.is_placed = True
        return self.ADDRESS


def array_at(address: int, shape: tuple[int, ...] = (1, 2), *, device_index: int = 0) -> DeviceArray:
    """Return a made-up float32 array of a GPU, which nobody may read."""
    return DeviceArray(address=address, shape=shape, dtype=np.dtype(np.float32), device_index=device_index)


def recorded() -> tuple[TensorRtBackend, RecordingLibrary]:
    """Return the backend on such a library."""
    library = RecordingLibrary()
    return TensorRtBackend(TENSORRT, library), library
