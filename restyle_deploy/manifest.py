"""What a manifest says, taken by type, and the files that it names: inside the directory, and unchanged."""

import json
import math
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from restyle_deploy.errors import BundleError
from restyle_deploy.files import sha256_of_file
from restyle_deploy.tensors import TensorSpec

PLAN_ORIGINS = ("tuned", "table")
# A manifest needs eight levels. What is nested without end would exhaust the stack of whoever walks it.
_MOST_LEVELS = 64

Value = TypeVar("Value")


def read_json(path: Path) -> Any:
    """Return what a JSON file holds; raise `ValueError` where it is no JSON, or nested too deeply for a manifest."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    _check_levels(content)
    return content


def typed(values: Mapping[str, Any], key: str, kind: type[Value]) -> Value:
    """Return `values[key]`; raise `KeyError` or `TypeError` unless there is one of this type."""
    return _check_type(values[key], key, kind)


def texts_from_json(values: Mapping[str, Any], key: str) -> Mapping[str, str]:
    """Return the object `values[key]`, all of whose values are texts; raise `KeyError` or `TypeError` otherwise."""
    texts = typed(values, key, dict)
    for name, text in texts.items():
        _check_type(text, f"{key}.{name}", str)
    return MappingProxyType(texts)


def specs_from_json(record: Mapping[str, Any], side: str) -> tuple[TensorSpec, ...]:
    """Return the inputs or outputs of a graph's record; raise `KeyError` or `TypeError` where there are none."""
    return tuple(
        TensorSpec(name=typed(spec, "name", str), dtype=typed(spec, "dtype", str), shape=_shape_from_json(spec))
        for spec in typed(record, side, list)
    )


def plan_from_json(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the plan of an engine's record: `origin`, `choices`, `measurements` (ms) and `seconds`, perhaps more.

    Raises:
        KeyError, TypeError, ValueError: something is missing or of another type, or a time is no time.
    """
    plan = typed(record, "plan", dict)
    if plan["origin"] not in PLAN_ORIGINS:
        raise ValueError(f"the plan's origin is {plan['origin']!r}, expected one of {', '.join(PLAN_ORIGINS)}")
    texts_from_json(plan, "choices")
    _check_time(plan["seconds"], "seconds")
    for site, times in typed(plan, "measurements", dict).items():
        for choice, time_ms in _check_type(times, f"measurements.{site}", dict).items():
            _check_time(time_ms, f"measurements.{site}.{choice}")
    return MappingProxyType(plan)


def build_from_json(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return how an engine was built: `verified`, `reason`, perhaps `options` and more.

    Raises:
        KeyError, TypeError, ValueError: one of the two is missing or of another type, an engine that is not verified
            has no reason, or the options are no texts.
    """
    build = typed(record, "build", dict)
    for option in _check_type(build.get("options", []), "build.options", list):
        _check_type(option, "build.options", str)
    is_verified, reason = typed(build, "verified", bool), build["reason"]
    if is_verified != (reason is None):
        raise ValueError(f"the build's reason is {reason!r}, expected {'none' if is_verified else 'a text'}")
    return MappingProxyType({**build, "reason": None if is_verified else typed(build, "reason", str)})


def path_inside(directory: Path, name: str, *, of: str, within: Path | None = None) -> Path:
    """Return `directory / name`; raise `BundleError` if it lies elsewhere, links followed.

    Args:
        directory: of the bundle or of an engine.
        name: as the manifest has it.
        of: what must hold the file, for the message.
        within: a narrower directory that must hold it, below which it has to be.
    """
    path = directory / name
    place, holder = path.resolve(), (within or directory).resolve()
    if not place.is_relative_to(holder) or (within and place == holder):
        raise BundleError(f"{directory}: {name} lies outside the {of}")
    return path


def check_hashes(expected: Mapping[Path, str], *, since: str, mend: str) -> None:
    """Hash files, several at a time, and compare.

    Args:
        expected: SHA-256 by file.
        since: what they have to be unchanged since, for the message.
        mend: what to do about it, for the message.
    Raises:
        BundleError: a file is missing or has changed; the first one in the order given.
    """
    for path in expected:
        if not path.is_file():  # before minutes of hashing
            raise BundleError(f"{path}: missing; {mend}")
    for path, sha256 in find_changes(expected).items():
        found = "missing" if sha256 is None else f"sha256 {sha256[:12]}…"
        raise BundleError(f"{path}: changed since the {since} ({found}, expected {expected[path][:12]}…); {mend}")


def find_changes(expected: Mapping[Path, str]) -> dict[Path, str | None]:
    """Hash files, several at a time, and return those that are not as expected, in the order given.

    Args:
        expected: SHA-256 by file.
    Returns:
        The SHA-256 that each of them has; None where there is no file.
    """
    there = [path for path in expected if path.is_file()]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing lets go of the interpreter's lock
        found = dict(zip(there, pool.map(sha256_of_file, there), strict=True))
    return {path: found.get(path) for path, sha256 in expected.items() if found.get(path) != sha256}


def _check_levels(content: Any) -> None:
    """Raise `ValueError` where lists and objects are nested too deeply."""
    level, count = [content], 0
    while level:
        if count > _MOST_LEVELS:
            raise ValueError("nested too deeply")
        holders = [value for value in level if isinstance(value, (dict, list))]
        level = [value for holder in holders for value in (holder.values() if isinstance(holder, dict) else holder)]
        count += 1


def _shape_from_json(spec: Mapping[str, Any]) -> tuple[int | str, ...]:
    shape = typed(spec, "shape", list)
    if not all(type(size) in (int, str) for size in shape):  # a bool would be an int
        raise TypeError(f"shape is {shape!r}, expected a list of sizes")
    return tuple(shape)


def _check_type(value: Any, name: str, kind: type[Value]) -> Value:
    if not isinstance(value, kind):
        raise TypeError(f"{name} is {value!r}, expected {kind.__name__}")
    return value


def _check_time(value: Any, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {value!r}, expected a number")
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} is {value!r}, expected a time")
