"""What a backend module offers. The session knows nothing else of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from restyle_deploy.errors import ShapeError
from restyle_deploy.tensors import TensorSpec

EXACT_PRECISION = "fp32"
# Computed in another one, results differ by more than rounding.
PRECISIONS = (EXACT_PRECISION, "bf16")


@dataclass(frozen=True, kw_only=True)
class RunnerOptions:
    """How a graph is run.

    Attributes:
        device: one of the backend's `devices()`.
        threads: CPU threads of one run; None leaves the choice to the library.
        precision: one of `PRECISIONS`, in which the library computes; inputs and outputs are float32 in any case.
    """

    device: str = "cpu"
    threads: int | None = None
    precision: str = EXACT_PRECISION


class Runner(Protocol):
    """A loaded graph. Owned by the session, which closes it."""

    def bind(self, buffers: Mapping[str, NDArray[Any]]) -> Callable[[], None]:
        """Bind the caller's buffers once and return a function that runs the graph on them, again and again.

        A backend may compile the graph when it first meets a batch size: that takes seconds for a large one.

        Args:
            buffers: one array per input and output, of the spec's dtype and shape at one batch size, C-contiguous;
                the run reads and writes them in place, and they stay alive as long as the function does.
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

    def build(self, graph: Path, engine: Path, options: RunnerOptions) -> None:
        """Turn an ONNX file into an engine file, which loads faster and runs on such a machine only.

        Args:
            graph: the ONNX file; weights inside it, or as external data beside it.
            engine: the file to write, in a folder that exists; the names of files beside it begin with its stem.
            options: how the engine will be run.
        Raises:
            BackendUnavailableError: see `check_options`.
            BuildError: the library refuses the graph.
        """
        ...

    def load(
        self, file: Path, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], options: RunnerOptions
    ) -> Runner:
        """Load an ONNX file, or an engine that `build` wrote on such a machine with the same library.

        Raises:
            BackendUnavailableError: see `check_options`.
            BuildError: the library refuses the file.
        """
        ...


def check_buffers(buffers: Mapping[str, NDArray[Any]], specs: tuple[TensorSpec, ...]) -> None:
    """Raise `ShapeError` unless there is a fitting buffer for each spec, all of one batch size."""
    missing = [spec.name for spec in specs if spec.name not in buffers]
    if missing:
        raise ShapeError(f"no buffer for {', '.join(missing)}; got {', '.join(buffers) or 'none'}")
    first = buffers[specs[0].name]
    batch = first.shape[0] if first.ndim else 1
    for spec in specs:
        spec.check(buffers[spec.name], batch)
