"""The kernels around the loop, compiled as C++ and run thread by thread on the host, against Pillow and NumPy."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import PIL
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from restyle_deploy.ops.compiler import read_source
from restyle_deploy.ops.kernels import image_launches
from restyle_deploy.ops.kernels.image_launches import (
    IMAGE_INSTANTIATIONS,
    IMAGES,
    launch_pixels_from_images,
    launch_prepare_images,
)
from restyle_deploy.runtime.images import normalize_images, resize_image, uint8_from_images
from tests.ops.host_cuda.host_kernels import COMPILERS, HostLibrary, build_library, find_compiler
from tests.ops.resizing import resize_as_pillow_12

PILLOW = int(PIL.__version__.partition(".")[0])
LEVEL = 2 / 255
SIZES = st.integers(1, 70)


@pytest.fixture(scope="module")
def library() -> HostLibrary:
    if find_compiler() is None:
        pytest.skip(f"no C++ compiler: none of {', '.join(COMPILERS)} is on the PATH")
    return HostLibrary(path=build_library(f"{IMAGES}.cu", IMAGE_INSTANTIATIONS[IMAGES]))


def prepare(
    library: HostLibrary,
    images: NDArray[np.uint8],
    size: tuple[int, int],
    *,
    schedule: int = 0,
    pillow: int = PILLOW,
) -> NDArray[Any]:
    target = torch.full((len(images), 3, *size), float("nan"))
    launch = launch_prepare_images(images.shape, tuple(target.shape), pillow=pillow)
    library.run(launch, [torch.from_numpy(images)], target, schedule=schedule)
    return target.numpy()


def noise(*shape: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@settings(max_examples=60)
@given(SIZES, SIZES, SIZES, SIZES, st.integers(0, 3))
def test_prepared_images_are_those_of_pillow_12_to_the_bit(
    library: HostLibrary, height: int, width: int, out_height: int, out_width: int, schedule: int
) -> None:
    """So are upstream's, of which all fixtures are: there the filter goes along rows first, whatever the sizes."""
    images = noise(2, height, width, 3)
    expected = normalize_images(np.stack([resize_as_pillow_12(image, (out_height, out_width)) for image in images]))
    got = prepare(library, images, (out_height, out_width), schedule=schedule, pillow=12)
    np.testing.assert_array_equal(got, expected)


@settings(max_examples=100)
@given(SIZES, SIZES, SIZES, SIZES)
def test_prepared_images_are_those_of_the_host_to_the_bit(
    library: HostLibrary, height: int, width: int, out_height: int, out_width: int
) -> None:
    images = noise(1, height, width, 3)
    expected = normalize_images(resize_image(images[0], (out_height, out_width))[None])
    np.testing.assert_array_equal(prepare(library, images, (out_height, out_width)), expected)
    other = prepare(library, images, (out_height, out_width), pillow=12 if PILLOW > 12 else 13)
    assert np.abs(other - expected).max() <= LEVEL * 1.001  # the versions are so near each other


@pytest.mark.parametrize(
    "source",
    [(256, 256), (512, 512), (97, 301), (301, 97), (5, 40_000), (40_000, 5)],
    ids=lambda size: f"{size[0]}x{size[1]}",
)
def test_sizes_of_photographs_and_beyond(library: HostLibrary, source: tuple[int, int]) -> None:
    """Reductions of more taps than are stored are among them: 40000 to 256 takes 313."""
    images = noise(1, *source, 3)
    size = tuple(min(256, side) for side in source)
    got = prepare(library, images, (size[0], size[1]))
    np.testing.assert_array_equal(got, normalize_images(resize_image(images[0], (size[0], size[1]))[None]))


@pytest.mark.parametrize("shape", [(2, 3, 16, 16), (3, 5, 3, 8, 4), (1, 3, 5, 7), (2, 3, 1, 1), (3, 70, 64)])
def test_pixels_are_those_of_the_host(library: HostLibrary, shape: tuple[int, ...]) -> None:
    images = np.random.default_rng(0).uniform(-1.5, 1.5, shape).astype(np.float32)
    images.reshape(-1)[:3] = [-1, 1, np.nextafter(np.float32(1), np.float32(0))]
    expected = uint8_from_images(images)
    pixels = torch.zeros(expected.shape, dtype=torch.uint8)
    library.run(launch_pixels_from_images(shape), [torch.from_numpy(images)], pixels)
    np.testing.assert_array_equal(pixels.numpy(), expected)


def test_pixels_at_an_address_that_vectors_do_not_take(library: HostLibrary) -> None:
    images = torch.linspace(-1, 1, 3 * 64 + 1)[1:].reshape(1, 3, 8, 8)
    pixels = torch.zeros(1 + 3 * 64, dtype=torch.uint8)[1:].reshape(1, 8, 8, 3)
    library.run(launch_pixels_from_images((1, 3, 8, 8)), [images], pixels)
    np.testing.assert_array_equal(pixels.numpy(), uint8_from_images(images.numpy()))


def test_a_pixel_that_is_not_a_number_is_black(library: HostLibrary) -> None:
    pixels = torch.full((1, 1, 4, 3), 7, dtype=torch.uint8)
    library.run(launch_pixels_from_images((1, 3, 1, 4)), [torch.full((1, 3, 1, 4), float("nan"))], pixels)
    assert pixels.sum() == 0


def test_the_constants_are_those_of_the_source() -> None:
    found = dict(re.findall(r"^constexpr int (\w+) = (\d+);", read_source(IMAGES), re.MULTILINE))
    for name in ("PREPARE_COLUMNS", "PREPARE_ROWS", "PIXELS_THREADS", "PIXELS_VECTOR", "CHANNELS"):
        assert int(found[name]) == getattr(image_launches, name), name


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ((1, 8, 8, 4), (1, 3, 8, 8), r"expected \[N, H, W, 3\] and \[N, 3, h, w\]"),
        ((1, 8, 8, 3), (2, 3, 8, 8), r"expected \[N, H, W, 3\] and \[N, 3, h, w\]"),
        ((8, 8, 3), (1, 3, 8, 8), "expected four axes, each at least 1"),
        ((1, 0, 8, 3), (1, 3, 8, 8), "expected four axes, each at least 1"),
        ((1, 40_000, 40_000, 3), (1, 3, 8, 8), r"fewer than 2\^31 values of one image"),
        ((70_000, 1, 1, 3), (70_000, 3, 1, 1), r"a GPU takes .* 65535"),
    ],
)
def test_shapes_that_cannot_be_prepared(source: tuple[int, ...], target: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        launch_prepare_images(source, target, pillow=PILLOW)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 4, 8, 8), r"expected \[\.\.\., 3, H, W\]"),
        ((8, 8), "expected at least three axes, each at least 1"),
        ((0, 3, 8, 8), "expected at least three axes, each at least 1"),
    ],
)
def test_shapes_that_are_no_images(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        launch_pixels_from_images(shape)
