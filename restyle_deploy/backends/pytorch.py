"""PyTorch on the CPU or a GPU: a graph's nodes as torch calls, what follows a convolution by our kernels on a GPU.

An engine is a graph that a plan has rewritten, with its weights in the types of the precision. The exported graphs run
as well, and are typed when they are loaded.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from restyle_deploy.backends import cpu
from restyle_deploy.backends.base import (
    DEFAULT_REQUEST,
    BuildRequest,
    BuildTarget,
    EngineOptions,
    RunnerOptions,
    check_buffers,
    refuse_engine_options,
)
from restyle_deploy.backends.cpu import plugin_hash as plugin_hash  # kernels are in no engine: they are launched
from restyle_deploy.backends.pytorch_execution import CudaExecution, Execution, HostExecution
from restyle_deploy.device_array import Array
from restyle_deploy.errors import BackendUnavailableError, BuildError, DeviceError, RestyleDeployError
from restyle_deploy.tensors import TensorSpec

ENGINE_OPTIONS: frozenset[str] = frozenset()
ENGINE_SUFFIX = ".typed.onnx"
ENGINE_BATCH: int | None = None

_CPU = "cpu"
_CPU_PRECISIONS = ("fp32", "bf16")
_CUDA_PRECISIONS = ("fp32", "tf32", "fp16", "bf16")
_NO_MEMORY = "meta"
# Tensor cores read the channels of a pixel side by side; in float32 without them cuDNN is faster on planes.
_CHANNELS_LAST_PRECISIONS = ("tf32", "fp16", "bf16")
_AMPERE = (8, 0)


def devices() -> tuple[str, ...]:
    """Return the devices that can run here: the CPU, and GPUs where torch was built for CUDA."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return (_CPU, *(f"cuda:{index}" for index in range(count)))


def library_versions() -> Mapping[str, str]:
    """Return the version of torch."""
    return {"torch": str(torch.__version__)}


def check_options(options: RunnerOptions) -> None:
    """Raise `BackendUnavailableError` unless this machine can run with these options."""
    if options.device not in devices():
        mend = ""
        if options.device.startswith("cuda:") and not torch.backends.cuda.is_built():
            mend = "; this torch was built without CUDA: see https://pytorch.org/get-started for one with it"
        raise BackendUnavailableError(
            f"backend pytorch: device {options.device!r} cannot run here; available: {', '.join(devices())}{mend}"
        )
    known = _CPU_PRECISIONS if options.device == _CPU else _CUDA_PRECISIONS
    refusal = None if options.precision in known else f"on {options.device} known are {', '.join(known)}"
    if refusal is None and options.precision in ("tf32", "bf16") and options.device != _CPU:
        found = torch.cuda.get_device_capability(options.device)
        refusal = None if found >= _AMPERE else f"it needs sm_80, this GPU is sm_{found[0]}{found[1]}"
    if refusal is not None:
        raise BackendUnavailableError(f"backend pytorch: precision {options.precision} cannot run here: {refusal}")
    if options.device != _CPU:
        from restyle_deploy.ops.compiler import check_available

        check_available()


def processors(device: str) -> tuple[str, ...]:
    """Return this machine's processor, or the GPU's compute capability, "sm_89" style."""
    if device == _CPU:
        return cpu.processors(device)
    major, minor = torch.cuda.get_device_capability(device)
    return (f"sm_{major}{minor}",)


def check_build(options: RunnerOptions, engine: EngineOptions) -> BuildTarget:
    """Find out whether the options can run here; engines are for this processor. See `Backend.check_build`."""
    refuse_engine_options("pytorch", engine, ENGINE_OPTIONS)
    check_options(options)
    (processor,) = processors(options.device)
    return BuildTarget(processor=processor, refusal=None, has_kernels=options.device != _CPU, facts={})


def check_graph(graph: Path, options: RunnerOptions, request: BuildRequest) -> Mapping[str, Any]:
    """Convert a graph without its weights; return the number of calls that it becomes."""
    with _refusal(graph):
        from restyle_deploy.backends.pytorch_graph import prepare, read_exported

        module = _convert(prepare(read_exported(graph), options.precision), device=_NO_MEMORY)
    return {"calls": sum(node.op == "call_function" for node in module.graph.nodes)}


