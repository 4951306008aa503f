"""Which image files are meant, and what their outputs are called."""

import os
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from restyle_deploy.errors import ImageError
from restyle_deploy.runtime.images import load_image, resize_image

# Upstream's utils/data_utils.py, and two that users have.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".tiff", ".tif", ".webp")


@dataclass(frozen=True, kw_only=True)
class ImageInput:
    """An image file to process.

    Attributes:
        path: where it is read.
        name: file name for outputs that keep the input's name, as upstream's do; unique in the list, whatever the case.
        stem: name without extension, for outputs that get their own; unique likewise.
    """

    path: Path
    name: str
    stem: str


def find_images(paths: Sequence[Path], *, output: Path | None = None) -> list[ImageInput]:
    """Return the image files that are meant, in the order given; those of a folder sorted, with its subfolders.

    Files are taken whatever their extension; in folders those with one of `EXTENSIONS` count, in any case, and hidden
    files and folders are passed over; so is `output` with all below it, so that results are not taken for inputs by the
    next run. A file that is named twice is taken once. Where two names agree, both are
    preceded by the folders that tell them apart: `a/x.jpg`, `b/x.jpg` become `a_x.jpg`, `b_x.jpg`. Where two stems
    agree, the extension joins them: `x.jpg`, `x.png` have the stems `x_jpg`, `x_png`.

    Raises:
        ImageError: names every path that does not exist and every folder without images; or a folder cannot be read.
    """
    problems: list[str] = []
    files: dict[Path, Path] = {}
    for path in paths:
        found = _images_in_folder(path, output) if path.is_dir() else [path]
        if not path.exists():
            problems.append(f"{path}: no such file or folder")
        elif not found:
            problems.append(f"{path}: no images in this folder ({' '.join(EXTENSIONS)})")
        for file in found:
            files.setdefault(file.resolve(), file)
    if problems:
        raise ImageError("; ".join(problems))
    names = _distinct([_names_with_folders(file) for file in files.values()])
    stems = _distinct([(Path(name).stem, name.replace(".", "_")) for name in names])
    return [
        ImageInput(path=path, name=name, stem=stem)
        for path, name, stem in zip(files.values(), names, stems, strict=True)
    ]


def load_images(
    inputs: Sequence[ImageInput], shape: tuple[int, int]
) -> tuple[list[tuple[str, NDArray[np.uint8]]], list[str]]:
    """Return (stem, [H, W, 3] resized to `shape`) of the files that can be read, and the reason of each that cannot."""
    loaded, failures = [], []
    for image_input in inputs:
        try:
            loaded.append((image_input.stem, resize_image(load_image(image_input.path), shape)))
        except ImageError as error:
            failures.append(str(error))
    return loaded, failures


def _images_in_folder(folder: Path, output: Path | None) -> list[Path]:
    found: list[Path] = []
    left_out = output.resolve() if output else None
    for directory, subfolders, names in os.walk(folder, onerror=_refuse):
        subfolders[:] = [
            name for name in subfolders if not name.startswith(".") and Path(directory, name).resolve() != left_out
        ]
        candidates = (Path(directory, name) for name in names if not name.startswith("."))
        found += [path for path in candidates if path.suffix.lower() in EXTENSIONS and path.is_file()]
    return sorted(found, key=os.fspath)


def _refuse(error: OSError) -> None:
    raise ImageError(f"{error.filename}: this folder cannot be read: {error.strerror}") from error


def _names_with_folders(file: Path) -> list[str]:
    """Return the file's name after none, one, two... of its folders: `x.jpg`, `b_x.jpg`, `a_b_x.jpg`."""
    absolute = Path(os.path.abspath(file))
    parts = absolute.relative_to(absolute.anchor).parts
    return ["_".join(parts[-count:]) for count in range(1, len(parts) + 1)]


def _distinct(candidates: Sequence[Sequence[str]]) -> list[str]:
    """Return for each item its first candidate that no other item has.

    Items whose candidates agree to the last one (upper and lower case do not count) are numbered.
    """
    levels = [0] * len(candidates)
    while True:
        labels = [names[level] for names, level in zip(candidates, levels, strict=True)]
        groups: dict[str, list[int]] = {}
        for i, label in enumerate(labels):
            groups.setdefault(_caseless(label), []).append(i)
        separable = [group for group in groups.values() if len({_caseless(candidates[i][-1]) for i in group}) > 1]
        if not separable:
            return _numbered(labels)
        for i in (i for group in separable for i in group):
            levels[i] = min(levels[i] + 1, len(candidates[i]) - 1)


def _numbered(labels: Sequence[str]) -> list[str]:
    taken = set(map(_caseless, labels))
    seen: set[str] = set()
    result: list[str] = []
    for label in labels:
        name, number = label, 1
        while _caseless(name) in seen or (number > 1 and _caseless(name) in taken):
            number += 1
            name = f"{Path(label).stem}_{number}{Path(label).suffix}"
        seen.add(_caseless(name))
        result.append(name)
    return result


def _caseless(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()
