"""Parity: what the reference model computed, kept in small, against what a session computes."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from restyle_deploy.backends.base import EXACT_PRECISION
from restyle_deploy.bundle import Bundle, check_engine_files, check_graphs, find_engine
from restyle_deploy.engines import DamagedEngine, EngineRecord, build_command, quote_path
from restyle_deploy.errors import BundleError, VerificationError
from restyle_deploy.model_config import ModelConfig
from restyle_deploy.runtime.images import pool_images, resize_image
from restyle_deploy.runtime.session import InversionResult, Session

STEPS = 3
# Two images, so that a batch that was frozen at one, or mixed up, is noticed.
IMAGE_COUNT = 2
POOLED_WIDTH = 64
CROP_SIZE = 32
_PATTERN_SIZE = 8


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """The largest differences that pass, at any step.

    `latents` and `images` are absolute, `layers` a share of the largest value of a layer's output.
    """

    latents: float
    images: float
    layers: float = 1e-4


# By precision. Of latents beyond ±1, the shorter types' tolerance is a share of the largest, as their rounding is.
TOLERANCES: Mapping[str, Tolerance] = MappingProxyType(
    {
        "fp32": Tolerance(latents=1e-4, images=1e-3),
        "tf32": Tolerance(latents=1e-2, images=0.05, layers=2e-2),
        "fp16": Tolerance(latents=2e-2, images=0.1, layers=2e-2),
        "bf16": Tolerance(latents=2e-2, images=0.1, layers=0.1),
        "mixed": Tolerance(latents=2e-2, images=0.1, layers=0.1),
    }
)


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """Inputs and what a float32 reference gives for them at every step.

    Attributes:
        inputs: uint8 [N, H, W, 3], of the encoder's size.
        latents: [steps, N, S, D] float32.
        images_pooled: [steps, N, 3, h, w] float32, block means of the full image, at most 64 px wide.
        images_crop: [steps, N, 3, 32, 32] float32, the centre of the full image (smaller for a smaller image).
    """

    inputs: NDArray[np.uint8]
    latents: NDArray[np.float32]
    images_pooled: NDArray[np.float32]
    images_crop: NDArray[np.float32]

    @property
    def steps(self) -> int:
        """Refinement steps that are kept."""
        return len(self.latents)


@dataclass(frozen=True, kw_only=True)
class Exceeding:
    """A difference beyond its tolerance, at a step from 1 on, of `latents`, `images` or `current`."""

    step: int
    output: str
    error: float
    tolerance: float


@dataclass(frozen=True, kw_only=True)
class Parity:
    """The largest absolute differences from an expectation, per step, of a session of this precision.

    Attributes:
        latent_errors, image_errors: per step.
        current_errors: per step, of the image that goes back into the encoder; empty where it was not compared.
        precision: of the session.
        largest_latent: absolute value, of the expectation.
    """

    latent_errors: tuple[float, ...]
    image_errors: tuple[float, ...]
    current_errors: tuple[float, ...] = ()
    precision: str = EXACT_PRECISION
    largest_latent: float = 1.0

    @property
    def tolerance(self) -> Tolerance:
        """The precision's row of the table, for latents of this size."""
        row = TOLERANCES[self.precision]
        scale = 1.0 if self.precision == EXACT_PRECISION else max(1.0, self.largest_latent)
        return replace(row, latents=row.latents * scale)

    @property
    def is_within_tolerance(self) -> bool:
        """Whether all outputs keep to the tolerance at every step."""
        return self.first_exceeding is None

    @property
    def first_exceeding(self) -> Exceeding | None:
        """The first difference beyond its tolerance, in the order in which a step computes its outputs."""
        tolerance = self.tolerance
        outputs = {
            "latents": (self.latent_errors, tolerance.latents),
            "images": (self.image_errors, tolerance.images),
            "current": (self.current_errors, tolerance.images),
        }
        for step in range(len(self.latent_errors)):
            for output, (errors, most) in outputs.items():
                if errors and not errors[step] <= most:
                    return Exceeding(step=step + 1, output=output, error=errors[step], tolerance=most)
        return None

    def as_json(self) -> dict[str, Any]:
        """Return plain values for a manifest or a report; an error that is not finite is None."""
        current = {"current_errors": _as_json(self.current_errors)} if self.current_errors else {}
        return {
            "latent_errors": _as_json(self.latent_errors),
            "image_errors": _as_json(self.image_errors),
            **current,
            "latent_tolerance": self.tolerance.latents,
            "image_tolerance": self.tolerance.images,
        }