def build(
    graph: Path, engine: Path, options: RunnerOptions, request: BuildRequest = DEFAULT_REQUEST
) -> Mapping[str, Any]:
    """Type a graph to the precision and write it, its weights in a file beside it; see `Backend.build`."""
    check_options(options)
    with _refusal(graph):
        from restyle_deploy.backends.pytorch_graph import prepare, read_exported, save

        model = prepare(read_exported(graph), options.precision)
        _convert(model, device=_NO_MEMORY)
    save(model, engine)
    return {}


def load(
    file: Path,
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    options: RunnerOptions,
    weights: Path | None = None,
) -> "PyTorchRunner":
    """Load an engine, or type an ONNX file (seconds for a large one) and load that; see `Backend.load`.

    With `options.is_compiled` the first run of each batch size compiles, for minutes.
    """
    check_options(options)
    execution: Execution = HostExecution(options.threads) if options.device == _CPU else CudaExecution(options)
    with _refusal(file):
        from restyle_deploy.backends.pytorch_graph import check_border, module_from_graph, prepare, read_exported

        model = read_exported(file)
        check_border(model, inputs, outputs)
        if not file.name.endswith(ENGINE_SUFFIX):
            model = prepare(model, options.precision)
        module: Callable[..., Any] = module_from_graph(
            model,
            [spec.name for spec in inputs],
            [spec.name for spec in outputs],
            device=options.device,
            channels_last=options.precision in _CHANNELS_LAST_PRECISIONS,
        )
    if options.is_compiled:
        module = torch.compile(module, dynamic=False)
    return PyTorchRunner(module, inputs, outputs, execution)


class PyTorchRunner:
    """A graph as a torch module; satisfies `Runner`."""

    is_capturable = True

    def __init__(
        self,
        module: Callable[..., Any],
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        execution: Execution,
    ) -> None:
        """Take a module from the inputs to a tuple of the outputs, both in the order of the specs."""
        self._module: Callable[..., Any] | None = module
        self._inputs, self._outputs = inputs, outputs
        self._execution: Execution | None = execution

    def bind(self, buffers: Mapping[str, Array]) -> Callable[[], None]:
        """Bind buffers of the device; see `Runner.bind`.

        On a GPU the first run of a batch size compiles our kernels and lets cuDNN measure; from the second on, all
        memory is there.

        Raises:
            TypeError, ValueError: the buffers lie in the memory of another device, or the runner is closed.
        """
        if self._module is None or self._execution is None:
            raise ValueError("the runner is closed")
        check_buffers(buffers, self._inputs + self._outputs)
        tensors = self._execution.tensors_of(buffers)
        return _BoundRun(
            self._module,
            self._execution,
            [tensors[spec.name] for spec in self._inputs],
            [tensors[spec.name] for spec in self._outputs],
            tuple(buffers.values()),
        )

    def close(self) -> None:
        """Release the graph, and memory of runs once no bound one is left; safe to call twice."""
        self._module = self._execution = None


class _BoundRun:
    """A run on fixed buffers, which it keeps alive: the tensors are views of them."""

    def __init__(
        self,
        module: Callable[..., Any],
        execution: Execution,
        inputs: list[Tensor],
        outputs: list[Tensor],
        buffers: tuple[Array, ...],
    ) -> None:
        self._module, self._execution, self._buffers = module, execution, buffers
        self._inputs, self._outputs = inputs, outputs

    def __call__(self) -> None:
        try:
            self._run()
        except DeviceError as error:
            if not isinstance(error.__cause__, torch.OutOfMemoryError) or not self._execution.free_what_is_kept():
                raise
            self._run()

    def _run(self) -> None:
        with self._execution.scope(), torch.inference_mode():
            for output, value in zip(self._outputs, self._module(*self._inputs), strict=True):
                output.copy_(value)


def _convert(model: Any, *, device: str) -> fx.GraphModule:
    from restyle_deploy.backends.pytorch_graph import module_from_graph

    names = [[str(value.name) for value in values] for values in (model.graph.inputs, model.graph.outputs)]
    return module_from_graph(model, *names, device=device)


@contextmanager
def _refusal(file: Path) -> Iterator[None]:
    """Turn what reading a graph raises, which has no common base, into a `BuildError` of one line."""
    try:
        yield
    except RestyleDeployError:
        raise
    except ModuleNotFoundError as error:
        raise BackendUnavailableError(
            f"backend pytorch needs {error.name} to read graphs; run: pip install 'restyle-deploy[pytorch]'"
        ) from error
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise BuildError(f"PyTorch {torch.__version__} refuses {file.name}: {reason}") from error
