"""The bundle that is shipped: the stored bundle of format version 1."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from restyle_deploy import Session
from restyle_deploy.bundle import MANIFEST, open_bundle
from restyle_deploy.runtime.images import normalize_images, uint8_from_images
from restyle_deploy.runtime.inputs import find_images, load_images
from restyle_deploy.verify import check_parity, compare_with_expectation, load_expectation

MAX_BYTES = 20_000_000


@pytest.fixture(scope="module")
def demo_bundle(project_root: Path) -> Path:
    return project_root / "engines" / "demo-faces"


@pytest.fixture(scope="module")
def session(demo_bundle: Path) -> Iterator[Session]:
    with Session.open(demo_bundle) as session:
        yield session


def test_no_engine_of_another_machine_is_shipped(demo_bundle: Path) -> None:
    assert json.loads((demo_bundle / MANIFEST).read_text(encoding="utf-8"))["engines"] == []


def test_stored_bundle_of_version_1_is_read(demo_bundle: Path) -> None:
    assert json.loads((demo_bundle / MANIFEST).read_text(encoding="utf-8"))["format_version"] == 1
    bundle = open_bundle(demo_bundle)
    assert bundle.config.output_size == 64
    assert bundle.verification["latent_errors"]


def test_bundle_is_small(demo_bundle: Path) -> None:
    assert 0 < sum(path.stat().st_size for path in demo_bundle.rglob("*") if path.is_file()) <= MAX_BYTES


def test_stored_expectation_is_met(session: Session) -> None:
    check_parity(compare_with_expectation(session, load_expectation(session.bundle.expectation)), "demo-faces")


def test_photos_are_approached(session: Session, project_root: Path) -> None:
    named, failures = load_images(find_images([project_root / "examples" / "photos"]), session.config.input_shape)
    assert len(named) >= 2
    assert failures == []
    targets = normalize_images(np.stack([image for _, image in named]))
    result = session.invert(targets, steps=5, every_step=True)
    assert np.isfinite(result.latents).all()
    height, width = session.config.input_shape
    factor = session.config.output_size // width
    pooled = result.images.reshape(5, len(named), 3, height, factor, width, factor).mean(axis=(4, 6))
    errors = ((pooled - targets) ** 2).mean(axis=(2, 3, 4))  # [steps, N]
    assert (errors[4] < errors[0]).all()
    assert uint8_from_images(result.images[4]).std(axis=(1, 2, 3)).min() > 10  # pictures, not grey areas
