"""What a worker is told: one configuration and how it is measured, as a JSON file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from restyle_deploy.bench.metrics.base import MetricOptions
from restyle_deploy.bench.parsing import parse
from restyle_deploy.bench.report import Configuration
from restyle_deploy.errors import ReportError
from restyle_deploy.files import replace_when_complete

JOB_VERSION = 2  # of what a job's results mean: 2 has throughput by the sum of the samples


@dataclass(frozen=True, kw_only=True)
class Job:
    """One configuration's measurement.

    Attributes:
        bundle: its directory.
        configuration: what is opened.
        steps: step counts, rising.
        warmup: calls before the measured ones; None: until they are stable.
        repeats: measured calls of each step count.
        targets: a `.npy` file, float32 [N, 3, h, w] in [-1, 1] of the encoder's size.
        names: of the images.
        files: that they came from, for the stages around the session.
        output: folder of the step images.
        picture_count: so many images' steps are written there.
        metrics: see `bench.metrics`; None counts no quality: for configurations that another's quality holds for.
        against: one of `libraries.REFERENCES`, measured in the same rounds.
        load_shares: of the calls that are done in a second one after the other: rates at which calls arrive at random.
        load_rates: further ones, in calls per second; each call has the configuration's batch.
        load_seconds: for each rate.
    """

    bundle: str
    configuration: Configuration
    steps: tuple[int, ...]
    warmup: int | None
    repeats: int
    targets: str
    names: tuple[str, ...]
    files: tuple[str, ...]
    output: str
    picture_count: int
    metrics: dict[str, object] | None = field(default_factory=dict)
    against: str | None = None
    load_shares: tuple[float, ...] = ()
    load_rates: tuple[float, ...] = ()
    load_seconds: float = 20.0

    @property
    def metric_options(self) -> MetricOptions | None:
        """The options of the metrics."""
        return None if self.metrics is None else metric_options_from(self.metrics)


def write_job(job: Job, path: Path) -> None:
    """Write a job."""
    with replace_when_complete(path) as temporary:
        temporary.write_text(json.dumps(asdict(job), indent=2) + "\n", encoding="utf-8")


def read_job(path: Path) -> Job:
    """Read a job; raise `ReportError` where something is missing."""
    problems: list[str] = []
    job: Job = parse(Job, json.loads(path.read_text(encoding="utf-8")), "job", problems)
    if problems:
        raise ReportError(f"{path}: not a complete job: {'; '.join(problems)}")
    return job


def key_of(job: Job, surroundings: Mapping[str, object]) -> str:
    """Return the hash of all that a job's results depend on, so that `--resume` takes no other benchmark's.

    Args:
        job: where its files lie does not matter.
        surroundings: what it does not hold itself, as JSON: what is in those files, and the machine.
    """
    facts = asdict(replace(job, bundle="", targets="", output="", files=()))
    return hashlib.sha256(json.dumps([JOB_VERSION, facts, surroundings], sort_keys=True).encode()).hexdigest()


def plain_metric_options(options: MetricOptions) -> dict[str, object]:
    """Return metric options as plain values."""
    return {
        name: str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
        for name, value in asdict(options).items()
    }


def metric_options_from(values: dict[str, object]) -> MetricOptions:
    """Return what `plain_metric_options` was made from."""
    typed = {
        name: Path(str(value))
        if value is not None and name in ("lpips_backbone", "identity_model")
        else tuple(value)
        if isinstance(value, list)
        else value
        for name, value in values.items()
    }
    return MetricOptions(**typed)  # type: ignore[arg-type]
