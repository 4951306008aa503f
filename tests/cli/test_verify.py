import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from restyle_deploy.bundle import EXPECTATION
from restyle_deploy.cli.verify import _REFERENCES
from restyle_deploy.verify import TOLERANCES
from restyle_deploy.verify_reference import NO_REFERENCE, REFERENCES
from tests.bundles import add_engine, edit_manifest, replace_arrays
from tests.cli.conftest import Run
from tests.faults import add_faulty_engine


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
    assert [line.split(" latents ")[0] for line in lines[1:4]] == [
        f"step {step}: from the stored results:" for step in (1, 2, 3)
    ]
    assert lines[4].startswith("reference: the exported graphs in ONNX Runtime")
    number = r"\d\.\de-\d\d"
    for step, line in enumerate(lines[5:8], start=1):
        running = f"step {step}: running freely: latents {number}, images {number}"
        assert re.fullmatch(
            f"{running}; from the reference's state: latents {number}, images {number}, current {number}", line
        )
    assert lines[8:] == [f"{toy_bundle}: ok; run: the exported graphs, by onnxruntime on cpu in fp32"]


def test_stored_results_alone_are_compared_when_told(run: Run, toy_bundle: Path) -> None:
    result = run("verify", toy_bundle, "--threads", 1, "--reference", "none")
    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) == 5
    for options in (("--steps", 2), ("--layers",)):
        refused = run("verify", toy_bundle, "--reference", "none", *options)
        assert refused.exit_code == 2
        assert "need a reference" in refused.stderr


def test_reference_steps_and_layers_are_as_told(run: Run, toy_bundle: Path) -> None:
    result = run("verify", toy_bundle, "--threads", 1, "--reference", "torch", "--steps", 4, "--layers")
    assert result.exit_code == 0
    assert "reference: the torch model in torch " in result.stdout
    assert "step 4: running freely: " in result.stdout
    for graph in ("encoder", "generator"):
        pattern = rf"{graph}: \d+ outputs of layers compared, in the exported graphs: all within 0\.0001 of"
        assert re.search(pattern, result.stdout)


