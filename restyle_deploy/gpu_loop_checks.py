"""The loop tried on the GPU at hand: its results, its recording, its memory and its time; on the CPU it runs too."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path

import numpy as np

from restyle_deploy.bundle import read_bundle
from restyle_deploy.errors import BackendUnavailableError, VerificationError
from restyle_deploy.gpu_outcomes import join_outcomes, outcome_of
from restyle_deploy.gpu_trial import STEPS, DeviceArrays, Images, Trial
from restyle_deploy.runtime.deployment import Deployment
from restyle_deploy.runtime.device import current_context, free_memory, index_of, primary_context
from restyle_deploy.runtime.images import normalize_images, resize_image
from restyle_deploy.runtime.opening import open_device
from restyle_deploy.runtime.results import Inversion, InversionResult
from restyle_deploy.runtime.session import Session
from restyle_deploy.verify import TOLERANCES, check_parity, compare_with_expectation, load_expectation

LOOP_BACKENDS = ("pytorch", "onnxruntime")
WARMUP, REPEATS = 3, 20
ROUNDS = 20
MEBIBYTE = 2**20
# The driver's pages are of 2 MiB; a session's state that is not given back is many of them.
MOST_LOST_BYTES = 2 * MEBIBYTE
PHOTO_SHAPE = (3024, 4032, 3)
ENCODER_SHAPE = (256, 256)
LEVELS_OF_ONE = 127.5  # [-1, 1] is 255 levels
# One level, and the rounding of float32.
MOST_LEVELS = 1.001


def check_loop(bundle: Path, *, backend: str, device: str) -> str:
    """Try the loop of a backend, in float32 on the exported graphs, with the inputs of the bundle's expectation.

    The expectation is met; results of images on the device are those of images on the host, and those of a session that
    records nothing: to the bit, or within the tolerance where the backend lets nothing be recorded, as its library then
    chooses its algorithms anew; a call is one launch. Times are told.

    Args:
        bundle: a bundle's directory.
        backend: a row of `backends.BACKENDS`.
        device: `cuda:0` and so on; `cpu` too, where nothing is recorded.
    Returns:
        What was found, of each part.
    Raises:
        BackendUnavailableError: the backend or the device cannot run here.
        VerificationError: a part failed; the message has all of them.
        BundleError, BuildError, DeviceError: see `Session.open`.
    """
    expectation = load_expectation(read_bundle(bundle).expectation)
    images = expectation.inputs
    deployment = Deployment(bundle=bundle, backend=backend, device=device, plain=True, max_batch=len(images))
    with closing(Trial(deployment)) as trial:

        def check_expectation() -> str:
            parity = compare_with_expectation(trial.session, expectation)
            check_parity(parity, f"backend {backend} on {device}")
            return f"latents within {max(parity.latent_errors):.1e}, images within {max(parity.image_errors):.1e}"

        checks: Mapping[str, Callable[[], str]] = {
            "expectation": check_expectation,
            "images on the device": lambda: _check_device_images(trial, images),
            "one launch": lambda: _check_launches(trial, images),
            "capture=False": lambda: _check_capture(trial, deployment, images),
            "times": lambda: _measure(trial, deployment, images[:1]),
        }
        return join_outcomes({name: outcome_of(check) for name, check in checks.items()})


def check_images(device_name: str) -> str:
    """Compare a photo-sized random image, resized and normalised on a device, with Pillow's.

    Raises:
        BackendUnavailableError: there is no such device, or no compiler for its kernels.
        VerificationError: a value differs by more than a level.
    """
    photo = np.random.default_rng(0).integers(0, 256, (1, *PHOTO_SHAPE), dtype=np.uint8)
    expected = normalize_images(resize_image(photo[0], ENCODER_SHAPE)[None])
    with closing(open_device(device_name)) as device, closing(DeviceArrays(device)) as arrays:
        target = arrays.upload(np.full_like(expected, np.nan))  # what is not written shows
        device.prepare_images(arrays.upload(photo), target)
        prepared = arrays.download(target)
    levels = float(np.abs(prepared - expected).max() * LEVELS_OF_ONE)
    height, width = PHOTO_SHAPE[:2]
    found = f"{height} x {width} pixels, the largest difference is {levels:.2g} levels"
    if not levels <= MOST_LEVELS:
        raise VerificationError(f"{found}, not one at most")
    return found


def check_memory(bundle: Path, *, backend: str, device: str, rounds: int | None = None) -> str:
    """Open, run and close sessions on the exported graphs, and see whether the GPU's memory comes back.

    Args:
        bundle, backend, device: see `check_loop`.
        rounds: how often; None for `ROUNDS`.
    Raises:
        VerificationError: it does not, or another process took some meanwhile.
        BackendUnavailableError, BundleError, BuildError, DeviceError: see `Session.open`.
    """
    images = load_expectation(read_bundle(bundle).expectation).inputs
    rounds = ROUNDS if rounds is None else rounds

    def once() -> None:
        with Session.open(bundle, backend=backend, device=device, plain=True, max_batch=len(images)) as session:
            for _ in range(2):  # the second call replays
                session.invert(images, steps=2)
                session.invert(images[:1], steps=2, every_step=True)

    once()  # libraries keep what they load at first
    gc.collect()
    before = free_bytes(device)
    for _ in range(rounds):
        once()
    gc.collect()
    lost = before - free_bytes(device)
    found = f"{rounds} times open, run and close, after a first time: {lost / MEBIBYTE:.1f} MiB less are free"
    if lost > MOST_LOST_BYTES:
        raise VerificationError(
            f"{found}, expected {MOST_LOST_BYTES / MEBIBYTE:.0f} at most; run it again when no other process "
            "uses the GPU"
        )
    return found


def free_bytes(device: str) -> int:
    """Return the memory of a GPU that is free, as its driver counts it.

    Args:
        device: `cuda:0` and so on.
    Raises:
        DeviceError: the driver refuses.
    """
    with current_context(primary_context(index_of(device))):
        free, _ = free_memory()
    return free


def _check_device_images(trial: Trial, images: Images) -> str:
    expected = trial.session.invert(images, steps=STEPS)
    return _compare(trial.invert_on_device(images), expected, exact=trial.is_recorded)


def _check_launches(trial: Trial, images: Images) -> str:
    """Repeat a call: its loop is recorded, so that no run is enqueued by itself."""
    if trial.device.is_host:
        raise BackendUnavailableError("there are no launches on the CPU")
    trial.session.invert(images, steps=STEPS)
    trial.enqueued.clear()
    trial.invert_on_device(images)
    count = len(trial.enqueued)
    if not trial.is_recorded:
        raise BackendUnavailableError(f"this backend lets nothing be recorded, a call enqueues {count} runs")
    if count:
        raise VerificationError(f"the loop is not recorded: a call enqueues {count} runs, and the log says why")
    return f"no run of {STEPS} steps is enqueued by itself"


def _check_capture(trial: Trial, deployment: Deployment, images: Images) -> str:
    replayed = trial.invert_on_device(images)
    with closing(Trial(deployment, capture=False)) as other:
        return _compare(replayed, other.invert_on_device(images), exact=trial.is_recorded)


def _compare(found: InversionResult, expected: InversionResult, *, exact: bool) -> str:
    assert found.current is not None
    assert expected.current is not None
    pairs = {
        "latents": (found.latents, expected.latents, TOLERANCES["fp32"].latents),
        "images": (found.images, expected.images, TOLERANCES["fp32"].images),
        "current": (found.current, expected.current, TOLERANCES["fp32"].images),
    }
    if all(np.array_equal(one, other) for one, other, _ in pairs.values()):
        return "the same bits"
    largest = {name: float(np.abs(one - other).max()) for name, (one, other, _) in pairs.items()}
    told = ", ".join(f"{name} differ by {difference:.1e}" for name, difference in largest.items())
    if exact:
        raise VerificationError(f"{told}, expected the same bits")
    if not all(largest[name] <= tolerance for name, (_, _, tolerance) in pairs.items()):
        raise VerificationError(f"{told}, more than rounding")
    return told


def _measure(trial: Trial, deployment: Deployment, images: Images) -> str:
    """Time calls on the device, by its clock in a session that takes times, and on the host until they return."""
    on_device, host_us = trial.upload(images), []
    for _ in range(WARMUP + REPEATS):
        start = time.perf_counter()
        inversion: Inversion = trial.session.invert(on_device, steps=STEPS)
        host_us.append((time.perf_counter() - start) * 1e6)
        trial.device.synchronize()
        del inversion  # its slot serves the next call
    with closing(Trial(deployment, timing_enabled=True)) as timed:
        source = timed.upload(images)
        timings = [timed.session.invert(source, steps=STEPS).timings for _ in range(WARMUP + REPEATS)]
    total_ms = statistics.median(one.total_ms for one in timings[WARMUP:] if one is not None)
    return (
        f"{STEPS} steps of one image {total_ms:.2f} ms, the host busy for "
        f"{statistics.median(host_us[WARMUP:]):.0f} µs of each call"
    )
