"""Kernels, the loop and engines tried on the GPU at hand: a row of the table in docs/gpu.md."""

import datetime
import functools
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from restyle_deploy import __version__
from restyle_deploy.backends import load_backend
from restyle_deploy.backends.base import PRECISIONS, EngineOptions
from restyle_deploy.backends.cuda_devices import find_devices, find_processor
from restyle_deploy.bench.environment import installed_versions
from restyle_deploy.errors import BackendUnavailableError, VerificationError
from restyle_deploy.gpu_loop_checks import LOOP_BACKENDS, check_images, check_loop, check_memory
from restyle_deploy.gpu_outcomes import Outcome, join_outcomes, outcome_of
from restyle_deploy.ops.cuda_versions import driver_version

if TYPE_CHECKING:
    from restyle_deploy.build import BuildOptions

DEVICE = "cuda:0"
# Distributions whose versions a result depends on.
PACKAGES = ("cuda-core", "nvidia-cuda-nvrtc", "onnxruntime-gpu", "pillow", "tensorrt", "tensorrt-rtx", "torch")
NO_BUNDLE = "no bundle was named"
# By type of the images: the largest error, as a share of the range; a few roundings of the result.
KERNEL_TOLERANCES = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}
# (up, pads, size of the image): the blur, the skip's upsampling, and the general kernel; None for no filter at all.
CASES = (None, (1, (1, 1, 1, 1), (65, 65)), (2, (2, 2, 1, 1), (32, 48)), (3, (2, 1, 0, -1), (9, 17)))
# Name -> precision, and how it is built.
ENGINES = {
    **{precision: (precision, EngineOptions()) for precision in PRECISIONS},
    "fp16 without plugins": ("fp16", EngineOptions(no_plugins=True)),
    "fp16 stripped": ("fp16", EngineOptions(stripped=True)),
}
CHANNELS = 24


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
    yield "kernels compile", _compile_kernels
    yield "kernels agree with torch", _compare_kernels
    yield "images agree with Pillow", lambda gpu: check_images(DEVICE)
    for backend in LOOP_BACKENDS:
        check = functools.partial(check_loop, backend=backend, device=DEVICE)
        yield f"loop of {backend}", functools.partial(_check_bundle, bundle, check)
    check = functools.partial(check_memory, backend=LOOP_BACKENDS[0], device=DEVICE)
    yield "memory comes back", functools.partial(_check_bundle, bundle, check)
    for backend in ("tensorrt", "tensorrt-rtx"):
        yield backend, functools.partial(_check_bundle, bundle, functools.partial(_build_engines, backend))


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
    from cuda.core import Device

    version = driver_version()
    assert version is not None  # there are devices
    return Gpu(name=Device(0).name, arch=find_processor(devices[0]), driver=".".join(map(str, version)))


def _compile_kernels(gpu: Gpu) -> str:
    from restyle_deploy.ops.compiler import compile_kernels
    from restyle_deploy.ops.kernels.image_launches import IMAGE_INSTANTIATIONS
    from restyle_deploy.ops.kernels.launches import INSTANTIATIONS

    count = spilling = 0
    for kernel, expressions in (*INSTANTIATIONS.items(), *IMAGE_INSTANTIATIONS.items()):
        compiled = compile_kernels(kernel, expressions, arch=gpu.arch)
        count += len(expressions)
        spilling += sum(resources.spill_bytes > 0 for resources in compiled.resources.values())
    return f"{count} instantiations, {spilling or 'none'} with spilled registers"


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
        largest = max(_kernel_error(name, layout, case) for layout in layouts for case in CASES)
        if not largest <= tolerance:
            raise VerificationError(f"{name}: the error is {largest:.1e} of the range, not {tolerance:.0e} at most")
        found.append(f"{name} within {largest:.1e} of the range")
    return ", ".join(found)


def _kernel_error(dtype: str, layout: Any, case: tuple[int, Any, tuple[int, int]] | None) -> float:
    """Return the largest difference of our kernel on the GPU from torch in float32, as a share of the range."""
    import torch

    from restyle_deploy.ops import cuda_ops, fused_bias_act, upfirdn2d

    up, pads, size = case or (1, (0, 0, 0, 0), (33, 40))
    generator = torch.Generator().manual_seed(0)
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
    kernel = torch.outer(taps, taps) / 16
    short = getattr(torch, dtype)
    x = torch.randn((2, CHANNELS, *size), generator=generator).to(short)
    out_size = tuple(size[axis] * up + pads[axis] + pads[axis + 2] - 3 for axis in (0, 1)) if case else size
    factors: dict[str, Any] = {
        "bias": torch.randn(CHANNELS, generator=generator),
        "demod": torch.rand((2, CHANNELS), generator=generator),
        "noise": torch.randn((1, 1, *out_size), generator=generator).to(short),
        "next_scale": torch.randn((2, CHANNELS), generator=generator),
    }
    wide: dict[str, Any] = {name: factor.float() for name, factor in factors.items()}
    on_device: dict[str, Any] = {name: factor.to(DEVICE) for name, factor in factors.items()}
    image = x.to(DEVICE).contiguous(memory_format=layout)
    if case is None:
        exact = fused_bias_act.fused_bias_act(x.float(), **wide)
        ours = cuda_ops.fused_bias_act(image, **on_device)
    else:
        exact = upfirdn2d.upfirdn2d_epilogue(x.float(), kernel, up=up, pads=pads, **wide)
        ours = cuda_ops.upfirdn2d_epilogue(image, kernel.to(DEVICE), up=up, pads=pads, **on_device)
    return float((ours.float().cpu() - exact).abs().max() / exact.abs().max())


def _build_engines(backend: str, bundle: Path) -> str:
    """Build an engine in each way from a copy of a bundle, and open it again to verify it."""
    load_backend(backend)
    from restyle_deploy.build import BuildOptions

    outcomes = {}
    for name, (precision, engine) in ENGINES.items():
        options = BuildOptions(backend=backend, device=DEVICE, precision=precision, engine=engine)
        with tempfile.TemporaryDirectory() as folder:
            outcomes[name] = outcome_of(functools.partial(_build_and_verify, bundle, Path(folder) / "bundle", options))
    return join_outcomes(outcomes)


def _build_and_verify(bundle: Path, copy: Path, options: "BuildOptions") -> str:
    from restyle_deploy.build import build_engine
    from restyle_deploy.verify import check_parity, verify_bundle

    shutil.copytree(bundle, copy)
    record = build_engine(copy, options)
    if not record.build["verified"]:
        raise VerificationError(f"built, not verified: {record.build['reason']}")
    parity = verify_bundle(
        copy, backend=options.backend, device=DEVICE, threads=None, precision=options.precision
    )  # from the file, as a user opens it
    check_parity(parity, "the engine, opened again")
    return f"kernels: {record.build['plugin_route']}, latents within {max(parity.latent_errors):.1e}"
