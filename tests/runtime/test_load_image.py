"""Image files are read: the odd kinds come right, the bad ones are named."""

import io
import re
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from restyle_deploy.errors import ImageError
from restyle_deploy.runtime.images import FORMATS, load_image

# Four flat quarters, no two alike: any turn or flip shows, and JPEG keeps them.
QUARTERS = np.array([[[250, 20, 20], [20, 240, 20]], [[20, 20, 230], [200, 200, 40]]], np.uint8)


LOSSLESS_AS_FAR_AS_IT_GOES: dict[str, dict[str, object]] = {
    "JPEG": {"quality": 100, "subsampling": 0},
    "WEBP": {"lossless": True},
}


def quarters(height: int = 32, width: int = 64) -> NDArray[np.uint8]:
    return np.repeat(np.repeat(QUARTERS, height // 2, axis=0), width // 2, axis=1)


def grey_quarters() -> NDArray[np.uint8]:
    return np.ascontiguousarray(quarters()[..., 1])


def encoded(image: Image.Image, name: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, name, **options)
    return buffer.getvalue()


def file_with(folder: Path, content: bytes, name: str = "image") -> Path:
    (folder / name).write_bytes(content)
    return folder / name


def assert_shows_quarters(image: NDArray[np.uint8], tolerance: int = 0) -> None:
    assert image.dtype == np.uint8
    assert image.flags.writeable
    np.testing.assert_allclose(image.astype(int), quarters().astype(int), atol=tolerance)


@pytest.mark.parametrize("name", ["PNG", "BMP", "PPM", "TIFF", "GIF"])
def test_lossless_formats_under_any_name(tmp_path: Path, name: str) -> None:
    assert_shows_quarters(load_image(file_with(tmp_path, encoded(Image.fromarray(quarters()), name), "image.dat")))


@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg(tmp_path: Path, progressive: bool) -> None:
    content = encoded(Image.fromarray(quarters()), "JPEG", quality=100, subsampling=0, progressive=progressive)
    assert_shows_quarters(load_image(file_with(tmp_path, content)), tolerance=4)


def test_webp(tmp_path: Path) -> None:
    content = encoded(Image.fromarray(quarters()), "WEBP", lossless=True)
    assert_shows_quarters(load_image(file_with(tmp_path, content)))


@pytest.mark.parametrize("name", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, name: str, orientation: int) -> None:
    stored_from_upright: dict[int, Callable[[NDArray[np.uint8]], NDArray[np.uint8]]] = {
        1: lambda image: image,
        2: lambda image: image[:, ::-1],
        3: lambda image: image[::-1, ::-1],
        4: lambda image: image[::-1],
        5: lambda image: image.transpose(1, 0, 2),
        6: lambda image: np.rot90(image, 1),
        7: lambda image: image[::-1, ::-1].transpose(1, 0, 2),
        8: lambda image: np.rot90(image, -1),
    }
    stored = Image.fromarray(np.ascontiguousarray(stored_from_upright[orientation](quarters())))
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(stored, name, exif=exif, **LOSSLESS_AS_FAR_AS_IT_GOES.get(name, {}))
    assert_shows_quarters(load_image(file_with(tmp_path, content)), tolerance=4)


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage!", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0"])
def test_damaged_exif_does_not_hide_the_image(tmp_path: Path, exif: bytes) -> None:
    content = encoded(Image.fromarray(quarters()), "JPEG", quality=100, subsampling=0, exif=exif)
    assert_shows_quarters(load_image(file_with(tmp_path, content)), tolerance=4)


@pytest.mark.parametrize("name", ["PNG", "JPEG", "TIFF"])
def test_grey_is_repeated(tmp_path: Path, name: str) -> None:
    image = load_image(file_with(tmp_path, encoded(Image.fromarray(np.full((4, 6), 77, np.uint8)), name)))
    np.testing.assert_array_equal(image, np.full((4, 6, 3), 77))


def test_one_bit(tmp_path: Path) -> None:
    content = encoded(Image.fromarray(np.array([[0, 255], [255, 0]], np.uint8)).convert("1"), "PNG")
    np.testing.assert_array_equal(load_image(file_with(tmp_path, content))[..., 1], [[0, 255], [255, 0]])


@pytest.mark.parametrize("transparency", [None, 0, bytes([0, 128, 255, 7])])
def test_palette_gives_its_colours(tmp_path: Path, transparency: object) -> None:
    palette = Image.fromarray(quarters()).quantize(4)
    options = {} if transparency is None else {"transparency": transparency}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_shows_quarters(load_image(file_with(tmp_path, encoded(palette, "PNG", **options))))


def test_alpha_is_dropped_not_blended(tmp_path: Path) -> None:
    alpha = np.random.default_rng(0).integers(0, 255, (32, 64, 1), dtype=np.uint8)
    content = encoded(Image.fromarray(np.concatenate([quarters(), alpha], axis=2)), "PNG")
    assert_shows_quarters(load_image(file_with(tmp_path, content)))
    content = encoded(Image.fromarray(np.concatenate([grey_quarters()[..., None], alpha], axis=2)), "PNG")
    np.testing.assert_array_equal(load_image(file_with(tmp_path, content))[..., 2], grey_quarters())


