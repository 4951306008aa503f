"""JSON -> dataclasses, with all that is missing or of another type named at once."""

from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints


def parse(kind: Any, value: object, where: str, problems: list[str]) -> Any:
    """Return JSON's `value` as `kind`; note problems.

    Args:
        kind: a dataclass, a plain type, a literal, a tuple, a dict by strings, or one of them or None.
        value: what `json.loads` made.
        where: its place, for the problems' text.
        problems: gets one entry for each; the result is of use only if there is none.
    """
    if is_dataclass(kind) and isinstance(kind, type):
        return _parse_dataclass(kind, value, where, problems)
    arguments = get_args(kind)
    if isinstance(kind, UnionType):
        return None if value is None else parse(arguments[0], value, where, problems)
    origin = get_origin(kind)
    if origin is Literal:
        if value not in arguments:
            problems.append(f"{where} is {value!r}, not one of {', '.join(map(str, arguments))}")
        return value
    if origin is tuple and isinstance(value, list):
        return _parse_tuple(arguments, value, where, problems)
    if origin is dict and isinstance(value, Mapping):
        return {key: parse(arguments[1], item, f"{where}.{key}", problems) for key, item in value.items()}
    _check_plain(kind, value, where, problems)
    return value


def is_required(field: Field[Any]) -> bool:
    """Return whether a file must have the field."""
    return field.default is MISSING and field.default_factory is MISSING


def _parse_dataclass(kind: type, value: object, where: str, problems: list[str]) -> Any:
    if not isinstance(value, Mapping):
        problems.append(f"{where} is {type(value).__name__}, not an object")
        return None
    kinds = get_type_hints(kind)
    missing = [field.name for field in fields(kind) if is_required(field) and field.name not in value]
    problems.extend(f"{where}.{name} is missing" for name in missing)
    parsed = {
        field.name: parse(kinds[field.name], value[field.name], f"{where}.{field.name}", problems)
        for field in fields(kind)
        if field.name in value
    }
    return None if missing else kind(**parsed)


def _parse_tuple(arguments: tuple[Any, ...], value: list[Any], where: str, problems: list[str]) -> tuple[Any, ...]:
    """Parse a tuple of any length (`tuple[X, ...]`) or of a fixed one."""
    if arguments[-1] is Ellipsis:
        arguments = (arguments[0],) * len(value)
    if len(arguments) != len(value):
        problems.append(f"{where} has {len(value)} entries, not {len(arguments)}")
    pairs = zip(arguments, value, strict=False)
    return tuple(parse(kind, item, f"{where}[{index}]", problems) for index, (kind, item) in enumerate(pairs))


def _check_plain(kind: Any, value: object, where: str, problems: list[str]) -> None:
    plain = get_origin(kind) or kind
    if plain is object:
        return
    accepted, name = {float: ((float, int), "number"), tuple: (list, "list")}.get(plain, (plain, plain.__name__))
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        problems.append(f"{where} is {type(value).__name__}, not {name}")
