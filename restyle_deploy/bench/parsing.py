"""JSON -> dataclasses, with all that is missing or of another type named at once."""

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints


def parse(kind: Any, value: object, where: str, problems: list[str]) -> Any:
    """Return JSON's `value` as `kind` (a dataclass, a plain type, a tuple, or one of them or None); note problems."""
    if is_dataclass(kind) and isinstance(kind, type):
        return _parse_dataclass(kind, value, where, problems)
    arguments = get_args(kind)
    if isinstance(kind, UnionType):
        return None if value is None else parse(arguments[0], value, where, problems)
    if get_origin(kind) is tuple and isinstance(value, list):
        return tuple(parse(arguments[0], item, f"{where}[{index}]", problems) for index, item in enumerate(value))
    plain = get_origin(kind) or kind
    accepted, name = {float: ((float, int), "number"), tuple: (list, "list")}.get(plain, (plain, plain.__name__))
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        problems.append(f"{where} is {type(value).__name__}, not {name}")
    return value


def _parse_dataclass(kind: type, value: object, where: str, problems: list[str]) -> Any:
    if not isinstance(value, Mapping):
        problems.append(f"{where} is {type(value).__name__}, not an object")
        return None
    kinds = get_type_hints(kind)
    required = [field.name for field in fields(kind) if field.default is MISSING]
    missing = [name for name in required if name not in value]
    problems.extend(f"{where}.{name} is missing" for name in missing)
    parsed = {
        field.name: parse(kinds[field.name], value[field.name], f"{where}.{field.name}", problems)
        for field in fields(kind)
        if field.name in value
    }
    return None if missing else kind(**parsed)
