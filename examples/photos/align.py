"""Make the two example photos, aligned as the demo model's training portraits are.

python -m examples.photos.align
"""

from collections.abc import Sequence
from pathlib import Path

import matplotlib.cbook
import numpy as np
import skimage.data
from PIL import Image

SIZE = 256
# Landmarks, (x, y) from the top left corner: the pupil on the image's left, the one on its right, the mouth's middle.
# Where the mean of the portraits has them, in an image of 128 px:
PORTRAIT_SIZE = 128
PORTRAIT_LANDMARKS = ((47.4, 46.8), (79.1, 46.9), (63.6, 80.0))
# Read off the two photos:
HOPPER_LANDMARKS = ((221.0, 189.8), (304.7, 185.8), (268.3, 279.0))
COLLINS_LANDMARKS = ((203.2, 101.4), (247.1, 103.2), (225.4, 145.4))
_OVERSAMPLING = 4

Point = tuple[float, float]


def grace_hopper() -> Image.Image:
    """Return matplotlib's sample photo."""
    path = matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
    with Image.open(str(path)) as photo:
        return photo.convert("L")


def eileen_collins() -> Image.Image:
    """Return scikit-image's sample photo."""
    return Image.fromarray(skimage.data.astronaut()).convert("L")


def align(photo: Image.Image, landmarks: Sequence[Point], size: int = SIZE) -> Image.Image:
    """Turn, scale and shift a photo so that its landmarks come nearest to the portraits'; return a square of `size`."""
    fine = size * _OVERSAMPLING
    scale, shift = similarity(PORTRAIT_LANDMARKS, landmarks)
    scale *= PORTRAIT_SIZE / fine
    photo_from_aligned = (scale.real, -scale.imag, shift.real, scale.imag, scale.real, shift.imag)
    aligned = photo.transform((fine, fine), Image.Transform.AFFINE, photo_from_aligned, Image.Resampling.BICUBIC)
    return aligned.resize((size, size), Image.Resampling.BOX)


def similarity(source: Sequence[Point], target: Sequence[Point]) -> tuple[complex, complex]:
    """Return the factor and the shift, as complex numbers, that bring `source` nearest to `target` (least squares)."""
    start, end = (np.array(points) @ (1, 1j) for points in (source, target))
    offsets = start - start.mean()
    factor = np.vdot(offsets, end - end.mean()) / np.vdot(offsets, offsets)
    return complex(factor), complex(end.mean() - factor * start.mean())


def main() -> None:
    """Write the two files next to this one."""
    folder = Path(__file__).parent
    align(grace_hopper(), HOPPER_LANDMARKS).save(folder / "grace-hopper.png", optimize=True)
    align(eileen_collins(), COLLINS_LANDMARKS).save(folder / "eileen-collins.png", optimize=True)


if __name__ == "__main__":
    main()
