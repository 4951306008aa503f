"""The PyTorch example, on the CPU and on a GPU."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from examples import torch_pipeline
from restyle_deploy import Session
from restyle_deploy.runtime.images import uint8_from_images
from restyle_deploy.runtime.results import InversionResult

PHOTOS = Path("examples/photos")
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no NVIDIA GPU")


@pytest.fixture(params=["cpu", pytest.param("cuda:0", marks=[pytest.mark.gpu, NEEDS_GPU])])
def session(request: pytest.FixtureRequest, toy_bundle: Path) -> Iterator[Session]:
    with Session.open(toy_bundle, backend="pytorch", device=request.param) as session:
        yield session


@pytest.fixture
def pictures(session: Session) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    pictures = torch.randint(256, (2, *session.config.input_shape, 3), dtype=torch.uint8, generator=random)
    return pictures.to(str(session.describe()["device"]))


def test_results_are_views_of_what_the_session_gives(
    session: Session, pictures: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    invert = session.invert

    def noted(images: object, **options: Any) -> Any:
        given[:] = [images, invert(images, **options)]
        return given[1]

    monkeypatch.setattr(session, "invert", noted)
    images, latents = torch_pipeline.reconstruct(session, pictures, steps=2)
    assert given[0] is pictures
    for tensor, array in ((images, given[1].images), (latents, given[1].latents)):
        assert tensor.device == pictures.device
        address = array.ctypes.data if isinstance(array, np.ndarray) else array.address
        assert tensor.data_ptr() == address


def test_results_are_those_of_numpys_arrays(session: Session, pictures: torch.Tensor) -> None:
    images, latents = torch_pipeline.reconstruct(session, pictures, steps=2)
    expected = session.invert(pictures.cpu().numpy(), steps=2)
    assert isinstance(expected, InversionResult)
    np.testing.assert_array_equal(images.cpu().numpy(), expected.images)
    np.testing.assert_array_equal(latents.cpu().numpy(), expected.latents)
    pixels = torch_pipeline.pixels_from_images(images).cpu().numpy()
    np.testing.assert_array_equal(pixels, uint8_from_images(expected.images))


def test_error_is_that_of_the_pooled_image() -> None:
    pictures = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 4, 4, 3)
    images = torch.cat([torch.full((1, 3, 8, 8), -1.0), torch.full((1, 3, 8, 8), 0.5)])
    assert torch_pipeline.measure_errors(images, pictures).tolist() == pytest.approx([0, 0.25])


def test_the_command_writes_and_measures(project_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project_root)
    arguments = ["engines/demo-faces", str(PHOTOS), "-o", str(tmp_path), "--backend", "onnxruntime", "--steps", "3"]
    result = CliRunner().invoke(torch_pipeline.main, arguments)
    assert result.exit_code == 0, result.output
    errors = {
        name: float(error) for name, error in (line.split(": mean error ") for line in result.output.splitlines())
    }
    assert errors.keys() == {"eileen-collins", "grace-hopper"}
    assert max(errors.values()) < 0.12
    for name in errors:
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.size == (64, 64)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_so(toy_bundle: Path, project_root: Path, tmp_path: Path) -> None:
    arguments = [str(toy_bundle), str(project_root / PHOTOS), "-o", str(tmp_path), "--device", "cuda:0"]
    result = CliRunner().invoke(torch_pipeline.main, arguments)
    assert result.exit_code == 1
    assert "device 'cuda:0' cannot run here" in result.output
