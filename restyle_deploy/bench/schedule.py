"""One configuration after the other, within a time budget: what was finished before is taken, a sweep adds batches."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from restyle_deploy.bench.environment import Environment
from restyle_deploy.bench.job import Job, key_of, plain_metric_options
from restyle_deploy.bench.metrics import MetricOptions
from restyle_deploy.bench.metrics.identity_input import sidecar_of
from restyle_deploy.bench.metrics.perceptual import cached_backbone
from restyle_deploy.bench.report import Configuration, ConfigurationResult, Part, read_part
from restyle_deploy.bench.strips import IMAGES_FOLDER
from restyle_deploy.bench.sweep import MOST_BATCH, BatchPoint, next_batch
from restyle_deploy.bench.worker import run_job, skipped_part
from restyle_deploy.bundle import MANIFEST, Bundle, find_engine
from restyle_deploy.engines import build_command
from restyle_deploy.errors import BundleError, ReportError
from restyle_deploy.files import sha256_of_file
from restyle_deploy.runtime.images import normalize_images, resize_image

CELLS_FOLDER = "cells"
PACKAGE = Path(__file__).parents[1]  # what is measured with

Images = Sequence[tuple[str, NDArray[np.uint8]]]


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """How configurations are measured, and what is made of the results.

    Attributes:
        steps: step counts, each at least 1 and given once; sorted here.
        warmup: calls before the measured ones; None: until they are stable.
        repeats: measured calls of each step count.
        metrics: which, and their files.
        picture_count: strips are drawn for the first so many images, and the page shows them.
        against: one of `libraries.REFERENCES`: also measure the reference model in each configuration's process.
        load_shares, load_rates: see `Job`.
        load_seconds: for each rate.
        sweeps: whether batches are doubled from each configuration's until throughput no longer grows.
        most_batch: of a sweep.
        time_budget_s: no configuration begins after so long, and one that is being measured is ended; None: no limit.
        resume: whether parts of a former run of the same benchmark are taken.
        budget_ms, minimums: see `decision.decide`.
    """

    steps: tuple[int, ...]
    warmup: int | None = None
    repeats: int = 20
    metrics: MetricOptions = MetricOptions()
    picture_count: int = 8
    against: str | None = None
    load_shares: tuple[float, ...] = ()
    load_rates: tuple[float, ...] = ()
    load_seconds: float = 20.0
    sweeps: bool = False
    most_batch: int = MOST_BATCH
    time_budget_s: float | None = None
    resume: bool = False
    budget_ms: float | None = None
    minimums: Mapping[str, float] = field(default_factory=dict)


class Jobs:
    """Makes the jobs of one bench: the images are written once for all of them.

    Attributes:
        targets_sha256: of the images as the encoder is given them.
    """

    def __init__(
        self,
        bundle: Bundle,
        images: Images,
        output: Path,
        options: BenchOptions,
        *,
        environment: Environment,
        files: Sequence[Path],
        folder: Path,
    ) -> None:
        """Write the images, of the encoder's size, into `folder`; the other arguments are those of `run_bench`."""
        self._bundle, self._output, self._options = bundle, output, options
        self._names, self._files = tuple(name for name, _ in images), tuple(str(file.resolve()) for file in files)
        targets = normalize_images(np.stack([resize_image(image, bundle.config.input_shape) for _, image in images]))
        self._targets = folder / "targets.npy"
        np.save(self._targets, targets)
        self.targets_sha256 = hashlib.sha256(targets.data).hexdigest()
        self._surroundings = {
            "manifest": hashlib.sha256((bundle.path / MANIFEST).read_bytes()).hexdigest(),
            "targets": self.targets_sha256,
            "files": _hashes_of(options.metrics),
            "environment": asdict(replace(environment, load_average=None)),
            # Of a tree with changes, the commit does not tell which changes.
            "source": _hash_of_source(PACKAGE) if (environment.commit or "").endswith("-dirty") else None,
        }

    def create(self, configuration: Configuration, *, is_swept: bool = False) -> tuple[Job, str]:
        """Return a configuration's job and key; a sweep's has the largest step count alone, and counts no quality."""
        options = self._options
        steps = tuple(sorted(options.steps))
        job = Job(
            bundle=str(self._bundle.path.resolve()),
            configuration=configuration,
            steps=steps[-1:] if is_swept else steps,
            warmup=options.warmup,
            repeats=options.repeats,
            targets=str(self._targets),
            names=self._names,
            files=self._files,
            output=str(self._output.resolve()),
            picture_count=0 if is_swept else options.picture_count,
            metrics=None if is_swept else plain_metric_options(options.metrics),
            against=None if is_swept else options.against,
            load_shares=() if is_swept else options.load_shares,
            load_rates=() if is_swept else options.load_rates,
            load_seconds=options.load_seconds,
        )
        return job, key_of(job, self._surroundings)

    def why_not(self, configuration: Configuration) -> str | None:
        """Return why a configuration does not exist: a session would run the exported graphs, which are another."""
        if configuration.plan == "plain":
            return None
        key = {name: getattr(configuration, name) for name in ("backend", "device", "precision")}
        try:
            if find_engine(self._bundle, **key):
                return None
        except BundleError:  # a damaged one: its process says so
            return None
        return f"the bundle has no engine for it; run: {build_command(self._bundle.path, **key)}"


