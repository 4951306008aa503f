"""A report and a session, both made up."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from restyle_deploy.bench.comparison import Against, ComparedRow, Difference, Exact, ExactRow, Ratio
from restyle_deploy.bench.environment import Environment
from restyle_deploy.bench.measure import Latency, StepLatency, step_latency_from
from restyle_deploy.bench.quality import ImageQuality
from restyle_deploy.bench.report import BundleFacts, NamedQuality, Report, Row, Settings
from restyle_deploy.bundle import Bundle
from restyle_deploy.model_config import ModelConfig
from restyle_deploy.runtime.session import InversionResult, Session, targets_from_images
from restyle_deploy.verify import STEPS, Expectation, create_inputs, reduce_images, save_expectation


class FakeSession(Session):
    """Halves the distance between a grey image and the target at every step; renders at twice the input's size."""

    precision = "fp32"
    preview_steps = False
    offset = 0.0  # added to all results, as an approximate session's error

    def __init__(self, folder: Path) -> None:
        config = ModelConfig(encoder_type="BackboneEncoder", domain="custom", output_size=32, input_size=16)
        self.bundle = Bundle(
            path=Path("engines/made-up"),
            config=config,
            checkpoint_sha256="ab" * 32,
            graphs={},
            latent_avg=np.zeros((config.n_styles, 512), np.float32),
            average_image=np.zeros((3, 16, 16), np.float32),
            expectation=folder / "expectation.npz",
            engines=(),
            verification={},
        )
        self.calls: list[tuple[int, int, bool]] = []
        inputs = create_inputs(config)
        result = self.invert(inputs, steps=STEPS, every_step=True)
        pooled, crop = reduce_images(result.images)
        expectation = Expectation(inputs=inputs, latents=result.latents, images_pooled=pooled, images_crop=crop)
        save_expectation(self.bundle.expectation, expectation)
        self.calls.clear()

    def invert(  # type: ignore[override]
        self, images: NDArray[Any], *, steps: int = 5, every_step: bool = False, max_batch: int = 8
    ) -> InversionResult:
        self.calls.append((len(images), steps, every_step))
        images = targets_from_images(images, self.bundle.config)
        large = images.repeat(2, axis=2).repeat(2, axis=3)
        assert not (self.preview_steps and every_step), "only the last step has an image"
        kept = np.stack([large * (1 - 0.5**step) + self.offset for step in range(1, steps + 1)]).astype(np.float32)
        latents = np.full((steps, len(images), self.bundle.config.n_styles, 512), self.offset, np.float32)
        return InversionResult(images=kept if every_step else kept[-1], latents=latents if every_step else latents[-1])

    def describe(self) -> dict[str, Any]:
        return {
            "backend": "made-up",
            "device": "cpu",
            "threads": None,
            "precision": self.precision,
            "preview_steps": self.preview_steps,
            "library_versions": {"made-up": "1.0"},
        }


@pytest.fixture
def session(tmp_path: Path) -> FakeSession:
    return FakeSession(tmp_path)


@pytest.fixture
def approximate(tmp_path: Path) -> FakeSession:
    """A session that renders all steps but the last in small, and is off by 0.01."""
    (tmp_path / "approximate").mkdir()
    session = FakeSession(tmp_path / "approximate")
    session.preview_steps, session.offset = True, 0.01
    return session


@pytest.fixture
def report() -> Report:
    """Two images, three step counts; the second image is met exactly after five steps; step 2 is unstable."""
    rows = []
    for steps, median_ms, spread in ((1, 10.0, 0.01), (2, 20.0, 0.2), (5, 50.0, 0.01)):
        samples = tuple(median_ms * (1 + spread * (index - 5) / 5) for index in range(11))
        good = ImageQuality(mse=0.08 / steps, psnr_db=20.0 + steps, ssim=0.5 + steps / 20)
        exact = ImageQuality(mse=0.0, psnr_db=None, ssim=1.0)
        rows.append(
            Row(
                steps=steps,
                latency=step_latency_from(Latency(warmup_ms=(99.0,), samples_ms=samples)),
                quality=good if steps < 5 else ImageQuality(mse=0.008, psnr_db=None, ssim=0.875),
                images=(
                    NamedQuality(name="first", quality=good),
                    NamedQuality(name="second", quality=good if steps < 5 else exact),
                ),
            )
        )
    environment = Environment(
        python="3.12.1",
        platform="Linux-6.1-x86_64",
        cpu="Some CPU",
        logical_cores=4,
        usable_cores=2,
        load_average=(0.5, 0.25, 0.125),
        packages={"numpy": "2.0.0"},
        commit=None,
    )
    return Report(
        created="2026-01-02T03:04:05+00:00",
        environment=environment,
        bundle=BundleFacts(name="demo-faces", domain="custom", output_size=64, checkpoint_sha256="ab" * 32),
        session={
            "backend": "onnxruntime",
            "device": "cpu",
            "threads": 2,
            "precision": "fp32",
            "preview_steps": False,
        },
        parity={"latent_errors": [1e-6], "image_errors": [1e-5]},
        settings=Settings(batch=1, warmup=1, repeats=11, image_count=2, steps=(1, 2, 5)),
        rows=tuple(rows),
    )


@pytest.fixture
def report_against(report: Report) -> Report:
    """The report of an approximate session, with the exact one, which takes twice as long, and torch: ten times."""

    def latency(row: Row, factor: float) -> StepLatency:
        return step_latency_from(
            Latency(warmup_ms=(), samples_ms=tuple(factor * sample for sample in row.latency.samples_ms))
        )

    def ratio(factor: float) -> Ratio:
        return Ratio(median=factor, lower_quartile=factor - 0.125, upper_quartile=factor + 0.125)

    exact = tuple(
        ExactRow(
            steps=row.steps,
            latency=latency(row, 2),
            ratio=ratio(2),
            quality=row.quality,
            difference=Difference(psnr_db=40.0 + row.steps, latent_error=0.01 * row.steps),
        )
        for row in report.rows
    )
    against = tuple(ComparedRow(steps=row.steps, latency=latency(row, 10), ratio=ratio(10)) for row in report.rows)
    return replace(
        report,
        session={**report.session, "precision": "bf16", "preview_steps": True},
        against=Against(reference={"library": "torch", "version": "2.9", "threads": 2}, rows=against),
        exact=Exact(session=report.session, rows=exact),
    )
