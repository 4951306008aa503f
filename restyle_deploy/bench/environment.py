"""The machine and the software that a measurement ran on."""

import os
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from restyle_deploy.bench.gpu_monitor import GpuFacts, list_gpus
from restyle_deploy.bench.machine import read_governor
from restyle_deploy.processor import describe_processor, usable_cores

PACKAGES = (
    "restyle-deploy",
    "numpy",
    "pillow",
    "scikit-image",
    "torchmetrics",
    "lpips",
    "dlib-bin",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "tensorrt",
    "tensorrt-rtx",
    "cuda-core",
    "torch",
)


@dataclass(frozen=True, kw_only=True)
class Environment:
    """What figures may depend on; `None` for what cannot be found out here.

    Attributes:
        python: version of the interpreter.
        platform: operating system, its version and the architecture.
        cpu: the processor's model name and the instruction sets that matter.
        logical_cores: of the machine.
        usable_cores: those this process may run on.
        load_average: mean number of running processes over the last 1, 5 and 15 minutes.
        packages: versions of the installed packages among `PACKAGES`.
        commit: of the project, when it runs from a git checkout; "-dirty" is added when tracked files are modified.
        governor: how Linux chooses the cores' clocks; "performance" is the one to measure under.
        memory_bytes: of the host.
        gpus: NVIDIA's, as their driver describes them.
    """

    python: str
    platform: str
    cpu: str
    logical_cores: int
    usable_cores: int
    load_average: tuple[float, ...] | None
    packages: dict[str, str]
    commit: str | None
    governor: str | None = None
    memory_bytes: int | None = None
    gpus: tuple[GpuFacts, ...] = ()


def describe_environment() -> Environment:
    """Look at this machine, now: call it before the measurement, which raises the load itself."""
    return Environment(
        python=platform.python_version(),
        platform=platform.platform(),
        cpu=describe_processor(),
        logical_cores=os.cpu_count() or 1,
        usable_cores=usable_cores(),
        load_average=os.getloadavg() if hasattr(os, "getloadavg") else None,
        packages=installed_versions(PACKAGES),
        commit=_read_commit(Path(__file__).parents[2]),
        governor=read_governor(),
        memory_bytes=_read_memory_bytes(),
        gpus=list_gpus(),
    )


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of those of the packages that are installed, by name."""
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _read_memory_bytes() -> int | None:
    """Return the host's memory; None where psutil, which a benchmark needs, is not installed."""
    try:
        import psutil
    except ModuleNotFoundError:
        return None
    return int(psutil.virtual_memory().total)


def _read_commit(root: Path) -> str | None:
    """Return the commit of the checkout at `root`; an installed package lies in no checkout of its own."""
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):  # no git, or no commit yet
        return None
    return answer.stdout.strip()
