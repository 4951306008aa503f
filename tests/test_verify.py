import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from restyle_deploy import Session, verify
from restyle_deploy.backends.base import EXACT_PRECISION, PRECISIONS
from restyle_deploy.bundle import EXPECTATION, LATENT_AVG
from restyle_deploy.errors import BackendUnavailableError, BundleError, VerificationError
from restyle_deploy.model_config import ModelConfig
from restyle_deploy.verify import (
    TOLERANCES,
    Exceeding,
    Expectation,
    Parity,
    Tolerance,
    check_parity,
    compare_with_expectation,
    create_inputs,
    largest_per_step,
    load_expectation,
    reduce_images,
    save_expectation,
    verify_bundle,
)
from tests.bundles import add_engine, replace_array, replace_arrays, replace_file
from tests.fakes import create_engine_session

EXACT = TOLERANCES[EXACT_PRECISION]
CPU: dict[str, Any] = {"backend": "onnxruntime", "device": "cpu", "threads": 1}


@pytest.fixture
def bundle(toy_bundle: Path, tmp_path: Path) -> Path:
    """A bundle to change."""
    return shutil.copytree(toy_bundle, tmp_path / "bundle")


def read_arrays(bundle: Path) -> dict[str, NDArray[Any]]:
    with np.load(bundle / EXPECTATION) as arrays:
        return dict(arrays)


def test_good_bundle_is_within_tolerance(toy_bundle: Path) -> None:
    parity = verify_bundle(toy_bundle, **CPU)
    assert parity.is_within_tolerance
    assert len(parity.latent_errors) == len(parity.image_errors) == 3
    check_parity(parity, "toy")


@pytest.mark.parametrize("name", ["latents", "images_pooled", "images_crop"])
@pytest.mark.parametrize("step", [1, 2, 3])
@pytest.mark.parametrize("image", [0, 1])
def test_difference_at_any_step_and_image_is_found(bundle: Path, name: str, step: int, image: int) -> None:
    arrays = read_arrays(bundle)
    arrays[name][step - 1, image].flat[-1] += 0.25
    replace_arrays(bundle, EXPECTATION, arrays)
    parity = verify_bundle(bundle, **CPU)
    assert not parity.is_within_tolerance
    errors = parity.latent_errors if name == "latents" else parity.image_errors
    assert errors[step - 1] == pytest.approx(0.25, abs=1e-3)
    assert max(error for index, error in enumerate(errors) if index != step - 1) < EXACT.latents
    with pytest.raises(VerificationError, match="bundle: differs from the reference model; largest error per step"):
        check_parity(parity, "bundle")


def test_other_weights_are_found(bundle: Path) -> None:
    array = np.load(bundle / LATENT_AVG)
    replace_array(bundle, LATENT_AVG, array + np.float32(0.01))
    assert not verify_bundle(bundle, **CPU).is_within_tolerance


def test_expectation_that_is_not_finite_is_not_met(bundle: Path) -> None:
    arrays = read_arrays(bundle)
    arrays["latents"][1, 0, 0, 0] = np.nan
    replace_arrays(bundle, EXPECTATION, arrays)
    assert not verify_bundle(bundle, **CPU).is_within_tolerance


def test_expectation_of_another_shape_is_refused(bundle: Path) -> None:
    for name in ("latents", "images_pooled", "images_crop"):
        arrays = read_arrays(bundle)
        arrays[name] = arrays[name][:, :1]
        replace_arrays(bundle, EXPECTATION, arrays)
        with pytest.raises(VerificationError, match=r"got results of \[.*, the expectation holds \["):
            verify_bundle(bundle, **CPU)


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04", b"\x93NUMPY"])
def test_file_that_is_no_expectation_is_refused(bundle: Path, content: bytes) -> None:
    replace_file(bundle, EXPECTATION, content)
    with pytest.raises(BundleError, match=r"expectation\.npz: holds no expectation .*export the bundle again"):
        verify_bundle(bundle, **CPU)


def test_expectation_that_lacks_an_array_is_refused(bundle: Path) -> None:
    arrays = read_arrays(bundle)
    for changed in ({**arrays, "more": arrays["latents"]}, {"latents": arrays["latents"]}):
        replace_arrays(bundle, EXPECTATION, changed)
        with pytest.raises(BundleError, match="holds no expectation"):
            verify_bundle(bundle, **CPU)


def test_plain_array_is_no_expectation(bundle: Path) -> None:
    replace_array(bundle, EXPECTATION, np.zeros(3))
    with pytest.raises(BundleError, match="holds no expectation"):
        verify_bundle(bundle, **CPU)


