"""`deploy.toml`: which bundle is run how, as `bench` decides it and `Session.open` takes it."""

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from restyle_deploy.backends import BACKENDS
from restyle_deploy.backends.base import PRECISIONS
from restyle_deploy.errors import BundleError
from restyle_deploy.files import replace_when_complete

SUFFIX = ".toml"
DEFAULT_STEPS = 5
_TYPES: Mapping[str, type] = {
    "bundle": str,
    "backend": str,
    "device": str,
    "precision": str,
    "plain": bool,
    "preview_steps": bool,
    "threads": int,
    "max_batch": int,
    "steps": int,
}


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """Which bundle is run how.

    Attributes:
        bundle: the directory.
        backend, device, precision, plain, preview_steps, threads, max_batch: see `Session.open`.
        steps: of an inversion that names none.
    """

    bundle: Path
    backend: str = "onnxruntime"
    device: str | None = None
    precision: str = "fp32"
    plain: bool = False
    preview_steps: bool = False
    threads: int | None = None
    max_batch: int | None = None
    steps: int = DEFAULT_STEPS


def read_deployment(path: str | Path) -> Deployment:
    """Read a file that `write_deployment` or a person wrote.

    Args:
        path: of the file. The bundle in it is relative to the file's folder.
    Raises:
        BundleError: the file is missing or no TOML, or a name or a value in it is not one of a deployment; all
            problems are named.
    """
    path = Path(path)
    values = _load(path)
    problems = [f"unknown {name}" for name in values if name not in _TYPES]
    for name, kind in _TYPES.items():
        if name in values and type(values[name]) is not kind:
            problems.append(f"{name} is {values[name]!r}, expected {_describe(kind)}")
        elif kind is int and values.get(name, 1) < 1:
            problems.append(f"{name} is {values[name]}, expected at least 1")
    if "bundle" not in values:
        problems.append("no bundle")
    for name, known in (("backend", tuple(BACKENDS)), ("precision", PRECISIONS)):
        if isinstance(values.get(name), str) and values[name] not in known:
            problems.append(f"{name} is {values[name]!r}, expected one of {', '.join(known)}")
    if problems:
        names = ", ".join(_TYPES)
        raise BundleError(f"{path}: no deployment: {'; '.join(problems)}. Known are {names}; only bundle is required")
    return Deployment(**{**values, "bundle": path.parent / values["bundle"]})


def write_deployment(path: str | Path, deployment: Deployment) -> None:
    """Write a file that `read_deployment` and `Session.open` read; it appears once it is complete.

    Args:
        path: of the file, in a folder that exists. The bundle is written relative to that, where there is a way.
        deployment: what to write; None is left out.
    Raises:
        OSError: the file cannot be written.
    """
    path = Path(path)
    values = {name: value for name, value in asdict(deployment).items() if value is not None}
    values["bundle"] = _relative(deployment.bundle, path.parent)
    lines = ["# Run by restyle_deploy.Session.open; the bundle is relative to this file."]
    lines += [f"{field.name} = {_toml(values[field.name])}" for field in fields(deployment) if field.name in values]
    with replace_when_complete(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _load(path: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BundleError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise BundleError(f"{path}: no TOML ({error})") from error


def _relative(bundle: Path, folder: Path) -> str:
    # ".." means the parent of what a link points to; the bundle's own name may be a link, which others may move on.
    place = os.path.join(os.path.realpath(bundle.absolute().parent), bundle.absolute().name)
    try:
        return Path(os.path.relpath(place, os.path.realpath(folder))).as_posix()
    except ValueError:  # on Windows, when the two are on different drives
        return bundle.absolute().as_posix()


def _toml(value: str | int | bool) -> str:
    """Return a value as TOML has it; its strings are those of JSON, but for one control character."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _describe(kind: type) -> str:
    return {str: "a string", bool: "true or false", int: "a whole number"}[kind]
