"""The libraries that only a benchmark needs."""

from collections.abc import Mapping
from importlib.util import find_spec

from restyle_deploy.errors import BackendUnavailableError

DISTRIBUTIONS = {"skimage": "scikit-image", "matplotlib": "matplotlib", "psutil": "psutil"}
# What a session can be measured against.
REFERENCES = ("torch",)
# What rebuilds and runs the reference model.
REFERENCE_DISTRIBUTIONS = {"torch": "torch", "onnx": "onnx"}


def require_bench_libraries() -> None:
    """Raise `BackendUnavailableError`, with the command that mends it, unless the `bench` extra is installed."""
    _require(DISTRIBUTIONS, job="benchmarks need", extra="bench")


def require_reference_libraries() -> None:
    """Raise `BackendUnavailableError`, with the command that mends it, unless the reference model can run here."""
    _require(REFERENCE_DISTRIBUTIONS, job="the reference model needs", extra="export")


def _require(distributions: Mapping[str, str], *, job: str, extra: str) -> None:
    missing = [distribution for module, distribution in distributions.items() if find_spec(module) is None]
    if missing:
        raise BackendUnavailableError(
            f"{job} {' and '.join(missing)}, not installed here; run: pip install 'restyle-deploy[{extra}]'"
        )
