"""Everything of this package that needs a GPU, tried on the one at hand: the list of docs/gpu.md."""

import datetime
import functools
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from restyle_deploy import __version__
from restyle_deploy.backends import load_backend
from restyle_deploy.errors import BackendUnavailableError, BuildError, RestyleDeployError, VerificationError

DEVICE = "cuda:0"
# Distributions whose versions a result depends on.
PACKAGES = ("cuda-core", "nvidia-cuda-nvrtc", "tensorrt", "tensorrt-rtx", "torch")
NO_BUNDLE = "no bundle was named"
# By type of the images: the largest error, as a share of the range; a few roundings of the result.
KERNEL_TOLERANCES = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}
# (up, pads, size of the image): the blur, the skip's upsampling, and the general kernel.
FILTER_CASES = ((1, (1, 1, 1, 1), (65, 65)), (2, (2, 2, 1, 1), (32, 48)), (3, (2, 1, 0, -1), (9, 17)))
CHANNELS = 24

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a check.

    Attributes:
        status: `not run` where something that it needs is missing.
        detail: what was found, or the reason.
    """

    status: Literal["passed", "failed", "not run"]
    detail: str


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
    """Try everything that needs a GPU on the first one.

    Args:
        bundle: whose graphs engines are built from, in a temporary copy; None leaves these checks out.
        progress: told the name of each check as it begins.
    Raises:
        BackendUnavailableError: there is no GPU, no driver, or no library to find them by.
    """
    gpu = _find_gpu()
    outcomes = {}
    for name, check in _checks(bundle):
        progress(name)
        outcomes[name] = _outcome_of(functools.partial(check, gpu))
    return GpuReport(
        date=datetime.date.today().isoformat(),
        gpu=gpu,
        versions={"restyle-deploy": __version__, **_installed_versions()},
        outcomes=outcomes,
    )


def _checks(bundle: Path | None) -> Iterator[tuple[str, Callable[[Gpu], str]]]:
    yield "kernels compile", _compile_kernels
    yield "kernels agree with torch", _compare_kernels
    for backend in ("tensorrt", "tensorrt-rtx"):
        for precision in ("fp32", "fp16"):
            yield f"{backend} {precision}", _engine_check(bundle, backend, precision)


def _outcome_of(check: Callable[[], str]) -> Outcome:
    """Run a check; whatever it raises is an outcome, so that the rest goes on."""
    try:
        return Outcome(status="passed", detail=check())
    except BackendUnavailableError as error:
        return Outcome(status="not run", detail=str(error))
    except RestyleDeployError as error:
        return Outcome(status="failed", detail=str(error))
    except Exception as error:  # libraries of the device raise what they like
        _logger.exception("a check ended with an error")
        return Outcome(status="failed", detail=f"{type(error).__name__}: {error}")


def _find_gpu() -> Gpu:
    """Return the first GPU.

    Raises:
        BackendUnavailableError: the extra `cuda` is not installed, or there is no GPU or no driver.
    """
    try:
        from cuda.core import Device, system
    except ImportError as error:
        raise BackendUnavailableError(
            f"a GPU is found by cuda-core ({error}); run: pip install 'restyle-deploy[cuda]'"
        ) from error
    try:
        device = Device(0)
        device.set_current()
        driver = ".".join(map(str, system.get_driver_version()))
        return Gpu(name=device.name, arch=f"sm_{device.arch}", driver=driver)
    except Exception as error:  # cuda-core's errors have no common base
        raise BackendUnavailableError(f"no NVIDIA GPU can be used here: {type(error).__name__}: {error}") from error


def _installed_versions() -> dict[str, str]:
    installed = {}
    for name in PACKAGES:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return installed


def _compile_kernels(gpu: Gpu) -> str:
    from restyle_deploy.ops.compiler import compile_kernels
    from restyle_deploy.ops.kernels.launches import INSTANTIATIONS

    count = spilling = 0
    for kernel, expressions in INSTANTIATIONS.items():
        compiled = compile_kernels(kernel, expressions, arch=gpu.arch)
        count += len(expressions)
        spilling += sum(resources.spill_bytes > 0 for resources in compiled.resources.values())
    if spilling:
        raise BuildError(f"{spilling} of {count} instantiations spill registers on {gpu.arch}")
    return f"{count} instantiations, none spills"


def _compare_kernels(gpu: Gpu) -> str:
    """Compare the filter with its epilogue, in every type and layout, with the reference in float32."""
    try:
        import torch
    except ModuleNotFoundError as error:
        raise BackendUnavailableError(
            "torch is the reference, and is not installed; run: pip install 'restyle-deploy[export]'"
        ) from error
    if not torch.cuda.is_available():
        raise BackendUnavailableError(f"torch {torch.__version__} sees no GPU")
    layouts = (torch.contiguous_format, torch.channels_last)
    found = []
    for name, tolerance in KERNEL_TOLERANCES.items():
        largest = max(_kernel_error(name, layout, *case) for layout in layouts for case in FILTER_CASES)
        if not largest <= tolerance:
            raise VerificationError(f"{name}: the error is {largest:.1e} of the range, not {tolerance:.0e} at most")
        found.append(f"{name} within {largest:.1e} of the range")
    return ", ".join(found)


def _kernel_error(dtype: str, layout: Any, up: int, pads: Any, size: tuple[int, int]) -> float:
    """Return the largest difference of our kernel on the GPU from torch in float32, as a share of the range."""
    import torch

    from restyle_deploy.ops import cuda_ops, upfirdn2d

    generator = torch.Generator().manual_seed(0)
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
    kernel = torch.outer(taps, taps) / 16
    short = getattr(torch, dtype)
    x = torch.randn((2, CHANNELS, *size), generator=generator).to(short)
    filtered = tuple(size[axis] * up + pads[axis] + pads[axis + 2] - 3 for axis in (0, 1))
    factors: dict[str, Any] = {
        "bias": torch.randn(CHANNELS, generator=generator),
        "demod": torch.rand((2, CHANNELS), generator=generator),
        "noise": torch.randn((1, 1, *filtered), generator=generator).to(short),
        "next_scale": torch.randn((2, CHANNELS), generator=generator),
    }
    wide: dict[str, Any] = {name: factor.float() for name, factor in factors.items()}
    on_device: dict[str, Any] = {name: factor.to(DEVICE) for name, factor in factors.items()}
    image = x.to(DEVICE).contiguous(memory_format=layout)
    exact = upfirdn2d.upfirdn2d_epilogue(x.float(), kernel, up=up, pads=pads, **wide)
    ours = cuda_ops.upfirdn2d_epilogue(image, kernel.to(DEVICE), up=up, pads=pads, **on_device)
    return float((ours.float().cpu() - exact).abs().max() / exact.abs().max())


def _engine_check(bundle: Path | None, backend: str, precision: str) -> Callable[[Gpu], str]:
    def check(gpu: Gpu) -> str:
        if bundle is None:
            raise BackendUnavailableError(NO_BUNDLE)
        load_backend(backend)
        from restyle_deploy.build import BuildOptions, build_engine

        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "bundle"
            shutil.copytree(bundle, copy)
            record = build_engine(copy, BuildOptions(backend=backend, device=DEVICE, precision=precision))
        if not record.build["verified"]:
            raise VerificationError(f"built, not verified: {record.build['reason']}")
        return f"built and verified, kernels: {record.build['plugin_route']}"

    return check
