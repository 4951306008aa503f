import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from restyle_deploy import Session, verify_drift, verify_reference, verify_search
from restyle_deploy.bundle import EXPECTATION, LATENT_AVG
from restyle_deploy.errors import BackendUnavailableError, BundleError, VerificationError
from restyle_deploy.verify import TOLERANCES, Expectation, Parity, create_inputs, reduce_images
from restyle_deploy.verify_drift import Drift, Verification, check_verification, examine_session, take_step
from restyle_deploy.verify_reference import NO_REFERENCE, ReferenceRun, State, run_reference
from tests.bundles import add_engine, replace_array, replace_arrays
from tests.fakes import AVERAGE_IMAGE, AVERAGE_LATENT, create_session
from tests.faults import add_faulty_engine

CPU: dict[str, Any] = {"backend": "onnxruntime", "device": "cpu", "threads": 1}
FITS = Parity(latent_errors=(0.0, 0.0), image_errors=(0.0, 0.0))
DIFFERS = replace(FITS, latent_errors=(0.0, 1.0))
# Of one step of `create_drifting`: within the tolerance of latents, and twice it is not.
STEP_ERROR = 0.7 * TOLERANCES["fp32"].latents


@pytest.fixture
def bundle(toy_bundle: Path, tmp_path: Path) -> Path:
    """A bundle to change."""
    return shutil.copytree(toy_bundle, tmp_path / "bundle")


def drift_of(*, stored: Parity = FITS, running: Parity = FITS, forced: Parity = FITS) -> Drift:
    return Drift(reference="a reference", stored=stored, running=running, forced=forced)


def test_good_bundle_is_within_tolerance(toy_bundle: Path) -> None:
    verification = verify_drift.verify_drift(toy_bundle, **CPU, steps=5)
    assert verification.is_within_tolerance
    assert (verification.cause, verification.layers, verification.notes) == (None, (), ())
    drift = verification.drift
    assert drift is not None
    assert drift.reference.startswith("the exported graphs in ONNX Runtime")
    assert len(verification.stored.latent_errors) == len(drift.stored.latent_errors) == 3
    assert len(drift.running.latent_errors) == len(drift.forced.latent_errors) == len(drift.forced.current_errors) == 5
    check_verification(verification, "toy")
    assert verification.as_json()["ok"] is True


def test_fewer_steps_than_stored_are_filled_up(toy_bundle: Path) -> None:
    verification = verify_drift.verify_drift(toy_bundle, **CPU, steps=1, reference="torch")
    assert verification.drift is not None
    assert "torch model" in verification.drift.reference
    assert len(verification.drift.forced.image_errors) == 3


def test_layers_are_compared_when_asked_for(toy_bundle: Path) -> None:
    layers = verify_drift.verify_drift(toy_bundle, **CPU, layers=True).layers
    assert [search.graph for search in layers] == ["encoder", "generator"]
    assert all(search.first is None for search in layers)


@pytest.mark.parametrize(
    ("role", "layer", "output"),
    [("encoder", "encoder.body.2.res_layer.1", "latents"), ("generator", "decoder.convs.1.conv", "images")],
)
def test_fault_of_a_step_is_told_with_its_layer(bundle: Path, role: str, layer: str, output: str) -> None:
    add_faulty_engine(bundle, role, layer, factor=1.5)
    verification = verify_drift.verify_drift(bundle, **CPU)
    assert not verification.is_within_tolerance
    assert verification.cause == "step"
    first = verification.layers[-1].first
    assert first is not None
    assert (first.graph, first.layer) == (role, layer)
    exceeding = verification.first_exceeding
    assert exceeding is not None
    assert (exceeding.step, exceeding.output) == (1, output)
    assert verification.drift is not None
    assert verification.drift.forced.first_exceeding is not None
    facts = json.loads(json.dumps(verification.as_json(), allow_nan=False))
    assert facts["layers"][-1]["first"]["layer"] == layer
    with pytest.raises(VerificationError, match="bundle: differs from the reference model; largest error per step"):
        check_verification(verification, "bundle")


