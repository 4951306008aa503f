"""OpenVINO on the CPU, with inputs and outputs in the caller's memory."""

import io
import mmap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset15 as ops
from openvino.frontend import FrontEndManager
from openvino.frontend.onnx import ConversionExtension

from restyle_deploy.backends.base import (
    DEFAULT_REQUEST,
    ENCODER_ROLES,
    EXACT_PRECISION,
    MIXED_PRECISION,
    BuildRequest,
    BuildTarget,
    EngineOptions,
    RunnerOptions,
    check_buffers,
    refuse_engine_options,
)
from restyle_deploy.backends.cpu import check_graph as check_graph
from restyle_deploy.backends.cpu import host_arrays
from restyle_deploy.backends.cpu import plugin_hash as plugin_hash
from restyle_deploy.backends.cpu import processors as processors
from restyle_deploy.backends.openvino_nodes import CONVERSIONS
from restyle_deploy.backends.openvino_rounding import refine_encoder
from restyle_deploy.device_array import Array
from restyle_deploy.errors import BackendUnavailableError, BuildError
from restyle_deploy.ops.onnx_functions import DOMAIN
from restyle_deploy.processor import describe_processor
from restyle_deploy.tensors import TensorSpec

ENGINE_OPTIONS: frozenset[str] = frozenset()
ENGINE_SUFFIX = ".blob"
# With a free batch OpenVINO allocates outputs itself and copies them, and larger batches gain little or nothing.
ENGINE_BATCH = 1

_DEVICE = "CPU"
_PRECISION_HINTS = {"fp32": "f32", "bf16": "bf16"}
_PRECISIONS = (*_PRECISION_HINTS, MIXED_PRECISION)
# Batch sizes of one graph kept compiled: as many as a session keeps bound.
_BATCHES_KEPT = 2
# Two such operations in a row, each with a constant, are merged into one by OpenVINO.
_MERGED = {("Add", "Add"), ("Add", "Multiply"), ("Multiply", "Multiply")}
# Lines of OpenVINO's messages that tell places in its sources, or are headings.
_SOURCE_LINES = ("Exception from ", "Check '", "FrontEnd API failed", "Summary:")
_UNKNOWN_OPERATIONS = "No conversion rule found"


def devices() -> tuple[str, ...]:
    """Return the devices that can run here."""
    return ("cpu",)


def library_versions() -> Mapping[str, str]:
    """Return the version of OpenVINO."""
    return {"openvino": ov.__version__.partition("-")[0]}


def check_options(options: RunnerOptions) -> None:
    """Raise `BackendUnavailableError` unless this machine can run with these options."""
    if options.device not in devices():
        raise BackendUnavailableError(
            f"backend openvino: device {options.device!r} cannot run here; available: {', '.join(devices())}"
        )
    if options.precision not in _PRECISIONS:
        raise BackendUnavailableError(
            f"backend openvino: precision {options.precision} cannot run here: known are {', '.join(_PRECISIONS)}"
        )
    is_exact = options.precision == EXACT_PRECISION
    if not is_exact and "BF16" not in ov.Core().get_property(_DEVICE, "OPTIMIZATION_CAPABILITIES"):
        raise BackendUnavailableError(
            f"backend openvino: precision {options.precision} cannot run here: "
            "this CPU has no bfloat16 instructions (avx512_bf16 or amx_bf16)"
        )


def check_build(options: RunnerOptions, engine: EngineOptions) -> BuildTarget:
    """Find out whether the options can run here; engines are for this processor. See `Backend.check_build`."""
    refuse_engine_options("openvino", engine, ENGINE_OPTIONS)
    check_options(options)
    return BuildTarget(processor=describe_processor(), refusal=None, has_kernels=False, facts={})


