"""Parity step by step: freely running, where errors feed back, and each step from the reference's state by itself."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from restyle_deploy.backends.base import EXACT_PRECISION
from restyle_deploy.bundle import check_engine_files, check_graphs
from restyle_deploy.errors import BackendUnavailableError, RestyleDeployError, VerificationError
from restyle_deploy.runtime.results import InversionResult
from restyle_deploy.runtime.session import Session
from restyle_deploy.verify import (
    Exceeding,
    Parity,
    check_parity,
    largest_per_step,
    load_expectation,
    parity_with_expectation,
)
from restyle_deploy.verify_reference import NO_REFERENCE, ReferenceRun, State, run_reference

if TYPE_CHECKING:
    from restyle_deploy.verify_layers import LayerSearch

Array = NDArray[np.float32]

_NO_LAYER = (
    "no layer differs while the outputs of layers are kept: it is the merging of layers, or the engine's file; "
    "try --plain, or build the engine again"
)


@dataclass(frozen=True, kw_only=True)
class Drift:
    """How a session's errors come about, against a reference's full results.

    Attributes:
        reference: what computed the reference, for people.
        stored: the reference's own differences from the bundle's stored results, which tells whether it is one.
        running: freely from the average, as results are used: a step starts from what the last one left.
        forced: each step from the reference's state before it: a step's own error, without what was fed back.
    """

    reference: str
    stored: Parity
    running: Parity
    forced: Parity


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What is known of a session's results.

    Attributes:
        stored: differences from the bundle's stored results, which the torch model gave when it was exported.
        drift: None where no reference could run.
        layers: a search of each graph that was looked at, in the order of computation; empty without one.
        notes: what could not be found out, and why.
    """

    stored: Parity
    drift: Drift | None = None
    layers: tuple[LayerSearch, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def is_within_tolerance(self) -> bool:
        """Whether all differences keep to the tolerance, freely running and step by step."""
        return self.first_exceeding is None

    @property
    def first_exceeding(self) -> Exceeding | None:
        """The first difference beyond its tolerance: freely running, else of a step by itself."""
        parities = [self.stored, *([self.drift.running, self.drift.forced] if self.drift else [])]
        found = [parity.first_exceeding for parity in parities]
        return min((one for one in found if one), key=lambda one: one.step, default=None)

    @property
    def cause(self) -> str | None:
        """Where the first difference beyond its tolerance comes from; None without one, or without a reference.

        `stored`: the reference differs from the stored results as well; `step`: a step by itself differs; `feedback`:
        each step by itself keeps to the tolerance, and what they are off by adds up.
        """
        if self.drift is None or self.is_within_tolerance:
            return None
        if not self.drift.stored.is_within_tolerance:
            return "stored"
        return "feedback" if self.drift.forced.is_within_tolerance else "step"

    def as_json(self) -> dict[str, Any]:
        """Return plain values; the differences from the stored results at the top."""
        drift = self.drift and {
            "reference": self.drift.reference,
            **{name: getattr(self.drift, name).as_json() for name in ("stored", "running", "forced")},
        }
        first = self.first_exceeding
        return {
            "ok": self.is_within_tolerance,
            **self.stored.as_json(),
            "drift": drift,
            "first_exceeding": first and _finite_or_none(asdict(first)),
            "cause": self.cause,
            "layers": [_finite_or_none(asdict(search)) for search in self.layers],
            "notes": list(self.notes),
        }


def verify_drift(
    directory: Path,
    *,
    backend: str,
    device: str,
    threads: int | None,
    precision: str = EXACT_PRECISION,
    plain: bool = False,
    steps: int | None = None,
    reference: str | None = None,
    layers: bool = False,
) -> Verification:
    """Check all files of a bundle against their hashes, and find out where and why its results differ.

    Args:
        directory: the bundle.
        backend, device, threads, precision, plain: see `Session.open`.
        steps: steps to take, if more than the bundle has stored results of.
        reference: see `verify_reference.run_reference`; None takes what is installed, and goes without if nothing is.
            `NO_REFERENCE` compares with the stored results only, as many steps as these have.
        layers: look at the layers even where all is within tolerance; else only where a step by itself differs.
    Raises:
        BundleError, BackendUnavailableError, BuildError: see `verify.verify_bundle` and `run_reference`.
        ValueError: no such reference.
    """
    with Session.open(
        directory, backend=backend, device=device, threads=threads, precision=precision, plain=plain
    ) as session:
        check_graphs(session.bundle)
        for engine in session.bundle.engines:
            check_engine_files(session.bundle, engine)
        return examine_session(session, steps=steps, reference=reference, layers=layers)


def examine_session(
    session: Session, *, steps: int | None = None, reference: str | None = None, layers: bool = False
) -> Verification:
    """Compare an open session with the stored results and with a reference; see `verify_drift`."""
    expectation = load_expectation(session.bundle.expectation)
    precision = session.describe()["precision"]
    count = expectation.steps if reference == NO_REFERENCE else max(steps or 0, expectation.steps)
    images, latents, notes = _run_freely(session, expectation.inputs, count)
    first = slice(0, expectation.steps)
    stored = parity_with_expectation(images[first], latents[first], expectation, precision=precision)
    if reference == NO_REFERENCE:
        return Verification(stored=stored, notes=notes)
    try:
        expected = run_reference(
            session.bundle, expectation.inputs, steps=count, name=reference, threads=session.describe().get("threads")
        )
    except BackendUnavailableError as error:
        if reference is not None:
            raise
        return Verification(stored=stored, notes=(*notes, f"no reference: {error}"))
    running = Parity(
        latent_errors=largest_per_step(latents, expected.latents),
        image_errors=largest_per_step(images, expected.images),
        precision=precision,
        largest_latent=stored.largest_latent,
    )
    drift = Drift(
        reference=expected.name,
        stored=parity_with_expectation(
            expected.images[first], expected.latents[first], expectation, precision=EXACT_PRECISION
        ),
        running=running,
        forced=_compare_steps(session, expected, running),
    )
    verification = Verification(stored=stored, drift=drift, notes=notes)
    if layers or verification.cause == "step":
        verification = _with_layers(verification, session, expected)
    return verification


def check_verification(verification: Verification, name: str) -> None:
    """Raise `VerificationError` with the errors of each step unless all are within tolerance."""
    check_parity(verification.stored, name)
    first = verification.first_exceeding
    if first is not None and verification.drift is not None:
        raise VerificationError(
            f"{name}: differs from {verification.drift.reference}: at step {first.step} {first.output} "
            f"by {first.error:.2g} (tolerance {first.tolerance:g})"
        )


def take_step(session: Session, targets: Array, state: State) -> tuple[Array, Array, Array]:
    """Return (images, latents, current) after one step of a session from a given state; NaN where it is not finite.

    Args:
        session: open.
        targets: [N, 3, h, w] float32.
        state: of as many images.
    """
    config = session.config
    start = InversionResult(
        images=np.empty((len(targets), 3, *config.image_shape), np.float32),  # only latents and current count
        latents=state.latents,
        current=state.current,
    )
    try:
        result = session.invert(targets, steps=1, start=start)
    except VerificationError:
        return np.full_like(start.images, np.nan), np.full_like(state.latents, np.nan), np.full_like(targets, np.nan)
    assert result.current is not None
    return result.images, result.latents, result.current


def _run_freely(session: Session, inputs: NDArray[np.uint8], steps: int) -> tuple[Array, Array, tuple[str, ...]]:
    """Return images and latents of every step, with a note; all NaN where the session gave something not finite."""
    try:
        result = session.invert(inputs, steps=steps, every_step=True)
    except VerificationError as error:
        config = session.config
        images = np.full((steps, len(inputs), 3, *config.image_shape), np.nan, np.float32)
        latents = np.full((steps, len(inputs), config.n_styles, config.style_dim), np.nan, np.float32)
        return images, latents, (str(error),)
    return result.images, result.latents, ()


def _compare_steps(session: Session, expected: ReferenceRun, like: Parity) -> Parity:
    """Return the differences of each step that starts from the reference's state."""
    errors: list[tuple[float, ...]] = []
    for step in range(1, expected.steps + 1):
        after = expected.state_before(step + 1)
        found = take_step(session, expected.targets, expected.state_before(step))
        wanted = (expected.images[step - 1], after.latents, after.current)
        errors.append(
            tuple(largest_per_step(one[None], other[None])[0] for one, other in zip(found, wanted, strict=True))
        )
    image_errors, latent_errors, current_errors = zip(*errors, strict=True)
    return replace(like, image_errors=image_errors, latent_errors=latent_errors, current_errors=current_errors)


def _with_layers(verification: Verification, session: Session, expected: ReferenceRun) -> Verification:
    """Add a search of the layers, at the first step that differs by itself, else at the one that is off by most."""
    assert verification.drift is not None
    forced = verification.drift.forced
    first = forced.first_exceeding
    step = first.step if first else int(np.argmax(forced.latent_errors)) + 1
    try:
        from restyle_deploy.verify_search import search_session
    except ModuleNotFoundError as error:
        note = f"layers are not compared: this needs {error.name}; run: pip install 'restyle-deploy[build]'"
        return replace(verification, notes=(*verification.notes, note))
    notes = verification.notes
    try:
        layers = search_session(session, expected, step=step)
    except RestyleDeployError as error:
        return replace(verification, notes=(*notes, f"layers are not compared: {error}"))
    if first and not any(search.first for search in layers):
        notes = (*notes, _NO_LAYER)
    return replace(verification, layers=layers, notes=notes)


def _finite_or_none(values: Any) -> Any:
    """Return plain values with None for the numbers that JSON does not have."""
    if isinstance(values, dict):
        return {name: _finite_or_none(value) for name, value in values.items()}
    if isinstance(values, float) and not np.isfinite(values):
        return None
    return values