def test_latents_of_a_step_are_right_where_only_the_generator_is_not(bundle: Path) -> None:
    add_faulty_engine(bundle, "generator", "decoder.convs.1.conv", factor=1.5)
    drift = verify_drift.verify_drift(bundle, **CPU).drift
    assert drift is not None
    assert max(drift.forced.latent_errors) < TOLERANCES["fp32"].latents  # nothing was fed back
    assert drift.running.latent_errors[1] > TOLERANCES["fp32"].latents  # the image that was wrong was


def test_result_that_is_not_finite_is_told_with_its_layer(bundle: Path) -> None:
    add_faulty_engine(bundle, "encoder", "encoder.body.1.res_layer.1", factor=float("nan"))
    verification = verify_drift.verify_drift(bundle, **CPU)
    assert verification.cause == "step"
    assert verification.layers[-1].first is not None
    assert verification.layers[-1].first.layer == "encoder.body.1.res_layer.1"
    assert any("is not finite after step 1" in note for note in verification.notes)
    facts = json.loads(json.dumps(verification.as_json(), allow_nan=False))
    assert facts["latent_errors"] == [None] * 3
    assert facts["first_exceeding"] == {"step": 1, "output": "latents", "error": None, "tolerance": 1e-4}
    assert facts["layers"][0]["first"]["error"] is None


def test_stored_results_that_no_reference_gives_are_the_cause(bundle: Path) -> None:
    with np.load(bundle / EXPECTATION) as stored:
        arrays = dict(stored)
    arrays["latents"][1] += 0.5
    replace_arrays(bundle, EXPECTATION, arrays)
    verification = verify_drift.verify_drift(bundle, **CPU)
    assert (verification.cause, verification.layers) == ("stored", ())
    assert verification.first_exceeding is not None
    assert verification.first_exceeding.step == 2


def test_other_average_is_found_in_the_stored_results(bundle: Path) -> None:
    replace_array(bundle, LATENT_AVG, np.load(bundle / LATENT_AVG) + np.float32(0.01))
    assert verify_drift.verify_drift(bundle, **CPU).cause == "stored"


def create_drifting(monkeypatch: pytest.MonkeyPatch, *, error: float, steps: int) -> Session:
    """Return a session each of whose steps adds `error` to the latents, beside a reference that does not."""

    def encode(buffers: Mapping[str, NDArray[Any]]) -> None:
        np.add(buffers["latent"], 0.25 + offset, out=buffers["latent_out"])

    def generate(buffers: Mapping[str, NDArray[Any]]) -> None:
        buffers["image"][:] = buffers["current"][:] = 0.5

    offset = 0.0
    session, _, _ = create_session(encoder=encode, generator=generate)
    about = {**session.describe(), "device": "cpu", "threads": None}
    monkeypatch.setattr(session, "describe", lambda: about)
    config = session.config
    inputs = create_inputs(config)
    exact = session.invert(inputs, steps=steps, every_step=True)
    offset = error
    pooled, crop = reduce_images(exact.images[:1])
    expectation = Expectation(inputs=inputs, latents=exact.latents[:1], images_pooled=pooled, images_crop=crop)
    monkeypatch.setattr(verify_drift, "load_expectation", lambda path: expectation)
    shape = (len(inputs), 3, *config.input_shape)
    run = ReferenceRun(
        name="the exact session",
        targets=np.zeros(shape, np.float32),
        average=State(
            latents=np.full_like(exact.latents[0], AVERAGE_LATENT), current=np.full(shape, AVERAGE_IMAGE, np.float32)
        ),
        images=exact.images,
        latents=exact.latents,
        currents=np.full((steps, *shape), 0.5, np.float32),
    )
    monkeypatch.setattr(verify_drift, "run_reference", lambda *arguments, **options: run)
    return session


def test_feedback_is_told_from_the_error_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    session = create_drifting(monkeypatch, error=STEP_ERROR, steps=4)
    verification = examine_session(session, steps=4)
    drift = verification.drift
    assert drift is not None
    assert drift.running.latent_errors == pytest.approx([STEP_ERROR * step for step in (1, 2, 3, 4)], abs=1e-6)
    assert drift.forced.latent_errors == pytest.approx([STEP_ERROR] * 4, abs=1e-6)
    assert verification.stored.is_within_tolerance
    assert (verification.cause, verification.layers) == ("feedback", ())
    first = verification.first_exceeding
    assert first is not None
    assert (first.step, first.output) == (2, "latents")
    with pytest.raises(VerificationError, match=r"differs from the exact session: at step 2 latents by 0\.00014 \("):
        check_verification(verification, "drifting")


