"""The video example: frames of all kinds of sources, and each frame started from the one before."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from examples import video
from examples.video import Frame, invert_frames, read_frames, write_frames
from restyle_deploy import Session
from restyle_deploy.errors import ImageError
from restyle_deploy.runtime.images import load_image, resize_image

COUNT = 5


@pytest.fixture(scope="module")
def frames(project_root: Path) -> list[Frame]:
    """A face that moves by a quarter of a pixel from frame to frame."""
    photo = load_image(project_root / "examples" / "photos" / "grace-hopper.png")
    return [resize_image(np.roll(photo, index, axis=1), (64, 64)) for index in range(COUNT)]


@pytest.fixture(scope="module")
def session(project_root: Path) -> Iterator[Session]:
    with Session.open(project_root / "engines" / "demo-faces") as session:
        yield session


@pytest.fixture
def clip(frames: list[Frame], tmp_path: Path) -> Path:
    assert write_frames(tmp_path / "clip.png", frames, frame_ms=40) == COUNT
    return tmp_path / "clip.png"


def errors_of(session: Session, inversions: list[Any], frames: list[Frame]) -> list[float]:
    pairs = zip(inversions, frames, strict=True)
    return [float(np.abs(inversion.images[0].astype(float) - frame).mean()) for inversion, frame in pairs]


def test_a_frame_starts_where_the_one_before_ended(session: Session, frames: list[Frame]) -> None:
    found = list(invert_frames(session, frames, first_steps=3, steps=1))
    previous = None
    for inversion, frame in zip(found, frames, strict=True):
        steps = 3 if previous is None else 1
        previous = session.invert(frame[None], steps=steps, start=previous, image_type="uint8")
        np.testing.assert_array_equal(inversion.latents, previous.latents)
        np.testing.assert_array_equal(inversion.images, previous.images)


def test_one_step_from_the_frame_before_beats_one_from_the_average(session: Session, frames: list[Frame]) -> None:
    warm = errors_of(session, list(invert_frames(session, frames, first_steps=5, steps=1)), frames)
    cold = errors_of(session, [session.invert(frame[None], steps=1, image_type="uint8") for frame in frames], frames)
    assert all(one < 0.95 * other for one, other in zip(warm, cold, strict=True))


def test_frames_are_decoded_one_ahead(session: Session, frames: list[Frame]) -> None:
    taken: list[int] = []

    def decode() -> Iterator[Frame]:
        for index, frame in enumerate(frames):
            taken.append(index)
            yield frame

    inversions = invert_frames(session, decode(), first_steps=1)
    assert taken == []
    next(inversions)
    assert taken == [0, 1]  # the second one is being inverted while the first one's result is used
    assert len(list(inversions)) == COUNT - 1


def test_no_frames_give_no_results(session: Session) -> None:
    assert list(invert_frames(session, [])) == []


def test_an_animation_and_a_folder_give_the_same_frames(clip: Path, frames: list[Frame], tmp_path: Path) -> None:
    assert write_frames(tmp_path / "folder", frames, frame_ms=40) == COUNT
    for source in (clip, tmp_path / "folder"):
        found = list(read_frames(source))
        np.testing.assert_array_equal(np.stack(found), np.stack(frames))


def test_a_video_is_decoded_by_pyav(frames: list[Frame], tmp_path: Path) -> None:
    av = pytest.importorskip("av", reason="PyAV is not installed")
    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    found = np.stack(list(read_frames(tmp_path / "clip.mp4")))
    assert found.shape == (COUNT, 64, 64, 3)
    assert np.abs(found.astype(float) - np.stack(frames)).mean() < 10


def test_a_video_without_pyav_is_refused_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)  # the import fails as if it were not installed
    (tmp_path / "clip.mp4").write_bytes(b"\0\0\0\x18ftypmp42")
    with pytest.raises(ImageError, match="for videos: pip install av"):
        list(read_frames(tmp_path / "clip.mp4"))


def test_a_damaged_animation_is_refused(clip: Path) -> None:
    clip.write_bytes(clip.read_bytes()[:-2000])
    with pytest.raises(ImageError, match=r"clip\.png: cannot be decoded"):
        list(read_frames(clip))


def test_the_command_writes_an_animation(clip: Path, project_root: Path, tmp_path: Path) -> None:
    bundle, output = str(project_root / "engines" / "demo-faces"), tmp_path / "out" / "inverted.gif"
    result = CliRunner().invoke(video.main, [bundle, str(clip), "-o", str(output), "--frames", "3"])
    assert result.exit_code == 0, result.output
    assert result.output == f"3 frames written: {output}\n"
    with Image.open(output) as animation:
        assert (getattr(animation, "n_frames", 1), animation.size) == (3, (64, 64))


def test_an_error_is_one_line(clip: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = CliRunner().invoke(video.main, [str(tmp_path / "empty"), str(clip), "-o", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert result.output.startswith("Error: ")
    assert len(result.output.splitlines()) == 1
