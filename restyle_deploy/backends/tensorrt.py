"""TensorRT and TensorRT for RTX: one backend for both libraries, whose Python modules have nearly the same interface.

TensorRT builds on the GPU that will run the engine. TensorRT for RTX builds anywhere, for one or several kinds of GPU,
and finishes on the device when an engine is loaded; what that took is kept beside the engine.
"""

import importlib
import logging
import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from restyle_deploy.backends.base import (
    DEFAULT_REQUEST,
    WITHOUT_PLUGINS,
    BuildRequest,
    BuildTarget,
    EngineOptions,
    RunnerOptions,
    refuse_engine_options,
)
from restyle_deploy.backends.cuda_devices import current_device, queue_of
from restyle_deploy.backends.tensorrt_library import (
    AMPERE,
    AMPERE_AND_NEWER,
    DEFAULT_COMPUTE_CAPABILITIES,
    TENSORRT,
    TENSORRT_RTX,
    TURING,
    Library,
    batches_of,
    check_precision,
    check_processor,
    describe_gpu,
    describe_library,
    list_targets,
    named_processors,
    number_of,
)
from restyle_deploy.engines import join_processors
from restyle_deploy.errors import BackendUnavailableError, BuildError
from restyle_deploy.runtime.device import find_devices, find_name, find_processor
from restyle_deploy.tensors import TensorSpec

LOGGER = logging.getLogger(__name__)
# That engines are built for on a machine without a GPU.
_DEVICE_WITHOUT_GPU = "cuda:0"


def tensorrt() -> "TensorRtBackend":
    """Return the backend on TensorRT; raise `ModuleNotFoundError` where that is not installed."""
    return TensorRtBackend(TENSORRT, importlib.import_module(TENSORRT.module))


def tensorrt_rtx() -> "TensorRtBackend":
    """Return the backend on TensorRT for RTX; raise `ModuleNotFoundError` where that is not installed."""
    return TensorRtBackend(TENSORRT_RTX, importlib.import_module(TENSORRT_RTX.module))


