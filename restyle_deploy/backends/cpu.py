"""The part of `Backend` that is the same for all libraries on the CPU; their modules have these names as their own."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from restyle_deploy.backends.base import BuildRequest, RunnerOptions
from restyle_deploy.processor import describe_processor


def processors(device: str) -> tuple[str, ...]:
    """Return this machine's processor."""
    return (describe_processor(),)


def plugin_hash() -> str | None:
    """Return None: there is no kernel of ours for the CPU."""
    return None


def check_graph(graph: Path, options: RunnerOptions, request: BuildRequest) -> Mapping[str, Any]:
    """Return nothing: only building tells whether the library takes a graph."""
    return {}
