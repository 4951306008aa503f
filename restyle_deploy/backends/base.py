"""What a backend module offers. The session knows nothing else of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from restyle_deploy.device_array import Array
from restyle_deploy.errors import ShapeError
from restyle_deploy.tensors import TensorSpec

EXACT_PRECISION = "fp32"
# Computed in another one, results differ by more than rounding.
UNIFORM_PRECISIONS = (EXACT_PRECISION, "tf32", "fp16", "bf16")
# The encoder in float32, whose rounding the latents keep; the generator, which takes most of the time, in bfloat16.
MIXED_PRECISION = "mixed"
PRECISIONS = (*UNIFORM_PRECISIONS, MIXED_PRECISION)
_MIXED: Mapping[str, str] = MappingProxyType(
    {"encoder": EXACT_PRECISION, "target": EXACT_PRECISION, "generator": "bf16", "preview": "bf16"}
)
# The graphs that see images; `target` is the part of an encoder that sees only the target.
ENCODER_ROLES = frozenset({"encoder", "target"})
# Of one run: no GPU's memory holds the maps of more, and from 2³¹ on TensorRT's bindings end in errors of their own.
MOST_IMAGES = 65535
# The plugin route of an engine that has none of our kernels.
WITHOUT_PLUGINS = "functions"
# Names of `EngineOptions` on a command line.
OPTION_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "min_batch": "min-batch",
        "opt_batch": "opt-batch",
        "max_batch": "max-batch",
        "workspace_bytes": "workspace",
        "optimization_level": "optimization-level",
        "compute_capabilities": "compute-capability",
        "hardware_compatible": "hardware-compatible",
        "version_compatible": "version-compatible",
        "stripped": "stripped",
        "no_plugins": "no-plugins",
    }
)


def precision_of_graph(precision: str, role: str) -> str:
    """Return what a graph (`encoder`, `target`, `generator`, `preview`) computes in: one of `UNIFORM_PRECISIONS`."""
    return _MIXED[role] if precision == MIXED_PRECISION else precision


class Queue(Protocol):
    """The queue of a GPU that runs are enqueued on, and working memory that all graphs of a session share.

    Attributes:
        stream: a `CUstream` as a number.
    """

    stream: int

    def reserve_scratch(self, nbytes: int) -> None:
        """Ask for working memory, while graphs are loaded; the largest request counts."""
        ...

    def scratch_address(self) -> int:
        """Return the address of the working memory; from the first call on it stays where it is."""
        ...


@dataclass(frozen=True, kw_only=True)
class RunnerOptions:
    """How a graph is run.

    Attributes:
        device: one of the backend's `devices()`.
        threads: CPU threads of one run; None leaves the choice to the library.
        precision: one of `PRECISIONS`, in which the library computes; inputs and outputs are float32 in any case.
            A backend's `build` and `load` are given one of `UNIFORM_PRECISIONS`.
        host_code_allowed: whether an engine may bring code of its own for the host, as version-compatible ones do.
        plugin_route: how our kernels are in the engine, by its record; None: as the backend would put them into one.
        queue: of the GPU, owned by the session; None on the CPU, and where graphs are built but not run.
        role: of the graph, as `encoder`; empty where it is none of a bundle's. What a shorter precision would spoil a
            backend may compute by it in another way.
        is_compiled: whether torch may compile what it runs, which takes minutes; other backends ignore it.
    """

    device: str = "cpu"
    threads: int | None = None
    precision: str = EXACT_PRECISION
    host_code_allowed: bool = False
    plugin_route: str | None = None
    queue: Queue | None = None
    role: str = ""
    is_compiled: bool = False

    def for_graph(self, role: str) -> "RunnerOptions":
        """Return the options of one graph, with its role, whose precision is one of `UNIFORM_PRECISIONS`."""
        return replace(self, role=role, precision=precision_of_graph(self.precision, role))


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What an engine is made for, and how, beside `RunnerOptions`. A backend takes those that it names.

    Attributes:
        min_batch, opt_batch, max_batch: images of one run: the fewest, those to be fastest for, the most.
        workspace_bytes: memory of the device that one operation may use for itself.
        optimization_level: 0 to 5; higher ones build for longer.
        compute_capabilities: of the devices that it is for, such as "8.9", wherever it is built.
        hardware_compatible: whether it shall run on newer devices too.
        version_compatible: whether it shall run with newer versions of the library too, of the same major.
        stripped: whether it leaves the weights out, which are then taken from the bundle's graphs when it is loaded.
        no_plugins: whether the library's own operations take the place of our kernels.
    """

    min_batch: int | None = None
    opt_batch: int | None = None
    max_batch: int | None = None
    workspace_bytes: int | None = None
    optimization_level: int | None = None
    compute_capabilities: tuple[str, ...] = ()
    hardware_compatible: bool = False
    version_compatible: bool = False
    stripped: bool = False
    no_plugins: bool = False

    @property
    def given(self) -> dict[str, Any]:
        """Those that are not left to the backend, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            name: value for name, value in values.items() if value is not None and value is not False and value != ()
        }

    @property
    def arguments(self) -> list[str]:
        """Those that are not left to the backend, as the command line has them."""
        arguments = []
        for name, value in self.given.items():
            for one in value if isinstance(value, tuple) else (value,):
                arguments += [f"--{OPTION_NAMES[name]}", *([] if one is True else [str(one)])]
        return arguments


@dataclass(frozen=True, kw_only=True)
class BuildRequest:
    """How a backend builds one graph.

    Attributes:
        engine: what the engine is made for.
        cache: a folder that keeps what one build measures for the next; None for no such folder.
        progress: told a few words as the library's work goes on.
    """

    engine: EngineOptions = EngineOptions()
    cache: Path | None = None
    progress: Callable[[str], None] = lambda text: None


DEFAULT_REQUEST = BuildRequest()


@dataclass(frozen=True, kw_only=True)
class BuildTarget:
    """What engines of a build are for.

    Attributes:
        processor: as an engine's record has it.
        refusal: why they cannot run on this machine; None where they can.
        has_kernels: whether our own kernels compute the operators of the domain `restyle_deploy`.
        facts: for an engine's record, in plain values.
    """

    processor: str
    refusal: str | None
    has_kernels: bool
    facts: Mapping[str, Any]


class Runner(Protocol):
    """A loaded graph. Owned by the session, which closes it.

    Attributes:
        is_capturable: whether a CUDA graph can record its runs, once each of them has run; true on the CPU.
    """

    is_capturable: bool

    def bind(self, buffers: Mapping[str, Array]) -> Callable[[], None]:
        """Bind the caller's buffers once and return a function that runs the graph on them, again and again.

        On the CPU a run is complete when the function returns. On a GPU the function only enqueues on the stream of
        `RunnerOptions.queue`: it waits for nothing and, from its second call on, allocates nothing.
        A backend may compile the graph when it first meets a batch size: that takes seconds for a large one.

        Args:
            buffers: one array per input and output, of the spec's dtype and shape at one batch size, C-contiguous, in
                the device's memory; the run reads and writes them in place, and they stay alive as long as the
                function does.
        Raises:
            ShapeError: a buffer is missing or does not fit its spec.
            BuildError: the library refuses the graph for this batch size.
            ValueError: the runner is closed.
        """
        ...

    def close(self) -> None:
        """Release the graph; safe to call twice."""
        ...


class Backend(Protocol):
    """A backend module."""

    ENGINE_SUFFIX: str
    """Suffix of the engine files that `build` writes."""

    ENGINE_BATCH: int | None
    """1 where engines are best built for single images, which a session runs one by one; None for any number."""

    ENGINE_OPTIONS: frozenset[str]
    """Names of the `EngineOptions` that `build` takes."""

    def devices(self) -> tuple[str, ...]:
        """Return the devices that can run here, as `Session.open` takes them."""
        ...

    def library_versions(self) -> Mapping[str, str]:
        """Return the versions of the libraries that run the graphs."""
        ...

    def check_options(self, options: RunnerOptions) -> None:
        """Find out, without a graph, whether this machine can run with these options.

        Raises:
            BackendUnavailableError: the device or the precision cannot run here; the message says why.
        """
        ...

    def processors(self, device: str) -> tuple[str, ...]:
        """Return what an engine's record may name as `processor` to run on one of the `devices`."""
        ...

    def plugin_hash(self) -> str | None:
        """Return the hash of the kernels that `build` puts into engines; None where it has none."""
        ...

    def check_build(self, options: RunnerOptions, engine: EngineOptions) -> BuildTarget:
        """Find out, without a graph, whether engines can be built here with these options, and what they will be for.

        Raises:
            BackendUnavailableError: see `check_options`, though some libraries build for a device that is not here.
            ValueError: an option that this library does not have, or options that contradict each other.
        """
        ...

    def build(
        self, graph: Path, engine: Path, options: RunnerOptions, request: BuildRequest = DEFAULT_REQUEST
    ) -> Mapping[str, Any]:
        """Turn an ONNX file into an engine file, which loads faster and runs on such a machine only.

        Args:
            graph: the ONNX file; weights inside it, or as external data beside it.
            engine: the file to write, in a folder that exists; the names of files beside it begin with its stem.
            options: how the engine will be run.
            request: how it is built.
        Returns:
            Facts for the engine's record, in plain values.
        Raises:
            BackendUnavailableError, ValueError: see `check_build`.
            BuildError: the library refuses the graph.
        """
        ...

    def check_graph(self, graph: Path, options: RunnerOptions, request: BuildRequest) -> Mapping[str, Any]:
        """Find out whether the library takes a graph, as far as that is known without building it.

        Returns:
            Facts for people, in plain values.
        Raises:
            BuildError: the library refuses the graph.
        """
        ...

    def load(
        self,
        file: Path,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        options: RunnerOptions,
        weights: Path | None = None,
    ) -> Runner:
        """Load an ONNX file, or an engine that `build` wrote on such a machine with the same library.

        Args:
            file: the ONNX file or the engine.
            inputs, outputs: its border.
            options: how it is run.
            weights: the ONNX file that a stripped engine was built from.
        Raises:
            BackendUnavailableError: see `check_options`.
            BuildError: the library refuses the file.
        """
        ...


def refuse_engine_options(backend: str, engine: EngineOptions, taken: frozenset[str]) -> None:
    """Raise `ValueError` if options are given that a backend does not take."""
    unknown = [name for name in engine.given if name not in taken]
    if unknown:
        known = ", ".join(f"--{name}" for option, name in OPTION_NAMES.items() if option in taken)
        others = f"; it has {known}" if known else ", nor any other option of engines; leave out what it has not"
        raise ValueError(f"backend {backend} has no {', '.join(f'--{OPTION_NAMES[name]}' for name in unknown)}{others}")


def check_buffers(buffers: Mapping[str, Array], specs: tuple[TensorSpec, ...]) -> None:
    """Raise `ShapeError` unless there is a fitting buffer for each spec, all of one batch size."""
    missing = [spec.name for spec in specs if spec.name not in buffers]
    if missing:
        raise ShapeError(f"no buffer for {', '.join(missing)}; got {', '.join(buffers) or 'none'}")
    first = buffers[specs[0].name]
    batch = first.shape[0] if first.ndim else 1
    for spec in specs:
        spec.check(buffers[spec.name], batch)
