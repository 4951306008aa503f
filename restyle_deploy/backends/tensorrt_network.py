"""An ONNX file -> a typed TensorRT network -> a serialised engine. Only building needs this file, and onnx_ir."""

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from restyle_deploy.backends.base import WITHOUT_PLUGINS, EngineOptions
from restyle_deploy.backends.tensorrt_interrupts import Interrupts
from restyle_deploy.backends.tensorrt_layers import describe_layer, layers_of_log, node_of_layer
from restyle_deploy.backends.tensorrt_library import (
    Messages,
    construct,
    create_logger,
    describe_errors,
    describe_library,
)
from restyle_deploy.backends.tensorrt_plugins import prepare_graph
from restyle_deploy.backends.tensorrt_products import convolve_products
from restyle_deploy.errors import BuildError
from restyle_deploy.files import replace_when_complete
from restyle_deploy.graph.precision import set_precision
from restyle_deploy.ops.kernels.launches import GRID_LIMITS
from restyle_deploy.ops.onnx_functions import DOMAIN

LOGGER = logging.getLogger(__name__)
# How the libraries say that they have no way to compute a layer of these types and sizes.
_NO_KERNEL = re.compile("could not find any implementation|no valid tactic|no low-precision", re.IGNORECASE)
# And that what it works with does not fit into the memory that it may use.
_NO_MEMORY = re.compile("OutOfMemory|Requested size was")
# A phase of the builder is told at its beginning and after each such share of its steps.
_TOLD_SHARE = 0.25
_LEAST_TOLD_STEPS = 20
MAX_PLANES = GRID_LIMITS[2]


@dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """How a network becomes an engine.

    Attributes:
        batches: images of one run: the fewest, those to be fastest for, the most.
        engine: other options; those that the library lacks are not given.
        tf32: whether float32 convolutions and matrix products may be computed in TF32.
        processors: "sm_89" style, where the library builds for named ones; none where it builds for the current GPU.
        timing_cache: the file that keeps what building measures; None for none.
    """

    batches: tuple[int, int, int]
    engine: EngineOptions
    tf32: bool
    processors: tuple[str, ...]
    timing_cache: Path | None


def write_typed_graph(
    graph: Path,
    folder: Path,
    *,
    precision: str,
    route: str,
    arch: str | None,
    max_batch: int,
    is_for_turing: bool = False,
) -> Path:
    """Write a graph as TensorRT takes it: typed, our operators as plugins or as their bodies' nodes, all named.

    Args:
        graph: the ONNX file.
        folder: takes the new one and its weights.
        precision: one of `base.UNIFORM_PRECISIONS`.
        route: see `tensorrt_plugins.register_plugins`.
        arch: that plugins' kernels are compiled for, "sm_89" style; None without plugins.
        max_batch: the most images of one run.
        is_for_turing: whether matrix products have to be convolutions; see `convolve_products`.
    Raises:
        BuildError: it is no ONNX file, or so many images are too many for a plugin.
    """
    try:
        model = ir.load(graph)
    except Exception as error:  # of onnx_ir or protobuf, without a common base
        raise BuildError(f"TensorRT refuses {graph.name}: it is no ONNX file") from error
    if not model.graph.outputs:
        raise BuildError(f"TensorRT refuses {graph.name}: it is no ONNX file, as it has no output")
    if route != WITHOUT_PLUGINS:
        check_planes(model, max_batch)
    set_precision(model, precision)
    prepare_graph(model, route, arch=arch)  # type: ignore[arg-type]
    inline_functions(model)
    if is_for_turing:
        convolve_products(model)
    path = folder / f"{graph.stem}.typed.onnx"
    ir.save(model, path, external_data=f"{graph.stem}.typed.data")
    return path


def check_planes(model: ir.Model, max_batch: int) -> None:
    """Raise `BuildError` if a run has more feature maps than our filter's kernel can take, one block each."""
    most = max((node.attributes["channels"].as_int() for node in model.graph if _is_filter(node)), default=1)
    if most * max_batch > MAX_PLANES:
        raise BuildError(
            f"{max_batch} images of {most} channels are {most * max_batch} feature maps, and our kernels take no more "
            f"than {MAX_PLANES} in one run; use --max-batch {MAX_PLANES // most} or less, or --no-plugins"
        )


