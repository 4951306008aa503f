"""The example photos are what their script makes, and lie where the portraits do."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from examples.photos import align
from restyle_deploy.runtime.images import load_image

PHOTOS = {
    "grace-hopper.png": (align.grace_hopper, align.HOPPER_LANDMARKS),
    "eileen-collins.png": (align.eileen_collins, align.COLLINS_LANDMARKS),
}


@pytest.mark.parametrize(("name", "photo", "landmarks"), [(name, *rest) for name, rest in PHOTOS.items()])
def test_photo_is_what_the_script_makes(
    name: str, photo: Callable[[], Image.Image], landmarks: Sequence[align.Point]
) -> None:
    shipped = load_image(Path(align.__file__).with_name(name))
    made = np.asarray(align.align(photo(), landmarks))
    assert shipped.shape == (align.SIZE, align.SIZE, 3)
    np.testing.assert_allclose(shipped[..., 0].astype(int), made.astype(int), atol=2)


@pytest.mark.parametrize("landmarks", [align.HOPPER_LANDMARKS, align.COLLINS_LANDMARKS])
def test_landmarks_lie_within_a_pixel_of_the_portraits(landmarks: Sequence[align.Point]) -> None:
    factor, shift = align.similarity(landmarks, align.PORTRAIT_LANDMARKS)
    distances = [
        abs(complex(*point) * factor + shift - complex(*expected))
        for point, expected in zip(landmarks, align.PORTRAIT_LANDMARKS, strict=True)
    ]
    assert max(distances) < 1


def test_similarity_finds_turn_scale_and_shift() -> None:
    corners = ((0.0, 0.0), (4.0, 0.0), (0.0, 3.0))
    turned = [(10 - 2 * y, 20 + 2 * x) for x, y in corners]
    factor, shift = align.similarity(corners, turned)
    assert factor == pytest.approx(2j)
    assert shift == pytest.approx(10 + 20j)


def test_aligning_moves_the_landmarks_to_their_places() -> None:
    photo = Image.new("L", (400, 300))
    landmarks = ((180.0, 120.0), (240.0, 130.0), (200.0, 190.0))
    factor, shift = align.similarity(align.PORTRAIT_LANDMARKS, landmarks)
    spot = complex(60, 60) * factor + shift
    photo.paste(255, (round(spot.real) - 2, round(spot.imag) - 2, round(spot.real) + 2, round(spot.imag) + 2))
    rows, columns = np.nonzero(np.asarray(align.align(photo, landmarks)) > 128)
    assert (columns.mean() + 0.5, rows.mean() + 0.5) == pytest.approx((120, 120), abs=1)
