"""ONNX Runtime on a GPU: its CUDA provider on the session's stream, with runs that nothing waits for.

Options and run options: onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html and the library's
`onnxruntime_run_options_config_keys.h`.
"""

import contextlib
import io
import logging
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import onnxruntime as ort

from restyle_deploy.backends.base import Queue, RunnerOptions, check_buffers
from restyle_deploy.backends.cuda_devices import (
    device_arrays,
    device_error,
)
from restyle_deploy.device_array import Array, DeviceArray
from restyle_deploy.errors import BackendUnavailableError, BuildError
from restyle_deploy.runtime.device import (
    current_context,
    end_capture,
    find_devices,
    find_processor,
    index_of,
    primary_context,
)
from restyle_deploy.tensors import TensorSpec

LOGGER = logging.getLogger(__name__)

PROVIDER = "CUDAExecutionProvider"
# Its convolutions take no bfloat16.
PRECISIONS = ("fp32", "tf32", "fp16")
# From this release on the replays of its own CUDA graphs return at once; in former ones they wait, whatever the run's
# options say (pull request 28686, merged in June 2026).
FIRST_WITHOUT_WAITING = (1, 28)
# CUDA graphs of one ONNX Runtime session. It keeps each until it is closed; what is bound later runs without.
MOST_GRAPHS = 64
_AMPERE = 80
# What a run raises, in a private module, where the GPU or one of its libraries refuses; others are a program's errors.
_DEVICE_ERRORS = ("Fail", "RuntimeException", "EPFail", "RuntimeError")
# Of a graph that is typed already: an engine, or what one is built from.
_TYPED = "restyle_deploy.precision"


def has_provider() -> bool:
    """Whether the installed ONNX Runtime was built for CUDA."""
    return PROVIDER in ort.get_available_providers()


def find_cuda_devices() -> tuple[str, ...]:
    """Return the GPUs that ONNX Runtime can run on."""
    return find_devices()[0] if has_provider() else ()


def refusal_of_precision(options: RunnerOptions) -> str | None:
    """Return why a GPU of `find_cuda_devices` cannot run in a precision; None where it can."""
    if options.precision not in PRECISIONS:
        return f"on a GPU ONNX Runtime has {', '.join(PRECISIONS)}"
    processor = find_processor(options.device)
    if options.precision == "tf32" and int(processor.removeprefix("sm_")) < _AMPERE:
        return f"{processor} has no such instructions, sm_{_AMPERE} and newer have"
    return None


@contextmanager
def typed_graph(file: Path, precision: str) -> Iterator[Path]:
    """Yield an ONNX file in a precision: the file itself where that changes nothing, else a copy, removed afterwards.

    Raises:
        BuildError: it is no ONNX file.
    """
    if precision != "fp16":
        yield file
        return
    import onnx_ir as ir

    from restyle_deploy.graph.precision import set_precision

    try:
        model = ir.load(file)
    except Exception as error:  # of onnx_ir or protobuf, without a common base
        raise BuildError(f"ONNX Runtime {ort.__version__} refuses {file.name}: it is no ONNX file") from error
    if not model.graph.outputs:
        raise BuildError(f"ONNX Runtime {ort.__version__} refuses {file.name}: it is no ONNX file, as it has no output")
    if model.metadata_props.get(_TYPED) == precision:
        yield file
        return
    set_precision(model, precision)
    model.metadata_props[_TYPED] = precision  # which ONNX Runtime keeps in an optimised graph
    with tempfile.TemporaryDirectory(prefix="restyle-deploy-", ignore_cleanup_errors=True) as folder:
        path = Path(folder) / file.name
        ir.save(model, path, external_data=f"{file.stem}.data")
        yield path


def open_session(
    file: Path, settings: ort.SessionOptions, options: RunnerOptions, queue: Queue | None
) -> tuple[ort.InferenceSession, bool]:
    """Open a graph with the CUDA provider.

    Args:
        file: ONNX, in the precision.
        settings: for the session.
        options: device and precision.
        queue: whose stream it runs on; None for a graph that is optimised and not run.
    Returns:
        The session, and whether it captures its runs in CUDA graphs of its own.
    Raises:
        BackendUnavailableError: the provider's libraries cannot be loaded, which ONNX Runtime itself only warns of.
        Exception: whatever ONNX Runtime raises of a graph that it refuses.
    """
    _preload_libraries()
    captures = queue is not None and _release() >= FIRST_WITHOUT_WAITING
    try:
        session = _open(file, settings, provider_options(options, queue, captures=captures))
    except Exception as error:
        if not captures:
            raise
        # Nodes that it leaves to the CPU, mostly: the reason, if it is another one, is raised by the second try.
        LOGGER.info("%s: without CUDA graphs of ONNX Runtime's own: %s", file.name, str(error).partition("\n")[0])
        captures = False
        session = _open(file, settings, provider_options(options, queue, captures=False))
    if PROVIDER not in session.get_providers():
        raise BackendUnavailableError(
            f"backend onnxruntime: {PROVIDER} cannot be loaded, as libraries of CUDA or cuDNN are missing or of other "
            "versions; run: pip install 'restyle-deploy[onnxruntime-gpu]'"
        )
    return session, captures