def inline_functions(model: ir.Model) -> ir.Model:
    """Put the bodies of model-local functions in the place of their nodes, in place.

    The bodies' nodes are named after the node that they replace, so that a layer of the engine still says which part of
    the model it computes: `<node>/<operator>_<number>`.
    """
    known = {id(node) for node in model.graph}
    calls = {(node.domain, node.op_type, node.overload) for node in model.graph} & set(model.functions)
    names = {
        output.name: node.name
        for node in model.graph
        for output in node.outputs
        if (node.domain, node.op_type, node.overload) in calls
    }
    InlinePass()(model)
    body: list[ir.Node] = []
    for node in model.graph:
        if id(node) in known and not body:
            continue
        body.append(node)
        caller = next((names[output.name] for output in node.outputs if output.name in names), None)
        if caller is not None:
            for index, part in enumerate(body):
                part.name = f"{caller}/{part.op_type}_{index}"
            body = []
    return model


def name_helpers(network: Any) -> dict[str, str]:
    """Rename the layers that the parser has added to a node's own after the node that reads them.

    Constants keep their names, by which weights are put back.

    Returns:
        The name of the node that each layer belongs to, by the layer's name.
    """
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    readers: dict[str, str] = {}  # tensor -> node
    nodes = {}
    for layer in reversed(layers):  # readers come after what they read
        outputs = [layer.get_output(index).name for index in range(layer.num_outputs)]
        node = node_of_layer(layer) or next((readers[name] for name in outputs if name in readers), layer.name)
        for index in range(layer.num_inputs):
            tensor = layer.get_input(index)
            if tensor is not None:
                readers[tensor.name] = node
        if not layer.metadata and layer.type.name != "CONSTANT":
            layer.name = f"{node}/{layer.name}"
        nodes[layer.name] = node
    return nodes


