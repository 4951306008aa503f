"""The one table of backends. A new backend is one file and one row here."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import cast

from restyle_deploy.backends.base import Backend
from restyle_deploy.errors import BackendUnavailableError


@dataclass(frozen=True, kw_only=True)
class BackendRow:
    """Where a backend is, and what it needs.

    Attributes:
        module: a module that satisfies `backends.base.Backend`, or has the factory; imported on demand.
        library: the import name of the library that the module needs.
        extra: the extra of this package that installs the library.
        factory: the function of the module that returns the `Backend`; None where the module is one.
        device: that of a user who names none.
    """

    module: str
    library: str
    extra: str
    factory: str | None = None
    device: str = "cpu"


BACKENDS: Mapping[str, BackendRow] = MappingProxyType(
    {
        "onnxruntime": BackendRow(
            module="restyle_deploy.backends.onnxruntime", library="onnxruntime", extra="onnxruntime"
        ),
        "openvino": BackendRow(module="restyle_deploy.backends.openvino", library="openvino", extra="openvino"),
        "pytorch": BackendRow(module="restyle_deploy.backends.pytorch", library="torch", extra="pytorch"),
        "tensorrt": BackendRow(
            module="restyle_deploy.backends.tensorrt",
            library="tensorrt",
            extra="tensorrt",
            factory="tensorrt",
            device="cuda:0",
        ),
        "tensorrt-rtx": BackendRow(
            module="restyle_deploy.backends.tensorrt",
            library="tensorrt_rtx",
            extra="tensorrt-rtx",
            factory="tensorrt_rtx",
            device="cuda:0",
        ),
    }
)


def default_device(name: str) -> str:
    """Return the device of a user who names none; raise `ValueError` where there is no such backend."""
    return _row(name).device


def load_backend(name: str) -> Backend:
    """Import a backend.

    Raises:
        ValueError: no such row.
        BackendUnavailableError: the backend's library is not installed. Any other import error passes through.
    """
    row = _row(name)
    try:
        module = importlib.import_module(row.module)
        return cast(Backend, getattr(module, row.factory)() if row.factory else module)
    except ModuleNotFoundError as error:
        # TensorRT is split into packages of which one may be there alone: tensorrt, tensorrt_bindings, tensorrt_libs.
        if error.name not in (row.library, f"{row.library}_bindings", f"{row.library}_libs"):
            raise
        raise BackendUnavailableError(
            f"backend {name} needs {row.library}, which is not installed; "
            f"run: pip install 'restyle-deploy[{row.extra}]'"
        ) from error


def _row(name: str) -> BackendRow:
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; known are {', '.join(BACKENDS)}")
    return BACKENDS[name]