def provider_options(options: RunnerOptions, queue: Queue | None, *, captures: bool) -> dict[str, str]:
    """Return the options of the CUDA provider.

    Memory grows by what is asked for, not by doubling; TF32, which is on by default, only where it is asked for.
    """
    settings = {
        "device_id": str(index_of(options.device)),
        "use_tf32": "1" if options.precision == "tf32" else "0",
        "arena_extend_strategy": "kSameAsRequested",
        "cudnn_conv_algo_search": "EXHAUSTIVE",
    }
    if queue is not None:
        settings["user_compute_stream"] = str(queue.stream)
    if captures:
        settings["enable_cuda_graph"] = "1"
    return settings


class OnnxRuntimeCudaRunner:
    """A graph loaded on a GPU; satisfies `Runner`. It enqueues on the session's stream and waits for nothing.

    ONNX Runtime's runs cannot be captured from outside, as it asks for memory in between; it captures them itself.
    """

    is_capturable = False

    def __init__(
        self,
        session: ort.InferenceSession,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        *,
        options: RunnerOptions,
        queue: Queue,
        captures: bool,
    ) -> None:
        """Take an open session; see `open_session` for the arguments."""
        self._session: ort.InferenceSession | None = session
        self._inputs, self._outputs = inputs, outputs
        self._device, self._queue = options.device, queue
        self._graphs_left = MOST_GRAPHS if captures else 0

    def bind(self, buffers: Mapping[str, Array]) -> Callable[[], None]:
        """Bind arrays of the GPU; see `Runner.bind`."""
        if self._session is None:
            raise ValueError("the runner is closed")
        check_buffers(buffers, self._inputs + self._outputs)
        arrays = device_arrays(buffers, self._device)
        binding = self._session.io_binding()
        for specs, bind_one in ((self._inputs, binding.bind_input), (self._outputs, binding.bind_output)):
            for spec in specs:
                array = arrays[spec.name]
                bind_one(spec.name, "cuda", array.device_index, array.dtype, list(array.shape), array.address)
        graph = None
        if self._graphs_left > 0:
            graph = MOST_GRAPHS - self._graphs_left + 1  # 0 is ONNX Runtime's own
            self._graphs_left -= 1
        return _BoundRun(
            self._session,
            binding,
            tuple(arrays.values()),
            stream=self._queue.stream,
            context=primary_context(index_of(self._device)),
            graph=graph,
        )

    def close(self) -> None:
        """Release the graph; safe to call twice."""
        self._session = None


class _BoundRun:
    """A run on fixed buffers, which it keeps alive: the binding only knows their addresses.

    ONNX Runtime keeps CUDA graphs by thread: the thread that runs first captures at once (ONNX Runtime repeats the run
    until it has), and others launch kernel by kernel.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        binding: ort.IOBinding,
        buffers: tuple[DeviceArray, ...],
        *,
        stream: int,
        context: int,
        graph: int | None,
    ) -> None:
        self._session, self._binding, self._buffers = session, binding, buffers
        self._stream, self._context = stream, context
        self._plain = _run_options(-1)
        self._captured = _run_options(graph) if graph is not None else None
        self._thread: int | None = None

    def __call__(self) -> None:
        with current_context(self._context):  # a run makes its device the thread's, and leaves it at that
            try:
                self._run()
            except Exception as error:  # its classes have no common base
                if type(error).__name__ not in _DEVICE_ERRORS:
                    raise
                raise device_error(f"ONNX Runtime {ort.__version__}", error) from error

    def _run(self) -> None:
        if self._captured is None:
            self._session.run_with_iobinding(self._binding, self._plain)
        elif self._thread is None:
            self._capture(self._captured)
        else:
            is_captured = self._thread == threading.get_ident()
            self._session.run_with_iobinding(self._binding, self._captured if is_captured else self._plain)

    def _capture(self, options: ort.RunOptions) -> None:
        self._thread = threading.get_ident()
        try:
            self._session.run_with_iobinding(self._binding, options)
        except Exception as error:
            LOGGER.warning("ONNX Runtime %s cannot capture a run in a CUDA graph: %s", ort.__version__, error)
            end_capture(self._stream)
            self._captured = None
            self._session.run_with_iobinding(self._binding, self._plain)


def _run_options(graph: int) -> ort.RunOptions:
    """Return options of a run that does not wait; `graph` numbers a CUDA graph, -1 forbids one."""
    options = ort.RunOptions()
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    options.add_run_config_entry("gpu_graph_id", str(graph))
    return options


def _open(file: Path, settings: ort.SessionOptions, provider: Mapping[str, str]) -> ort.InferenceSession:
    # Its own fallback prints to stdout.
    with current_context(primary_context(int(provider["device_id"]))):  # as in a run
        return ort.InferenceSession(str(file), settings, providers=[(PROVIDER, dict(provider))], enable_fallback=0)


def _release() -> tuple[int, ...]:
    return tuple(int(part) for part in ort.__version__.split(".")[:2])


@lru_cache(maxsize=1)
def _preload_libraries() -> None:
    """Load CUDA and cuDNN from NVIDIA's packages where these are installed; what it prints is logged."""
    if not hasattr(ort, "preload_dlls"):  # since 1.21
        return
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        ort.preload_dlls()
    for line in printed.getvalue().splitlines():
        LOGGER.info("%s", line)
