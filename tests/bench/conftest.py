"""A report and a session, both made up."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from restyle_deploy.bench.report import Report
from restyle_deploy.bundle import Bundle
from restyle_deploy.model_config import ModelConfig
from restyle_deploy.runtime.session import InversionResult, Session, targets_from_images
from restyle_deploy.verify import STEPS, Expectation, create_inputs, reduce_images, save_expectation
from tests.bench.reports import made_up_report


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

    def invert(
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
    """See `tests.bench.reports`: six configurations that ran, one that failed, one that was skipped."""
    return made_up_report()
