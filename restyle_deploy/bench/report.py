"""report.json: everything that was measured and where, enough to draw all charts from."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from restyle_deploy.bench.comparison import Against, Exact, Ratio
from restyle_deploy.bench.environment import Environment
from restyle_deploy.bench.measure import UNSTABLE_ABOVE, StepLatency
from restyle_deploy.bench.parsing import parse
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
        parity: largest differences from the reference model, of the exact session where the measured one is
            approximate; within tolerance, or there is no report.
        settings: what was asked for.
        rows: one per step count, rising; at least one.
        against: the reference model, where it was measured too.
        exact: the exact session, where the measured one is approximate.
        format_version: of the file.
    """

    created: str
    environment: Environment
    bundle: BundleFacts
    session: dict[str, object]
    parity: dict[str, object]
    settings: Settings
    rows: tuple[Row, ...]
    against: Against | None = None
    exact: Exact | None = None
    format_version: int = FORMAT_VERSION


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
    report: Report = parse(Report, content, "report", problems)
    if not problems:
        problems += _check_rows(report)
    if problems:
        raise ReportError(f"{path}: not a complete report: {'; '.join(problems)}")
    return report


def format_table(report: Report) -> str:
    """Return a plain-text table: a line per step count, latency relative to the first line's."""
    header = ["steps", "median ms", "p95 ms", "relative", *(metric.label for metric in METRICS)]
    lines = [header] + [_table_cells(row, report.rows[0]) for row in report.rows]
    for columns in (_exact_columns(report), _against_columns(report)):
        lines = [line + more for line, more in zip(lines, columns, strict=True)] if columns else lines
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    compared = [row for part in (report.exact, report.against) if part is not None for row in part.rows]
    if any(row.latency.unstable for row in (*report.rows, *compared)):
        text.append(f"! unstable: interquartile range above {UNSTABLE_ABOVE:.0%} of the median")
    return "\n".join(text)


def _table_cells(row: Row, first: Row) -> list[str]:
    ratio = row.latency.median_ms / first.latency.median_ms
    quality = [getattr(row.quality, metric.name) for metric in METRICS]
    return [
        str(row.steps),
        _median(row.latency),
        f"{row.latency.p95_ms:.2f}",
        f"x{ratio:.2f}",
        *(_decimals(value, metric.decimals) for metric, value in zip(METRICS, quality, strict=True)),
    ]


def _exact_columns(report: Report) -> list[list[str]]:
    """Return the header and the cells of what an approximate session gains and costs; nothing for an exact one."""
    if report.exact is None:
        return []
    header = ["exact ms", "exact/this (quartiles)", "PSNR to exact (dB)", "latent error"]
    return [header] + [
        [
            _median(row.latency),
            _ratio(row.ratio),
            _decimals(row.difference.psnr_db, 1),
            f"{row.difference.latent_error:.1e}",
        ]
        for row in report.exact.rows
    ]


def _against_columns(report: Report) -> list[list[str]]:
    if report.against is None:
        return []
    name = report.against.reference["library"]
    header = [f"{name} ms", f"{name}/this (quartiles)"]
    return [header] + [[_median(row.latency), _ratio(row.ratio)] for row in report.against.rows]


def _median(latency: StepLatency) -> str:
    return f"{'! ' if latency.unstable else ''}{latency.median_ms:.2f}"


def _ratio(ratio: Ratio) -> str:
    return f"{ratio.median:.2f} ({ratio.lower_quartile:.2f} to {ratio.upper_quartile:.2f})"


def _decimals(value: float | None, decimals: int) -> str:
    return "infinite" if value is None else f"{value:.{decimals}f}"


def _check_rows(report: Report) -> list[str]:
    """Return what is wrong with the rows: none, one without samples, or other step counts beside them."""
    problems = []
    if not (report.rows and all(row.latency.samples_ms for row in report.rows)):
        problems.append("no rows, or a row without samples_ms")
    steps = [row.steps for row in report.rows]
    for name, compared in (("against", report.against), ("exact", report.exact)):
        if compared is not None and [row.steps for row in compared.rows] != steps:
            problems.append(f"report.{name} has other step counts than the report")
    return problems
