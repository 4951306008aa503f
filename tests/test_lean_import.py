"""Running needs neither torch nor the libraries of the other jobs: they are blocked, and an image is inverted."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.pictures import write_picture

# All that some job needs, but for what a session needs: NumPy, Pillow and the backend's library.
BLOCKED = ("torch", "onnx", "onnxscript", "click", "tqdm", "matplotlib", "skimage", "scipy", "tomli")

BLOCK = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"blocked: {name}", name=name)

blocked = set(sys.argv[1].split(","))
sys.meta_path.insert(0, Blocker())
"""

INVERT = """
from pathlib import Path
import numpy as np
from restyle_deploy import Session
from restyle_deploy.runtime.images import load_image, save_image, uint8_from_images

bundle, source, target = map(Path, sys.argv[2:])
with Session.open(bundle, threads=1) as session:
    result = session.invert(load_image(source)[None], steps=2)
    assert result.images.shape == (1, 3, *session.config.image_shape)
    assert np.isfinite(result.latents).all()
save_image(target, uint8_from_images(result.images[0]))
assert not blocked & set(sys.modules)
"""

IMPORT = """
import restyle_deploy
import restyle_deploy.doctor
import restyle_deploy.runtime.folder
import restyle_deploy.verify
assert not blocked & set(sys.modules)
"""


def run_blocked(program: str, blocked: tuple[str, ...], *arguments: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BLOCK + program, ",".join(blocked), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_image_is_inverted_with_all_else_blocked(toy_bundle: Path, tmp_path: Path) -> None:
    photo = write_picture(tmp_path / "photo.jpg")
    done = run_blocked(INVERT, BLOCKED, toy_bundle, photo, tmp_path / "result.png")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert (tmp_path / "result.png").is_file()


def test_backends_are_imported_on_demand() -> None:
    done = run_blocked(IMPORT, (*BLOCKED, "onnxruntime"))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["torch", "click"])
def test_blocker_blocks(name: str) -> None:
    done = run_blocked(f"import {name}", BLOCKED)
    assert done.returncode == 1
    assert f"ModuleNotFoundError: blocked: {name}" in done.stderr
