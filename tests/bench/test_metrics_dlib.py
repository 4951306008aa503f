"""dlib's descriptor: how its parts are called, by a stand-in; and, where the extra is installed, on real faces."""

import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from numpy.typing import NDArray

from restyle_deploy.bench.metrics.base import MetricOptions
from restyle_deploy.bench.metrics.dlib_descriptor import open_dlib
from restyle_deploy.errors import MetricError
from restyle_deploy.runtime.images import load_image, normalize_images, resize_image

PHOTOS = Path(__file__).parents[2] / "examples" / "photos"
Pixels = NDArray[np.uint8]


class Rectangle:
    def __init__(self, first: int, last: int) -> None:
        self.rows = slice(first, last)
        self.height = last - first

    def area(self) -> int:
        return self.height


class StandIn(ModuleType):
    """Takes for faces the two bands of rows that differ from black; a descriptor is a band's mean colour, in levels."""

    def __init__(self) -> None:
        super().__init__("dlib")
        self.models: list[str] = []

    def get_frontal_face_detector(self) -> object:
        def find_faces(pixels: Pixels, enlargements: int) -> list[Rectangle]:
            assert enlargements == 0
            assert pixels.dtype == np.uint8
            assert pixels.shape[0] >= 256
            bands = [Rectangle(0, 64), Rectangle(128, 256)]
            return [band for band in bands if pixels[band.rows].any()]

        return find_faces

    def shape_predictor(self, model: str) -> object:
        self.models.append(model)
        return lambda pixels, face: face

    def face_recognition_model_v1(self, model: str) -> "StandIn":
        self.models.append(model)
        return self

    def compute_face_descriptor(self, pixels: Pixels, face: Rectangle) -> list[float]:
        means: list[float] = pixels[face.rows].mean(axis=(0, 1)).tolist()
        return means


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of models whose files are empty and which cannot be imported, as the real one without pkg_resources."""
    folder = tmp_path / "face_recognition_models" / "models"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise ImportError")
    for name in ("shape_predictor_5_face_landmarks.dat", "dlib_face_recognition_resnet_model_v1.dat"):
        (folder / name).touch()
    monkeypatch.syspath_prepend(tmp_path)
    return folder


@pytest.fixture
def dlib(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn()
    stand_in.__spec__ = find_spec("json")  # any: that it is there
    monkeypatch.setitem(sys.modules, "dlib", stand_in)
    return stand_in


def images_of(*levels: int) -> NDArray[np.float32]:
    """Return images of 64 x 64 whose lower half has a grey level each, and whose upper half is black."""
    pixels = np.zeros((len(levels), 64, 64, 3), np.uint8)
    for image, level in zip(pixels, levels, strict=True):
        image[32:] = level
    return normalize_images(pixels) + np.float32(1e-3)  # pictures are truncated


def test_value_is_the_distance_of_the_largest_faces_descriptors(models: Path, dlib: StandIn) -> None:
    gauge = open_dlib(MetricOptions(), (64, 64))
    assert [Path(model).parent for model in dlib.models] == [models, models]
    values = gauge.measure(images_of(100, 100), images_of(104, 100))
    assert values == pytest.approx([4 * np.sqrt(3), 0], rel=0.05)


def test_a_target_without_a_face_has_no_value_and_an_image_without_one_has(models: Path, dlib: StandIn) -> None:
    values = open_dlib(MetricOptions(), (64, 64)).measure(images_of(100, 0), images_of(0, 100))
    assert np.isnan(values[0])
    assert values[1] > 100


def test_missing_packages_are_told_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dlib", None)
    monkeypatch.setitem(sys.modules, "face_recognition_models", None)
    with pytest.raises(
        MetricError, match=r"dlib and face_recognition_models are not .*pip install 'restyle-deploy\[dlib\]'"
    ):
        open_dlib(MetricOptions(), (64, 64))


def test_a_damaged_model_is_told(models: Path, dlib: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(model: str) -> object:
        raise RuntimeError("Error deserializing object of type int\nwhile reading")

    monkeypatch.setattr(dlib, "shape_predictor", refuse)
    with pytest.raises(
        MetricError, match=r"landmarks.dat: dlib cannot read it: Error .* of type int; run: pip install"
    ):
        open_dlib(MetricOptions(), (64, 64))


def test_a_missing_model_is_told(models: Path, dlib: StandIn) -> None:
    (models / "shape_predictor_5_face_landmarks.dat").unlink()
    with pytest.raises(MetricError, match="lacks shape_predictor_5_face_landmarks.dat; run: pip install"):
        open_dlib(MetricOptions(), (64, 64))


@pytest.mark.parametrize("side", [64, 256])
def test_two_people_are_told_apart_and_one_is_not(side: int) -> None:
    try:
        gauge = open_dlib(MetricOptions(), (side, side))
    except MetricError as error:
        if "not installed" not in str(error):
            raise
        pytest.skip(str(error))
    photos = [load_image(PHOTOS / name) for name in ("eileen-collins.png", "grace-hopper.png")]
    people = normalize_images(np.stack([resize_image(photo, (side, side)) for photo in photos]))
    assert (gauge.measure(people * np.float32(0.8), people) < 0.3).all()
    assert (gauge.measure(people[::-1], people) > 0.55).all()
