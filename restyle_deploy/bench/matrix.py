"""Which configurations are measured: backends, devices, precisions, plans, batches and approximate modes, combined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

from restyle_deploy.backends import BACKENDS, default_device, load_backend
from restyle_deploy.backends.base import EXACT_PRECISION
from restyle_deploy.bench.report import Configuration
from restyle_deploy.bundle import Bundle, find_engine
from restyle_deploy.errors import BackendUnavailableError, BundleError

ALL = "all"
Plan = Literal["engine", "plain"]


@dataclass(frozen=True, kw_only=True)
class MatrixOptions:
    """What is combined; every configuration of the product is measured.

    Attributes:
        backends: rows of `BACKENDS`; `all` stands for those whose library is installed and has a device here.
        device: None for each backend's default one.
        precisions: see `backends.base.PRECISIONS`.
        plans: None takes the engine where the bundle has one for the backend, the device and the precision, and the
            exported graphs elsewhere.
        batches: images of one call.
        previews: whether all steps but the last render in small; both values measure both.
        threads: CPU threads; None leaves the choice to the backend.
    """

    backends: tuple[str, ...] = ("onnxruntime",)
    device: str | None = None
    precisions: tuple[str, ...] = (EXACT_PRECISION,)
    plans: tuple[Plan, ...] | None = None
    batches: tuple[int, ...] = (1,)
    previews: tuple[bool, ...] = (False,)
    threads: int | None = None


def configurations_of(bundle: Bundle, options: MatrixOptions) -> tuple[Configuration, ...]:
    """Return the configurations in the order in which they are measured: each backend's together, batches rising.

    Whether one can run is for its own process to find out: its row says so if it cannot.

    Args:
        bundle: tells which engines there are.
        options: what is combined.
    Raises:
        ValueError: an unknown backend.
        BackendUnavailableError: `all`, and no backend has a device here.
    """
    found: dict[str, Configuration] = {}
    combined = product(_backends(options.backends), options.precisions, options.previews, sorted(options.batches))
    for backend, precision, preview, batch in combined:
        device = options.device or default_device(backend)
        for plan in options.plans or (_usual_plan(bundle, backend, device, precision),):
            one = Configuration(
                backend=backend,
                device=device,
                precision=precision,
                plan=plan,
                preview_steps=preview,
                batch=batch,
                threads=options.threads,
            )
            found[one.name] = one
    return tuple(found.values())


def _backends(names: Sequence[str]) -> tuple[str, ...]:
    if ALL not in names:
        return tuple(dict.fromkeys(names))
    here = tuple(name for name in BACKENDS if _has_device(name))
    if not here:
        raise BackendUnavailableError("no backend is installed that has a device here; see: restyle-deploy doctor")
    return here


def _has_device(name: str) -> bool:
    try:
        return default_device(name) in load_backend(name).devices()
    except BackendUnavailableError:
        return False
    except ImportError:  # installed, but broken: its row says so
        return True


def _usual_plan(bundle: Bundle, backend: str, device: str, precision: str) -> Plan:
    try:
        return "engine" if find_engine(bundle, backend=backend, device=device, precision=precision) else "plain"
    except BundleError:  # a damaged engine: its row says so
        return "engine"
