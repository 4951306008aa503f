"""What a backend module offers. The session knows nothing else of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from restyle_deploy.errors import ShapeError
from restyle_deploy.tensors import TensorSpec


@dataclass(frozen=True, kw_only=True)
class RunnerOptions:
    """How a graph is run.

    Attributes:
        device: one of the backend's `devices()`.
        threads: CPU threads of one run; None leaves the choice to the library.
    """

    device: str = "cpu"
    threads: int | None = None


class Runner(Protocol):
    """A loaded graph. Owned by the session, which closes it."""

    def bind(self, buffers: Mapping[str, NDArray[Any]]) -> Callable[[], None]:
        """Bind the caller's buffers once and return a function that runs the graph on them, again and again.

        Args:
            buffers: one array per input and output, of the spec's dtype and shape at one batch size, C-contiguous;
                the run reads and writes them in place, and they stay alive as long as the function does.
        Raises:
            ShapeError: a buffer is missing or does not fit its spec.
            ValueError: the runner is closed.
        """
        ...

    def close(self) -> None:
        """Release the graph; safe to call twice."""
        ...


class Backend(Protocol):
    """A backend module."""

    def devices(self) -> tuple[str, ...]:
        """Return the devices that can run here, as `Session.open` takes them."""
        ...

    def library_versions(self) -> Mapping[str, str]:
        """Return the versions of the libraries that run the graphs."""
        ...

    def load(
        self, graph: Path, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], options: RunnerOptions
    ) -> Runner:
        """Load an ONNX file.

        Raises:
            BackendUnavailableError: the device cannot run here.
            BuildError: the library refuses the graph.
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