class Network:
    """A parsed network and what builds it."""

    def __init__(
        self, trt: Any, graph: Path, options: NetworkOptions, *, name: str, progress: Callable[[str], None]
    ) -> None:
        """Parse a typed graph.

        Args:
            trt: `tensorrt` or `tensorrt_rtx`.
            graph: see `write_typed_graph`.
            options: for the engine.
            name: of the file, for messages.
            progress: told the phases of a build.
        Raises:
            BuildError: the parser refuses the graph.
            KeyboardInterrupt: there was a Ctrl-C meanwhile; so do `check` and `build`.
        """
        self._trt, self._options, self._name = trt, options, name
        self._messages, self._interrupts = Messages(), Interrupts()
        with self._interrupts.put_off():
            self._parse(graph)
            self._nodes = name_helpers(self._network)
            self._monitor = _create_monitor(trt, progress, self._interrupts)
            self._config = self._configure()

    def _parse(self, graph: Path) -> None:
        trt = self._trt
        logger = create_logger(trt, self._messages)
        self._builder = construct(trt, self._messages, trt.Builder, logger)
        flag = trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
        self._network = self._builder.create_network(1 << int(flag))
        self._parser = trt.OnnxParser(self._network, logger)  # it holds the weights until the engine is built
        if not self._parser.parse_from_file(str(graph)):
            errors = [_describe_error(self._parser.get_error(index)) for index in range(self._parser.num_errors)]
            raise self._refusal(errors or self._messages.errors)

    def layers(self) -> list[dict[str, Any]]:
        """Return the layers as parsed: no format is chosen yet, and none is fused."""
        layers = (self._network.get_layer(index) for index in range(self._network.num_layers))
        return [describe_layer(layer, self._nodes[layer.name]) for layer in layers]

    def built_layers(self) -> list[dict[str, Any]]:
        """Return the layers of the engine that was built, as the library has logged them; none if it did not."""
        return layers_of_log(self._messages.engine_layers)

    def check(self) -> None:
        """Raise `BuildError` unless the library says that it can build the network."""
        with self._interrupts.put_off():
            if not self._builder.is_network_supported(self._network, self._config):
                raise self._refusal(self._messages.errors)

    def build(self) -> Any:
        """Return the serialised engine, a buffer; raise `BuildError` if the library refuses the network."""
        with self._interrupts.put_off(), self._timing_cache():
            plan = self._builder.build_serialized_network(self._network, self._config)
            if plan is None:
                raise self._refusal(self._messages.errors)
        return plan

    def _configure(self) -> Any:
        trt, options, engine = self._trt, self._options, self._options.engine
        config = self._builder.create_builder_config()
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # else an engine has no layer names
        config.progress_monitor = self._monitor
        (config.set_flag if options.tf32 else config.clear_flag)(trt.BuilderFlag.TF32)  # set by default
        if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):
            config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)  # else a run may allocate, and not be captured
        if engine.stripped:
            config.set_flag(trt.BuilderFlag.STRIP_PLAN)
        if engine.version_compatible:
            config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        if engine.hardware_compatible:
            config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
        if engine.workspace_bytes is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, engine.workspace_bytes)
        if engine.optimization_level is not None:
            config.builder_optimization_level = engine.optimization_level
        if options.processors:
            config.num_compute_capabilities = len(options.processors)
        for index, processor in enumerate(options.processors):
            capability = trt.ComputeCapability.__members__[processor.replace("_", "").upper()]
            config.set_compute_capability(capability, index)
        config.add_optimization_profile(self._profile())
        return config

    def _profile(self) -> Any:
        profile = self._builder.create_optimization_profile()
        for index in range(self._network.num_inputs):
            tensor = self._network.get_input(index)
            sizes = tuple(tensor.shape)[1:]
            profile.set_shape(tensor.name, *[(batch, *sizes) for batch in self._options.batches])
        return profile

    @contextmanager
    def _timing_cache(self) -> Iterator[None]:
        """Let the builder use what former builds have measured; keep what it measures, unless it fails."""
        path = self._options.timing_cache
        if path is None:
            yield
            return
        cache = self._config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
        if cache is None or not self._config.set_timing_cache(cache, ignore_mismatch=False):
            LOGGER.info("%s: of another GPU, driver or version; it is made anew", path)
            self._messages.errors.clear()  # else a refusal would give this for its reason
            cache = self._config.create_timing_cache(b"")
            self._config.set_timing_cache(cache, ignore_mismatch=False)
        yield
        measured = self._config.get_timing_cache()
        if measured is not None:
            with replace_when_complete(path) as temporary:
                temporary.write_bytes(memoryview(measured.serialize()))

    def _refusal(self, errors: list[str]) -> BuildError:
        reason = describe_errors(errors)
        remedy = ""
        if _NO_KERNEL.search(reason):
            remedy = "; with --tune, the plan has only what it can compute"
        elif _NO_MEMORY.search(reason):
            remedy = f"; use a larger --workspace, or a smaller --max-batch than {self._options.batches[2]}"
        return BuildError(f"{describe_library(self._trt)} refuses {self._name}: {reason}{remedy}")


def _is_filter(node: ir.Node) -> bool:
    return node.domain == DOMAIN and "channels" in node.attributes


def _describe_error(error: Any) -> str:
    """Return the node and what the parser says of it."""
    node = f"{error.node_name()} ({error.node_operator()}): " if error.node_operator() else ""
    return f"{node}{error.desc()}"


def _create_monitor(trt: Any, progress: Callable[[str], None], interrupts: Interrupts) -> Any:
    """Return a progress monitor that tells a build's long phases, in percent, and ends the build after a Ctrl-C.

    TensorRT calls it from any thread.
    """

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}
            self._told: dict[str, float] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self._steps[phase], self._told[phase] = steps, 0.0
            if steps >= _LEAST_TOLD_STEPS or parent is None:
                progress(phase)

        def step_complete(self, phase: str, step: int) -> bool:
            share = (step + 1) / max(1, self._steps.get(phase, 1))
            if self._steps.get(phase, 0) >= _LEAST_TOLD_STEPS and share >= self._told[phase] + _TOLD_SHARE:
                self._told[phase] = share
                progress(f"{phase} {share:.0%}")
            return not interrupts.is_pending

        def phase_finish(self, phase: str) -> None:
            self._steps.pop(phase, None)

    return Monitor()
