"""The benchmark: configurations in processes of their own, their parts joined to a report, and what it shows."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import numpy as np

from restyle_deploy.bench.cell import USUAL_WARMUP
from restyle_deploy.bench.charts import LOAD_CHART_NAME, draw_charts
from restyle_deploy.bench.decision import decide, deployment_of
from restyle_deploy.bench.environment import describe_environment
from restyle_deploy.bench.figures import MetricFacts
from restyle_deploy.bench.libraries import REFERENCES, require_bench_libraries, require_reference_libraries
from restyle_deploy.bench.markdown import markdown_from_report
from restyle_deploy.bench.metrics import METRICS
from restyle_deploy.bench.page import PAGE_NAME, write_page
from restyle_deploy.bench.report import (
    BundleFacts,
    Configuration,
    Decision,
    Part,
    Report,
    Settings,
    read_report,
    write_report,
)
from restyle_deploy.bench.schedule import CELLS_FOLDER, BenchOptions, Images, Jobs, measure_all
from restyle_deploy.bench.strips import STRIPS_FOLDER, draw_strips
from restyle_deploy.bundle import Bundle
from restyle_deploy.errors import ReportError
from restyle_deploy.files import replace_when_complete
from restyle_deploy.runtime.deployment import write_deployment

REPORT_NAME = "report.json"
MARKDOWN_NAME = "report.md"
DEPLOYMENT_NAME = "deploy.toml"


class BenchInterruptedError(ReportError):
    """The bench was interrupted; what was finished is kept."""


def run_bench(
    bundle: Bundle,
    images: Images,
    output: Path,
    configurations: Sequence[Configuration],
    options: BenchOptions,
    *,
    files: Sequence[Path] = (),
    progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> Report:
    """Measure configurations one after the other; write report.json, charts, page, Markdown and strips.

    Args:
        bundle: an opened bundle.
        images: names and uint8 [H, W, 3] of any size. Names are unique and fit for files, as `ImageInput.stem` is.
        output: folder of everything; created when missing. `cells/` keeps each configuration's part and log.
        configurations: see `matrix.configurations_of`.
        options: how they are measured.
        files: of the images, for the stages around the session.
        progress: told the configuration's name, the refinement steps done and their total.
    Returns:
        The report. A configuration that failed or was skipped is in it, with the reason.
    Raises:
        ValueError: no images, configurations or step counts, or unusable ones; or a metric that there is not.
        ReportError: `output` cannot be written; or no configuration could be measured: the message has the reasons.
        BenchInterruptedError: Ctrl-C; finished configurations are kept, and reported on if there is one.
        BackendUnavailableError: the `bench` extra is not installed, or what `against` needs.
    """
    require_bench_libraries()
    _check(images, configurations, options)
    for written in (output, output / CELLS_FOLDER):
        prepare_folder(written)
    environment, created = describe_environment(), datetime.now(timezone.utc).isoformat(timespec="seconds")
    with tempfile.TemporaryDirectory(prefix="restyle-deploy-") as folder:
        jobs = Jobs(bundle, images, output, options, environment=environment, files=files, folder=Path(folder))
        parts, interrupted = measure_all(jobs, configurations, options, progress)
    report = Report(
        created=created,
        environment=environment,
        bundle=_facts_of_bundle(bundle),
        settings=_settings(images, options, images_sha256=jobs.targets_sha256),
        metrics=_metrics_of(parts),
        configurations=tuple(part.result for part in parts),
    )
    done = [part for part in parts if part.result.status == "ok"]
    if done:
        report = finish_report(report, bundle, output, options)
    if interrupted:
        raise BenchInterruptedError(
            f"interrupted: {len(done)} of {len(parts)} configurations are measured and kept in {output}; "
            "go on with the same command and --resume"
        )
    if not done:
        reasons = "; ".join(f"{result.configuration.name}: {result.reason}" for result in report.configurations)
        raise ReportError(f"nothing could be measured: {reasons}")
    return report


def draw_report(path: Path, output: Path) -> list[Path]:
    """Draw charts, page and Markdown from a report.json alone, and return the files.

    Args:
        path: of the report. The page has images if their folder `images` is beside it.
        output: folder; created when missing. Load charts of a former report go.
    Raises:
        ReportError: the report or an image cannot be read, or `output` cannot be written to.
        BackendUnavailableError: the `bench` extra is not installed.
    """
    require_bench_libraries()
    report = read_report(path)
    prepare_folder(output)
    for suffix in ("png", "svg"):
        (output / f"{LOAD_CHART_NAME}.{suffix}").unlink(missing_ok=True)
    charts = draw_charts(path, output)
    page, markdown = write_page(path, output / PAGE_NAME), output / MARKDOWN_NAME
    with replace_when_complete(markdown) as temporary:
        temporary.write_text(markdown_from_report(report), encoding="utf-8")
    return [*charts, page, markdown]


def finish_report(report: Report, bundle: Bundle, output: Path, options: BenchOptions) -> Report:
    """Add the decision and write report.json and all that follows from it; at least one configuration was measured."""
    report = replace(report, decision=_decision_of(report, options))
    path = output / REPORT_NAME
    write_report(report, path)
    _remove_former(output)
    if report.decision is not None and report.decision.configuration is not None:
        write_deployment(output / DEPLOYMENT_NAME, deployment_of(report, bundle))
    draw_report(path, output)
    measured = next(result for result in report.configurations if result.status == "ok")
    draw_strips(output, measured.configuration.name)
    return report


def prepare_folder(output: Path) -> None:
    """Create a folder and try to write to it: better now than after minutes of measuring.

    Raises:
        ReportError: it cannot be written to.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise ReportError(f"{output}: no folder that can be written to: {error.strerror}") from error


