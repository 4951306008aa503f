"""report.json: everything that was measured and where, enough to draw all charts from."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

from restyle_deploy.bench.environment import Environment
from restyle_deploy.bench.measure import UNSTABLE_ABOVE, Latency
from restyle_deploy.bench.quality import METRICS, ImageQuality
from restyle_deploy.errors import ReportError
from restyle_deploy.files import replace_when_complete

FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class BundleFacts:
    """The measured bundle: name of its directory, domain, side of the rendered square, and its checkpoint's hash."""

    name: str
    domain: str
    output_size: int
    checkpoint_sha256: str


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What was asked for: images per call, calls before and during the measurement, images, step counts (rising)."""

    batch: int
    warmup: int
    repeats: int
    image_count: int
    steps: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class StepLatency:
    """A `Latency`, with its figures written out."""

    median_ms: float
    p95_ms: float
    iqr_ms: float
    unstable: bool
    samples_ms: tuple[float, ...]
    warmup_ms: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class NamedQuality:
    """The quality of one image."""

    name: str
    quality: ImageQuality


@dataclass(frozen=True, kw_only=True)
class Row:
    """One step count: latency of a whole call, mean quality, and quality per image."""

    steps: int
    latency: StepLatency
    quality: ImageQuality
    images: tuple[NamedQuality, ...]


@dataclass(frozen=True, kw_only=True)
class Report:
    """A benchmark's result.

    Attributes:
        created: UTC, ISO 8601.
        environment: the machine and its software.
        bundle: what was measured.
        session: backend, device, threads and library versions, as the session describes itself.
        parity: largest differences from the reference model; within tolerance, or there is no report.
        settings: what was asked for.
        rows: one per step count, rising; at least one.
        format_version: of the file.
    """

    created: str
    environment: Environment
    bundle: BundleFacts
    session: dict[str, object]
    parity: dict[str, object]
    settings: Settings
    rows: tuple[Row, ...]
    format_version: int = FORMAT_VERSION


def step_latency_from(latency: Latency) -> StepLatency:
    """Write a latency's figures out."""
    return StepLatency(
        median_ms=latency.median_ms,
        p95_ms=latency.p95_ms,
        iqr_ms=latency.iqr_ms,
        unstable=latency.is_unstable,
        samples_ms=latency.samples_ms,
        warmup_ms=latency.warmup_ms,
    )


def write_report(report: Report, path: Path) -> None:
    """Write report.json; an interrupted write leaves the former file."""
    with replace_when_complete(path) as temporary:
        temporary.write_text(json.dumps(asdict(report), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def read_report(path: Path) -> Report:
    """Read report.json.

    Raises:
        ReportError: the file cannot be read, is of another format version, or lacks fields (all are named).
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ReportError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ReportError(f"{path}: not a JSON file: {error}") from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise ReportError(
            f"{path}: format_version is {version!r}, expected {FORMAT_VERSION}; "
            "make the report anew: restyle-deploy bench BUNDLE IMAGES -o DIR"
        )
    problems: list[str] = []
    report: Report = _parse(Report, content, "report", problems)
    if not problems and not (report.rows and all(row.latency.samples_ms for row in report.rows)):
        problems.append("no rows, or a row without samples_ms")
    if problems:
        raise ReportError(f"{path}: not a complete report: {'; '.join(problems)}")
    return report


def format_table(report: Report) -> str:
    """Return a plain-text table: a line per step count, latency relative to the first line's."""
    header = ["steps", "median ms", "p95 ms", "relative", *(metric.label for metric in METRICS)]
    lines = [header] + [_table_cells(row, report.rows[0]) for row in report.rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    text = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    if any(row.latency.unstable for row in report.rows):
        text.append(f"! unstable: interquartile range above {UNSTABLE_ABOVE:.0%} of the median")
    return "\n".join(text)


def _table_cells(row: Row, first: Row) -> list[str]:
    latency, mark = row.latency, "! " if row.latency.unstable else ""
    ratio = latency.median_ms / first.latency.median_ms
    quality = [getattr(row.quality, metric.name) for metric in METRICS]
    return [
        str(row.steps),
        f"{mark}{latency.median_ms:.2f}",
        f"{latency.p95_ms:.2f}",
        f"x{ratio:.2f}",
        *(
            "infinite" if value is None else f"{value:.{metric.decimals}f}"
            for metric, value in zip(METRICS, quality, strict=True)
        ),
    ]


def _parse(kind: Any, value: object, where: str, problems: list[str]) -> Any:
    """Return JSON's `value` as `kind` (a dataclass, a plain type, a tuple, or one of them or None); note problems."""
    if is_dataclass(kind) and isinstance(kind, type):
        return _parse_dataclass(kind, value, where, problems)
    arguments = get_args(kind)
    if isinstance(kind, UnionType):
        return None if value is None else _parse(arguments[0], value, where, problems)
    if get_origin(kind) is tuple and isinstance(value, list):
        return tuple(_parse(arguments[0], item, f"{where}[{index}]", problems) for index, item in enumerate(value))
    plain = get_origin(kind) or kind
    accepted, name = {float: ((float, int), "number"), tuple: (list, "list")}.get(plain, (plain, plain.__name__))
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        problems.append(f"{where} is {type(value).__name__}, not {name}")
    return value


def _parse_dataclass(kind: type, value: object, where: str, problems: list[str]) -> Any:
    if not isinstance(value, Mapping):
        problems.append(f"{where} is {type(value).__name__}, not an object")
        return None
    missing = [field.name for field in fields(kind) if field.name not in value]
    problems.extend(f"{where}.{name} is missing" for name in missing)
    parsed = {
        field.name: _parse(field.type, value[field.name], f"{where}.{field.name}", problems)
        for field in fields(kind)
        if field.name in value
    }
    return None if missing else kind(**parsed)
