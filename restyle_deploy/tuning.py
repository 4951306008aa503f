"""What tuning measured, kept in the bundle: another build on such a machine need not measure it again."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from restyle_deploy.engines import ENGINES
from restyle_deploy.files import replace_when_complete

LOGGER = logging.getLogger(__name__)
FILE_NAME = "tuning.json"
FORMAT_VERSION = 1

Times = Mapping[str, Mapping[str, float]]
"""Kind of site -> choice -> milliseconds."""
NONE_REFUSED: Mapping[str, Sequence[str]] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What times depend on beside the graphs.

    Attributes:
        backend, device, precision, threads: how the graphs ran.
        library_versions: of the backend.
        processor: what engines are built for, as their record says; on a GPU its model too, whose times these are.
    """

    backend: str
    device: str
    precision: str
    threads: int
    library_versions: Mapping[str, str]
    processor: str


class KeptTimes:
    """What a bundle keeps of tuning under some conditions.

    Attributes:
        times: milliseconds, by kind of site and choice.
        refused: the choices that the backend has refused, by kind of site.
    """

    def __init__(self, bundle: Path, conditions: Conditions) -> None:
        self._bundle, self._conditions = bundle, conditions
        self.times: dict[str, Mapping[str, float]] = dict(read_times(bundle, conditions))
        self.refused = read_refused(bundle, conditions)

    def tried(self, key: str) -> set[str]:
        """Return the choices of a kind of site that need not be tried again: timed, or refused."""
        return {*self.times.get(key, ()), *self.refused.get(key, ())}

    def update(self, times: Times, refused: Mapping[str, Sequence[str]]) -> None:
        """Put what was tried of some kinds of sites in the place of what there was, and write it into the bundle."""
        for key in times:
            self.refused.pop(key, None)
        self.times |= times
        self.refused |= {key: tuple(choices) for key, choices in refused.items()}
        write_times(self._bundle, self._conditions, self.times, refused=self.refused)


def read_times(bundle: Path, conditions: Conditions) -> dict[str, dict[str, float]]:
    """Return what was measured under these conditions; nothing where nothing was, or where the file is damaged."""
    return {key: dict(times) for key, times in _entry_of(bundle, conditions).get("times", {}).items()}


def read_refused(bundle: Path, conditions: Conditions) -> dict[str, tuple[str, ...]]:
    """Return the choices that the backend has refused under these conditions, by kind of site."""
    return {key: tuple(choices) for key, choices in _entry_of(bundle, conditions).get("refused", {}).items()}


def write_times(
    bundle: Path, conditions: Conditions, times: Times, *, refused: Mapping[str, Sequence[str]] = NONE_REFUSED
) -> None:
    """Keep times, and refused choices by kind of site, instead of those that were kept for the same conditions."""
    others = [entry for entry in _read_entries(bundle) if entry["conditions"] != _as_json(conditions)]
    kept = {"refused": {key: list(choices) for key, choices in refused.items()}} if refused else {}
    entries = [*others, {"conditions": _as_json(conditions), "times": times, **kept}]
    with replace_when_complete(bundle / ENGINES / FILE_NAME) as temporary:
        content = {"format_version": FORMAT_VERSION, "entries": entries}
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _entry_of(bundle: Path, conditions: Conditions) -> dict[str, Any]:
    entries = (entry for entry in _read_entries(bundle) if entry["conditions"] == _as_json(conditions))
    return next(entries, {})


def _as_json(conditions: Conditions) -> dict[str, Any]:
    return {**vars(conditions), "library_versions": dict(conditions.library_versions)}


def _read_entries(bundle: Path) -> list[dict[str, Any]]:
    """Return the entries of the file; it only saves time, so one that is damaged counts as absent."""
    path = bundle / ENGINES / FILE_NAME
    if not path.is_file():
        return []
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        entries = content["entries"] if content["format_version"] == FORMAT_VERSION else []
        return [entry for entry in entries if _is_entry(entry)]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        LOGGER.warning("%s: damaged (%s); what it held is measured again", path, error)
        return []


def _is_entry(entry: Any) -> bool:
    times = entry["times"].values()
    numbers = [number for choices in times for number in choices.values()]
    refused = [choice for choices in entry.get("refused", {}).values() for choice in choices]
    return (
        isinstance(entry["conditions"], dict)
        and all(isinstance(number, float) and number > 0 for number in numbers)
        and all(isinstance(choice, str) for choice in refused)
    )
