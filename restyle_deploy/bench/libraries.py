"""The libraries of the `bench` extra, which nothing else needs."""

from importlib.util import find_spec

from restyle_deploy.errors import BackendUnavailableError

DISTRIBUTIONS = {"skimage": "scikit-image", "matplotlib": "matplotlib"}


def require_bench_libraries() -> None:
    """Raise `BackendUnavailableError`, with the command that mends it, unless the `bench` extra is installed."""
    missing = [distribution for module, distribution in DISTRIBUTIONS.items() if find_spec(module) is None]
    if missing:
        raise BackendUnavailableError(
            f"benchmarks need {' and '.join(missing)}, not installed here; run: pip install 'restyle-deploy[bench]'"
        )
