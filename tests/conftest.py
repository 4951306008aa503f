"""Fixtures for all tests."""

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from tests.backends.host_driver.stand_in import HostDriver

# A busy machine makes any single example slow.
settings.register_profile("without deadline", deadline=None)
settings.load_profile("without deadline")

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


@pytest.fixture(scope="session")
def toy_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in the official layout; the model is the official one in small."""
    from tests.toy import write_toy_checkpoint  # here, so that tests without a model start without torch

    return write_toy_checkpoint(tmp_path_factory.mktemp("checkpoint") / "toy.pt")


@pytest.fixture(scope="session")
def toy_bundle(toy_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of `toy_checkpoint`. Only to be read: a test that changes it takes a copy."""
    from restyle_deploy.export import export_checkpoint

    directory = tmp_path_factory.mktemp("bundle") / "toy"
    export_checkpoint(toy_checkpoint, directory)
    return directory


@pytest.fixture(scope="session")
def host_driver(pytestconfig: pytest.Config) -> "HostDriver":
    """A stand-in for the CUDA driver, under which the real cuda-core runs scripts without a GPU."""
    from tests.backends.host_driver.stand_in import build_host_driver  # needs g++

    pytest.importorskip("cuda.core", reason="cuda-core is not installed")
    assert pytestconfig.cache is not None
    return build_host_driver(pytestconfig.cache.mkdir("host_driver"))