class TensorRtBackend:
    """Satisfies `Backend`, on one of the two libraries."""

    ENGINE_SUFFIX = ".engine"
    ENGINE_BATCH: int | None = None

    def __init__(self, library: Library, module: Any) -> None:
        """Take the library and its module; nothing is loaded or asked yet."""
        self._library, self._trt = library, module
        self.ENGINE_OPTIONS = library.options

    def devices(self) -> tuple[str, ...]:
        """Return `cuda:0` and so on; none without a driver, or without cuda-core."""
        return find_devices()[0]

    def library_versions(self) -> Mapping[str, str]:
        """Return the version of the library."""
        return {self._library.module: self._trt.__version__}

    def check_options(self, options: RunnerOptions) -> None:
        """Raise `BackendUnavailableError` unless there is such a GPU, and it has the precision."""
        check_precision(self._library, options.precision)
        devices, reason = find_devices()
        if options.device not in devices:
            available = ", ".join(devices) or f"none ({reason})"
            raise BackendUnavailableError(
                f"backend {self._library.backend}: device {options.device!r} cannot run here; available: {available}"
            )
        check_processor(self._library, options.precision, find_processor(options.device))

    def processors(self, device: str) -> tuple[str, ...]:
        """Return the GPU's compute capability, "sm_89" style; of TensorRT its model, and a range that it is in.

        What TensorRT has measured on one model is no measure for another of the same compute capability. TensorRT for
        RTX measures nothing until an engine is loaded.
        """
        processor = find_processor(device)
        if self._library.builds_anywhere:
            return (processor,)
        model = describe_gpu(find_name(device), processor)
        return (model, AMPERE_AND_NEWER) if number_of(processor) >= AMPERE else (model,)

    def plugin_hash(self) -> str | None:
        """Return the hash of our kernels' sources; None where the library takes no plugins."""
        return self._kernels(is_wanted=True)[1]

    def check_build(self, options: RunnerOptions, engine: EngineOptions) -> BuildTarget:
        """Find out what engines of these options are for; see `Backend.check_build`.

        Raises:
            BackendUnavailableError: see there; TensorRT for RTX needs no device, but strips weights on one only, and
                a GPU that it cannot build for needs others to be named.
            ValueError: an option that the library lacks, options that contradict each other, batches that are not in
                order, or a compute capability that it does not build for.
        """
        refuse_engine_options(self._library.backend, engine, self.ENGINE_OPTIONS)
        if engine.stripped and engine.version_compatible:
            raise ValueError(
                f"backend {self._library.backend}: --stripped contradicts --version-compatible: a version-compatible "
                "engine brings its own runtime, which cannot put weights back; leave out one of both"
            )
        batches = batches_of(engine)
        processors, refusal = self._targets(options, engine)
        if engine.stripped and TURING in processors and len(processors) > 1:
            raise ValueError(
                f"backend {self._library.backend}: --stripped contradicts {TURING} beside other GPUs: weights have "
                "other shapes there, and opening the engine puts them back by the GPU at hand; leave out one of both"
            )
        route, plugin_hash = self._kernels(is_wanted=not engine.no_plugins, wanted=options.plugin_route)
        return BuildTarget(
            processor=self._processor_of_record(options.device, processors),
            refusal=refusal,
            has_kernels=route != WITHOUT_PLUGINS,
            facts={
                "plugin_route": route,
                "plugin_hash": plugin_hash,
                "profile": dict(zip(("min", "opt", "max"), batches, strict=True)),
                "compute_capability": list(processors),
                "hardware_compatibility": engine.hardware_compatible,
                "version_compatible": engine.version_compatible,
                "weights": "stripped" if engine.stripped else "full",
                "optimization_level": engine.optimization_level,
                "workspace_bytes": engine.workspace_bytes,
            },
        )

    def check_graph(self, graph: Path, options: RunnerOptions, request: BuildRequest) -> Mapping[str, Any]:
        """Parse a graph and let the library judge it; return the number of its layers."""
        with _work_on(options) as folder:
            network = self._network(graph, folder, options, request)
            network.check()
            return {"layers": len(network.layers())}

    def build(
        self, graph: Path, engine: Path, options: RunnerOptions, request: BuildRequest = DEFAULT_REQUEST
    ) -> Mapping[str, Any]:
        """Build an engine and write it, with `<stem>.layers.json` beside it; see `Backend.build`."""
        from restyle_deploy.backends.tensorrt_layers import layers_of_engine, write_layers

        began = time.perf_counter()
        with _work_on(options) as folder:
            network = self._network(graph, folder, options, request)
            plan = network.build()
            engine.write_bytes(memoryview(plan))
            source, layers = "engine", network.built_layers()
            runs_here = self._targets(options, request.engine)[1] is None
            if not layers and runs_here and not request.engine.stripped:
                try:
                    layers = layers_of_engine(self._trt, plan, host_code_allowed=request.engine.version_compatible)
                except BuildError as error:  # the layers are for people: they cost no engine
                    LOGGER.warning("%s: its layers are listed as they were parsed: %s", engine.name, error)
            if not layers:
                source, layers = "network", network.layers()
        write_layers(engine, source, layers)
        return {"layers": len(layers), "layers_of": source, "seconds": round(time.perf_counter() - began, 1)}

    def load(
        self,
        file: Path,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        options: RunnerOptions,
        weights: Path | None = None,
    ) -> Any:
        """Load an engine, or build an ONNX file in memory (minutes) and load that; see `Backend.load`."""
        from restyle_deploy.backends.tensorrt_runner import TensorRtRunner, load_engine

        self.check_options(options)
        queue = queue_of(options)
        if (options.plugin_route or self._kernels(is_wanted=True)[0]) == "jit":
            _plugins().register_plugins(self._trt, "jit")
        with _work_on(options) as folder:
            typed = None
            if weights is not None:
                here = self.processors(options.device)
                typed = self._typed_graph(weights, folder, options, DEFAULT_REQUEST.engine, processors=here)
            if file.suffix == ".onnx":
                plan: Any = self._build_exported(file, folder, options)
            else:
                plan = _read(file, self._trt)
            engine = load_engine(self._trt, plan, options, name=file.name, weights=typed)
        cache = file.with_suffix(".runtime.cache") if self._library.builds_anywhere and file.suffix != ".onnx" else None
        return TensorRtRunner(engine, inputs, outputs, device=options.device, queue=queue, cache=cache)

    def _build_exported(self, graph: Path, folder: Path, options: RunnerOptions) -> Any:
        """Return the serialised engine of an exported graph, for whoever leaves built ones aside."""
        try:
            return self._network(graph, folder, options, DEFAULT_REQUEST).build()
        except BuildError as error:
            if options.precision != "bf16":
                raise
            raise BuildError(
                f"{error}; as exported, a generator has transposed convolutions, which TensorRT does not take of "
                "bfloat16 maps, and a built engine has none: leave out --plain (plain=True), after restyle-deploy "
                f"build BUNDLE --backend {self._library.backend} --precision bf16, or use --precision fp16"
            ) from error

    def _network(self, graph: Path, folder: Path, options: RunnerOptions, request: BuildRequest) -> Any:
        """Return the network of an ONNX file, typed by the precision; `folder` takes a copy with weights."""
        from restyle_deploy.backends.tensorrt_network import Network, NetworkOptions

        processors, _ = self._targets(options, request.engine)
        timing_cache = None
        if request.cache is not None and not self._library.builds_anywhere:
            gpu = re.sub(r"[^A-Za-z0-9]+", "-", find_name(options.device)).strip("-")
            timing_cache = request.cache / f"timing-{self._library.module}-{self._trt.__version__}-{gpu}.cache"
        network_options = NetworkOptions(
            batches=batches_of(request.engine),
            engine=request.engine,
            tf32=options.precision == "tf32",
            processors=processors if self._library.builds_anywhere else (),
            timing_cache=timing_cache,
        )
        typed = self._typed_graph(graph, folder, options, request.engine, processors=processors)
        return Network(self._trt, typed, network_options, name=graph.name, progress=request.progress)

    def _typed_graph(
        self, graph: Path, folder: Path, options: RunnerOptions, engine: EngineOptions, *, processors: tuple[str, ...]
    ) -> Path:
        from restyle_deploy.backends.tensorrt_network import write_typed_graph

        route = options.plugin_route or self._kernels(is_wanted=not engine.no_plugins)[0]
        arch = None
        if route != WITHOUT_PLUGINS:
            _plugins().register_plugins(self._trt, route)
            arch = f"sm_{AMPERE}" if engine.hardware_compatible else find_processor(options.device)
        most = batches_of(engine)[2]
        return write_typed_graph(
            graph,
            folder,
            precision=options.precision,
            route=route,
            arch=arch,
            max_batch=most,
            is_for_turing=self._library.builds_anywhere and TURING in processors,
        )

    def _kernels(self, *, is_wanted: bool, wanted: str | None = None) -> tuple[str, str | None]:
        """Return how our kernels come into engines, and their hash; "functions" and None where they do not.

        Raises:
            BackendUnavailableError: they do not come in the way that is wanted; None is the best one.
        """
        best, reason = _plugins().choose_route(self._trt) if is_wanted else (WITHOUT_PLUGINS, "")
        route = wanted or best
        if best == WITHOUT_PLUGINS != route or (route == "aot" != best):
            raise BackendUnavailableError(f"backend {self._library.backend}: no plugins by the route {route}: {reason}")
        if route == WITHOUT_PLUGINS:
            return route, None
        from restyle_deploy.ops.compiler import kernel_source_hash

        return route, kernel_source_hash()

    def _targets(self, options: RunnerOptions, engine: EngineOptions) -> tuple[tuple[str, ...], str | None]:
        """Return the processors that an engine is for, and why it cannot run here, if it cannot."""
        if not self._library.builds_anywhere:
            self.check_options(options)
            here = find_processor(options.device)
            if engine.hardware_compatible and number_of(here) < AMPERE:
                raise BackendUnavailableError(
                    f"backend tensorrt: --hardware-compatible needs sm_{AMPERE}, this is {here}"
                )
            return ((AMPERE_AND_NEWER,) if engine.hardware_compatible else (here,)), None
        check_precision(self._library, options.precision)
        self._check_device_of_target(options.device)
        processors = self._named_processors(options.device, engine)
        for processor in processors:
            check_processor(self._library, options.precision, processor)
        return processors, self._refusal(options, engine, processors)

    def _processor_of_record(self, device: str, processors: tuple[str, ...]) -> str:
        """Return what engines for some processors have in their record."""
        is_for_one_model = not self._library.builds_anywhere and AMPERE_AND_NEWER not in processors
        return describe_gpu(find_name(device), processors[0]) if is_for_one_model else join_processors(processors)

    def _check_device_of_target(self, device: str) -> None:
        """Raise `BackendUnavailableError` unless there is such a GPU or, where there is none, may be."""
        devices, _ = find_devices()
        if device not in (devices or (_DEVICE_WITHOUT_GPU,)):
            available = ", ".join(devices) or f"none, but engines can be built for {_DEVICE_WITHOUT_GPU}"
            raise BackendUnavailableError(
                f"backend {self._library.backend}: device {device!r} cannot run here; available: {available}"
            )

    def _named_processors(self, device: str, engine: EngineOptions) -> tuple[str, ...]:
        """Return what engines are to be for: what is asked for, else the GPU, else the usual ones."""
        if engine.compute_capabilities or not find_devices()[0]:
            capabilities = engine.compute_capabilities or DEFAULT_COMPUTE_CAPABILITIES
            return named_processors(self._library, self._trt, capabilities)
        here, targets = find_processor(device), list_targets(self._trt)
        if here not in targets.values():
            raise BackendUnavailableError(
                f"backend {self._library.backend}: {describe_library(self._trt)} cannot build for this GPU, {here}; "
                f"for others it can: --compute-capability with {', '.join(targets)}"
            )
        return (here,)

    def _refusal(self, options: RunnerOptions, engine: EngineOptions, processors: tuple[str, ...]) -> str | None:
        devices, reason = find_devices()
        if not devices and engine.stripped:
            raise BackendUnavailableError(
                f"backend {self._library.backend}: --stripped needs a GPU to build on, which compiles how weights are "
                f"put back; there is none here: {reason}"
            )
        if not devices:
            return f"no GPU can run the engine here: {reason}"
        here = find_processor(options.device)
        return None if here in processors else f"the engine is for {join_processors(processors)}, this GPU is {here}"


@contextmanager
def _work_on(options: RunnerOptions) -> Iterator[Path]:
    """Yield a folder for so long, with the device, where there is one, as the calling thread's."""
    is_here = options.device in find_devices()[0]
    with (
        tempfile.TemporaryDirectory(prefix="restyle-deploy-", ignore_cleanup_errors=True) as folder,
        current_device(options.device) if is_here else nullcontext(),
    ):
        yield Path(folder)


def _plugins() -> Any:
    return importlib.import_module("restyle_deploy.backends.tensorrt_plugins")


def _read(file: Path, trt: Any) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise BuildError(f"{describe_library(trt)} refuses {file.name}: {error.strerror}") from error
