"""Pixels are prepared and saved as the official code does."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from restyle_deploy.errors import ImageError
from restyle_deploy.runtime.images import (
    load_image,
    normalize_images,
    resize_image,
    save_image,
    uint8_from_images,
)


def quarters() -> NDArray[np.uint8]:
    colours = np.array([[[250, 20, 20], [20, 240, 20]], [[20, 20, 230], [200, 200, 40]]], np.uint8)
    return np.repeat(np.repeat(colours, 16, axis=0), 32, axis=1)


def test_resize_is_pillows_antialiased_bilinear() -> None:
    image = np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)
    expected = Image.fromarray(image).resize((16, 12), Image.Resampling.BILINEAR)
    resized = resize_image(image, (12, 16))
    np.testing.assert_array_equal(resized, np.asarray(expected))
    assert resized.flags.writeable


def test_image_that_fits_is_not_copied() -> None:
    image = quarters()
    assert resize_image(image, (32, 64)) is image


def test_normalized_values_are_torchvisions_to_the_bit() -> None:
    torch = pytest.importorskip("torch")
    images = np.arange(256, dtype=np.uint8).reshape(2, 8, 16, 1).repeat(3, axis=3)
    tensor = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().to(torch.float32).div(255)
    mean = torch.full((3, 1, 1), 0.5)
    expected = tensor.sub_(mean).div_(mean).numpy()
    normalized = normalize_images(images)
    assert normalized.dtype == np.float32
    assert normalized.flags.c_contiguous
    np.testing.assert_array_equal(normalized.view(np.uint32), expected.view(np.uint32))


def test_normalized_values_are_torchvisions_in_numpy() -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 5, 7, 3), dtype=np.uint8)
    half = np.float32(0.5)
    expected = np.stack(
        [(image.transpose(2, 0, 1).astype(np.float32) / np.float32(255) - half) / half for image in images]
    )
    np.testing.assert_array_equal(normalize_images(images), expected)
    assert normalize_images(images).min() >= -1


def test_output_values_are_clipped_and_truncated() -> None:
    values = np.array([-2, -1, 0, 0.999, 1, 3, 0.2], np.float32)
    images = np.broadcast_to(values, (2, 3, 1, 7))
    pixels = uint8_from_images(images)
    assert pixels.shape == (2, 1, 7, 3)
    assert pixels.flags.c_contiguous
    np.testing.assert_array_equal(pixels[1, 0, :, 2], [0, 0, 127, 254, 255, 255, 153])


def test_any_leading_axes_are_kept() -> None:
    assert uint8_from_images(np.zeros((3, 4, 5), np.float32)).shape == (4, 5, 3)
    assert uint8_from_images(np.zeros((2, 6, 3, 4, 5), np.float32)).shape == (2, 6, 4, 5, 3)


def test_pixels_survive_normalizing_within_one() -> None:
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    difference = images.astype(int) - uint8_from_images(normalize_images(images))
    assert set(np.unique(difference)) <= {0, 1}


def test_saved_image_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "image.PNG"
    save_image(path, quarters())
    np.testing.assert_array_equal(load_image(path), quarters())
    assert [file.name for file in path.parent.iterdir()] == ["image.PNG"]


def test_format_follows_the_extension(tmp_path: Path) -> None:
    for name, expected in {"a.jpg": "JPEG", "a.png": "PNG", "a.tif": "TIFF", "a.bmp": "BMP"}.items():
        save_image(tmp_path / name, quarters())
        with Image.open(tmp_path / name) as image:
            assert image.format == expected


@pytest.mark.parametrize("name", ["image", "image.npy", "image.txt"])
def test_extension_that_cannot_be_written_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(ImageError, match="cannot write images with the extension"):
        save_image(tmp_path / name, quarters())
    assert list(tmp_path.iterdir()) == []


def test_target_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "image.png").mkdir()
    for path in (tmp_path / "file" / "image.png", tmp_path / "image.png"):
        with pytest.raises(OSError, match=r"file|image\.png"):
            save_image(path, quarters())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "image.png"]
