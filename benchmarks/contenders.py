"""What the speed table compares: one row per way to run the same model. A new way is one row here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

from numpy.typing import NDArray

from benchmarks.processes import UnavailableError
from restyle_deploy.bundle import read_bundle
from restyle_deploy.runtime.session import InversionResult, Session

if TYPE_CHECKING:
    from restyle_deploy.models.restyle import RestyleModel

BASELINE = "upstream"
REFERENCE = "torch"

# glibc hands large blocks back to the kernel at once, which zeroes each page again at the next tensor: torch's default
# pays for that on CPUs. These settings keep the memory in the process.
KEEP_MEMORY: Mapping[str, str] = MappingProxyType(
    {
        "MALLOC_MMAP_THRESHOLD_": "2000000000",
        "MALLOC_TRIM_THRESHOLD_": "8000000000",
        "MALLOC_TOP_PAD_": "200000000",
    }
)


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """A model of the table.

    Attributes:
        name: in the table.
        bundle: its bundle.
        checkpoint: the file that the bundle was exported from; where there is none, torch's model is rebuilt from the
            bundle.
    """

    name: str
    bundle: Path
    checkpoint: Path | None = None


class Inverter(Protocol):
    """An opened contender."""

    def invert(self, images: NDArray[Any], *, steps: int) -> InversionResult:
        """Invert images as `Session.invert` does."""
        ...


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A row of the table.

    Attributes:
        name: for `--contenders`.
        label: for the table.
        open: load a model with so many threads; None leaves the choice to the library.
        libraries: imported before the loading is timed.
        engine: backend and precision of the engine that it needs.
        is_approximate: whether it may differ from float32 by more than rounding.
        environment: variables of its process.
    """

    name: str
    label: str
    open: Callable[[ModelFiles, int | None], Inverter]
    libraries: tuple[str, ...]
    engine: tuple[str, str] | None = None
    is_approximate: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)


class _TorchInverter:
    """A torch model, called as a session is."""

    def __init__(self, model: RestyleModel, average_image: NDArray[Any]) -> None:
        self._model, self._average_image = model, average_image

    def invert(self, images: NDArray[Any], *, steps: int) -> InversionResult:
        from restyle_deploy.reference import invert_with_model

        return invert_with_model(self._model, images, average_image=self._average_image, steps=steps)


def _open_torch(files: ModelFiles, threads: int | None, *, change: Callable[[Any], Any]) -> Inverter:
    import torch

    from restyle_deploy.checkpoint import load_checkpoint
    from restyle_deploy.models.restyle import model_from_checkpoint
    from restyle_deploy.reference import model_from_bundle

    if threads is not None:
        torch.set_num_threads(threads)
    bundle = read_bundle(files.bundle)
    if files.checkpoint is None:
        model = model_from_bundle(bundle)
    else:
        model = model_from_checkpoint(load_checkpoint(files.checkpoint))
    return _TorchInverter(change(model), bundle.average_image)


def _open_reference(files: ModelFiles, threads: int | None) -> Inverter:
    return _open_torch(files, threads, change=lambda model: model)


def _open_upstream(files: ModelFiles, threads: int | None) -> Inverter:
    from benchmarks.upstream_arithmetic import UpstreamArithmetic

    return _open_torch(files, threads, change=UpstreamArithmetic.from_model)


def _open_compiled(files: ModelFiles, threads: int | None) -> Inverter:
    import torch

    def change(model: RestyleModel) -> RestyleModel:
        model.encode = torch.compile(model.encode, dynamic=False)  # type: ignore[method-assign]
        model.generate = torch.compile(model.generate, dynamic=False)  # type: ignore[method-assign]
        return model

    return _open_torch(files, threads, change=change)


def _session(backend: str, **options: Any) -> Callable[[ModelFiles, int | None], Inverter]:
    """Return a function that opens a session; one without `plain` needs an engine."""

    def open_session(files: ModelFiles, threads: int | None) -> Inverter:
        session = Session.open(files.bundle, backend=backend, threads=threads, **options)
        description = session.describe()
        if not options.get("plain") and description["plan"] == "plain":
            raise UnavailableError("the bundle has no engine for it")
        if options.get("preview_steps") and not description["preview_steps"]:
            raise UnavailableError("this model renders the encoder's size: preview steps skip nothing")
        return session

    return open_session


_TORCH = ("torch", "onnx", "restyle_deploy.reference", "restyle_deploy.checkpoint")
_COMPILE = (*_TORCH, "torch._dynamo", "torch._inductor")
_ONNXRUNTIME, _OPENVINO = ("onnxruntime",), ("openvino",)

_ROWS = (
    Contender(
        name=BASELINE,
        label="upstream's arithmetic, torch",
        open=_open_upstream,
        libraries=(*_TORCH, "benchmarks.upstream_arithmetic"),
    ),
    Contender(
        name="upstream-kept",
        label="upstream's arithmetic, torch, memory kept",
        open=_open_upstream,
        libraries=(*_TORCH, "benchmarks.upstream_arithmetic"),
        environment=KEEP_MEMORY,
    ),
    Contender(name=REFERENCE, label="our model, torch", open=_open_reference, libraries=_TORCH),
    Contender(
        name="torch-kept",
        label="our model, torch, memory kept",
        open=_open_reference,
        libraries=_TORCH,
        environment=KEEP_MEMORY,
    ),
    Contender(name="torch-compile", label="our model, torch.compile", open=_open_compiled, libraries=_COMPILE),
    Contender(
        name="onnxruntime-plain",
        label="ONNX Runtime, exported graphs",
        open=_session("onnxruntime", plain=True),
        libraries=_ONNXRUNTIME,
    ),
    Contender(
        name="onnxruntime",
        label="ONNX Runtime, engine",
        open=_session("onnxruntime"),
        libraries=_ONNXRUNTIME,
        engine=("onnxruntime", "fp32"),
    ),
    Contender(
        name="onnxruntime-preview",
        label="ONNX Runtime, engine, preview steps",
        open=_session("onnxruntime", preview_steps=True),
        libraries=_ONNXRUNTIME,
        engine=("onnxruntime", "fp32"),
        is_approximate=True,
    ),
    Contender(
        name="openvino-plain",
        label="OpenVINO, exported graphs",
        open=_session("openvino", plain=True),
        libraries=_OPENVINO,
    ),
    Contender(
        name="openvino",
        label="OpenVINO, engine float32",
        open=_session("openvino"),
        libraries=_OPENVINO,
        engine=("openvino", "fp32"),
    ),
    Contender(
        name="openvino-preview",
        label="OpenVINO, engine float32, preview steps",
        open=_session("openvino", preview_steps=True),
        libraries=_OPENVINO,
        engine=("openvino", "fp32"),
        is_approximate=True,
    ),
    Contender(
        name="openvino-bf16",
        label="OpenVINO, engine bf16",
        open=_session("openvino", precision="bf16"),
        libraries=_OPENVINO,
        engine=("openvino", "bf16"),
        is_approximate=True,
    ),
    Contender(
        name="openvino-mixed",
        label="OpenVINO, engine mixed: encoder float32, generator bf16",
        open=_session("openvino", precision="mixed"),
        libraries=_OPENVINO,
        engine=("openvino", "mixed"),
        is_approximate=True,
    ),
)
CONTENDERS: Mapping[str, Contender] = MappingProxyType({row.name: row for row in _ROWS})
