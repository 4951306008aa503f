"""Invert image files into a folder, batch by batch; a file that fails is reported and the others go on."""

import errno
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from restyle_deploy.errors import ImageError, VerificationError
from restyle_deploy.files import replace_when_complete
from restyle_deploy.runtime.images import (
    check_extension,
    load_image,
    pool_images,
    resize_image,
    save_image,
    uint8_from_images,
)
from restyle_deploy.runtime.inputs import EXTENSIONS, ImageInput
from restyle_deploy.runtime.session import InversionResult, Session

LATENTS_NAME = "latents.npz"
OFFICIAL_LATENTS_NAME = "latents.npy"
OFFICIAL_FOLDER = "inference_results"


@dataclass(frozen=True, kw_only=True)
class FolderOptions:
    """How files are inverted and written.

    Attributes:
        steps: refinement steps.
        every_step: also write `step-<k>/<stem>.png` for each step k from 1, and keep each step's latents.
        official_layout: write as upstream does instead: `inference_results/<k>/<name>` for each step k from 0, and
            `latents.npy`, a pickled dict of name to a list of each step's [n_styles, style_dim].
        resized: write images of the encoder's input size, pooled before they become 8-bit, as upstream's
            `--resize_outputs` does.
        batch_size: images of one run.
    """

    steps: int = 5
    every_step: bool = False
    official_layout: bool = False
    resized: bool = False
    batch_size: int = 1

    @property
    def keeps_every_step(self) -> bool:
        """Whether the results of all steps are written, and so kept in memory."""
        return self.every_step or self.official_layout


@dataclass(frozen=True, kw_only=True)
class FolderResult:
    """What was written.

    Attributes:
        names: names of the inputs done, as the latents have them.
        images: image files.
        latents: file with all latents; None when no input was done.
        failures: (path, reason) of the inputs that failed.
    """

    names: tuple[str, ...]
    images: tuple[Path, ...]
    failures: tuple[tuple[Path, str], ...]
    latents: Path | None


def invert_files(
    session: Session,
    inputs: Sequence[ImageInput],
    output: Path,
    options: FolderOptions,
    *,
    progress: Callable[[int], None] = lambda count: None,
    report_failure: Callable[[Path, str], None] = lambda path, reason: None,
) -> FolderResult:
    """Invert image files and write an image each, and the latents of all.

    `latents.npz` holds `names` [N] (str) and `latents` [N, n_styles, style_dim] float32, or with every_step
    [N, steps, n_styles, style_dim], in the order of the inputs that succeeded.

    Args:
        session: an open session.
        inputs: from `inputs.find_images`.
        output: the folder; created when missing.
        options: see there.
        progress: called with the number of inputs that a batch has finished.
        report_failure: called with path and reason as soon as an input fails.
    Raises:
        ImageError: an output would overwrite an input.
        ValueError: every step is to be written, and the session renders the last one only.
        OSError: an output cannot be written.
    """
    _check_targets(inputs, output, options)
    images: list[Path] = []
    latents: dict[str, NDArray[np.float32]] = {}
    failures: list[tuple[Path, str]] = []

    def fail(path: Path, reason: str) -> None:
        failures.append((path, reason))
        report_failure(path, reason)

    try:
        for first in range(0, len(inputs), options.batch_size):
            batch = inputs[first : first + options.batch_size]
            loaded = list(_load_targets(batch, session, options, fail))
            for image_input, result in _invert_batch(session, loaded, options, fail):
                try:
                    images += _write_images(image_input, result.images, output, session, options)
                except ImageError as error:
                    fail(image_input.path, f"{image_input.path}: {error}")
                    continue
                latents[_latent_name(image_input, options)] = result.latents
            progress(len(batch))
    finally:  # an interrupted run keeps the latents of the images that it wrote
        path = _write_latents(latents, output, options) if latents else None
    return FolderResult(names=tuple(latents), images=tuple(images), failures=tuple(failures), latents=path)


def find_skipped(paths: Sequence[Path], inputs: Sequence[ImageInput], *, output: Path) -> list[Path]:
    """Return the files of folders that `inputs.find_images` passes over because of their extensions.

    Args:
        paths: those that `find_images` was given, as is `output`.
        inputs: what it returned; a file that was named itself is none that is passed over.
    """
    taken = {image_input.path.resolve() for image_input in inputs}
    skipped: dict[Path, Path] = {}
    for folder in filter(Path.is_dir, paths):
        for directory, subfolders, names in os.walk(folder):
            subfolders[:] = [name for name in subfolders if not _is_left_out(Path(directory, name), output)]
            for file in (Path(directory, name) for name in names if not name.startswith(".")):
                if file.suffix.lower() not in EXTENSIONS and file.is_file() and file.resolve() not in taken:
                    skipped.setdefault(file.resolve(), file)
    return list(skipped.values())


