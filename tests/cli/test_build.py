import importlib.util
import json
import re
import shlex
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
        backend="openvino", device="cpu", precision="bf16", threads=3, tune=tune, retune=retune, seconds=seconds
    )
    assert seen == [(toy_bundle, options)]


@pytest.mark.parametrize(
    ("arguments", "engine"),
    [
        ([], {}),
        (
            ["--min-batch", "2", "--opt-batch", "3", "--max-batch", "4"],
            {"min_batch": 2, "opt_batch": 3, "max_batch": 4},
        ),
        (["--workspace", "512"], {"workspace_bytes": 512}),
        (["--workspace", "3K"], {"workspace_bytes": 3 * 2**10}),
        *[
            (["--workspace", text], {"workspace_bytes": 2**31})
            for text in ("2G", "2g", "2GB", "2GiB", "2 GiB", "2048M", "2097152KB", "2147483648", "2147483648B")
        ],
        (["--workspace", "1.5G"], {"workspace_bytes": 3 * 2**29}),
        (["--workspace", "1T"], {"workspace_bytes": 2**40}),
        *[
            (["--compute-capability", text], {"compute_capabilities": ("8.9", "12.0")})
            for text in ("8.9,12.0", "8.9, 12.0", "sm_89,sm_120", "SM89,120")
        ],
        (["--workspace", "2G", "--optimization-level", "0"], {"workspace_bytes": 2**31, "optimization_level": 0}),
        (["--compute-capability", "8.9", "--compute-capability", "12.0"], {"compute_capabilities": ("8.9", "12.0")}),
        (["--hardware-compatible", "--version-compatible"], {"hardware_compatible": True, "version_compatible": True}),
        (["--stripped", "--no-plugins"], {"stripped": True, "no_plugins": True}),
    ],
    ids=str,
)
@pytest.mark.parametrize("dry", [False, True])
def test_options_of_engines_reach_the_build(
    run: Run,
    toy_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    engine: dict[str, Any],
    dry: bool,
) -> None:
    from restyle_deploy import build as build_module
    from restyle_deploy.backends.base import EngineOptions
    from restyle_deploy.errors import BuildError

    seen: list[Any] = []

    def note(bundle: Path, options: Any, **_: Any) -> None:
        seen.append(options)
        raise BuildError("seen")

    monkeypatch.setattr(build_module, "describe_build" if dry else "build_engine", note)
    result = run("build", toy_bundle, *arguments, "--backend", "tensorrt-rtx", *(["--dry-run"] if dry else []))
    assert (result.exit_code, result.stderr) == (1, "Error: seen\n")
    assert seen == [build_module.BuildOptions(backend="tensorrt-rtx", device="cuda:0", engine=EngineOptions(**engine))]


def test_all_examples_of_the_help_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    from click.testing import CliRunner

    from restyle_deploy.cli.build import build

    examples = re.findall(r"restyle-deploy build (.+)", str(build.help))
    assert len(examples) > 3
    monkeypatch.setattr(build, "callback", lambda **arguments: None)
    for example in examples:
        result = CliRunner().invoke(build, example.split(), catch_exceptions=False)
        assert result.exit_code == 0, (example, result.output)