def build(
    graph: Path, engine: Path, options: RunnerOptions, request: BuildRequest = DEFAULT_REQUEST
) -> Mapping[str, Any]:
    """Compile an ONNX file and write it as a blob, which opens without conversion; see `Backend.build`.

    The batch stays as the graph has it. A free one costs speed (a 1024 px generator runs 1.2 × as long, the demo's
    1.5 ×) and a copy of each output, as OpenVINO then allocates them itself: build graphs of one image.
    """
    check_options(options)
    model = _read_graph(graph, options)
    exported = io.BytesIO()
    with _refusal(graph):
        ov.Core().compile_model(model, _DEVICE, create_settings(options)).export_model(exported)
    engine.write_bytes(exported.getbuffer())
    return {}


def load(
    file: Path,
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    options: RunnerOptions,
    weights: Path | None = None,
) -> "OpenVinoRunner":
    """Load an ONNX file, which is compiled when a batch size is first bound, or a blob of `build`."""
    check_options(options)
    if file.suffix == ENGINE_SUFFIX:
        engine = _Engine(file, options)
        return OpenVinoRunner(lambda batch: engine.create_request(), inputs, outputs)
    model = _read_graph(file, options)

    @lru_cache(maxsize=_BATCHES_KEPT)
    def compile_for(batch: int) -> ov.CompiledModel:
        with _refusal(file):
            return ov.Core().compile_model(_model_of_batch(model, batch), _DEVICE, create_settings(options))

    return OpenVinoRunner(lambda batch: compile_for(batch).create_infer_request(), inputs, outputs)


class OpenVinoRunner:
    """A graph loaded in OpenVINO; satisfies `Runner`."""

    is_capturable = True

    def __init__(
        self,
        create_request: Callable[[int], ov.InferRequest],
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
    ) -> None:
        self._create_request: Callable[[int], ov.InferRequest] | None = create_request
        self._specs = inputs + outputs

    def bind(self, buffers: Mapping[str, Array]) -> Callable[[], None]:
        """Bind host buffers; see `Runner.bind`. An ONNX file's first bind of a batch size compiles it (seconds).

        Raises:
            BuildError: OpenVINO cannot compile the graph.
        """
        if self._create_request is None:
            raise ValueError("the runner is closed")
        check_buffers(buffers, self._specs)
        arrays = host_arrays(buffers)
        request = self._create_request(len(arrays[self._specs[0].name]))
        for spec in self._specs:
            request.set_tensor(spec.name, ov.Tensor(arrays[spec.name], shared_memory=True))
        return _BoundRun(request, tuple(arrays.values()), self._create_request)

    def close(self) -> None:
        """Release the graph; safe to call twice."""
        self._create_request = None


class _BoundRun:
    """A run on fixed buffers. It keeps them alive, and the mapped blob by way of `owner`."""

    def __init__(self, request: ov.InferRequest, buffers: tuple[NDArray[Any], ...], owner: object) -> None:
        self._request, self._buffers, self._owner = request, buffers, owner

    def __call__(self) -> None:
        self._request.infer(share_outputs=True)  # otherwise it returns a copy of each output


class _Engine:
    """A compiled model that reads its weights in a mapped blob."""

    def __init__(self, file: Path, options: RunnerOptions) -> None:
        with _refusal(file):
            with file.open("rb") as opened:
                # OpenVINO takes writable memory only: a private mapping, of which nothing is ever written.
                self._blob = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
            blob = ov.Tensor(np.frombuffer(self._blob, np.uint8), shared_memory=True)
            self._model = ov.Core().import_model(blob, _DEVICE, create_settings(options))
        # Most weights have been copied into the layouts of their operations; those that are read in place come back
        # from the file as they are. At 1024 px this process peaks at 2006 instead of 2701 MiB so.
        if hasattr(mmap, "MADV_DONTNEED"):
            self._blob.madvise(mmap.MADV_DONTNEED)

    def create_request(self) -> ov.InferRequest:
        return self._model.create_infer_request()


