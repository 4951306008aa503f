import importlib.util
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from restyle_deploy.bundle import read_bundle
from tests.cli.conftest import Run


@pytest.fixture
def bundle(toy_bundle: Path, tmp_path: Path) -> Path:
    return shutil.copytree(toy_bundle, tmp_path / "bundle")


def test_engine_is_built_used_and_described(run: Run, bundle: Path) -> None:
    result = run("build", bundle, "--backend", "onnxruntime", "--threads", 1)
    assert result.exit_code == 0
    (engine,) = read_bundle(bundle).engines
    assert re.fullmatch(
        rf"{re.escape(str(engine.directory))}: built and verified, [\d.]+ MB; plan: restyle-deploy inspect .*\n",
        result.stdout,
    )
    assert "checking the bundle …\n" in result.stderr
    assert result.stderr.endswith("verifying …\n")
    assert run("verify", bundle).exit_code == 0
    described = run("inspect", bundle)
    assert described.exit_code == 0
    text = described.stdout.partition("\nverification\n")[0]
    lines = dict(re.split(r": +", line.strip(), maxsplit=1) for line in text.splitlines() if ": " in line)
    assert lines["plan"] == "table"
    for site, choice in engine.plan["choices"].items():
        assert lines[site] == choice


def test_inspect_shows_what_tuning_measured(run: Run, bundle: Path) -> None:
    result = run("build", bundle, "--backend", "onnxruntime", "--threads", 1, "--tune")
    assert result.exit_code == 0
    assert "measuring " in result.stderr
    (engine,) = read_bundle(bundle).engines
    described = run("inspect", bundle).stdout
    assert re.search(r"plan: +tuned, measured for [\d.]+ s", described)
    for site, times in engine.plan["measurements"].items():
        if site in engine.plan["choices"]:
            (line,) = (line for line in described.splitlines() if line.strip().startswith(f"{site}:"))
            assert all(f"{choice} {time:.2f}" in line for choice, time in times.items())


def test_json_is_the_engine_s_record(run: Run, bundle: Path) -> None:
    result = run("build", bundle, "--backend", "onnxruntime", "--json")
    assert result.exit_code == 0
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    assert [json.loads(result.stdout)] == manifest["engines"]


@pytest.mark.parametrize(
    ("arguments", "tune", "retune", "seconds"),
    [
        ([], False, False, 180.0),
        (["--tune"], True, False, 180.0),
        (["--retune", "--seconds", "7"], True, True, 7.0),
    ],
    ids=str,
)
def test_options_reach_the_build(
    run: Run,
    toy_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    tune: bool,
    retune: bool,
    seconds: float,
) -> None:
    from restyle_deploy import build as build_module
    from restyle_deploy.errors import BuildError

    seen: list[Any] = []

    def build_engine(bundle: Path, options: Any, **_: Any) -> None:
        seen.append((bundle, options))
        raise BuildError("seen")

    monkeypatch.setattr(build_module, "build_engine", build_engine)
    given = ["--backend", "openvino", "--precision", "bf16", "--device", "cpu", "--threads", "3", *arguments]
    result = run("build", toy_bundle, *given)
    assert (result.exit_code, result.stderr) == (1, "Error: seen\n")
    options = build_module.BuildOptions(
        backend="openvino", precision="bf16", threads=3, tune=tune, retune=retune, seconds=seconds
    )
    assert seen == [(toy_bundle, options)]


def test_default_of_seconds_is_that_of_the_library(run: Run) -> None:
    from restyle_deploy.build import DEFAULT_SECONDS

    assert f"default: {DEFAULT_SECONDS}" in run("build", "--help").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing option '--backend'"),
        (["--backend", "abacus"], "'abacus' is not one of 'onnxruntime', 'openvino'"),
        (["--backend", "onnxruntime", "--threads", "0"], "0 is not in the range x>=1"),
        (["--backend", "onnxruntime", "--seconds", "-1"], "-1.0 is not in the range x>=0"),
        (["--backend", "onnxruntime", "--precision", "fp8"], "'fp8' is not one of 'fp32', 'bf16'"),
    ],
    ids=str,
)
def test_wrong_usage_is_told(run: Run, toy_bundle: Path, arguments: list[str], message: str) -> None:
    result = run("build", toy_bundle, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--precision", "bf16"], "precision bf16 cannot run here: on the CPU it computes float32 only"),
        (["--device", "abacus"], "device 'abacus' cannot run here; available: cpu"),
    ],
    ids=str,
)
def test_what_cannot_run_here_is_one_line(run: Run, toy_bundle: Path, arguments: list[str], message: str) -> None:
    result = run("build", toy_bundle, "--backend", "onnxruntime", *arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == f"Error: backend onnxruntime: {message}\n"


def test_missing_bundle_is_one_line(run: Run, tmp_path: Path) -> None:
    result = run("build", tmp_path / "none", "--backend", "onnxruntime")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith(f"Error: {tmp_path / 'none'}: no bundle")


@pytest.mark.parametrize("missing", [("onnx",), ("onnx_ir", "onnxscript")], ids=", ".join)
def test_missing_libraries_are_named(
    run: Run, toy_bundle: Path, monkeypatch: pytest.MonkeyPatch, missing: tuple[str, ...]
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else find_spec(name))
    result = run("build", toy_bundle, "--backend", "onnxruntime")
    assert result.exit_code == 1
    verb = "is" if len(missing) == 1 else "are"
    assert result.stderr == (
        f"Error: build needs {', '.join(missing)}, which {verb} not installed; "
        "run: pip install 'restyle-deploy[build]'\n"
    )
