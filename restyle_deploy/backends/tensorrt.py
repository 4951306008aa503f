"""TensorRT and TensorRT for RTX: one backend for both libraries, whose Python modules have nearly the same interface.

TensorRT builds on the GPU that will run the engine. TensorRT for RTX builds anywhere, for one or several kinds of GPU,
and finishes on the device when an engine is loaded; what that took is kept beside the engine.
"""

import importlib
import re
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from restyle_deploy.backends.base import (
    DEFAULT_REQUEST,
    PRECISIONS,
    BuildRequest,
    BuildTarget,
    EngineOptions,
    RunnerOptions,
    refuse_engine_options,
)
from restyle_deploy.backends.tensorrt_device import find_devices, find_processor
from restyle_deploy.backends.tensorrt_library import (
    AMPERE,
    AMPERE_AND_NEWER,
    AMPERE_PRECISIONS,
    DEFAULT_COMPUTE_CAPABILITIES,
    TENSORRT,
    TENSORRT_RTX,
    Library,
    batches_of,
    describe_library,
)
from restyle_deploy.engines import join_processors
from restyle_deploy.errors import BackendUnavailableError, BuildError
from restyle_deploy.tensors import TensorSpec


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
        self._check_precision(options.precision)
        devices, reason = find_devices()
        if options.device not in devices:
            available = ", ".join(devices) or f"none ({reason})"
            raise BackendUnavailableError(
                f"backend {self._library.backend}: device {options.device!r} cannot run here; available: {available}"
            )
        self._check_processor(options.precision, find_processor(options.device))

    def processors(self, device: str) -> tuple[str, ...]:
        """Return the GPU's compute capability, "sm_89" style, and the name of a range that has it."""
        processor = find_processor(device)
        in_range = not self._library.builds_anywhere and _number_of(processor) >= AMPERE
        return (processor, AMPERE_AND_NEWER) if in_range else (processor,)

    def plugin_hash(self) -> str | None:
        """Return the hash of our kernels' sources; None where the library takes no plugins."""
        return self._kernels(is_wanted=True)[1]

    def check_build(self, options: RunnerOptions, engine: EngineOptions) -> BuildTarget:
        """Find out what engines of these options are for; see `Backend.check_build`.

        Raises:
            BackendUnavailableError: see there; TensorRT for RTX needs no device, but strips weights on one only.
            ValueError: batches that are not in order.
        """
        refuse_engine_options(self._library.backend, engine, self.ENGINE_OPTIONS)
        batches = batches_of(engine)
        processors, refusal = self._targets(options, engine)
        route, plugin_hash = self._kernels(is_wanted=not engine.no_plugins)
        return BuildTarget(
            processor=join_processors(processors),
            refusal=refusal,
            has_kernels=route != "functions",
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
        with tempfile.TemporaryDirectory(prefix="restyle-deploy-", ignore_cleanup_errors=True) as folder:
            network = self._network(graph, Path(folder), options, request)
            network.check()
            return {"layers": len(network.layers())}

    def build(
        self, graph: Path, engine: Path, options: RunnerOptions, request: BuildRequest = DEFAULT_REQUEST
    ) -> Mapping[str, Any]:
        """Build an engine and write it, with `<stem>.layers.json` beside it; see `Backend.build`."""
        from restyle_deploy.backends.tensorrt_layers import layers_of_engine, write_layers

        began = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="restyle-deploy-", ignore_cleanup_errors=True) as folder:
            network = self._network(graph, Path(folder), options, request)
            plan = network.build()
            engine.write_bytes(memoryview(plan))
            source, layers = "engine", network.built_layers()
            runs_here = self._targets(options, request.engine)[1] is None
            if not layers and runs_here and not request.engine.stripped:
                layers = layers_of_engine(self._trt, plan)
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
        if self._kernels(is_wanted=True)[0] == "jit":
            _plugins().register_plugins(self._trt)
        with tempfile.TemporaryDirectory(prefix="restyle-deploy-", ignore_cleanup_errors=True) as folder:
            typed = None
            if weights is not None:
                typed = self._typed_graph(weights, Path(folder), options, DEFAULT_REQUEST.engine)
            if file.suffix == ".onnx":
                plan: Any = self._network(file, Path(folder), options, DEFAULT_REQUEST).build()
            else:
                plan = _read(file, self._trt)
            engine = load_engine(self._trt, plan, options, name=file.name, weights=typed)
        cache = file.with_suffix(".runtime.cache") if self._library.builds_anywhere and file.suffix != ".onnx" else None
        return TensorRtRunner(engine, inputs, outputs, device=options.device, cache=cache)

    def _network(self, graph: Path, folder: Path, options: RunnerOptions, request: BuildRequest) -> Any:
        """Return the network of an ONNX file, typed by the precision; `folder` takes a copy with weights."""
        from restyle_deploy.backends.tensorrt_network import Network, NetworkOptions

        processors, _ = self._targets(options, request.engine)
        timing_cache = None
        if request.cache is not None and not self._library.builds_anywhere:
            version = self._trt.__version__
            timing_cache = (
                request.cache / f"timing-{self._library.module}-{version}-{find_processor(options.device)}.cache"
            )
        network_options = NetworkOptions(
            batches=batches_of(request.engine),
            engine=request.engine,
            tf32=options.precision == "tf32",
            processors=processors if self._library.builds_anywhere else (),
            timing_cache=timing_cache,
        )
        typed = self._typed_graph(graph, folder, options, request.engine)
        return Network(self._trt, typed, network_options, name=graph.name, progress=request.progress)

    def _typed_graph(self, graph: Path, folder: Path, options: RunnerOptions, engine: EngineOptions) -> Path:
        from restyle_deploy.backends.tensorrt_network import write_typed_graph

        route = self._kernels(is_wanted=not engine.no_plugins)[0]
        if route != "functions":
            _plugins().register_plugins(self._trt)
        arch = None
        if route != "functions":
            arch = f"sm_{AMPERE}" if engine.hardware_compatible else find_processor(options.device)
        return write_typed_graph(graph, folder, precision=options.precision, route=route, arch=arch)

    def _kernels(self, *, is_wanted: bool) -> tuple[str, str | None]:
        """Return how our kernels come into engines, and their hash; "functions" and None where they do not."""
        route = _plugins().choose_route(self._trt)[0] if is_wanted else "functions"
        if route == "functions":
            return route, None
        from restyle_deploy.ops.compiler import kernel_source_hash

        return route, kernel_source_hash()

    def _targets(self, options: RunnerOptions, engine: EngineOptions) -> tuple[tuple[str, ...], str | None]:
        """Return the processors that an engine is for, and why it cannot run here, if it cannot."""
        if not self._library.builds_anywhere:
            self.check_options(options)
            here = find_processor(options.device)
            if engine.hardware_compatible and _number_of(here) < AMPERE:
                raise BackendUnavailableError(
                    f"backend tensorrt: --hardware-compatible needs sm_{AMPERE}, this is {here}"
                )
            return ((AMPERE_AND_NEWER,) if engine.hardware_compatible else (here,)), None
        self._check_precision(options.precision)
        processors = self._named_processors(engine.compute_capabilities or DEFAULT_COMPUTE_CAPABILITIES)
        for processor in processors:
            self._check_processor(options.precision, processor)
        return processors, self._refusal(options, engine, processors)

    def _refusal(self, options: RunnerOptions, engine: EngineOptions, processors: tuple[str, ...]) -> str | None:
        devices, reason = find_devices()
        if re.fullmatch(r"cuda:\d+", options.device) is None or (devices and options.device not in devices):
            raise BackendUnavailableError(
                f"backend {self._library.backend}: device {options.device!r} cannot run here; "
                f"available: {', '.join(devices) or 'none, but engines can be built for cuda:0'}"
            )
        if not devices and engine.stripped:
            raise BackendUnavailableError(
                f"backend {self._library.backend}: --stripped needs a GPU to build on, which compiles how weights are "
                f"put back; there is none here: {reason}"
            )
        if not devices:
            return f"no GPU can run the engine here: {reason}"
        here = find_processor(options.device)
        return None if here in processors else f"the engine is for {join_processors(processors)}, this GPU is {here}"

    def _named_processors(self, capabilities: tuple[str, ...]) -> tuple[str, ...]:
        known = [name for name in self._trt.ComputeCapability.__members__ if re.fullmatch(r"SM\d+", name)]
        numbers = {f"{name[2:-1]}.{name[-1]}": name[2:] for name in known}
        unknown = [capability for capability in capabilities if capability not in numbers]
        if unknown:
            raise BackendUnavailableError(
                f"backend {self._library.backend}: it cannot build for compute capability {', '.join(unknown)}; "
                f"it can for {', '.join(numbers)}"
            )
        return tuple(f"sm_{numbers[capability]}" for capability in dict.fromkeys(capabilities))

    def _check_precision(self, precision: str) -> None:
        if precision not in PRECISIONS:
            raise BackendUnavailableError(
                f"backend {self._library.backend}: precision {precision} cannot run here: "
                f"known are {', '.join(PRECISIONS)}"
            )

    def _check_processor(self, precision: str, processor: str) -> None:
        if precision in AMPERE_PRECISIONS and _number_of(processor) < AMPERE:
            raise BackendUnavailableError(
                f"backend {self._library.backend}: precision {precision} cannot run here: "
                f"{processor} has no such instructions, sm_{AMPERE} and newer have"
            )


def _number_of(processor: str) -> int:
    return int(processor.removeprefix("sm_"))


def _plugins() -> Any:
    return importlib.import_module("restyle_deploy.backends.tensorrt_plugins")


def _read(file: Path, trt: Any) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise BuildError(f"{describe_library(trt)} refuses {file.name}: {error.strerror}") from error