def create_settings(options: RunnerOptions) -> dict[str, Any]:
    """Return the device's properties.

    The precision is always named: by default OpenVINO computes in bfloat16 where the CPU has it. Whether threads are
    bound to cores, and hyper-threading, are left to OpenVINO: forbidding either changed no time beyond the noise on two
    cores (ratios 0.94 to 1.12, to both sides). OpenVINO keeps to the cores that the process may use and takes no more
    threads than those; it does not know the quotas of containers, for which users set `threads`.
    """
    settings: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": _PRECISION_HINTS[options.precision],
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
    }
    if options.threads is not None:
        settings["INFERENCE_NUM_THREADS"] = options.threads
    return settings


def _read_graph(path: Path, options: RunnerOptions) -> ov.Model:
    """Convert an ONNX file, custom nodes too: OpenVINO does not read the functions that the file has for them."""
    frontend = FrontEndManager().load_by_framework("onnx")
    for name, convert in CONVERSIONS.items():
        frontend.add_extension(ConversionExtension(name, DOMAIN, convert))
    with _refusal(path):
        if not frontend.supported(str(path)):
            raise ValueError("it is no ONNX file")
        model = frontend.convert(frontend.load(str(path)))
    _keep_constants_small(model)
    if options.precision != EXACT_PRECISION and options.role in ENCODER_ROLES:
        refine_encoder(model)
    return model


def _model_of_batch(model: ov.Model, batch: int) -> ov.Model:
    """Return a copy with the free batch fixed, which shares the weights."""
    fixed = model.clone()
    shapes = {port.any_name: port.partial_shape for port in fixed.inputs if port.partial_shape.is_dynamic}
    if shapes:
        fixed.reshape({name: ov.PartialShape([batch, *list(shape)[1:]]) for name, shape in shapes.items()})
    return fixed


def _keep_constants_small(model: ov.Model) -> None:
    """Separate constants that OpenVINO would merge into a larger one.

    It turns (x + noise) + bias into x + (noise + bias): [1,1,H,W] and [1,C,1,1] become [1,C,H,W], in the generator of
    1024 px 650 MB of constants instead of 135. A PReLU of slope 1 between the two changes no value and costs nothing,
    as both operations and their neighbours become one kernel.
    """
    constants: set[str] = set()
    for node in model.get_ordered_ops():
        inputs = [value.get_node() for value in node.input_values()]
        if node.get_type_name() == "Constant" or (inputs and all(one.get_name() in constants for one in inputs)):
            constants.add(node.get_name())
        elif len(inputs) == 2:
            for index, first in enumerate(inputs):
                if _merging_enlarges(first, node, constants):
                    barrier = ops.prelu(node.input_value(index), np.ones(1, np.float32))
                    node.input(index).replace_source_output(barrier.output(0))


def _merging_enlarges(first: ov.Node, second: ov.Node, constants: set[str]) -> bool:
    """Whether both operations take a constant, OpenVINO merges them, and the result is larger than either."""
    if (first.get_type_name(), second.get_type_name()) not in _MERGED:
        return False
    taken = [
        value for node in (first, second) for value in node.input_values() if value.get_node().get_name() in constants
    ]
    if len(taken) != 2:
        return False
    shapes = [tuple(value.get_shape()) for value in taken]
    return int(np.prod(np.broadcast_shapes(*shapes))) > max(int(np.prod(shape)) for shape in shapes)


@contextmanager
def _refusal(file: Path) -> Iterator[None]:
    """Turn whatever OpenVINO raises, which has no common base, into a `BuildError` of one line."""
    try:
        yield
    except Exception as error:
        version = library_versions()["openvino"]
        raise BuildError(f"OpenVINO {version} refuses {file.name}: {_reason(str(error))}") from error


def _reason(message: str) -> str:
    """Return the line of a message that says most."""
    lines = [line.strip(" -") for line in message.splitlines() if line.strip()]
    telling = [line for line in lines if not line.startswith(_SOURCE_LINES)] or lines or ["it gives no reason"]
    return next((line for line in telling if line.startswith(_UNKNOWN_OPERATIONS)), telling[0])
