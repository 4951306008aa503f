"""Fixtures for all tests."""

from pathlib import Path

import pytest

PROJECT_ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def project_root() -> Path:
    """The directory of pyproject.toml."""
    return PROJECT_ROOT


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The reference outputs and training data, which lie beside the repository and not in it."""
    path = PROJECT_ROOT.parent / "shared"
    if not path.is_dir():
        pytest.skip(f"the reference files are not here: {path}")
    return path