@pytest.mark.parametrize("name", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_grey_is_scaled(tmp_path: Path, name: str) -> None:
    content = encoded(Image.fromarray(grey_quarters().astype(np.uint16) * 257), name)
    image = load_image(file_with(tmp_path, content))
    np.testing.assert_array_equal(image, np.repeat(grey_quarters()[..., None], 3, axis=2))


def test_sixteen_bit_grey_big_endian_and_turned(tmp_path: Path) -> None:
    values = np.array([[0, 65535, 257 * 128]], np.uint16)
    big_endian = Image.frombytes("I;16B", (3, 1), values.astype(">u2").tobytes())
    np.testing.assert_array_equal(load_image(file_with(tmp_path, encoded(big_endian, "TIFF")))[..., 0], [[0, 255, 128]])
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = load_image(file_with(tmp_path, encoded(Image.fromarray(values), "PNG", exif=exif)))
    np.testing.assert_array_equal(turned[..., 0], [[0], [255], [128]])


def test_sixteen_bit_colour_is_scaled(tmp_path: Path) -> None:
    samples = (quarters().astype(np.uint16) * 257).astype(">u2").tobytes()
    assert_shows_quarters(load_image(file_with(tmp_path, b"P6 64 32 65535\n" + samples)))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 65535, 257]], np.int32), [[0, 255, 1]]),
        (np.array([[-100, 155, 0]], np.int32), [[0, 255, 100]]),
        (np.array([[0, 2_550_000, 1_000_000]], np.int32), [[0, 255, 100]]),
        (np.array([[0, 1, 0.4]], np.float32), [[0, 255, 102]]),
        (np.array([[0, 255, 3]], np.float32), [[0, 255, 3]]),
        (np.array([[0, 65535, 514]], np.float32), [[0, 255, 2]]),
        (np.array([[-1, 1, 0.6]], np.float32), [[0, 255, 204]]),
        (np.array([[-5, -5, -5]], np.float32), [[0, 0, 0]]),
    ],
)
def test_thirty_two_bit_and_float_grey_are_scaled(
    tmp_path: Path, values: NDArray[np.generic], expected: list[list[int]]
) -> None:
    image = load_image(file_with(tmp_path, encoded(Image.fromarray(values), "TIFF")))
    np.testing.assert_array_equal(image, np.repeat(np.array(expected)[..., None], 3, axis=2))


def test_cmyk_jpeg_is_not_inverted(tmp_path: Path) -> None:
    content = encoded(Image.fromarray(quarters()).convert("CMYK"), "JPEG", quality=95)
    assert b"Adobe" in content
    assert_shows_quarters(load_image(file_with(tmp_path, content)), tolerance=8)


def test_cmyk_tiff(tmp_path: Path) -> None:
    content = encoded(Image.fromarray(quarters()).convert("CMYK"), "TIFF")
    assert_shows_quarters(load_image(file_with(tmp_path, content)))


def test_pixels_are_counted_before_decoding(tmp_path: Path) -> None:
    path = file_with(tmp_path, encoded(Image.fromarray(quarters()), "PNG"))
    assert load_image(path, max_pixels=32 * 64).shape == (32, 64, 3)
    with pytest.raises(ImageError, match="image: 64 x 32 pixels, at most 2047"):
        load_image(path, max_pixels=32 * 64 - 1)


@pytest.mark.parametrize(("side", "message"), [(20_000, "too large"), (10_000, "at most 99999999")])
def test_decompression_bomb_is_refused_without_a_warning(tmp_path: Path, side: int, message: str) -> None:
    path = file_with(tmp_path, b"P6 %d %d 255\n" % (side, side), "bomb.ppm")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError, match=rf"bomb\.ppm: .*{message}"):
            load_image(path, max_pixels=99_999_999)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty file"),
        (b"hello", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        (b"P6 x 4 255\n", "cannot be decoded"),
        (b"P6 0 0 255\n", "cannot be decoded|not an image"),
    ],
)
def test_files_that_are_no_images_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(ImageError, match=rf"bad\.png: ({message})"):
        load_image(file_with(tmp_path, content, "bad.png"))


def test_missing_file_and_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"gone\.png: No such file"):
        load_image(tmp_path / "gone.png")
    with pytest.raises(ImageError, match="[Dd]irectory|Permission"):
        load_image(tmp_path)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_truncated_files_are_named(tmp_path: Path, name: str, share: float) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    content = encoded(noise, name)
    path = file_with(tmp_path, content[: int(len(content) * share)], "cut")
    with pytest.raises(ImageError, match=r"cut: [^\n]+$"):
        load_image(path)


def test_non_finite_pixels_are_refused(tmp_path: Path) -> None:
    content = encoded(Image.fromarray(np.array([[0, np.nan]], np.float32)), "TIFF")
    with pytest.raises(ImageError, match="NaN or infinity"):
        load_image(file_with(tmp_path, content))


@given(data=st.data(), name=st.sampled_from(FORMATS))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=300)
def test_damaged_files_load_or_are_named(tmp_path: Path, data: st.DataObject, name: str) -> None:
    content = bytearray(encoded(Image.fromarray(quarters(8, 8)), name))
    for position in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=8)):
        content[position] = data.draw(st.integers(0, 255))
    path = file_with(tmp_path, bytes(content))
    message = ""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            assert load_image(path, max_pixels=1_000_000).shape[2:] == (3,)
        except ImageError as error:
            message = str(error)
    assert re.fullmatch(r"(.*image: [^\n]+)?", message)


def test_threads_may_load_at_once(tmp_path: Path) -> None:
    path = file_with(tmp_path, encoded(Image.fromarray(quarters()), "PNG"))
    filters = list(warnings.filters)
    results: list[NDArray[np.uint8]] = []
    threads = [threading.Thread(target=lambda: results.extend(load_image(path) for _ in range(20))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 80
    assert all(np.array_equal(result, quarters()) for result in results)
    assert list(warnings.filters) == filters
