"""ONNX Runtime on the CPU, with bound and preallocated inputs and outputs."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnxruntime as ort
from numpy.typing import NDArray

from restyle_deploy.backends.base import RunnerOptions, check_buffers
from restyle_deploy.errors import BackendUnavailableError, BuildError
from restyle_deploy.tensors import TensorSpec

_ERRORS_ONLY = 3


def devices() -> tuple[str, ...]:
    """Return the devices that can run here."""
    return ("cpu",)


def library_versions() -> Mapping[str, str]:
    """Return the version of ONNX Runtime."""
    return {"onnxruntime": ort.__version__}


def load(
    graph: Path, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], options: RunnerOptions
) -> "OnnxRuntimeRunner":
    """Load an ONNX file; seconds for a large one, as constants are folded and weights packed."""
    if options.device not in devices():
        raise BackendUnavailableError(
            f"backend onnxruntime: device {options.device!r} cannot run here; available: {', '.join(devices())}"
        )
    settings = ort.SessionOptions()
    settings.log_severity_level = _ERRORS_ONLY
    if options.threads is not None:
        settings.intra_op_num_threads = options.threads
    try:
        session = ort.InferenceSession(str(graph), settings, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions have no other common base
        reason = str(error).partition("\n")[0]
        raise BuildError(f"ONNX Runtime {ort.__version__} refuses {graph.name}: {reason}") from error
    return OnnxRuntimeRunner(session, inputs, outputs)


class OnnxRuntimeRunner:
    """A graph loaded in ONNX Runtime; satisfies `Runner`."""

    def __init__(
        self, session: ort.InferenceSession, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]
    ) -> None:
        self._session: ort.InferenceSession | None = session
        self._inputs = inputs
        self._outputs = outputs

    def bind(self, buffers: Mapping[str, NDArray[Any]]) -> Callable[[], None]:
        """Bind host buffers; see `Runner.bind`."""
        if self._session is None:
            raise ValueError("the runner is closed")
        check_buffers(buffers, self._inputs + self._outputs)
        binding = self._session.io_binding()
        for specs, bind_one in ((self._inputs, binding.bind_input), (self._outputs, binding.bind_output)):
            for spec in specs:
                array = buffers[spec.name]
                bind_one(spec.name, "cpu", 0, array.dtype, list(array.shape), array.ctypes.data)
        return _BoundRun(self._session, binding, tuple(buffers.values()))

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
