"""ONNX Runtime on the CPU or a GPU, with bound and preallocated inputs and outputs."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnxruntime as ort
from numpy.typing import NDArray

from restyle_deploy.backends import cpu, onnxruntime_cuda
from restyle_deploy.backends.base import (
    DEFAULT_REQUEST,
    EXACT_PRECISION,
    BuildRequest,
    BuildTarget,
    EngineOptions,
    Runner,
    RunnerOptions,
    check_buffers,
    refuse_engine_options,
)
from restyle_deploy.backends.cpu import check_graph as check_graph
from restyle_deploy.backends.cpu import plugin_hash as plugin_hash
from restyle_deploy.backends.cuda_devices import queue_of
from restyle_deploy.device_array import Array
from restyle_deploy.errors import BackendUnavailableError, BuildError, RestyleDeployError
from restyle_deploy.runtime.device import find_processor
from restyle_deploy.tensors import TensorSpec

ENGINE_OPTIONS: frozenset[str] = frozenset()
ENGINE_SUFFIX = ".onnx"
ENGINE_BATCH: int | None = None

_CPU = "cpu"
_ERRORS_ONLY = 3
# Constants from this size on go to a file of their own beside an engine, which the system maps instead of reading it.
_EXTERNAL_FROM_BYTES = 1024


def devices() -> tuple[str, ...]:
    """Return the devices that can run here: the CPU, and GPUs where ONNX Runtime was built for CUDA."""
    return (_CPU, *onnxruntime_cuda.find_cuda_devices())


def library_versions() -> Mapping[str, str]:
    """Return the version of ONNX Runtime."""
    return {"onnxruntime": ort.__version__}


def check_options(options: RunnerOptions) -> None:
    """Raise `BackendUnavailableError` unless this machine can run with these options."""
    if options.device not in devices():
        mend = ""
        if options.device.startswith("cuda:") and not onnxruntime_cuda.has_provider():
            mend = "; this ONNX Runtime has no CUDA: pip install 'restyle-deploy[onnxruntime-gpu]'"
        raise BackendUnavailableError(
            f"backend onnxruntime: device {options.device!r} cannot run here; available: {', '.join(devices())}{mend}"
        )
    if options.device != _CPU:
        refusal = onnxruntime_cuda.refusal_of_precision(options)
    else:
        refusal = None if options.precision == EXACT_PRECISION else "on the CPU it computes float32 only"
    if refusal is not None:
        raise BackendUnavailableError(f"backend onnxruntime: precision {options.precision} cannot run here: {refusal}")


def processors(device: str) -> tuple[str, ...]:
    """Return this machine's processor, or the GPU's compute capability, "sm_89" style."""
    return cpu.processors(device) if device == _CPU else (find_processor(device),)


def check_build(options: RunnerOptions, engine: EngineOptions) -> BuildTarget:
    """Find out whether the options can run here; engines are for this processor. See `Backend.check_build`."""
    refuse_engine_options("onnxruntime", engine, ENGINE_OPTIONS)
    check_options(options)
    (processor,) = processors(options.device)
    return BuildTarget(processor=processor, refusal=None, has_kernels=False, facts={})


def build(
    graph: Path, engine: Path, options: RunnerOptions, request: BuildRequest = DEFAULT_REQUEST
) -> Mapping[str, Any]:
    """Optimise an ONNX file for this machine and write the result; see `Backend.build`.

    On the CPU convolution weights are stored in the blocked layout of this processor's vectors. Constants are folded,
    and the large ones lie in a file beside the engine: loading it maps that file and has nothing left to compute.
    """
    settings = create_settings(options)
    settings.optimized_model_filepath = str(engine)
    settings.add_session_config_entry(
        "session.optimized_model_external_initializers_file_name", f"{engine.stem}.weights"
    )
    settings.add_session_config_entry(
        "session.optimized_model_external_initializers_min_size_in_bytes", str(_EXTERNAL_FROM_BYTES)
    )
    if options.device == _CPU:
        _open(graph, settings)
    else:
        with onnxruntime_cuda.typed_graph(graph, options.precision) as typed, _refusal(graph):
            onnxruntime_cuda.open_session(typed, settings, options, None)
    return {}


def load(
    file: Path,
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    options: RunnerOptions,
    weights: Path | None = None,
) -> Runner:
    """Load an ONNX file or an engine; seconds for a large ONNX file, a fraction of one for its engine."""
    settings = create_settings(options)
    if options.device == _CPU:
        return OnnxRuntimeRunner(_open(file, settings), inputs, outputs)
    queue = queue_of(options)
    with onnxruntime_cuda.typed_graph(file, options.precision) as typed, _refusal(file):
        session, captures = onnxruntime_cuda.open_session(typed, settings, options, queue)
    return onnxruntime_cuda.OnnxRuntimeCudaRunner(
        session, inputs, outputs, options=options, queue=queue, captures=captures
    )


def create_settings(options: RunnerOptions) -> ort.SessionOptions:
    """Return how graphs are opened; `python -m benchmarks.onnxruntime_settings` measures each choice.

    Raises:
        BackendUnavailableError: see `check_options`.
    """
    check_options(options)
    settings = ort.SessionOptions()
    settings.log_severity_level = _ERRORS_ONLY
    # Encoder and generator have a thread pool each, and they take turns: idle threads that go on spinning after a run
    # would take a core from the other graph. Figures of all choices: docs/cpu.md.
    settings.add_session_config_entry("session.force_spinning_stop", "1")
    # One block for all of a run's tensors, planned at the second run, comes on top of what the first run has taken from
    # the arena: an eighth of the peak memory of a 256 px engine, for no time.
    settings.enable_mem_pattern = False
    if options.threads is not None:
        settings.intra_op_num_threads = options.threads
    return settings


def _open(file: Path, settings: ort.SessionOptions) -> ort.InferenceSession:
    with _refusal(file):
        return ort.InferenceSession(str(file), settings, providers=["CPUExecutionProvider"])


@contextmanager
def _refusal(file: Path) -> Iterator[None]:
    """Turn whatever ONNX Runtime raises, which has no common base, into a `BuildError` of one line."""
    try:
        yield
    except RestyleDeployError:
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise BuildError(f"ONNX Runtime {ort.__version__} refuses {file.name}: {reason}") from error


class OnnxRuntimeRunner:
    """A graph loaded in ONNX Runtime on the CPU; satisfies `Runner`."""

    is_capturable = True

    def __init__(
        self, session: ort.InferenceSession, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]
    ) -> None:
        self._session: ort.InferenceSession | None = session
        self._inputs = inputs
        self._outputs = outputs

    def bind(self, buffers: Mapping[str, Array]) -> Callable[[], None]:
        """Bind host buffers; see `Runner.bind`."""
        if self._session is None:
            raise ValueError("the runner is closed")
        check_buffers(buffers, self._inputs + self._outputs)
        arrays = cpu.host_arrays(buffers)
        binding = self._session.io_binding()
        for specs, bind_one in ((self._inputs, binding.bind_input), (self._outputs, binding.bind_output)):
            for spec in specs:
                array = arrays[spec.name]
                bind_one(spec.name, _CPU, 0, array.dtype, list(array.shape), array.ctypes.data)
        return _BoundRun(self._session, binding, tuple(arrays.values()))

    def close(self) -> None:
        """Release the graph; safe to call twice."""
        self._session = None


class _BoundRun:
    """A run on fixed buffers, which it keeps alive: the binding only knows their addresses."""

    def __init__(
        self, session: ort.InferenceSession, binding: ort.IOBinding, buffers: tuple[NDArray[Any], ...]
    ) -> None:
        self._session, self._binding, self._buffers = session, binding, buffers

    def __call__(self) -> None:
        self._session.run_with_iobinding(self._binding)