@dataclass(frozen=True, kw_only=True)
class EngineState:
    """What is known of an engine of a bundle.

    Attributes:
        name: of its directory; of a damaged one as its record states it.
        state: `run`: its results are those that were compared; `verified`: they were when it was built;
            `not verified`: they never were; `damaged`: its record describes no engine, so that its files are not
            checked.
        reason: why it is not verified, or what is wrong with its record; None for the other two.
        command: verifies it where it can run, or builds it again; None where there is nothing to do, or the record
            does not state what the engine is for.
    """

    name: str
    state: str
    reason: str | None = None
    command: str | None = None


@dataclass(frozen=True, kw_only=True)
class EngineSurvey:
    """Which of a bundle's graphs a verification has run, and which it has not.

    Attributes:
        backend, device, precision: what they were run with.
        engines: all that the bundle has.
    """

    backend: str
    device: str
    precision: str
    engines: tuple[EngineState, ...]

    @property
    def run(self) -> str | None:
        """The name of the engine that was run; None where it was the exported graphs."""
        return next((engine.name for engine in self.engines if engine.state == "run"), None)

    @property
    def damaged(self) -> tuple[EngineState, ...]:
        """The engines whose records are damaged."""
        return tuple(engine for engine in self.engines if engine.state == "damaged")

    def as_json(self) -> dict[str, Any]:
        """Return plain values: what was run, and all engines."""
        names = ("backend", "device", "precision")
        run = {"engine": self.run, **{name: getattr(self, name) for name in names}}
        return {"run": run, "engines": [asdict(engine) for engine in self.engines]}


def survey_engines(bundle: Bundle, *, backend: str, device: str, precision: str, plain: bool) -> EngineSurvey:
    """Tell what is known of a bundle's engines when a session with these options has been verified.

    No file is looked at; `check_engine_files` does that.

    Raises:
        BundleError: the record of the engine that the session would take is damaged.
    """
    engine = None if plain else find_engine(bundle, backend=backend, device=device, precision=precision)
    states = [_state_of(bundle, other, is_run=other is engine) for other in bundle.engines]
    states += [_state_of_damaged(bundle, damaged) for damaged in bundle.damaged_engines]
    return EngineSurvey(backend=backend, device=device, precision=precision, engines=tuple(states))


def check_survey(survey: EngineSurvey, name: str) -> None:
    """Raise `VerificationError`, which names them all, if there are damaged engines."""
    if survey.damaged:
        engines = "; ".join(f"{engine.name} ({engine.reason})" for engine in survey.damaged)
        commands = "; ".join(engine.command for engine in survey.damaged if engine.command)
        again = f"build again: {commands}" if commands else "build again"
        raise VerificationError(f"{name}: the records of these engines are damaged: {engines}; {again}")


def create_inputs(config: ModelConfig, *, count: int = IMAGE_COUNT) -> NDArray[np.uint8]:
    """Return smooth random images, the same at every call: uint8 [count, H, W, 3] of the encoder's size."""
    random = np.random.RandomState(0)
    patterns = random.randint(0, 256, (count, _PATTERN_SIZE, _PATTERN_SIZE, 3)).astype(np.uint8)
    return np.stack([resize_image(pattern, config.input_shape) for pattern in patterns])


