"""Our kernels tried on the GPU at hand: compiled, compared with torch, replayed, and under compute-sanitizer."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from restyle_deploy.errors import BackendUnavailableError, VerificationError

DEVICE = "cuda:0"
# By type of the images: the largest error, as a share of the range; a few roundings of the result.
KERNEL_TOLERANCES = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}
# (up, pads, size of the image): the blur, the skip's upsampling, and the general kernel; None for no filter at all.
CASES = (None, (1, (1, 1, 1, 1), (65, 65)), (2, (2, 2, 1, 1), (32, 48)), (3, (2, 1, 0, -1), (9, 17)))
CHANNELS = 24
SANITIZER = "compute-sanitizer"
SANITIZER_PLACES = ("/usr/local/cuda/bin", "/opt/cuda/bin")
SANITIZER_TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
SANITIZER_SECONDS = 900
FOUND_ERRORS = 86
# Libraries ask older drivers for functions that these have not, which is no error of a kernel.
SANITIZER_OPTIONS = ("--error-exitcode", str(FOUND_ERRORS), "--report-api-errors", "no")
_CHILD = "from restyle_deploy.gpu_kernel_checks import compare_kernels; compare_kernels()"
_TRACEBACK = "Traceback (most recent call last):\n"


def compile_all_kernels(arch: str) -> str:
    """Compile every instantiation for an architecture, "sm_90" style; return how many there are.

    Raises:
        BackendUnavailableError, BuildError: see `compile_kernels`.
    """
    from restyle_deploy.ops.compiler import compile_kernels
    from restyle_deploy.ops.kernels.image_launches import IMAGE_INSTANTIATIONS
    from restyle_deploy.ops.kernels.launches import INSTANTIATIONS

    count = spilling = 0
    for kernel, expressions in (*INSTANTIATIONS.items(), *IMAGE_INSTANTIATIONS.items()):
        compiled = compile_kernels(kernel, expressions, arch=arch)
        count += len(expressions)
        spilling += sum(resources.spill_bytes > 0 for resources in compiled.resources.values())
    return f"{count} instantiations, {spilling or 'none'} with spilled registers"


def compare_kernels() -> str:
    """Compare the filter with its epilogue, in every type and layout, with the reference in float32.

    Raises:
        BackendUnavailableError: torch is not installed, or sees no GPU.
        VerificationError: an error is too large.
    """
    torch = _require_torch()
    layouts = (torch.contiguous_format, torch.channels_last)
    found = []
    for name, tolerance in KERNEL_TOLERANCES.items():
        largest = max(_kernel_error(name, layout, case) for layout in layouts for case in CASES)
        if not largest <= tolerance:
            raise VerificationError(f"{name}: the error is {largest:.1e} of the range, not {tolerance:.0e} at most")
        found.append(f"{name} within {largest:.1e} of the range")
    return ", ".join(found)


def capture_kernels() -> str:
    """Record a kernel of each kind in a CUDA graph, and replay it on other images.

    Raises:
        BackendUnavailableError: see `compare_kernels`.
        VerificationError: a replay gives other bits than a call.
    """
    _require_torch()
    for case in CASES:
        images = [_images("float16", case, seed=seed).to(DEVICE) for seed in (0, 1)]
        factors = _factors("float16", case, DEVICE)
        x, y = images[0].clone(), _apply(images[0], case, factors)

        def run(x: Any = x, y: Any = y, case: Any = case, factors: Any = factors) -> None:
            y.copy_(_apply(x, case, factors))

        run()  # compiled, and loaded
        replay = _capture(run)
        x.copy_(images[1])
        replay()
        if not bool((y == _apply(images[1], case, factors)).all()):
            raise VerificationError(
                f"a replay gives other results than a call: {'no filter' if case is None else case}"
            )
    return f"{len(CASES)} kernels replayed on other images: the same bits"


def check_sanitizer() -> str:
    """Compare the kernels once more, under each tool of compute-sanitizer.

    Raises:
        BackendUnavailableError: it is not installed, does not know the device, or fails itself, as one that does not
            fit the driver; or see `compare_kernels`.
        VerificationError: a tool found an error, or the comparison fails under it.
    """
    program = find_sanitizer()
    if program is None:
        raise BackendUnavailableError(
            f"{SANITIZER} is neither on the PATH nor in {', '.join(SANITIZER_PLACES)}; a CUDA toolkit has it"
        )
    _require_torch()
    for tool in SANITIZER_TOOLS:
        output, code = _sanitize(program, tool)
        if "Device not supported" in output:
            raise BackendUnavailableError(f"{SANITIZER} says: Device not supported")
        if code == FOUND_ERRORS:
            raise VerificationError(f"{tool}: {_words_of_sanitizer(output)}")
        if code:
            raise _failure_of_child(tool, output) or BackendUnavailableError(
                f"{tool} ends with exit status {code}: {_words_of_sanitizer(output)}"
            )
    return f"{', '.join(SANITIZER_TOOLS)} find nothing"


def find_sanitizer() -> str | None:
    """Return the path of compute-sanitizer; None where there is none."""
    return shutil.which(SANITIZER) or shutil.which(SANITIZER, path=os.pathsep.join(SANITIZER_PLACES))


def _words_of_sanitizer(output: str) -> str:
    """Return the lines that compute-sanitizer has marked as its own; without one, the end of the output."""
    lines = [line.strip("= ") for line in output.splitlines() if line.startswith("=====")]
    return "; ".join(line for line in lines if line)[:300] or output[-300:].strip() or "it said nothing"


def _failure_of_child(tool: str, output: str) -> BackendUnavailableError | VerificationError | None:
    """Return what ended the comparison under the sanitizer, by its traceback; None where that is not what failed."""
    _, mark, after = output.rpartition(_TRACEBACK)
    message = next((line for line in after.splitlines() if line[:1] not in ("", " ", "=")), "")
    if not mark or not message:
        return None
    kind = BackendUnavailableError if BackendUnavailableError.__name__ in message else VerificationError
    return kind(f"{tool}: {message[:300]}")


def _sanitize(program: str, tool: str) -> tuple[str, int]:
    # torch would hand out parts of one large allocation, beyond which nothing is found.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [program, "--tool", tool, *SANITIZER_OPTIONS, sys.executable, "-c", _CHILD]
    try:
        result = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=SANITIZER_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise VerificationError(f"{tool}: it does not end within {SANITIZER_SECONDS} s") from error
    return result.stdout + result.stderr, result.returncode


def _require_torch() -> Any:
    try:
        import torch
    except ModuleNotFoundError as error:
        raise BackendUnavailableError(
            "torch is the reference, and is not installed; run: pip install 'restyle-deploy[export]'"
        ) from error
    from restyle_deploy.ops.torch_gpu import why_torch_sees_no_gpu

    reason = why_torch_sees_no_gpu()
    if reason:
        raise BackendUnavailableError(reason)
    return torch


def _kernel_error(dtype: str, layout: Any, case: Any) -> float:
    """Return the largest difference of our kernel on the GPU from torch in float32, as a share of the range."""
    from restyle_deploy.ops import fused_bias_act, upfirdn2d

    x, factors = _images(dtype, case, seed=0), _factors(dtype, case, "cpu")
    wide: dict[str, Any] = {name: factor.float() for name, factor in factors.items()}
    on_device: dict[str, Any] = {name: factor.to(DEVICE) for name, factor in factors.items()}
    ours = _apply(x.to(DEVICE).contiguous(memory_format=layout), case, on_device)
    if case is None:
        exact = fused_bias_act.fused_bias_act(x.float(), **wide)
    else:
        up, pads, _ = case
        exact = upfirdn2d.upfirdn2d_epilogue(x.float(), up=up, pads=pads, **wide)
    return float((ours.float().cpu() - exact).abs().max() / exact.abs().max())


def _apply(image: Any, case: Any, factors: dict[str, Any]) -> Any:
    """Return what our kernel for a case makes of images on the device."""
    from restyle_deploy.ops import cuda_ops

    if case is None:
        return cuda_ops.fused_bias_act(image, **factors)
    up, pads, _ = case
    return cuda_ops.upfirdn2d_epilogue(image, up=up, pads=pads, **factors)


def _filter() -> Any:
    import torch

    taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
    return torch.outer(taps, taps) / 16


def _images(dtype: str, case: Any, *, seed: int) -> Any:
    import torch

    size = case[2] if case else (33, 40)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((2, CHANNELS, *size), generator=generator).to(getattr(torch, dtype))


def _factors(dtype: str, case: Any, device: str) -> dict[str, Any]:
    """Return what a kernel reads beside the images, its filter included: on the device, where a graph may read it."""
    import torch

    up, pads, size = case or (1, (0, 0, 0, 0), (33, 40))
    generator = torch.Generator().manual_seed(2)
    out_size = tuple(size[axis] * up + pads[axis] + pads[axis + 2] - 3 for axis in (0, 1)) if case else size
    factors = {
        "bias": torch.randn(CHANNELS, generator=generator),
        "demod": torch.rand((2, CHANNELS), generator=generator),
        "noise": torch.randn((1, 1, *out_size), generator=generator).to(getattr(torch, dtype)),
        "next_scale": torch.randn((2, CHANNELS), generator=generator),
    }
    if case is not None:
        factors["kernel"] = _filter()
    return {name: factor.to(device) for name, factor in factors.items()}


def _capture(run: Callable[[], None]) -> Callable[[], None]:
    """Record what a function launches, and return what launches it again."""
    import torch

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return replay
