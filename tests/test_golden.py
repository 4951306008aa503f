"""The official code's own outputs, against the torch model, the exported bundle and engines, at every step."""

import gc
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from restyle_deploy.backends import BACKENDS
from restyle_deploy.build import BuildOptions, build_engine
from restyle_deploy.checkpoint import load_checkpoint
from restyle_deploy.export import export_checkpoint
from restyle_deploy.models.restyle import RestyleModel, model_from_checkpoint
from restyle_deploy.runtime.session import Session, targets_from_images
from restyle_deploy.verify import reduce_images
from tests.golden import CASES, GoldenCase, open_case

pytestmark = pytest.mark.slow

LOGGER = logging.getLogger(__name__)
LATENT_TOLERANCE = 1e-4
IMAGE_TOLERANCE = 1e-3


@pytest.fixture(scope="module", params=CASES)
def case(
    request: pytest.FixtureRequest, shared_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[GoldenCase]:
    with open_case(request.param, shared_dir, tmp_path_factory.mktemp(request.param)) as case:
        yield case


@pytest.fixture(scope="module")
def bundle(case: GoldenCase) -> Path:
    directory = case.checkpoint.with_name("bundle")
    export_checkpoint(case.checkpoint, directory)
    gc.collect()
    return directory


def test_torch_model_gives_the_official_results(case: GoldenCase) -> None:
    model = model_from_checkpoint(load_checkpoint(case.checkpoint))
    check_average_image(model.average_image().numpy(), case)
    latents, images = invert_with_torch(model, case)
    check_steps(latents, images, case)


@pytest.mark.parametrize("backend", [name for name, row in BACKENDS.items() if row.device == "cpu"])
def test_exported_bundle_gives_the_official_results(case: GoldenCase, bundle: Path, backend: str) -> None:
    with Session.open(bundle, backend=backend, plain=True) as session:
        check_average_image(session.bundle.average_image, case)
        result = session.invert(case.expected["input"], steps=case.steps, every_step=True)
    check_steps(result.latents, result.images, case)


@pytest.mark.parametrize("backend", [name for name, row in BACKENDS.items() if row.device == "cpu"])
def test_engine_gives_the_official_results(case: GoldenCase, bundle: Path, backend: str) -> None:
    build_engine(bundle, BuildOptions(backend=backend))
    gc.collect()
    with Session.open(bundle, backend=backend) as session:
        assert session.describe()["plan"] == "table"
        result = session.invert(case.expected["input"], steps=case.steps, every_step=True)
    check_steps(result.latents, result.images, case)


def invert_with_torch(model: RestyleModel, case: GoldenCase) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    targets = torch.from_numpy(targets_from_images(case.expected["input"], model.config))
    results = model.invert(targets, steps=case.steps)
    return np.stack([step.latent.numpy() for step in results]), np.stack([step.image.numpy() for step in results])


def check_average_image(average_image: NDArray[np.float32], case: GoldenCase) -> None:
    pooled, _ = reduce_images(average_image)
    error = np.abs(pooled - case.expected["average_image"]).max()
    LOGGER.info("largest error of the average image: %.2g", error)
    assert pooled.shape == case.expected["average_image"].shape
    assert error <= IMAGE_TOLERANCE


def check_steps(
    latents: NDArray[np.float32],
    images: NDArray[np.float32],
    case: GoldenCase,
) -> None:
    """Compare [steps, N, ...] with what the official code gave; --log-cli-level=INFO shows the errors."""
    pooled, crop = reduce_images(images)
    errors = {
        "latent": largest_per_step(latents, case.expected["latents"]),
        "pooled": largest_per_step(pooled, case.expected["images_pooled"]),
        "crop": largest_per_step(crop, case.expected["images_crop"]),
    }
    for name, values in errors.items():
        LOGGER.info("largest errors per step, %s: %s", name, ", ".join(f"{value:.2g}" for value in values))
    assert images.shape[-2:] == tuple(case.expected["image_size"])
    assert errors["latent"].max() <= LATENT_TOLERANCE
    assert max(errors["pooled"].max(), errors["crop"].max()) <= IMAGE_TOLERANCE


def largest_per_step(found: NDArray[np.float32], expected: NDArray[np.float32]) -> NDArray[np.float32]:
    assert found.shape == expected.shape
    difference: NDArray[np.float32] = np.abs(found - expected).reshape(len(found), -1).max(axis=1)
    return difference
