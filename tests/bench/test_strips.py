from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from restyle_deploy.bench.strips import draw_strip, draw_strips, read_step_images, write_step_images
from restyle_deploy.errors import ReportError


def pixels_of(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def plain_image(colour: tuple[int, int, int], shape: tuple[int, int] = (16, 16)) -> NDArray[np.uint8]:
    return np.full((*shape, 3), colour, np.uint8)


def test_images_are_read_as_they_were_written(tmp_path: Path) -> None:
    red, green = plain_image((200, 0, 0)), plain_image((0, 200, 0), (32, 32))
    for name in ("b", "a"):
        write_step_images(tmp_path, "some-b1", name, red, {10: red, 2: green})
    first, second = read_step_images(tmp_path, "some-b1")
    assert (first.name, second.name) == ("a", "b")
    assert list(first.steps) == [2, 10]
    np.testing.assert_array_equal(first.target, red)
    np.testing.assert_array_equal(first.steps[2], green)


def test_without_images_there_is_nothing_to_read(tmp_path: Path) -> None:
    assert list(read_step_images(tmp_path, "some-b1")) == []


def test_damaged_image_is_named(tmp_path: Path) -> None:
    write_step_images(tmp_path, "some-b1", "a", plain_image((1, 2, 3)), {})
    path = tmp_path / "images" / "some-b1" / "a" / "target.png"
    path.write_bytes(b"no image")
    with pytest.raises(ReportError, match=r"target\.png: cannot be read as an image"):
        list(read_step_images(tmp_path, "some-b1"))


def test_a_strip_is_drawn_for_each_image(tmp_path: Path) -> None:
    grey = plain_image((90, 90, 90))
    for name in ("a", "b"):
        write_step_images(tmp_path, "some-b1", name, grey, {1: grey, 2: grey})
    drawn = draw_strips(tmp_path, "some-b1")
    assert drawn == [tmp_path / "strips" / "a.png", tmp_path / "strips" / "b.png"]
    assert (pixels_of(drawn[0]) == 90).all(axis=2).sum() == 3 * 192 * 192


def test_strip_shows_each_pixel_enlarged(tmp_path: Path) -> None:
    red, green = plain_image((200, 0, 0)), plain_image((0, 200, 0))
    red[0, 0] = 255
    draw_strip(red, [("step 1", green), ("step 2", red)], tmp_path / "strip.png")
    strip = pixels_of(tmp_path / "strip.png")
    assert [(strip == colour).all(axis=2).sum() for colour in ((200, 0, 0), (0, 200, 0))] == [2 * 255 * 144, 256 * 144]


def test_strip_has_captions(tmp_path: Path) -> None:
    white = plain_image((255, 255, 255))
    draw_strip(white, [("step 1", white)], tmp_path / "strip.png")
    strip = pixels_of(tmp_path / "strip.png")
    dark = strip.max(axis=2) < 128
    assert dark[:26, :200].any()
    assert dark[:26, 200:].any()
    assert not dark[26:].any()


@pytest.mark.parametrize("shape", [(192, 256), (1024, 1024), (50, 70)])
def test_images_of_another_size_take_the_cell_of_the_target(tmp_path: Path, shape: tuple[int, int]) -> None:
    red = plain_image((200, 0, 0), shape)
    draw_strip(plain_image((0, 0, 0), (192, 256)), [("step 1", red)], tmp_path / "strip.png")
    assert (pixels_of(tmp_path / "strip.png") == (200, 0, 0)).all(axis=2).sum() == 192 * 256
