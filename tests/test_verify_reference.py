from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from restyle_deploy import verify_reference
from restyle_deploy.bundle import Bundle, read_bundle
from restyle_deploy.errors import BackendUnavailableError
from restyle_deploy.verify import check_parity, create_inputs, load_expectation, parity_with_expectation
from restyle_deploy.verify_reference import REFERENCES, ReferenceRun, run_graph, run_reference


@pytest.fixture(scope="module")
def bundle(toy_bundle: Path) -> Bundle:
    return read_bundle(toy_bundle)


@pytest.fixture(scope="module")
def runs(bundle: Bundle) -> dict[str, ReferenceRun]:
    """Three steps by each reference."""
    inputs = create_inputs(bundle.config)
    return {name: run_reference(bundle, inputs, steps=3, name=name, threads=1) for name in REFERENCES}


def block_libraries(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    monkeypatch.setattr(verify_reference, "find_spec", lambda name: None if name in names else find_spec(name))


@pytest.mark.parametrize("name", REFERENCES)
def test_references_compute_the_stored_results(bundle: Bundle, runs: dict[str, ReferenceRun], name: str) -> None:
    run = runs[name]
    expectation = load_expectation(bundle.expectation)
    check_parity(parity_with_expectation(run.images, run.latents, expectation, precision="fp32"), name)
    assert run.steps == expectation.steps == len(run.currents)
    assert f"in {'ONNX Runtime' if name == 'onnxruntime' else 'torch'} " in run.name
    assert run.name.endswith("float32")


def test_references_agree_on_the_whole_state(runs: dict[str, ReferenceRun]) -> None:
    ours, theirs = runs["onnxruntime"], runs["torch"]
    for name in ("targets", "images", "latents", "currents"):
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), atol=1e-4)


def test_steps_start_from_the_average_and_then_from_the_last_state(
    bundle: Bundle, runs: dict[str, ReferenceRun]
) -> None:
    run = runs["onnxruntime"]
    first, third = run.state_before(1), run.state_before(3)
    np.testing.assert_array_equal(first.latents[1], bundle.latent_avg)
    np.testing.assert_array_equal(first.current[1], bundle.average_image)
    np.testing.assert_array_equal(third.latents, run.latents[1])
    np.testing.assert_array_equal(third.current, run.currents[1])
    inputs = {"target": run.targets, "current": third.current, "latent": third.latents}
    encoded = run_graph(bundle.graphs["encoder"].path, inputs, threads=1)
    np.testing.assert_allclose(encoded["latent_out"], run.latents[2], atol=1e-5)


def test_first_reference_that_is_installed_is_taken(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = create_inputs(bundle.config)
    assert "ONNX Runtime" in run_reference(bundle, inputs, steps=1, threads=1).name
    block_libraries(monkeypatch, "onnxruntime")
    assert "torch model" in run_reference(bundle, inputs, steps=1, threads=1).name


@pytest.mark.parametrize(
    ("blocked", "name", "message"),
    [
        (("onnxruntime",), "onnxruntime", r"reference onnxruntime needs onnxruntime, .*restyle-deploy\[onnxruntime\]"),
        (("torch", "onnx"), "torch", r"reference torch needs torch and onnx, .*restyle-deploy\[export\]"),
        (("torch", "onnxruntime"), None, r"reference onnxruntime needs onnxruntime, not installed here"),
    ],
)
def test_missing_library_is_named(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, blocked: tuple[str, ...], name: str | None, message: str
) -> None:
    block_libraries(monkeypatch, *blocked)
    with pytest.raises(BackendUnavailableError, match=message):
        run_reference(bundle, create_inputs(bundle.config), steps=1, name=name)


def test_unknown_reference_is_refused(bundle: Bundle) -> None:
    with pytest.raises(ValueError, match="unknown reference 'abacus'; known are onnxruntime, torch"):
        run_reference(bundle, create_inputs(bundle.config), steps=1, name="abacus")
