import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from restyle_deploy.bundle import EXPECTATION
from tests.bundles import add_engine, replace_arrays
from tests.cli.conftest import Run


@pytest.fixture
def tampered(toy_bundle: Path, tmp_path: Path) -> Path:
    """A bundle whose expectation is off at step 2, with hashes that fit."""
    bundle = shutil.copytree(toy_bundle, tmp_path / "tampered")
    with np.load(bundle / EXPECTATION) as stored:
        arrays = dict(stored)
    arrays["latents"][1] += 0.5
    replace_arrays(bundle, EXPECTATION, arrays)
    return bundle


def test_good_bundle_is_ok(run: Run, toy_bundle: Path) -> None:
    result = run("verify", toy_bundle, "--threads", 1)
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0] == "files: unchanged"
    assert [line.split(":")[0] for line in lines[1:4]] == ["step 1", "step 2", "step 3"]
    assert lines[4] == f"{toy_bundle}: ok"


def test_json_holds_the_errors(run: Run, toy_bundle: Path) -> None:
    result = run("verify", toy_bundle, "--json")
    assert result.exit_code == 0
    facts = json.loads(result.stdout)
    assert facts["ok"] is True
    assert len(facts["latent_errors"]) == len(facts["image_errors"]) == 3
    assert max(facts["latent_errors"]) <= facts["latent_tolerance"]


def test_other_results_exit_with_1_and_the_errors_per_step(run: Run, tampered: Path) -> None:
    result = run("verify", tampered)
    assert (result.exit_code, result.stdout) == (1, "")
    number = r"[\d.e-]+"
    assert re.fullmatch(
        rf"Error: .*tampered: differs from the reference model; largest error per step: "
        rf"latents {number}, 0\.5, {number} \(tolerance 0\.0001\), images {number}, {number}, {number} .*\n",
        result.stderr,
    )


def test_json_is_printed_for_other_results_too(run: Run, tampered: Path) -> None:
    result = run("verify", tampered, "--json")
    assert result.exit_code == 1
    facts = json.loads(result.stdout)
    assert facts["ok"] is False
    assert facts["latent_errors"][1] == pytest.approx(0.5, abs=1e-3)
    assert result.stderr.startswith("Error: ")


def test_changed_file_exits_with_1(run: Run, toy_bundle: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(toy_bundle, tmp_path / "bundle")
    (bundle / "encoder.onnx").unlink()
    for arguments in ((), ("--json",)):
        result = run("verify", bundle, *arguments)
        assert (result.exit_code, result.stdout) == (1, "")
        assert re.fullmatch(r"Error: .*encoder\.onnx: missing; export the bundle again\n", result.stderr)


def test_options_reach_the_session(run: Run, toy_bundle: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(toy_bundle, tmp_path / "bundle")
    add_engine(bundle, processor="Abacus")
    result = run("verify", bundle)
    assert (result.exit_code, result.stdout) == (1, "")
    assert re.fullmatch(r"Error: .*built for Abacus, this is .*restyle-deploy build .* --plain .*\n", result.stderr)
    assert run("verify", bundle, "--plain").exit_code == 0
    result = run("verify", bundle, "--precision", "bf16")
    assert result.exit_code == 1
    assert re.fullmatch(r"Error: backend onnxruntime: precision bf16 cannot run here: .*\n", result.stderr)


def test_previews_cannot_be_verified(run: Run, toy_bundle: Path) -> None:
    result = run("verify", toy_bundle, "--preview-steps")
    assert result.exit_code == 2
    assert re.search("No such option.*--preview-steps", result.stderr)