def test_arguments_of_a_record_are_those_that_the_command_takes(
    run: Run, toy_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from restyle_deploy import build as build_module
    from restyle_deploy.backends.base import EngineOptions
    from restyle_deploy.errors import BuildError

    every = EngineOptions(
        min_batch=2,
        opt_batch=3,
        max_batch=4,
        workspace_bytes=1000,
        optimization_level=0,
        compute_capabilities=("8.9", "12.0"),
        hardware_compatible=True,
        version_compatible=True,
        stripped=True,
        no_plugins=True,
    )
    assert len(every.given) == len(vars(every))
    seen: list[Any] = []

    def note(bundle: Path, options: Any, **_: Any) -> None:
        seen.append(options.engine)
        raise BuildError("seen")

    monkeypatch.setattr(build_module, "build_engine", note)
    run("build", toy_bundle, "--backend", "tensorrt", *every.arguments)
    assert seen == [every]


def test_engine_that_is_not_verified_says_so(run: Run, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from restyle_deploy import build as build_module
    from tests.bundles import add_engine

    state = {
        "verified": False,
        "reason": "no GPU here",
        "profile": {"min": 1, "opt": 2, "max": 8},
        "plugin_route": "functions",
    }
    monkeypatch.setattr(build_module, "build_engine", lambda bundle, options, progress: add_engine(bundle, build=state))
    result = run("build", bundle, "--backend", "onnxruntime")
    assert result.exit_code == 0
    first, second = result.stdout.splitlines()
    assert re.search(r": built, NOT VERIFIED, [\d.]+ MB, batches 1 to 8, fastest for 2; plan: ", first)
    assert second == "not verified: no GPU here"
    described = run("inspect", bundle).stdout
    assert re.search(r"verified: +NO: no GPU here\n", described)
    assert re.search(r"plugin_route: +functions\n", described)
    assert re.search(r"max: +8\n", described)


def test_dry_run_prints_what_would_be_built(run: Run, bundle: Path) -> None:
    before = sorted(bundle.rglob("*"))
    result = run("build", bundle, "--backend", "onnxruntime", "--dry-run")
    assert result.exit_code == 0
    assert re.search(r"directory: +.*onnxruntime-cpu-fp32\n", result.stdout)
    assert re.search(r"file: +generator\.onnx\n", result.stdout)
    facts = json.loads(run("build", bundle, "--backend", "onnxruntime", "--dry-run", "--json").stdout)
    assert set(facts["graphs"]) == {"target", "encoder", "generator", "preview"}
    assert sorted(bundle.rglob("*")) == before


def test_contradicting_options_are_wrong_usage(run: Run, toy_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from restyle_deploy import build as build_module

    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("the batches are 3, 2 and 8")

    monkeypatch.setattr(build_module, "build_engine", refuse)
    result = run("build", toy_bundle, "--backend", "tensorrt", "--min-batch", 3, "--opt-batch", 2)
    assert result.exit_code == 2
    assert result.stderr.endswith("Error: the batches are 3, 2 and 8\n")


@pytest.mark.tensorrt
def test_engine_of_tensorrt_rtx_and_its_layers(run: Run, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx")
    from restyle_deploy.backends import tensorrt as backend_module

    monkeypatch.setattr(backend_module, "find_devices", lambda: ((), "there is no NVIDIA driver"))
    result = run("build", bundle, "--backend", "tensorrt-rtx", "--compute-capability", "8.9", "--max-batch", 4)
    assert result.exit_code == 0
    assert "building the generator: Building engine …\n" in result.stderr
    assert " MB, batches 1 to 4, fastest for 1; plan: restyle-deploy inspect " in result.stdout
    assert result.stdout.endswith("not verified: no GPU can run the engine here: there is no NVIDIA driver\n")
    described = run("inspect", bundle).stdout
    assert re.search(r"processor: +sm_89\n", described)
    layers = run("inspect", bundle, "--layers").stdout
    assert re.search(r"^tensorrt-rtx-cuda0-fp32 generator, \d+ layers, as the engine runs them$", layers, re.M)
    assert re.search(r"^  encoder\.input_layer\.1\S* +correlation +Float +\w+ +-1×8×32×32$", layers, re.M)
    facts = json.loads(run("inspect", bundle, "--layers", "--json").stdout)
    assert facts["tensorrt-rtx-cuda0-fp32"]["generator"]["of"] == "engine"
    refused = run("verify", bundle, "--backend", "tensorrt-rtx")
    assert refused.exit_code == 1
    assert "device 'cuda:0' cannot run here; available: none (there is no NVIDIA driver)" in refused.stderr


@pytest.mark.tensorrt
def test_useless_options_of_tensorrt_rtx_are_wrong_usage(
    run: Run, toy_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx")
    from restyle_deploy.backends import tensorrt as backend_module

    monkeypatch.setattr(backend_module, "find_devices", lambda: ((), "there is no NVIDIA driver"))
    for option, message in {
        "--optimization-level=3": "backend tensorrt-rtx has no --optimization-level; it has --min-batch, ",
        "--threads=2": "--threads is for engines on the CPU, this one is for cuda:0; leave it out",
        "--compute-capability=9.0": "cannot build for compute capability '9.0'; it can for 7.5, 8.0",
    }.items():
        for dry in ([], ["--dry-run"]):
            result = run("build", toy_bundle, "--backend", "tensorrt-rtx", option, *dry)
            assert (result.exit_code, message in result.stderr) == (2, True), option


@pytest.mark.parametrize("name", ["-faces", "my faces"])
def test_hint_can_be_pasted(
    run: Run, toy_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    shutil.copytree(toy_bundle, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    result = run("build", "--backend", "onnxruntime", "--", name)
    assert result.exit_code == 0
    hint = result.stdout.strip().partition("plan: ")[2]
    assert shlex.split(hint) == ["restyle-deploy", "inspect", f"./{name}" if name.startswith("-") else name]
    assert run(*shlex.split(hint)[1:]).exit_code == 0


def test_default_of_seconds_is_that_of_the_library(run: Run) -> None:
    from restyle_deploy.build import DEFAULT_SECONDS

    assert f"default: {DEFAULT_SECONDS}" in run("build", "--help").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing option '--backend'"),
        (["--backend", "abacus"], "is not one of 'onnxruntime', 'openvino', 'pytorch', 'tensorrt', 'tensorrt-rtx'"),
        (["--backend", "onnxruntime", "--threads", "0"], "0 is not in the range x>=1"),
        (["--backend", "onnxruntime", "--seconds", "-1"], "-1.0 is not in the range x>=0"),
        (["--backend", "onnxruntime", "--precision", "fp8"], "'fp8' is not one of 'fp32', 'tf32', 'fp16'"),
        (["--backend", "tensorrt", "--workspace", "2T"], "'2T' is more memory than any GPU has; name at most 1T"),
        (["--backend", "tensorrt", "--workspace", "9" * 400], "is more memory than any GPU has"),
        (["--backend", "tensorrt", "--workspace", "0"], "'0' is no memory at all; name some, such as 512M"),
        (["--backend", "tensorrt", "--workspace", "-2G"], "'-2G' is no number of bytes, such as 512M, 1.5G or 2GiB"),
        (["--backend", "tensorrt", "--workspace", ""], "'' is no number of bytes"),
        *[
            (["--backend", "tensorrt-rtx", "--compute-capability", text], f"{bad!r} is no compute capability; write 8")
            for text, bad in {"": "", "8.9,": "", "9": "9", "ada": "ada", "8.9 12.0": "8.9 12.0"}.items()
        ],
        (["--backend", "onnxruntime", "--max-batch", "0"], "0 is not in the range 1<=x<=65535"),
        (["--backend", "onnxruntime", "--max-batch", "2147483648"], "is not in the range 1<=x<=65535"),
        (["--backend", "onnxruntime", "--min-batch", "9223372036854775807"], "is not in the range 1<=x<=65535"),
        (["--backend", "onnxruntime", "--opt-batch", "65536"], "is not in the range 1<=x<=65535"),
        (["--backend", "onnxruntime", "--seconds", "9"], "--seconds is the time for --tune and --retune"),
        (["--backend", "onnxruntime", "--stripped"], "onnxruntime has no --stripped, nor any other option of engines"),
        (["--backend", "onnxruntime", "--optimization-level", "6"], "6 is not in the range 0<=x<=5"),
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


def test_help_tells_where_what_was_measured_is_kept(run: Run) -> None:
    text = " ".join(run("build", "--help").stdout.split())
    assert "BUNDLE/engines/timing-<library>-<version>-<GPU>.cache" in text
    assert "later versions of the same major version of the library" in text
    assert "default: (1, or --min-batch)" in text.replace("--min- batch", "--min-batch")
    assert "default: (8, or the largest of the others)" in text
    assert re.search(r"restyle-deploy build \S+ --backend tensorrt .*--version-compatible --optimization-level 5", text)
