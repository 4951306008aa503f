import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import restyle_deploy.build
from restyle_deploy import gpu_checks
from restyle_deploy.cli.doctor import doctor
from restyle_deploy.errors import BackendUnavailableError, BuildError
from restyle_deploy.gpu_checks import Gpu, run_gpu_checks
from restyle_deploy.ops import compiler
from restyle_deploy.ops.kernels.launches import INSTANTIATIONS

DEMO = Path("engines/demo-faces")
GPU = Gpu(name="Toy GPU", arch="sm_90", driver="13.0")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that there is a GPU, for which every kernel compiles without a spill."""
    monkeypatch.setattr(gpu_checks, "_find_gpu", lambda: GPU)
    monkeypatch.setattr(compiler, "compile_kernels", compiled_with(spill_bytes=0))


def compiled_with(*, spill_bytes: int) -> Callable[..., Any]:
    def compile_kernels(kernel: str, expressions: tuple[str, ...], *, arch: str) -> Any:
        assert arch == GPU.arch
        resources = SimpleNamespace(spill_bytes=spill_bytes)
        return SimpleNamespace(resources=dict.fromkeys(expressions, resources))

    return compile_kernels


def build_with(facts: dict[str, Any], built: list[Any]) -> Callable[..., Any]:
    def build_engine(bundle: Path, options: Any) -> Any:
        assert (bundle / "manifest.json").is_file()
        built.append((options.backend, options.device, options.precision, bundle))
        return SimpleNamespace(build=facts)

    return build_engine


def test_without_a_gpu_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def find() -> Gpu:
        raise BackendUnavailableError("no NVIDIA GPU can be used here: toy")

    monkeypatch.setattr(gpu_checks, "_find_gpu", find)
    with pytest.raises(BackendUnavailableError, match="no NVIDIA GPU can be used here"):
        run_gpu_checks(None)


def test_finding_a_gpu_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cuda.core", None)
    with pytest.raises(BackendUnavailableError, match=r"restyle-deploy\[cuda\]"):
        run_gpu_checks(None)


@pytest.mark.usefixtures("gpu")
def test_what_lacks_something_is_not_run_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    names: list[str] = []
    report = run_gpu_checks(None, progress=names.append)
    assert names == list(report.outcomes)
    count = sum(len(expressions) for expressions in INSTANTIATIONS.values())
    assert report.outcomes["kernels compile"].detail == f"{count} instantiations, none spills"
    assert report.outcomes["kernels compile"].status == "passed"
    assert report.outcomes["kernels agree with torch"].status == "not run"
    assert "sees no GPU" in report.outcomes["kernels agree with torch"].detail
    assert report.outcomes["tensorrt fp16"].detail == "no bundle was named"
    assert report.is_sound


@pytest.mark.usefixtures("gpu")
def test_a_spill_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "compile_kernels", compiled_with(spill_bytes=8))
    outcome = run_gpu_checks(None).outcomes["kernels compile"]
    assert (outcome.status, "spill registers on sm_90" in outcome.detail) == ("failed", True)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("is_wrong", [False, True])
def test_kernels_are_compared_with_torch(monkeypatch: pytest.MonkeyPatch, is_wrong: bool) -> None:
    """On the CPU, where our operators are the reference, in float32, rounded to the type of the images."""
    from restyle_deploy.ops import cuda_ops

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_checks, "DEVICE", "cpu")
    if is_wrong:
        exact = cuda_ops.upfirdn2d_epilogue
        monkeypatch.setattr(cuda_ops, "upfirdn2d_epilogue", lambda *args, **kwargs: 1.01 * exact(*args, **kwargs))
    outcome = run_gpu_checks(None).outcomes["kernels agree with torch"]
    assert outcome.status == ("failed" if is_wrong else "passed")
    assert "float32: the error is" in outcome.detail if is_wrong else "bfloat16 within" in outcome.detail


@pytest.mark.usefixtures("gpu")
def test_engines_are_built_from_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = DEMO
    built: list[Any] = []
    monkeypatch.setattr(gpu_checks, "load_backend", lambda name: None)
    facts = {"verified": True, "plugin_route": "aot"}
    monkeypatch.setattr(restyle_deploy.build, "build_engine", build_with(facts, built))
    report = run_gpu_checks(bundle)
    assert [one[:3] for one in built] == [
        (backend, "cuda:0", precision) for backend in ("tensorrt", "tensorrt-rtx") for precision in ("fp32", "fp16")
    ]
    assert all(one[3] != bundle and not one[3].exists() for one in built)
    assert report.outcomes["tensorrt fp32"].detail == "built and verified, kernels: aot"


@pytest.mark.usefixtures("gpu")
def test_an_engine_that_is_not_verified_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_checks, "load_backend", lambda name: None)
    facts = {"verified": False, "reason": "toy"}
    monkeypatch.setattr(restyle_deploy.build, "build_engine", build_with(facts, []))
    report = run_gpu_checks(DEMO)
    assert report.outcomes["tensorrt fp32"].detail == "built, not verified: toy"
    assert not report.is_sound


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("error", "detail"), [(BuildError("toy refuses"), "toy refuses"), (OSError("toy"), "OSError: toy")]
)
def test_an_error_is_an_outcome(monkeypatch: pytest.MonkeyPatch, error: Exception, detail: str) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(compiler, "compile_kernels", fail)
    outcome = run_gpu_checks(None).outcomes["kernels compile"]
    assert (outcome.status, outcome.detail) == ("failed", detail)


@pytest.mark.usefixtures("gpu")
def test_command_prints_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(doctor, ["--gpu"])
    assert result.exit_code == 0
    row = result.stdout.splitlines()[-1]
    assert row.startswith("| Toy GPU, sm_90, CUDA driver 13.0 | ")
    header = next(
        line for line in Path("docs/gpu.md").read_text(encoding="utf-8").splitlines() if line.startswith("| device")
    )
    assert row.count("|") == header.count("|")
    as_json = json.loads(CliRunner().invoke(doctor, ["--gpu", "--json"]).stdout)
    assert as_json["gpu"] == {"name": "Toy GPU", "arch": "sm_90", "driver": "13.0"}


@pytest.mark.usefixtures("gpu")
def test_command_exits_with_1_where_a_check_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "compile_kernels", compiled_with(spill_bytes=8))
    assert CliRunner().invoke(doctor, ["--gpu"]).exit_code == 1


def test_a_bundle_without_gpu_is_wrong_usage(tmp_path: Path) -> None:
    result = CliRunner().invoke(doctor, ["--bundle", str(tmp_path)])
    assert (result.exit_code, "--bundle goes with --gpu" in result.output) == (2, True)
