"""Invert a video, each frame from where the one before ended, which takes fewer steps than from the average.

    python -m examples.video engines/demo-faces clip.mp4 -o inverted.gif

Takes a folder of images (in the order of their names), an animation that Pillow reads (GIF, WebP, PNG), or, with PyAV
installed (pip install av), any video. Frames are to be aligned like the model's training images. While one frame is
inverted, the next one is decoded and the last one goes on: into the folder, or to the frames of an animation, which are
kept and written at the end.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageSequence, UnidentifiedImageError

from restyle_deploy import Session
from restyle_deploy.errors import ImageError, RestyleDeployError
from restyle_deploy.runtime.images import check_extension, load_image, save_image
from restyle_deploy.runtime.inputs import find_images
from restyle_deploy.runtime.results import Inversion, InversionResult, PendingInversion

Frame = NDArray[np.uint8]
ANIMATIONS = ("GIF", "PNG", "WEBP")
DEFAULT_MS = 40


def read_frames(path: Path) -> Iterator[Frame]:
    """Yield the frames of a folder, an animation or a video: uint8 [H, W, 3], one at a time.

    Raises:
        ImageError: it cannot be read, or only by PyAV, which is not installed.
    """
    if path.is_dir():
        for image in find_images([path]):
            yield load_image(image.path)
        return
    try:
        with Image.open(path, formats=ANIMATIONS) as animation:
            for picture in ImageSequence.Iterator(animation):
                yield np.array(picture.convert("RGB"))
    except UnidentifiedImageError:
        yield from _decode_video(path)
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow's decoders raise for damaged content
        raise ImageError(f"{path}: cannot be decoded: {error}") from error


def invert_frames(
    session: Session, frames: Iterable[Frame], *, first_steps: int | None = None, steps: int = 1
) -> Iterator[InversionResult]:
    """Yield each frame's inversion, uint8 images [1, R, R', 3], started from the one before.

    Args:
        session: where all frames are inverted, one after the other.
        frames: of one scene; what follows a cut wants a new beginning.
        first_steps: of the first frame, which starts from the average; None for the session's.
        steps: of the others.
    """
    pending: PendingInversion[Inversion] | None = None
    previous: InversionResult | None = None
    for frame in frames:
        if pending is not None:
            previous = _on_host(pending.result())
        pending = session.invert_async(
            frame[None],
            steps=first_steps if previous is None else steps,
            start=previous,
            image_type="uint8",
        )
        if previous is not None:
            yield previous  # whoever takes it works while the next one is inverted
    if pending is not None:
        yield _on_host(pending.result())


def write_frames(path: Path, frames: Iterable[Frame], *, frame_ms: int) -> int:
    """Write an animation, or a folder of PNG files where the path has no extension; return the number of frames."""
    if not path.suffix:
        count = 0
        for count, frame in enumerate(frames, start=1):
            save_image(path / f"{count:06d}.png", frame)
        return count
    check_extension(path)
    pictures = [Image.fromarray(frame) for frame in frames]
    if pictures:
        path.parent.mkdir(parents=True, exist_ok=True)
        pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=frame_ms, loop=0)
    return len(pictures)


def _decode_video(path: Path) -> Iterator[Frame]:
    try:
        import av
    except ModuleNotFoundError as error:
        raise ImageError(f"{path}: no animation that Pillow reads; for videos: pip install av") from error
    try:
        with av.open(str(path)) as container:
            for frame in container.decode(video=0):
                yield frame.to_ndarray(format="rgb24").astype(np.uint8, copy=False)
    except (av.error.FFmpegError, IndexError) as error:  # IndexError: it has sound alone
        raise ImageError(f"{path}: cannot be decoded: {error}") from error


def _on_host(inversion: Inversion) -> InversionResult:
    assert isinstance(inversion, InversionResult)  # as its frame was
    return inversion


@click.command(help=__doc__)
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.argument("video", type=click.Path(exists=True, path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Animation, or folder.")
@click.option("--backend", help="A row of restyle_deploy.backends.BACKENDS.")
@click.option("--device", help="cpu, or cuda:0 and so on.")
@click.option("--first-steps", default=5, show_default=True, type=click.IntRange(min=1), help="Of the first frame.")
@click.option("--steps", default=1, show_default=True, type=click.IntRange(min=1), help="Of each other frame.")
@click.option("--frames", type=click.IntRange(min=1), show_default="all", help="Stop after so many.")
@click.option("--frame-ms", default=DEFAULT_MS, show_default=True, type=click.IntRange(min=1), help="In animations.")
def main(
    bundle: Path,
    video: Path,
    output: Path,
    backend: str | None,
    device: str | None,
    first_steps: int,
    steps: int,
    frames: int | None,
    frame_ms: int,
) -> None:
    """Write the inverted frames."""
    try:
        with Session.open(bundle, backend=backend, device=device) as session:
            inversions = invert_frames(
                session, islice(read_frames(video), frames), first_steps=first_steps, steps=steps
            )
            count = write_frames(output, (inversion.images[0] for inversion in inversions), frame_ms=frame_ms)
    except RestyleDeployError as error:
        raise click.ClickException(str(error)) from None
    click.echo(f"{count} frames written: {output}")


if __name__ == "__main__":
    main()