def test_errors_of_the_session_pass_through(bundle: Path) -> None:
    with pytest.raises(BackendUnavailableError, match="abacus"):
        verify_bundle(bundle, backend="onnxruntime", device="abacus", threads=None)
    (bundle / "encoder.onnx").write_bytes(b"")
    with pytest.raises(BundleError, match="changed since the export"):
        verify_bundle(bundle, **CPU)


def test_expectation_is_read_as_it_was_written(toy_bundle: Path, tmp_path: Path) -> None:
    expectation = load_expectation(toy_bundle / EXPECTATION)
    save_expectation(tmp_path / "again.npz", expectation)
    again = load_expectation(tmp_path / "again.npz")
    assert again.steps == 3
    for name in ("inputs", "latents", "images_pooled", "images_crop"):
        np.testing.assert_array_equal(getattr(again, name), getattr(expectation, name))


def test_stored_inputs_are_those_that_are_created(toy_bundle: Path) -> None:
    with Session.open(toy_bundle, threads=1) as session:
        inputs = create_inputs(session.config)
    np.testing.assert_array_equal(load_expectation(toy_bundle / EXPECTATION).inputs, inputs)


def test_inputs_are_smooth_and_differ() -> None:
    config = ModelConfig(encoder_type="BackboneEncoder", domain="cars", output_size=512)
    inputs = create_inputs(config, count=3)
    assert inputs.dtype == np.uint8
    assert inputs.shape == (3, 192, 256, 3)
    assert np.ptp(inputs, axis=0).max() > 100
    assert np.abs(np.diff(inputs.astype(int), axis=2)).max() < 20
    np.testing.assert_array_equal(create_inputs(config, count=3), inputs)


@pytest.mark.parametrize(
    ("shape", "pooled", "crop"),
    [((1024, 1024), (64, 64), (32, 32)), ((384, 512), (48, 64), (32, 32)), ((16, 16), (16, 16), (16, 16))],
)
def test_images_are_reduced_to_block_means_and_centre(
    shape: tuple[int, int], pooled: tuple[int, int], crop: tuple[int, int]
) -> None:
    images = np.random.default_rng(0).normal(size=(2, 3, *shape)).astype(np.float32)
    means, centre = reduce_images(images)
    assert (means.shape, centre.shape) == ((2, 3, *pooled), (2, 3, *crop))
    assert means.dtype == np.float32
    assert centre.dtype == np.float32
    factor = shape[0] // pooled[0]
    assert means[1, 2, 3, 5] == pytest.approx(
        images[1, 2, 3 * factor : 4 * factor, 5 * factor : 6 * factor].mean(dtype=np.float64), abs=1e-6
    )
    top, left = ((size - part) // 2 for size, part in zip(shape, crop, strict=True))
    np.testing.assert_array_equal(centre, images[:, :, top : top + crop[0], left : left + crop[1]])


def test_every_precision_has_its_tolerance() -> None:
    assert set(TOLERANCES) == set(PRECISIONS)
    assert Tolerance(latents=1e-4, images=1e-3) == EXACT
    for row in TOLERANCES.values():
        assert EXACT.latents <= row.latents
        assert EXACT.images <= row.images
        assert EXACT.layers <= row.layers


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("latents", "images", "fits"),
    [
        ((1.0,), (1.0,), True),
        ((1.0, 1.01), (0.0, 0.0), False),
        ((0.0, 0.0), (1.01, 0.0), False),
        ((float("nan"),), (0.0,), False),
    ],
)
def test_tolerance_of_the_precision_is_kept_at_every_step(
    precision: str, latents: tuple[float, ...], images: tuple[float, ...], fits: bool
) -> None:
    row = TOLERANCES[precision]
    latent_errors, image_errors = (row.latents * np.array(latents)).tolist(), (row.images * np.array(images)).tolist()
    parity = Parity(latent_errors=tuple(latent_errors), image_errors=tuple(image_errors), precision=precision)
    assert parity.is_within_tolerance is fits
    stated = parity.as_json()
    assert (stated["latent_tolerance"], stated["image_tolerance"]) == (row.latents, row.images)
    if fits:
        check_parity(parity, "name")
    else:
        message = rf"name: .*latents .*\(tolerance {row.latents:g}\), images .*\(tolerance {row.images:g}\)"
        with pytest.raises(VerificationError, match=message):
            check_parity(parity, "name")


