from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from restyle_deploy.bench.inversions import (
    MAX_QUALITY_BATCH,
    Pictures,
    StepResults,
    count_steps,
    measure_inversions,
    quality_batch,
)
from restyle_deploy.bench.metrics import MetricOptions, open_metrics
from restyle_deploy.bench.metrics.pixels import measure_l2, saved_pictures
from restyle_deploy.model_config import ModelConfig
from restyle_deploy.runtime.images import pool_images
from tests.bench.made_up import INPUT_SIZE, FakeSession


def targets(count: int) -> NDArray[np.float32]:
    shape = (count, 3, INPUT_SIZE, INPUT_SIZE)
    return np.random.default_rng(0).uniform(-0.9, 0.9, shape).astype(np.float32)


def measure(
    session: FakeSession,
    folder: Path,
    *,
    count: int = 3,
    names: tuple[str, ...] = ("mse", "psnr_db"),
    **changes: Any,
) -> dict[int, StepResults]:
    images = tuple(f"photo{index}" for index in range(count))
    options: dict[str, Any] = {
        "steps": (1, 2, 5),
        "exact": None,
        "pictures": Pictures(folder=folder, configuration="made-up", names=images, count=0),
        "tick": lambda done: None,
        **changes,
    }
    with open_metrics(MetricOptions(names=names), (INPUT_SIZE, INPUT_SIZE)) as metrics:
        return measure_inversions(session, targets(count), metrics=metrics, **options)


def test_quality_is_counted_at_the_size_of_the_input(session: FakeSession, tmp_path: Path) -> None:
    energy = np.square(targets(3).astype(np.float64)).mean(axis=(1, 2, 3))
    for steps, result in measure(session, tmp_path).items():  # what is left is 4^-steps of the target's energy
        assert result.values["mse"] == pytest.approx(energy * 4.0**-steps, rel=1e-4)
        assert result.values["psnr_db"] == pytest.approx(10 * np.log10(4 / (energy * 4.0**-steps)), rel=1e-4)
        assert (result.exact_values, result.difference) == ({}, None)


def test_each_image_is_inverted_once(session: FakeSession, tmp_path: Path) -> None:
    ticks: list[int] = []
    results = measure(session, tmp_path, count=MAX_QUALITY_BATCH + 3, tick=ticks.append)
    assert session.calls == [(MAX_QUALITY_BATCH, 5, True), (3, 5, True)]
    assert ticks == [5 * MAX_QUALITY_BATCH, 15]
    assert {len(result.values["mse"]) for result in results.values()} == {MAX_QUALITY_BATCH + 3}
    assert count_steps(session, (1, 2, 5)) == 5


def test_one_image_is_enough(session: FakeSession, tmp_path: Path) -> None:
    assert len(measure(session, tmp_path, count=1)[5].values["mse"]) == 1


def test_previews_take_an_inversion_for_each_step_count(approximate: FakeSession, tmp_path: Path) -> None:
    measure(approximate, tmp_path)
    assert approximate.calls == [(3, 1, False), (3, 2, False), (3, 5, False)]
    assert count_steps(approximate, (1, 2, 5)) == 8


def test_approximate_session_is_compared_with_the_exact_one(
    session: FakeSession, approximate: FakeSession, tmp_path: Path
) -> None:
    for result in measure(approximate, tmp_path, exact=session).values():
        assert result.difference is not None
        assert result.difference.latent_error == pytest.approx(0.01)
        assert result.difference.psnr_db == pytest.approx(20 * np.log10(2 / 0.01), abs=0.01)
        assert result.exact_values["mse"] != result.values["mse"]
    assert session.calls == [(3, 5, True)]


def test_pictures_are_of_the_first_images(session: FakeSession, tmp_path: Path) -> None:
    count = MAX_QUALITY_BATCH + 3
    names = tuple(f"photo{index}" for index in range(count))
    pictures = Pictures(folder=tmp_path, configuration="made-up", names=names, count=MAX_QUALITY_BATCH + 1)
    measure(session, tmp_path, count=count, pictures=pictures)
    place = tmp_path / "images" / "made-up"
    assert {path.name for path in place.iterdir()} == set(names[: MAX_QUALITY_BATCH + 1])
    assert {path.name for path in (place / names[-3]).iterdir()} == {
        "target.png",
        "step-1.png",
        "step-2.png",
        "step-5.png",
    }


@pytest.mark.parametrize(("output_size", "steps", "batch"), [(64, 10, 8), (1024, 10, 2), (1024, 1, 8), (1024, 50, 1)])
def test_batches_fit_in_memory(output_size: int, steps: int, batch: int) -> None:
    config = ModelConfig(encoder_type="BackboneEncoder", domain="faces", output_size=output_size)
    assert quality_batch(config, steps) == batch


def test_l2_is_of_the_full_images_as_they_are_saved(session: FakeSession, tmp_path: Path) -> None:
    found = measure(session, tmp_path, steps=(5,), names=("l2",))[5].values["l2"]
    images = session.invert(targets(3), steps=5).images
    assert images.shape[-1] > INPUT_SIZE
    saved = saved_pictures(images, (INPUT_SIZE, INPUT_SIZE))
    assert found == pytest.approx(measure_l2(saved, targets(3)))
    pooled = saved_pictures(pool_images(images, (INPUT_SIZE, INPUT_SIZE)), (INPUT_SIZE, INPUT_SIZE))
    assert found != pytest.approx(measure_l2(pooled, targets(3)))
