"""The JSON schema of report.json, drawn from its dataclasses.

python -m restyle_deploy.bench.schema docs/report.schema.json
"""

import json
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from restyle_deploy.bench.parsing import is_required
from restyle_deploy.bench.report import FORMAT_VERSION, Report
from restyle_deploy.files import replace_when_complete

_PLAIN: dict[Any, dict[str, object]] = {
    str: {"type": "string"},
    int: {"type": "integer"},
    float: {"type": "number"},
    bool: {"type": "boolean"},
    object: {},
}


def report_schema() -> dict[str, object]:
    """Return the schema, draft 2020-12, of the format that `write_report` writes."""
    definitions: dict[str, object] = {}
    root = _schema_of(Report, definitions)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"restyle-deploy bench: report.json, format {FORMAT_VERSION}",
        **root,
        "$defs": definitions,
    }


def write_schema(path: Path) -> None:
    """Write the schema as JSON."""
    with replace_when_complete(path) as temporary:
        temporary.write_text(json.dumps(report_schema(), indent=2) + "\n", encoding="utf-8")


def _schema_of(kind: Any, definitions: dict[str, object]) -> dict[str, object]:
    """Return the schema of a type; that of a dataclass is put into `definitions` and referred to."""
    arguments, origin = get_args(kind), get_origin(kind)
    if is_dataclass(kind) and isinstance(kind, type):
        return _reference_to(kind, definitions)
    if isinstance(kind, UnionType):
        return {"anyOf": [_schema_of(arguments[0], definitions), {"type": "null"}]}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin is tuple and arguments[-1] is Ellipsis:
        return {"type": "array", "items": _schema_of(arguments[0], definitions)}
    if origin is tuple:
        items = [_schema_of(argument, definitions) for argument in arguments]
        return {"type": "array", "prefixItems": items, "minItems": len(items), "maxItems": len(items)}
    if origin is dict:
        return {"type": "object", "additionalProperties": _schema_of(arguments[1], definitions)}
    return dict(_PLAIN[kind])


def _reference_to(kind: type, definitions: dict[str, object]) -> dict[str, object]:
    if kind.__name__ not in definitions:
        definitions[kind.__name__] = None  # taken: a type may hold itself
        hints = get_type_hints(kind)
        properties = {field.name: _schema_of(hints[field.name], definitions) for field in fields(kind)}
        if kind is Report:
            properties["format_version"] = {"const": FORMAT_VERSION}
        definitions[kind.__name__] = {
            "type": "object",
            "description": (kind.__doc__ or "").split("\n")[0],
            "properties": properties,
            "required": [field.name for field in fields(kind) if is_required(field) or field.name == "format_version"],
        }
    return {"$ref": f"#/$defs/{kind.__name__}"}


if __name__ == "__main__":
    write_schema(Path(sys.argv[1]))
