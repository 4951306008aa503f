"""What is the same for all libraries on the CPU; their modules have the functions of `Backend` here as their own."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from restyle_deploy.backends.base import BuildRequest, RunnerOptions
from restyle_deploy.device_array import Array
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


def host_arrays(buffers: Mapping[str, Array]) -> dict[str, NDArray[Any]]:
    """Return buffers as NumPy's arrays, which they are already.

    Raises:
        TypeError: one lies in the memory of a GPU.
    """
    arrays = {name: array for name, array in buffers.items() if isinstance(array, np.ndarray)}
    others = [name for name in buffers if name not in arrays]
    if others:
        raise TypeError(f"got arrays of a GPU for {', '.join(others)}, expected NumPy's: the graph runs on the CPU")
    return arrays