def reduce_images(images: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return (block means at most 64 px wide, 32×32 centre) of [..., H, W] images."""
    height, width = images.shape[-2:]
    factor = max(1, width // POOLED_WIDTH)
    top, left = (max(0, (size - CROP_SIZE) // 2) for size in (height, width))
    crop = images[..., top : top + CROP_SIZE, left : left + CROP_SIZE]
    return pool_images(images, (height // factor, width // factor)), np.ascontiguousarray(crop)


def save_expectation(path: Path, expectation: Expectation) -> None:
    """Write an expectation as a compressed `.npz`."""
    np.savez_compressed(
        path,
        inputs=expectation.inputs,
        latents=expectation.latents,
        images_pooled=expectation.images_pooled,
        images_crop=expectation.images_crop,
    )


def load_expectation(path: Path) -> Expectation:
    """Read what `save_expectation` wrote.

    Raises:
        BundleError: the file holds something else.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return Expectation(**{name: arrays[name] for name in arrays.files})
    except (AttributeError, BadZipFile, EOFError, TypeError, ValueError) as error:
        raise BundleError(f"{path}: holds no expectation ({error}); export the bundle again") from error


def compare_with_expectation(session: Session, expectation: Expectation) -> Parity:
    """Invert the inputs and return the largest differences at each step.

    Raises:
        ValueError: the session has preview steps, so that not every step has an image.
        VerificationError: the session gave NaN or infinity, or arrays of another shape.
    """
    result = session.invert(expectation.inputs, steps=expectation.steps, every_step=True)
    return parity_with_expectation(
        result.images, result.latents, expectation, precision=session.describe()["precision"]
    )


def parity_with_expectation(
    images: NDArray[np.float32], latents: NDArray[np.float32], expectation: Expectation, *, precision: str
) -> Parity:
    """Return the largest differences of results, with a leading steps axis, at each step of an expectation.

    Raises:
        VerificationError: arrays of another shape.
    """
    pooled, crop = reduce_images(images)
    image_errors = map(
        max, largest_per_step(pooled, expectation.images_pooled), largest_per_step(crop, expectation.images_crop)
    )
    return Parity(
        latent_errors=largest_per_step(latents, expectation.latents),
        image_errors=tuple(image_errors),
        precision=precision,
        largest_latent=float(np.abs(expectation.latents).max()),
    )


def compare_with_reference(session: Session, inputs: NDArray[np.uint8], reference: InversionResult) -> Parity:
    """Invert the inputs and return the largest differences from a reference's whole images and latents, every step.

    Args:
        session: an open session.
        inputs: uint8 [N, H, W, 3].
        reference: with a leading steps axis.
    Raises:
        ValueError: the session has preview steps, so that not every step has an image.
        VerificationError: the session gave NaN or infinity.
    """
    result = session.invert(inputs, steps=len(reference.latents), every_step=True)
    return Parity(
        latent_errors=largest_per_step(result.latents, reference.latents),
        image_errors=largest_per_step(result.images, reference.images),
        precision=session.describe()["precision"],
        largest_latent=float(np.abs(reference.latents).max()),
    )


def check_parity(parity: Parity, name: str) -> None:
    """Raise `VerificationError` with the errors of each step unless all are within tolerance."""
    if not parity.is_within_tolerance:
        latents, images = (
            ", ".join(f"{error:.2g}" for error in errors) for errors in (parity.latent_errors, parity.image_errors)
        )
        raise VerificationError(
            f"{name}: differs from the reference model; largest error per step: latents {latents} "
            f"(tolerance {parity.tolerance.latents:g}), images {images} (tolerance {parity.tolerance.images:g})"
        )


def verify_bundle(
    directory: Path,
    *,
    backend: str,
    device: str,
    threads: int | None,
    precision: str = EXACT_PRECISION,
    plain: bool = False,
) -> Parity:
    """Check all files of a bundle against their hashes, run its expectation and return the differences.

    Args:
        directory: the bundle.
        backend, device, threads, precision, plain: see `Session.open`.
    Raises:
        BundleError, BackendUnavailableError, BuildError: see `Session.open`; or a file is missing or has changed, of
            whichever engine.
        VerificationError: see `compare_with_expectation`.
    """
    with Session.open(
        directory, backend=backend, device=device, threads=threads, precision=precision, plain=plain
    ) as session:
        check_graphs(session.bundle)
        for engine in session.bundle.engines:
            check_engine_files(session.bundle, engine)
        return compare_with_expectation(session, load_expectation(session.bundle.expectation))


def largest_per_step(found: NDArray[np.float32], expected: NDArray[np.float32]) -> tuple[float, ...]:
    """Return the largest absolute difference of each step, infinite where a value is not finite.

    Raises:
        VerificationError: arrays of different shapes.
    """
    if found.shape != expected.shape:
        raise VerificationError(
            f"got results of {list(found.shape)}, the expectation holds {list(expected.shape)}; export the bundle again"
        )
    return tuple(largest_difference(step, expected_step) for step, expected_step in zip(found, expected, strict=True))


def largest_difference(found: NDArray[np.floating], expected: NDArray[np.floating]) -> float:
    """Return the largest absolute difference of two arrays of one shape, infinite where a value is not finite."""
    with np.errstate(invalid="ignore", over="ignore"):
        largest = float(np.abs(found.astype(np.float32, copy=False) - expected).max(initial=0))
    return largest if np.isfinite(largest) else np.inf


def _state_of(bundle: Bundle, engine: EngineRecord, *, is_run: bool) -> EngineState:
    name = engine.directory.name
    if is_run:
        return EngineState(name=name, state="run")
    if engine.build["verified"]:
        return EngineState(name=name, state="verified")
    backend, device, precision = engine.key
    command = f"restyle-deploy verify {quote_path(bundle.path)} --backend {backend} --device {device}"
    command += "" if precision == EXACT_PRECISION else f" --precision {precision}"
    return EngineState(name=name, state="not verified", reason=engine.build["reason"], command=command)


def _state_of_damaged(bundle: Bundle, damaged: DamagedEngine) -> EngineState:
    command = None
    if damaged.key is not None:
        backend, device, precision = damaged.key
        command = build_command(bundle.path, backend=backend, device=device, precision=precision)
    return EngineState(name=damaged.name, state="damaged", reason=damaged.reason, command=command)


def _as_json(errors: tuple[float, ...]) -> list[float | None]:
    return [error if np.isfinite(error) else None for error in errors]
