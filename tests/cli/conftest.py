"""The command line, through click's runner."""

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from restyle_deploy.cli.main import main
from tests.pictures import write_picture

Run = Callable[..., Result]


@pytest.fixture
def run() -> Run:
    """Run `restyle-deploy` with arguments of any type; a bug keeps its traceback."""

    def run(*arguments: object) -> Result:
        return CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)

    return run


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of two good images."""
    for seed, name in enumerate(("a.png", "b.jpg")):
        write_picture(tmp_path / "photos" / name, seed)
    return tmp_path / "photos"
