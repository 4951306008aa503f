"""Engines tried on the GPU at hand: each way to build one, their batches, and what is kept for the next time."""

import functools
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from restyle_deploy.backends import load_backend
from restyle_deploy.backends.base import UNIFORM_PRECISIONS, EngineOptions
from restyle_deploy.engines import CACHE_SUFFIX, ENGINES
from restyle_deploy.errors import VerificationError
from restyle_deploy.gpu_kernel_checks import DEVICE
from restyle_deploy.gpu_outcomes import join_outcomes, outcome_of

if TYPE_CHECKING:
    from restyle_deploy.build import BuildOptions

# Name -> precision, how it is built, and how our kernels come into it; None for the best way.
WAYS: dict[str, tuple[str, EngineOptions, str | None]] = {
    **{precision: (precision, EngineOptions(), None) for precision in UNIFORM_PRECISIONS},
    "fp16 without plugins": ("fp16", EngineOptions(no_plugins=True), None),
    "fp16 with plugins in Python": ("fp16", EngineOptions(), "jit"),
    "fp16 stripped": ("fp16", EngineOptions(stripped=True), None),
    "fp16 hardware-compatible": ("fp16", EngineOptions(hardware_compatible=True), None),
    "fp16 version-compatible": ("fp16", EngineOptions(version_compatible=True), None),
}
# An engine of these takes one image filled up, and five images as four and one.
BATCHES = EngineOptions(min_batch=2, opt_batch=3, max_batch=4)
IMAGES, STEPS = 5, 2


def check_engines(bundle: Path, *, backend: str) -> str:
    """Build engines from copies of a bundle, open them again, and verify them.

    Args:
        bundle: a bundle's directory.
        backend: `tensorrt` or `tensorrt-rtx`.
    Returns:
        What was found of each that the library has the options for.
    Raises:
        BackendUnavailableError: none can be built here.
        VerificationError: one failed; the message has all of them.
    """
    known = load_backend(backend).ENGINE_OPTIONS
    from restyle_deploy.build import BuildOptions

    checks: dict[str, Callable[[Path], str]] = {}
    ways = {name: way for name, way in WAYS.items() if known >= set(way[1].given)}
    for name, (precision, engine, route) in ways.items():
        options = BuildOptions(backend=backend, device=DEVICE, precision=precision, engine=engine, plugin_route=route)
        checks[name] = functools.partial(_build_and_verify, options=options)
    checks["batches"] = functools.partial(
        _check_batches, options=BuildOptions(backend=backend, device=DEVICE, engine=BATCHES)
    )
    checks["caches"] = functools.partial(_check_caches, options=BuildOptions(backend=backend, device=DEVICE))
    outcomes = {}
    for name, check in checks.items():
        with tempfile.TemporaryDirectory() as folder:
            outcomes[name] = outcome_of(functools.partial(_check_copy, bundle, Path(folder) / "bundle", check))
    return join_outcomes(outcomes)


def _check_copy(bundle: Path, copy: Path, check: Callable[[Path], str]) -> str:
    shutil.copytree(bundle, copy, ignore=shutil.ignore_patterns(ENGINES))
    return check(copy)


def _build_and_verify(copy: Path, *, options: "BuildOptions") -> str:
    from restyle_deploy.build import build_engine
    from restyle_deploy.verify import check_parity, verify_bundle

    record = build_engine(copy, options)
    if not record.build["verified"]:
        raise VerificationError(f"built, not verified: {record.build['reason']}")
    parity = verify_bundle(
        copy, backend=options.backend, device=DEVICE, threads=None, precision=options.precision
    )  # from the file, as a user opens it
    check_parity(parity, "the engine, opened again")
    return f"kernels: {record.build['plugin_route']}, latents within {max(parity.latent_errors):.1e}"


def _check_batches(copy: Path, *, options: "BuildOptions") -> str:
    """Invert more images than the engine takes at once, split in two ways."""
    from restyle_deploy.build import build_engine
    from restyle_deploy.runtime.session import Session
    from restyle_deploy.verify import TOLERANCES

    build_engine(copy, options)
    with Session.open(copy, backend=options.backend, device=DEVICE) as session:
        images = np.random.default_rng(0).integers(0, 256, (IMAGES, *session.config.input_shape, 3), dtype=np.uint8)
        latents = [session.invert(images, steps=STEPS, max_batch=most).latents for most in (4, 2)]
    largest = float(np.abs(latents[0] - latents[1]).max())
    if not largest <= TOLERANCES["fp32"].latents:
        raise VerificationError(f"{IMAGES} images as 4 and 1, and as 2, 2 and 1: latents differ by {largest:.1e}")
    return f"of 2 to 4: {IMAGES} images split in two ways, latents within {largest:.1e}"


def _check_caches(copy: Path, *, options: "BuildOptions") -> str:
    """Build, open and run twice: the second time uses what the first one has kept, and leaves it as it is."""
    from restyle_deploy.build import build_engine

    def build() -> None:
        build_engine(copy, options)

    build_seconds = [_seconds_of(build)]
    first = _caches_in(copy)
    build_seconds.append(_seconds_of(build))
    if not first:
        raise VerificationError("a build, verified, has kept nothing for the next one")
    for name in _caches_in(copy):
        if not name.startswith("timing-"):
            (copy / ENGINES / name).unlink()
    open_seconds = [_seconds_of(functools.partial(_run_once, copy, options.backend))]
    kept = _caches_in(copy)
    open_seconds.append(_seconds_of(functools.partial(_run_once, copy, options.backend)))
    sizes = {name: len(content) for name, content in kept.items()}
    if {name: len(content) for name, content in _caches_in(copy).items()} != sizes:
        raise VerificationError("an engine that was opened and run a second time has made its cache anew")
    times = "; ".join(
        f"{what} {before:.1f} s, again {after:.1f} s"
        for what, (before, after) in {"build": build_seconds, "opening and first run": open_seconds}.items()
    )
    return f"{', '.join(f'{Path(name).name} {size} bytes' for name, size in sizes.items())}; {times}"


def _run_once(bundle: Path, backend: str) -> None:
    from restyle_deploy.runtime.session import Session

    with Session.open(bundle, backend=backend, device=DEVICE) as session:
        session.invert(np.zeros((1, *session.config.input_shape, 3), np.uint8), steps=1)


def _caches_in(bundle: Path) -> dict[str, bytes]:
    folder = bundle / ENGINES
    paths = (path for path in sorted(folder.rglob("*")) if path.suffix == CACHE_SUFFIX)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def _seconds_of(action: Callable[[], None]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began