def _remove_former(output: Path) -> None:
    """Remove what this run may not replace, since it would be taken for this one's: a choice, strips."""
    for path in (output / DEPLOYMENT_NAME, *(output / STRIPS_FOLDER).glob("*.png")):
        path.unlink(missing_ok=True)


def _decision_of(report: Report, options: BenchOptions) -> Decision | None:
    """Return what was decided, or why nothing could be; None where nothing was asked for and no quality measured."""
    try:
        return decide(report, budget_ms=options.budget_ms, minimums=options.minimums)
    except ReportError as error:
        if options.budget_ms is None and not options.minimums:
            return None
        return Decision(
            configuration=None,
            steps=None,
            budget_ms=options.budget_ms,
            minimums=dict(options.minimums),
            reason=f"nothing was chosen: {error}",
            pareto=(),
        )


def _check(images: Images, configurations: Sequence[Configuration], options: BenchOptions) -> None:
    steps, names = options.steps, [name for name, _ in images]
    if not steps or min(steps) < 1 or len(set(steps)) < len(steps):
        raise ValueError(f"step counts are {list(steps)}, expected at least one, each 1 or more and given once")
    if not configurations:
        raise ValueError("no configurations, expected at least one")
    if not names:
        raise ValueError("no images, expected at least one")
    unusable = sorted({name for name in names if not _is_file_name(name) or names.count(name) > 1})
    if unusable:
        raise ValueError(f"image names that are not unique file names: {', '.join(map(repr, unusable))}")
    _check_limits(options)
    if options.against is not None:
        if options.against not in REFERENCES:
            raise ValueError(f"against is {options.against!r}, expected one of {', '.join(REFERENCES)}")
        require_reference_libraries()


def _is_file_name(name: str) -> bool:
    return Path(f"{name}.png").stem == name and name not in (".", "..")


def _check_limits(options: BenchOptions) -> None:
    """Raise `ValueError` for metrics that there are not, a minimum of one that is not to be measured, or no number, or
    rates of calls that cannot be.
    """
    known = [metric.name for metric in METRICS]
    asked = options.metrics.names
    unknown = [name for name in (*(asked or ()), *options.minimums) if name not in known]
    if unknown:
        raise ValueError(f"no metric {', '.join(unknown)}; there are {', '.join(known)}")
    limits = [*options.minimums.values(), *([] if options.budget_ms is None else [options.budget_ms])]
    if not np.isfinite(limits).all():
        raise ValueError(f"a limit is no finite number: {limits}")
    if not all(0 < rate < np.inf for rate in (*options.load_shares, *options.load_rates)):
        raise ValueError(f"load shares {options.load_shares} and rates {options.load_rates}: each must be above 0")
    left_out = [name for name in options.minimums if asked is not None and name not in asked]
    if left_out:
        raise ValueError(
            f"a minimum of {', '.join(left_out)}, which is not among the metrics: {', '.join(asked or ())}"
        )


def _settings(images: Images, options: BenchOptions, *, images_sha256: str) -> Settings:
    return Settings(
        steps=tuple(sorted(options.steps)),
        warmup=USUAL_WARMUP.least_calls if options.warmup is None else options.warmup,
        repeats=options.repeats,
        image_count=len(images),
        image_names=tuple(name for name, _ in images),
        time_budget_s=options.time_budget_s,
        images_sha256=images_sha256,
    )


def _metrics_of(parts: Sequence[Part]) -> tuple[MetricFacts, ...]:
    """Return the metrics of all parts, measured ones first: a former run's part may lack a file that is there now."""
    found: dict[str, MetricFacts] = {}
    for metric in (metric for part in parts for metric in part.metrics):
        if metric.name not in found or found[metric.name].missing is not None:
            found[metric.name] = metric
    return tuple(found.values())


def _facts_of_bundle(bundle: Bundle) -> BundleFacts:
    return BundleFacts(
        name=bundle.path.resolve().name,
        domain=bundle.config.domain,
        output_size=bundle.config.output_size,
        checkpoint_sha256=bundle.checkpoint_sha256,
    )
