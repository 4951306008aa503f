"""Facts as aligned lines of text."""

from collections.abc import Mapping
from typing import Any


def format_facts(facts: Mapping[str, Any], indent: str = "") -> list[str]:
    """Return a line per fact, `name: value`, aligned; facts in a mapping follow its name, indented."""
    lines, width = [], max([24 - len(indent), *(len(name) + 2 for name in facts)])
    for name, value in facts.items():
        if isinstance(value, Mapping):
            lines += [f"{indent}{name}", *format_facts(value, indent + "  ")]
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            lines.append(f"{indent}{name + ':':<{width}}{text or 'none'}")
    return lines
