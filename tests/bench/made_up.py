"""A session, its bundle, and the processes that measure, none of which computes or starts anything."""

import errno
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from restyle_deploy.bench.figures import MetricFacts
from restyle_deploy.bench.job import Job
from restyle_deploy.bench.quality import gains_of, settled_steps
from restyle_deploy.bench.report import ConfigurationResult, Part, Row, write_part
from restyle_deploy.bench.strips import write_step_images
from restyle_deploy.bench.worker import skipped_part
from restyle_deploy.bundle import MANIFEST, Bundle
from restyle_deploy.model_config import ModelConfig
from restyle_deploy.runtime.results import InversionTimings
from restyle_deploy.runtime.session import InversionResult, Session, targets_from_images
from restyle_deploy.verify import STEPS, Expectation, create_inputs, reduce_images, save_expectation
from tests.bench.reports import METRICS, made_up_aggregate, made_up_latency

INPUT_SIZE = 16


def made_up_bundle(path: Path) -> Bundle:
    """Return a bundle without graphs; its directory has a manifest that is none, and what `FakeSession` computes."""
    path.mkdir()
    (path / MANIFEST).write_text("{}")
    config = ModelConfig(encoder_type="BackboneEncoder", domain="custom", output_size=32, input_size=INPUT_SIZE)
    bundle = Bundle(
        path=path,
        config=config,
        checkpoint_sha256="ab" * 32,
        graphs={},
        latent_avg=np.zeros((config.n_styles, 512), np.float32),
        average_image=np.zeros((3, INPUT_SIZE, INPUT_SIZE), np.float32),
        expectation=path / "expectation.npz",
        engines=(),
        verification={},
    )
    inputs = create_inputs(config)
    result = FakeSession(bundle).invert(inputs, steps=STEPS, every_step=True)
    pooled, crop = reduce_images(result.images)
    expectation = Expectation(inputs=inputs, latents=result.latents, images_pooled=pooled, images_crop=crop)
    save_expectation(bundle.expectation, expectation)
    return bundle


class FakeSession(Session):
    """Halves the distance between a grey image and the target at every step; renders at twice the input's size.

    Attributes:
        calls: images, steps and `every_step` of each call.
        is_open: until it is closed.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        precision: str = "fp32",
        preview_steps: bool = False,
        offset: float = 0.0,
        timing_enabled: bool = False,
    ) -> None:
        """Make one.

        Args:
            bundle: see `made_up_bundle`.
            precision, preview_steps: as it describes itself.
            offset: added to all results, as an approximate session's error.
            timing_enabled: gives each result timings: 1, 2, 3 and 4 ms for upload, encoder, generator and download.
        """
        self.bundle = bundle
        self._precision, self._preview_steps = precision, preview_steps
        self._offset, self._timing_enabled = offset, timing_enabled
        self.calls: list[tuple[int, int, bool]] = []
        self.is_open = True

    def invert(self, images: Any, *, steps: int | None = None, every_step: bool = False, **_: Any) -> InversionResult:
        assert self.is_open
        assert steps is not None
        assert not (self._preview_steps and every_step), "only the last step has an image"
        self.calls.append((len(images), steps, every_step))
        images = targets_from_images(images, self.bundle.config)
        large = images.repeat(2, axis=2).repeat(2, axis=3)
        kept = np.stack([large * (1 - 0.5**step) + self._offset for step in range(1, steps + 1)]).astype(np.float32)
        latents = np.full((steps, len(images), self.bundle.config.n_styles, 512), self._offset, np.float32)
        timings = InversionTimings(
            upload_ms=1.0, encoder_ms=(2.0,) * steps, generator_ms=(3.0,) * steps, download_ms=4.0, total_ms=9.0
        )
        return InversionResult(
            images=kept if every_step else kept[-1],
            latents=latents if every_step else latents[-1],
            timings=timings if self._timing_enabled else None,
        )

    def describe(self) -> dict[str, Any]:
        return {
            "backend": "made-up",
            "device": "cpu",
            "threads": None,
            "precision": self._precision,
            "plan": "plain",
            "preview_steps": self._preview_steps,
            "library_versions": {"made-up": "1.0"},
        }

    def close(self) -> None:
        self.is_open = False


class FakeProcesses:
    """Stands for `worker.run_job`.

    Attributes:
        jobs: that were run, in order.
        images_per_s: by batch; 100 for others.
        outcomes: by configuration name: raised, or called for a part in the place of a measured one.
        metrics: of all parts.
    """

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.seconds: list[float | None] = []
        self.images_per_s: dict[int, float] = {}
        self.outcomes: dict[str, BaseException | Callable[[Job, str], Part]] = {}
        self.metrics: tuple[MetricFacts, ...] = METRICS

    @property
    def names(self) -> list[str]:
        """Names of the configurations that were run."""
        return [job.configuration.name for job in self.jobs]

    def run_job(
        self,
        job: Job,
        key: str,
        *,
        part: Path,
        log: Path,
        seconds: float | None,
        progress: Callable[[int, int], None],
    ) -> Part:
        self.jobs.append(job)
        self.seconds.append(seconds)
        outcome = self.outcomes.get(job.configuration.name)
        if isinstance(outcome, BaseException):
            raise outcome
        found = outcome(job, key) if outcome else self.measured(job, key)
        write_part(found, part)
        progress(1, 1)
        return found

    def measured(self, job: Job, key: str) -> Part:
        """Return a part with made-up figures."""
        rows = tuple(self._row(job, steps) for steps in job.steps)
        for name in job.names[: job.picture_count]:
            pixels = np.full((INPUT_SIZE, INPUT_SIZE, 3), 128, np.uint8)
            write_step_images(Path(job.output), job.configuration.name, name, pixels, dict.fromkeys(job.steps, pixels))
        facts = () if job.metrics is None else self.metrics
        per_image = {row.steps: row.per_image for row in rows}
        gains = gains_of(per_image, [metric for metric in facts if metric.missing is None])
        result = ConfigurationResult(
            configuration=job.configuration, status="ok", rows=rows, gains=gains, settled_at_steps=settled_steps(gains)
        )
        return Part(key=key, metrics=facts, result=result)

    def _row(self, job: Job, steps: int) -> Row:
        batch = job.configuration.batch
        latency = made_up_latency(steps * batch / self.images_per_s.get(batch, 100.0) * 1e3, 0.01, seed=steps)
        values: dict[str, NDArray[np.float64]] = {}
        for metric in self.metrics if job.metrics is not None else ():
            if metric.missing is None:
                sign = 1 if metric.higher_is_better else -1
                values[metric.name] = sign * (np.linspace(0.9, 1.1, len(job.names)) - 0.5**steps)
        return Row(
            steps=steps,
            latency=latency,
            throughput=batch / latency.median_ms * 1e3,
            quality={name: made_up_aggregate(column) for name, column in values.items()},
            per_image={name: tuple(column.tolist()) for name, column in values.items()},
        )


def refuse_files_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let temporary files in a folder fail as on a disk that is read only; others are made."""
    make = tempfile.TemporaryFile

    def refuse(*, dir: Path) -> Any:
        if dir.resolve() == folder.resolve():
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return make(dir=dir)

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)


def failed_part(job: Job, key: str) -> Part:
    """Return the part of a configuration that failed."""
    part = skipped_part(job, key, "it needed more memory than there is")
    return Part(key=key, metrics=(), result=ConfigurationResult(**{**vars(part.result), "status": "failed"}))
