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
        module: a module that satisfies `backends.base.Backend`; imported on demand.
        library: the import name of the library that the module needs.
        extra: the extra of this package that installs the library.
    """

    module: str
    library: str
    extra: str


BACKENDS: Mapping[str, BackendRow] = MappingProxyType(
    {
        "onnxruntime": BackendRow(
            module="restyle_deploy.backends.onnxruntime", library="onnxruntime", extra="onnxruntime"
        ),
        "openvino": BackendRow(module="restyle_deploy.backends.openvino", library="openvino", extra="openvino"),
    }
)


def load_backend(name: str) -> Backend:
    """Import a backend.

    Raises:
        ValueError: no such row.
        BackendUnavailableError: the backend's library is not installed. Any other import error passes through.
    """
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; known are {', '.join(BACKENDS)}")
    row = BACKENDS[name]
    try:
        return cast(Backend, importlib.import_module(row.module))
    except ModuleNotFoundError as error:
        if error.name != row.library:
            raise
        raise BackendUnavailableError(
            f"backend {name} needs {row.library}, which is not installed; "
            f"run: pip install 'restyle-deploy[{row.extra}]'"
        ) from error