def test_larger_error_of_a_step_is_no_feedback(monkeypatch: pytest.MonkeyPatch) -> None:
    verification = examine_session(create_drifting(monkeypatch, error=2 * STEP_ERROR, steps=2), steps=2)
    assert verification.cause == "step"
    assert verification.layers == ()
    assert any("layers are not compared" in note for note in verification.notes)  # the session has no ONNX file


@pytest.mark.parametrize(
    ("drift", "cause", "is_within"),
    [
        (drift_of(), None, True),
        (drift_of(running=DIFFERS), "feedback", False),
        (drift_of(forced=DIFFERS), "step", False),
        (drift_of(running=DIFFERS, forced=DIFFERS), "step", False),
        (drift_of(stored=DIFFERS, running=DIFFERS, forced=DIFFERS), "stored", False),
    ],
)
def test_causes(drift: Drift, cause: str | None, is_within: bool) -> None:
    verification = Verification(stored=FITS, drift=drift)
    assert (verification.cause, verification.is_within_tolerance) == (cause, is_within)
    assert Verification(stored=DIFFERS).cause is None


def test_step_from_a_state_is_that_of_the_loop(toy_bundle: Path) -> None:
    with Session.open(toy_bundle, threads=1) as session:
        inputs = create_inputs(session.config)
        expected = run_reference(session.bundle, inputs, steps=2, threads=1)
        found = take_step(session, expected.targets, expected.state_before(2))
    for one, other in zip(found, (expected.images[1], expected.latents[1], expected.currents[1]), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    with pytest.raises(ValueError, match="the session is closed"):
        take_step(session, expected.targets, expected.average)


def test_no_reference_is_a_note(toy_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = ("onnxruntime", "torch")
    monkeypatch.setattr(verify_reference, "find_spec", lambda name: None if name in blocked else find_spec(name))
    verification = verify_drift.verify_drift(toy_bundle, **CPU)
    assert verification.is_within_tolerance
    assert verification.drift is None
    assert any(note.startswith("no reference: the reference onnxruntime needs") for note in verification.notes)
    with pytest.raises(BackendUnavailableError, match="reference torch needs torch"):
        verify_drift.verify_drift(toy_bundle, **CPU, reference="torch")


def test_stored_results_alone_need_no_reference(toy_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_drift, "run_reference", lambda *arguments, **options: pytest.fail("it was run"))
    verification = verify_drift.verify_drift(toy_bundle, **CPU, reference=NO_REFERENCE, steps=9)
    assert (verification.drift, verification.notes) == (None, ())
    assert len(verification.stored.latent_errors) == 3


def test_layers_without_onnx_are_a_note(toy_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "restyle_deploy.verify_search", raising=False)
    monkeypatch.delitem(sys.modules, "restyle_deploy.verify_layers", raising=False)
    monkeypatch.delitem(sys.modules, "restyle_deploy.graph.layer_values", raising=False)
    monkeypatch.setitem(sys.modules, "onnx", None)
    verification = verify_drift.verify_drift(toy_bundle, **CPU, layers=True)
    assert verification.layers == ()
    assert any("layers are not compared: this needs" in note for note in verification.notes)


def test_difference_of_no_layer_is_a_note(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_faulty_engine(bundle, "generator", "decoder.convs.1.conv", factor=1.5)
    searches = verify_drift.verify_drift(bundle, **CPU).layers
    none = tuple(replace(search, first=None) for search in searches)
    monkeypatch.setattr(verify_search, "search_session", lambda *arguments, **options: none)
    notes = verify_drift.verify_drift(bundle, **CPU).notes
    assert any("no layer differs while the outputs of layers are kept" in note for note in notes)


def test_files_are_checked(bundle: Path) -> None:
    engine = add_engine(bundle, precision="bf16")
    (engine.directory / "encoder.onnx").write_bytes(b"changed")
    with pytest.raises(BundleError, match=r"encoder\.onnx: changed since the build"):
        verify_drift.verify_drift(bundle, **CPU)
