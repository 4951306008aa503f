"""report.json: everything that was measured and where, enough to draw all charts and pages from."""

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from restyle_deploy.bench.comparison import Against, Exact
from restyle_deploy.bench.environment import Environment
from restyle_deploy.bench.figures import Aggregate as Aggregate
from restyle_deploy.bench.figures import Gain as Gain
from restyle_deploy.bench.figures import LoadPoint as LoadPoint
from restyle_deploy.bench.figures import Memory as Memory
from restyle_deploy.bench.figures import MetricFacts as MetricFacts
from restyle_deploy.bench.figures import StepLatency as StepLatency
from restyle_deploy.bench.parsing import parse
from restyle_deploy.errors import ReportError
from restyle_deploy.files import replace_when_complete

FORMAT_VERSION = 2


@dataclass(frozen=True, kw_only=True)
class BundleFacts:
    """The measured bundle: name of its directory, domain, side of the rendered square, and its checkpoint's hash."""

    name: str
    domain: str
    output_size: int
    checkpoint_sha256: str


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What was asked for.

    Attributes:
        steps: step counts, rising.
        warmup, repeats: calls before the measurement, at least; measured calls.
        image_count, image_names: that quality was counted over, in the order of `Row.per_image`.
        time_budget_s: seconds that the whole bench might take.
        images_sha256: of the target images as the encoder is given them; `None` in reports that do not record it.
    """

    steps: tuple[int, ...]
    warmup: int
    repeats: int
    image_count: int
    image_names: tuple[str, ...]
    time_budget_s: float | None = None
    images_sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """One way to run the bundle; what `Session.open` is told, and the images of one call."""

    backend: str
    device: str = "cpu"
    precision: str = "fp32"
    plan: Literal["engine", "plain"] = "engine"
    preview_steps: bool = False
    batch: int = 1
    threads: int | None = None

    @property
    def name(self) -> str:
        """Unique within a report and usable as a file's name, such as "onnxruntime-cpu-fp32-engine-b1"."""
        parts = [self.backend, re.sub(r"[^A-Za-z0-9]", "", self.device), self.precision, self.plan]
        parts += ["preview"] if self.preview_steps else []
        parts += [f"b{self.batch}"]
        parts += [f"t{self.threads}"] if self.threads is not None else []
        return "-".join(parts)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One step count of a configuration.

    Attributes:
        steps: of one call.
        latency: of a whole call, of `Configuration.batch` images.
        throughput: images per second.
        stages: median milliseconds of each stage of a call, by its name, in their order.
        quality: by metric, over all images.
        per_image: by metric, in the order of `Settings.image_names`; `None` for infinite or missing values.
    """

    steps: int
    latency: StepLatency
    throughput: float
    stages: dict[str, float] = field(default_factory=dict)
    quality: dict[str, Aggregate] = field(default_factory=dict)
    per_image: dict[str, tuple[float | None, ...]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ConfigurationResult:
    """What came of one configuration; a failed or skipped one has a reason and may have no rows.

    Attributes:
        session: as the session describes itself.
        parity: largest differences from the reference model.
        rows: one per step count, rising.
        gains: between neighbouring step counts.
        settled_at_steps: by metric, the steps after which no gain is above the width of its own interval. Absent where
            the last one is above it (not yet), or has no interval, as of less than `quality.LEAST_IMAGES` images.
        against, exact: the reference model and the exact session, where they were measured in the same rounds.
        opening_ms: from the files to a session that is ready.
        machine: what was seen of clocks, temperature and other processes while it was measured.
    """

    configuration: Configuration
    status: Literal["ok", "failed", "skipped"]
    reason: str | None = None
    session: dict[str, object] | None = None
    parity: dict[str, object] | None = None
    rows: tuple[Row, ...] = ()
    gains: tuple[Gain, ...] = ()
    settled_at_steps: dict[str, int] = field(default_factory=dict)
    against: Against | None = None
    exact: Exact | None = None
    opening_ms: float | None = None
    memory: Memory | None = None
    load: tuple[LoadPoint, ...] = ()
    machine: dict[str, object] | None = None


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What to deploy, for a budget and for quality not below minimums.

    Attributes:
        configuration, steps: `None` where nothing meets them.
        budget_ms: latency of one call, at most.
        minimums: by metric (a maximum where lower is better).
        reason: one sentence.
        pareto: configuration names and step counts that nothing beats in latency, throughput and quality together.
    """

    configuration: str | None
    steps: int | None
    budget_ms: float | None
    minimums: dict[str, float]
    reason: str
    pareto: tuple[tuple[str, int], ...]