def measure_all(
    jobs: Jobs,
    configurations: Sequence[Configuration],
    options: BenchOptions,
    progress: Callable[[str, int, int], None],
) -> tuple[list[Part], bool]:
    """Return the parts, and whether the user interrupted; what was not begun then, nor finished before, is skipped."""
    began = time.monotonic()
    parts: list[Part] = []
    interrupted = False
    for configuration, is_swept in _queue(configurations, options, parts):
        job, key = jobs.create(configuration, is_swept=is_swept)
        left = None if options.time_budget_s is None else options.time_budget_s - (time.monotonic() - began)
        if interrupted:
            finished = _finished(job, key, options)
            parts.append(finished or skipped_part(job, key, "the bench was interrupted before"))
        elif reason := jobs.why_not(configuration):
            parts.append(skipped_part(job, key, reason))
        else:
            try:
                parts.append(_measure_one(job, key, options, left, progress))
            except KeyboardInterrupt:
                interrupted = True
                parts.append(skipped_part(job, key, "the bench was interrupted while it was measured"))
    return parts, interrupted


def _queue(
    configurations: Sequence[Configuration], options: BenchOptions, parts: Sequence[Part]
) -> Iterator[tuple[Configuration, bool]]:
    """Yield configurations and whether they are only swept, by the parts that are there so far."""
    given = {configuration.name for configuration in configurations}
    for configuration in configurations:
        yield configuration, False
        if not options.sweeps or parts[-1].result.status != "ok":
            continue
        points = [_point_of(parts[-1].result)]
        while (batch := next_batch(points, most_batch=options.most_batch)) is not None:
            larger = replace(configuration, batch=batch)
            if larger.name in given:
                break  # measured with quality, in its own turn, and swept from there
            yield larger, True
            points.append(_point_of(parts[-1].result))


def _point_of(result: ConfigurationResult) -> BatchPoint:
    speed = result.rows[-1].throughput if result.rows else None
    return BatchPoint(batch=result.configuration.batch, images_per_s=speed, reason=result.reason)


def _measure_one(
    job: Job, key: str, options: BenchOptions, left: float | None, progress: Callable[[str, int, int], None]
) -> Part:
    name, place = job.configuration.name, _place_of(job)
    if found := _finished(job, key, options):
        return found
    if left is not None and left <= 0:
        return skipped_part(job, key, f"the time budget of {options.time_budget_s:g} s was spent")
    # Pictures of other images or steps, of a former run, would be taken for this one's.
    shutil.rmtree(Path(job.output) / IMAGES_FOLDER / name, ignore_errors=True)
    return run_job(
        job,
        key,
        part=place,
        log=place.with_suffix(".log"),
        seconds=left,
        progress=lambda done, total: progress(name, done, total),
    )


def _place_of(job: Job) -> Path:
    return Path(job.output) / CELLS_FOLDER / f"{job.configuration.name}.json"


def _finished(job: Job, key: str, options: BenchOptions) -> Part | None:
    """Return the part of a former run of the same job that went well, with all metrics, if they are to be taken."""
    if not options.resume:
        return None
    try:
        part = read_part(_place_of(job))
    except ReportError:
        return None
    is_whole = part.result.status == "ok" and part.result.reason is None
    return part if part.key == key and is_whole else None


def _hash_of_source(package: Path) -> str:
    """Return a hash of a package's files, names included, but for what the interpreter makes of them."""
    files = sorted(path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    listed = "".join(f"{sha256_of_file(path)} {path.relative_to(package).as_posix()}\n" for path in files)
    return hashlib.sha256(listed.encode()).hexdigest()


def _hashes_of(metrics: MetricOptions) -> dict[str, str]:
    """Return the hashes of all files that the metrics read, by what each is; those that are not there have none."""
    model = metrics.identity_model
    files = {
        "backbone": metrics.lpips_backbone or cached_backbone(),
        "model": model,
        "sidecar": None if model is None else sidecar_of(model),
    }
    return {name: sha256_of_file(file) for name, file in files.items() if file is not None and file.is_file()}
