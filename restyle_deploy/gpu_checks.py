"""Kernels, the loop and engines tried on the GPU at hand: a row of the table in docs/gpu.md."""

import datetime
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from restyle_deploy import __version__
from restyle_deploy.bench.environment import installed_versions
from restyle_deploy.errors import BackendUnavailableError
from restyle_deploy.gpu_engine_checks import check_engines
from restyle_deploy.gpu_kernel_checks import (
    DEVICE,
    capture_kernels,
    check_sanitizer,
    compare_kernels,
    compile_all_kernels,
)
from restyle_deploy.gpu_loop_checks import LOOP_BACKENDS, check_images, check_loop, check_memory
from restyle_deploy.gpu_outcomes import Outcome, outcome_of
from restyle_deploy.runtime.device import driver_version, find_devices, find_name, find_processor

# Distributions whose versions a result depends on.
PACKAGES = ("cuda-core", "nvidia-cuda-nvrtc", "onnxruntime-gpu", "pillow", "tensorrt", "tensorrt-rtx", "torch")
NO_BUNDLE = "no bundle was named"


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """The GPU at hand.

    Attributes:
        name: as its maker calls it.
        arch: "sm_90" style.
        driver: the newest CUDA version that the driver knows, such as "13.0".
    """

    name: str
    arch: str
    driver: str


@dataclass(frozen=True, kw_only=True)
class GpuReport:
    """All checks on one machine.

    Attributes:
        date: ISO, of today.
        versions: of this package and of `PACKAGES`, those that are installed.
        outcomes: by name of the check.
    """

    date: str
    gpu: Gpu
    versions: Mapping[str, str]
    outcomes: Mapping[str, Outcome]

    @property
    def is_sound(self) -> bool:
        """Whether no check failed; those not run do not count."""
        return all(outcome.status != "failed" for outcome in self.outcomes.values())

    def as_table_row(self) -> str:
        """Return this machine's row for the table in docs/gpu.md."""
        device = f"{self.gpu.name}, {self.gpu.arch}, CUDA driver {self.gpu.driver}"
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        cells = (f"{outcome.status}: {outcome.detail}" for outcome in self.outcomes.values())
        return "| " + " | ".join(text.replace("|", "/") for text in (device, self.date, versions, *cells)) + " |"


def run_gpu_checks(bundle: Path | None, *, progress: Callable[[str], None] = lambda name: None) -> GpuReport:
    """Try kernels, the loop and engines on the first GPU.

    Args:
        bundle: whose graphs are run, and engines are built from, in a temporary copy; None leaves these checks out.
        progress: told the name of each check as it begins.
    Raises:
        BackendUnavailableError: there is no GPU, no driver, or no library to find them by.
    """
    gpu = _find_gpu()
    outcomes = {}
    for name, check in _checks(bundle):
        progress(name)
        outcomes[name] = outcome_of(functools.partial(check, gpu))
    return GpuReport(
        date=datetime.date.today().isoformat(),
        gpu=gpu,
        versions={"restyle-deploy": __version__, **installed_versions(PACKAGES)},
        outcomes=outcomes,
    )


def _checks(bundle: Path | None) -> Iterator[tuple[str, Callable[[Gpu], str]]]:
    yield "kernels compile", lambda gpu: compile_all_kernels(gpu.arch)
    yield "kernels agree with torch", lambda gpu: compare_kernels()
    yield "kernels in a graph", lambda gpu: capture_kernels()
    yield "compute-sanitizer", lambda gpu: check_sanitizer()
    yield "images agree with Pillow", lambda gpu: check_images(DEVICE)
    for backend in LOOP_BACKENDS:
        check = functools.partial(check_loop, backend=backend, device=DEVICE)
        yield f"loop of {backend}", functools.partial(_check_bundle, bundle, check)
    check = functools.partial(check_memory, backend=LOOP_BACKENDS[0], device=DEVICE)
    yield "memory comes back", functools.partial(_check_bundle, bundle, check)
    for backend in ("tensorrt", "tensorrt-rtx"):
        yield backend, functools.partial(_check_bundle, bundle, functools.partial(check_engines, backend=backend))


def _check_bundle(bundle: Path | None, check: Callable[[Path], str], gpu: Gpu) -> str:
    if bundle is None:
        raise BackendUnavailableError(NO_BUNDLE)
    return check(bundle)


def _find_gpu() -> Gpu:
    """Return the first GPU.

    Raises:
        BackendUnavailableError: the extra `cuda` is not installed, or there is no GPU or no driver.
    """
    devices, reason = find_devices()
    if not devices:
        raise BackendUnavailableError(f"no NVIDIA GPU can be used here: {reason}")
    version = driver_version()
    assert version is not None  # there are devices
    return Gpu(name=find_name(devices[0]), arch=find_processor(devices[0]), driver=".".join(map(str, version)))