def _is_left_out(folder: Path, output: Path) -> bool:
    return folder.name.startswith(".") or folder.resolve() == output.resolve()


def _load_targets(
    batch: Sequence[ImageInput], session: Session, options: FolderOptions, fail: Callable[[Path, str], None]
) -> Iterable[tuple[ImageInput, NDArray[np.uint8]]]:
    for image_input in batch:
        try:
            if options.official_layout:
                check_extension(image_input.path)
            _check_regular(image_input.path)
            yield image_input, resize_image(load_image(image_input.path), session.config.input_shape)
        except ImageError as error:
            fail(image_input.path, str(error))


def _check_regular(path: Path) -> None:
    """Raise `ImageError` for a pipe or a device, which may wait for ever; what is missing is told when it is opened."""
    if path.exists() and not path.is_file():
        raise ImageError(f"{path}: no regular file; save the image in one")


def _invert_batch(
    session: Session,
    loaded: Sequence[tuple[ImageInput, NDArray[np.uint8]]],
    options: FolderOptions,
    fail: Callable[[Path, str], None],
) -> list[tuple[ImageInput, InversionResult]]:
    """Return results per input, [kept, ...]; when a batch is not finite, find out which of its images is not."""
    if not loaded:
        return []
    try:
        result = session.invert(
            np.stack([image for _, image in loaded]),
            steps=options.steps,
            every_step=options.keeps_every_step,
            max_batch=len(loaded),
        )
    except VerificationError as error:
        if len(loaded) == 1:
            fail(loaded[0][0].path, f"{loaded[0][0].path}: {error}")
            return []
        return [pair for item in loaded for pair in _invert_batch(session, [item], options, fail)]
    kept = options.steps if options.keeps_every_step else 1
    images = result.images.reshape(kept, len(loaded), *result.images.shape[-3:])
    latents = result.latents.reshape(kept, len(loaded), *result.latents.shape[-2:])
    return [
        (image_input, InversionResult(images=images[:, index], latents=latents[:, index]))
        for index, (image_input, _) in enumerate(loaded)
    ]


def _image_paths(image_input: ImageInput, output: Path, options: FolderOptions) -> dict[Path, int]:
    """Return each output path with the index of its step among those kept."""
    if options.official_layout:
        return {output / OFFICIAL_FOLDER / str(step) / image_input.name: step for step in range(options.steps)}
    paths = {output / f"{image_input.stem}.png": -1}
    if options.every_step:
        paths |= {output / f"step-{step + 1}" / f"{image_input.stem}.png": step for step in range(options.steps)}
    return paths


def _check_targets(inputs: Sequence[ImageInput], output: Path, options: FolderOptions) -> None:
    sources = {image_input.path.resolve() for image_input in inputs}
    for image_input in inputs:
        for path in _image_paths(image_input, output, options):
            if path.resolve() in sources:
                raise ImageError(f"{path}: the output would overwrite an input; choose another output folder")


def _write_images(
    image_input: ImageInput, images: NDArray[np.float32], output: Path, session: Session, options: FolderOptions
) -> list[Path]:
    """Write [kept, 3, R, R'] as the layout asks; raise `ImageError` where the input's name does not allow it."""
    if options.resized:
        images = pool_images(images, session.config.input_shape)
    paths = _image_paths(image_input, output, options)
    for path, step in paths.items():
        try:
            save_image(path, uint8_from_images(images[step]))
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            raise ImageError(f"{path}: the name of the output would be too long; rename the input") from error
    return list(paths)


def _latent_name(image_input: ImageInput, options: FolderOptions) -> str:
    return image_input.name if options.official_layout else image_input.stem


def _write_latents(latents: dict[str, NDArray[np.float32]], output: Path, options: FolderOptions) -> Path:
    if options.official_layout:
        path = output / OFFICIAL_LATENTS_NAME
        official: Any = np.array({name: list(steps) for name, steps in latents.items()}, dtype=object)
        with replace_when_complete(path) as temporary, temporary.open("wb") as file:
            np.save(file, official, allow_pickle=True)
        return path
    path = output / LATENTS_NAME
    stacked = np.stack([steps if options.every_step else steps[-1] for steps in latents.values()])
    with replace_when_complete(path) as temporary, temporary.open("wb") as file:
        np.savez(file, names=np.array(list(latents)), latents=stacked)
    return path