def test_parity_takes_the_tolerance_of_the_sessions_precision(
    toy_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Session.open(toy_bundle, threads=1) as session:
        description = {**session.describe(), "precision": "bf16"}
        monkeypatch.setattr(session, "describe", lambda: description)
        parity = compare_with_expectation(session, load_expectation(session.bundle.expectation))
    largest = float(np.abs(load_expectation(toy_bundle / EXPECTATION).latents).max())
    row = TOLERANCES["bf16"]
    assert parity.tolerance == replace(row, latents=row.latents * max(1.0, largest))


def test_tolerance_of_a_short_precision_grows_with_the_latents() -> None:
    errors: dict[str, Any] = {"latent_errors": (0.1,), "image_errors": (0.0,)}
    row = TOLERANCES["bf16"]
    assert not Parity(**errors, precision="bf16", largest_latent=0.5).is_within_tolerance
    assert Parity(**errors, precision="bf16", largest_latent=10.0).is_within_tolerance
    assert Parity(**errors, precision="bf16", largest_latent=0.5).tolerance == row
    assert Parity(**errors, largest_latent=10.0).tolerance == EXACT


def test_expectation_of_every_step_cannot_be_met_by_previews(toy_bundle: Path) -> None:
    session, _ = create_engine_session(roles=("preview",))
    with pytest.raises(ValueError, match="with preview_steps only the last step has an image"):
        compare_with_expectation(session, load_expectation(toy_bundle / EXPECTATION))


@pytest.mark.parametrize("plain", [False, True])
def test_engine_is_verified_unless_told(bundle: Path, monkeypatch: pytest.MonkeyPatch, plain: bool) -> None:
    add_engine(bundle)
    plans: list[str] = []

    def note(session: Session, expectation: Expectation) -> Parity:
        plans.append(session.describe()["plan"])
        return compare_with_expectation(session, expectation)

    monkeypatch.setattr(verify, "compare_with_expectation", note)
    assert verify_bundle(bundle, **CPU, plain=plain).is_within_tolerance
    assert plans == ["plain" if plain else "tuned"]


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("which", ["graph", "engine", "engine of another precision"])
def test_every_file_is_checked_whatever_is_run(bundle: Path, plain: bool, which: str) -> None:
    engine, other = add_engine(bundle), add_engine(bundle, precision="bf16")
    directory = {"graph": bundle, "engine": engine.directory, "engine of another precision": other.directory}[which]
    (directory / "generator.onnx").write_bytes(b"changed")
    with pytest.raises(BundleError, match=r"generator\.onnx: changed since the (export|build)"):
        verify_bundle(bundle, **CPU, plain=plain)


def test_precision_reaches_the_session(bundle: Path) -> None:
    with pytest.raises(BackendUnavailableError, match="precision bf16 cannot run here"):
        verify_bundle(bundle, **CPU, precision="bf16")


def test_comparison_takes_as_many_steps_as_are_stored(toy_bundle: Path) -> None:
    whole = load_expectation(toy_bundle / EXPECTATION)
    two = Expectation(
        inputs=whole.inputs,
        latents=whole.latents[:2],
        images_pooled=whole.images_pooled[:2],
        images_crop=whole.images_crop[:2],
    )
    with Session.open(toy_bundle, threads=1) as session:
        assert len(compare_with_expectation(session, two).latent_errors) == 2


@pytest.mark.parametrize(
    ("latents", "images", "current", "step", "output"),
    [
        ((0.0, 1.0), (0.0, 1.0), (0.0, 1.0), 2, "latents"),
        ((0.0, 1.0), (1.0, 1.0), (0.0, 1.0), 1, "images"),
        ((0.0, 0.0), (0.0, 0.0), (0.0, 1.0), 2, "current"),
        ((0.0, 0.0), (0.0, 1.0), (), 2, "images"),
    ],
)
def test_first_difference_is_that_of_the_earliest_step_and_output(
    latents: tuple[float, ...], images: tuple[float, ...], current: tuple[float, ...], step: int, output: str
) -> None:
    parity = Parity(latent_errors=latents, image_errors=images, current_errors=current)
    tolerance = EXACT.latents if output == "latents" else EXACT.images
    assert parity.first_exceeding == Exceeding(step=step, output=output, error=1.0, tolerance=tolerance)
    assert not parity.is_within_tolerance


def test_errors_that_are_not_finite_exceed_and_are_none_in_json() -> None:
    expected = np.zeros((3, 1, 2), np.float32)
    found = expected.copy()
    found[1, 0, 1], found[2, 0, 0] = np.nan, np.inf
    errors = largest_per_step(found, expected)
    assert errors == (0.0, np.inf, np.inf)
    parity = Parity(latent_errors=errors, image_errors=(0.0,) * 3, current_errors=(0.0,) * 3)
    assert parity.first_exceeding is not None
    assert parity.first_exceeding.step == 2
    facts = json.loads(json.dumps(parity.as_json(), allow_nan=False))
    assert facts["latent_errors"] == [0.0, None, None]
    assert facts["current_errors"] == [0.0] * 3
