"""The reference cases: what the official code computes with weights that follow a fixed rule."""

import importlib.util
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

CASES = ("e4e_church_256", "psp_cars_512", "psp_ffhq_1024")


@dataclass(frozen=True, kw_only=True)
class GoldenCase:
    """A checkpoint in the official layout and the official code's outputs for it."""

    checkpoint: Path
    expected: dict[str, NDArray[Any]]

    @property
    def steps(self) -> int:
        return len(self.expected["latents"])


@contextmanager
def open_case(name: str, shared_dir: Path, directory: Path) -> Iterator[GoldenCase]:
    """Write a case's checkpoint to `directory`, which is deleted in the end: its files take up to 2 GB."""
    golden = shared_dir / "golden"
    if not golden.is_dir():
        pytest.skip(f"the reference outputs are not here: {golden}")
    checkpoint = directory / "official.pt"
    _weights_writer(golden / "weights.py")(str(golden / f"{name}.json"), str(checkpoint))
    with np.load(golden / f"{name}.npz") as arrays:
        expected = dict(arrays)
    yield GoldenCase(checkpoint=checkpoint, expected=expected)
    shutil.rmtree(directory)


def _weights_writer(script: Path) -> Callable[[str, str], None]:
    spec = importlib.util.spec_from_file_location("golden_weights", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    main: Callable[[str, str], None] = module.main
    return main