def test_layer_of_a_fault_is_named(run: Run, toy_bundle: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(toy_bundle, tmp_path / "bundle")
    add_faulty_engine(bundle, "generator", "decoder.convs.1.conv", factor=1.5)
    result = run("verify", bundle, "--threads", 1)
    assert result.exit_code == 1
    assert "first beyond its tolerance: step 1, images: " in result.stdout
    assert "cause: the step itself" in result.stdout
    assert re.search(r"the first that differs is that of decoder\.convs\.1\.conv \(Conv, ", result.stdout)
    assert re.fullmatch(r"Error: .*differs from the reference model; largest error per step.*\n", result.stderr)
    assert f"{bundle}: ok" not in result.stdout


def test_help_has_the_tolerances_of_the_table_and_says_how_they_grow(run: Run) -> None:
    text = " ".join(run("verify", "--help").stdout.split())
    for precision, row in TOLERANCES.items():
        assert f"{precision} latents {row.latents:g}, images {row.images:g}" in text
    assert "Where the largest latent is beyond ±1, the tolerance of latents is multiplied by it" in text
    assert "Fewer than the bundle has stored results of are raised to these." in text


def test_references_are_those_that_there_are() -> None:
    assert (*REFERENCES, NO_REFERENCE) == _REFERENCES


def test_json_holds_the_errors(run: Run, toy_bundle: Path) -> None:
    result = run("verify", toy_bundle, "--json")
    assert result.exit_code == 0
    facts = json.loads(result.stdout)
    assert facts["ok"] is True
    assert facts["drift"]["reference"].startswith("the exported graphs")
    assert max(facts["drift"]["forced"]["latent_errors"]) <= facts["drift"]["forced"]["latent_tolerance"]
    assert (facts["first_exceeding"], facts["cause"], facts["layers"], facts["notes"]) == (None, None, [], [])
    assert len(facts["latent_errors"]) == len(facts["image_errors"]) == 3
    assert max(facts["latent_errors"]) <= facts["latent_tolerance"]


def test_other_results_exit_with_1_and_the_errors_per_step(run: Run, tampered: Path) -> None:
    result = run("verify", tampered)
    assert result.exit_code == 1
    assert "first beyond its tolerance: step 2, latents: 0.5, tolerance 0.0001" in result.stdout
    assert "cause: the reference differs from the stored results too" in result.stdout
    assert "ok" not in result.stdout.splitlines()[-1]
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


def leave_bundle(manifest: Any) -> None:
    """Let the record of the first engine state a directory that is not the bundle's."""
    manifest["engines"][0]["directory"] = "../victim"


def test_engine_that_nobody_has_verified_is_told(run: Run, toy_bundle: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(toy_bundle, tmp_path / "bundle")
    add_engine(bundle, precision="bf16", build={"verified": False, "reason": "no such processor here"})
    add_engine(bundle)
    result = run("verify", bundle, "--threads", 1, "--plain", "--reference", "none")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.splitlines()[-2:] == [
        "engine onnxruntime-cpu-bf16: NOT VERIFIED when it was built: no such processor here; where it can run: "
        f"restyle-deploy verify {bundle} --backend onnxruntime --device cpu --precision bf16",
        f"{bundle}: ok; run: the exported graphs, by onnxruntime on cpu in fp32; "
        "not run: onnxruntime-cpu-bf16 (not verified), onnxruntime-cpu-fp32 (verified)",
    ]
    facts = json.loads(run("verify", bundle, "--threads", 1, "--reference", "none", "--json").stdout)
    assert facts["ok"] is True
    assert facts["run"] == {
        "engine": "onnxruntime-cpu-fp32",
        "backend": "onnxruntime",
        "device": "cpu",
        "precision": "fp32",
    }
    assert [(engine["name"], engine["state"], engine["reason"]) for engine in facts["engines"]] == [
        ("onnxruntime-cpu-bf16", "not verified", "no such processor here"),
        ("onnxruntime-cpu-fp32", "run", None),
    ]


def test_engine_that_is_run_is_named_and_no_longer_unverified(run: Run, toy_bundle: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(toy_bundle, tmp_path / "bundle")
    add_engine(bundle, build={"verified": False, "reason": "built elsewhere"})
    result = run("verify", bundle, "--threads", 1, "--reference", "none")
    assert result.exit_code == 0
    assert "NOT VERIFIED" not in result.stdout
    assert result.stdout.endswith(": ok; run: engine onnxruntime-cpu-fp32, by onnxruntime on cpu in fp32\n")


def test_damaged_engine_exits_with_1(run: Run, toy_bundle: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(toy_bundle, tmp_path / "bundle")
    add_engine(bundle, precision="bf16")
    edit_manifest(bundle, leave_bundle)
    result = run("verify", bundle, "--threads", 1, "--reference", "none")
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    again = f"restyle-deploy build {bundle} --backend onnxruntime --precision bf16"
    reason = f"{bundle}: ../victim lies outside the bundle's engines"
    assert lines[0] == "files: unchanged; those of damaged engines are not checked"
    assert lines[-2:] == [
        f"engine ../victim: DAMAGED: {reason}; build it again: {again}",
        "run: the exported graphs, by onnxruntime on cpu in fp32; not run: ../victim (damaged)",
    ]
    assert result.stderr == (
        f"Error: {bundle}: the records of these engines are damaged: ../victim ({reason}); build again: {again}\n"
    )
    result = run("verify", bundle, "--threads", 1, "--reference", "none", "--json")
    assert result.exit_code == 1
    facts = json.loads(result.stdout)
    assert facts["ok"] is False
    assert facts["engines"] == [{"name": "../victim", "state": "damaged", "reason": reason, "command": again}]


def test_damaged_engine_that_states_nothing_has_no_command(run: Run, toy_bundle: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(toy_bundle, tmp_path / "bundle")
    edit_manifest(bundle, lambda manifest: manifest["engines"].append(3))
    result = run("verify", bundle, "--threads", 1, "--reference", "none")
    assert result.exit_code == 1
    assert re.search(r"^engine number 0: DAMAGED: .*; build it again$", result.stdout, re.MULTILINE)
    assert re.fullmatch(r"Error: .*damaged: number 0 \(.*\); build again\n", result.stderr)


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