@dataclass(frozen=True, kw_only=True)
class Report:
    """A benchmark's result: `created` is UTC, ISO 8601; `metrics` are in the order of tables, missing ones included."""

    format_version: int = FORMAT_VERSION
    created: str
    environment: Environment
    bundle: BundleFacts
    settings: Settings
    metrics: tuple[MetricFacts, ...]
    configurations: tuple[ConfigurationResult, ...]
    decision: Decision | None = None


@dataclass(frozen=True, kw_only=True)
class Part:
    """One configuration's share of a report, as its process leaves it.

    Attributes:
        key: what it depends on (bundle, images, settings), so that `--resume` takes no part of another benchmark.
    """

    format_version: int = FORMAT_VERSION
    key: str
    metrics: tuple[MetricFacts, ...]
    result: ConfigurationResult


def write_report(report: Report, path: Path) -> None:
    """Write report.json; an interrupted write leaves the former file."""
    _write(report, path)


def write_part(part: Part, path: Path) -> None:
    """Write a configuration's part; an interrupted write leaves the former file."""
    _write(part, path)


def read_report(path: Path) -> Report:
    """Read report.json.

    Raises:
        ReportError: the file cannot be read, is of another format version, or lacks fields (all are named).
    """
    report: Report = _read(Report, path)
    return report


def read_part(path: Path) -> Part:
    """Read a configuration's part; raises `ReportError` like `read_report`."""
    part: Part = _read(Part, path)
    return part


def _write(content: Report | Part, path: Path) -> None:
    with replace_when_complete(path) as temporary:
        temporary.write_text(json.dumps(asdict(content), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _read(kind: type[Any], path: Path) -> Any:
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
    parsed = parse(kind, content, kind.__name__.lower(), problems)
    if not problems:
        problems = _check_report(parsed) if kind is Report else _check_result(parsed.result, None)
    if problems:
        raise ReportError(f"{path}: not a complete {kind.__name__.lower()}: {'; '.join(problems)}")
    return parsed


def _check_report(report: Report) -> list[str]:
    """Return what is wrong with a whole report."""
    names = [result.configuration.name for result in report.configurations]
    problems = ["no configurations"] if not names else []
    problems += [f"{name} is there twice" for name in sorted({name for name in names if names.count(name) > 1})]
    for result in report.configurations:
        problems += _check_result(result, len(report.settings.image_names))
    return problems


def _check_result(result: ConfigurationResult, image_count: int | None) -> list[str]:
    """Return what is wrong with the rows: none where all went well, one without samples, or others beside them."""
    name, steps = result.configuration.name, [row.steps for row in result.rows]
    problems = []
    if result.status == "ok" and not steps:
        problems.append(f"{name} has no rows")
    if result.status != "ok" and result.reason is None:
        problems.append(f"{name} is {result.status} and gives no reason")
    problems += [f"{name}, {row.steps} steps: no samples_ms" for row in result.rows if not row.latency.samples_ms]
    if steps != sorted(set(steps)):
        problems.append(f"{name}: step counts are {steps}, expected them rising")
    for label, compared in (("against", result.against), ("exact", result.exact)):
        if compared is not None and [row.steps for row in compared.rows] != steps:
            problems.append(f"{name}: {label} has other step counts than the rows")
    lengths = {len(values) for row in result.rows for values in row.per_image.values()}
    if image_count is not None and lengths - {image_count}:
        problems.append(f"{name}: per_image has {sorted(lengths)} values, expected {image_count}")
    return problems
