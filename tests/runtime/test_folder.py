"""Files are inverted into a folder: both layouts, the odd names, and files that fail."""

import errno
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from restyle_deploy import InversionResult, Session
from restyle_deploy.errors import ImageError, VerificationError
from restyle_deploy.runtime.folder import FolderOptions, FolderResult, find_skipped, invert_files
from restyle_deploy.runtime.images import load_image, pool_images, resize_image, uint8_from_images
from restyle_deploy.runtime.inputs import ImageInput, find_images
from tests.pictures import write_bad_files, write_picture

Invert = Callable[..., InversionResult]


@pytest.fixture(scope="module")
def session(toy_bundle: Path) -> Iterator[Session]:
    """The toy bundle on the CPU; its `invert` may be replaced by monkeypatch."""
    with Session.open(toy_bundle, threads=1) as session:
        yield session


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of three good images."""
    for seed, name in enumerate(("a.png", "b.jpg", "c.png")):
        write_picture(tmp_path / "photos" / name, seed)
    return tmp_path / "photos"


def run(session: Session, source: Path, output: Path, **options: Any) -> FolderResult:
    return invert_files(session, find_images([source]), output, FolderOptions(**{"steps": 3, **options}))


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def pixels(path: Path) -> NDArray[np.int64]:
    return np.array(Image.open(path)).astype(np.int64)


def expected_result(session: Session, path: Path, steps: int = 3) -> InversionResult:
    image = resize_image(load_image(path), session.config.input_shape)
    return session.invert(image[None], steps=steps, every_step=True)


@pytest.fixture
def asked(session: Session, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, dict[str, Any]]]:
    """What the session was asked for: the number of images, and the options."""
    calls: list[tuple[int, dict[str, Any]]] = []
    invert: Invert = session.invert

    def record(images: NDArray[Any], **options: Any) -> InversionResult:
        calls.append((len(images), options))
        return invert(images, **options)

    monkeypatch.setattr(session, "invert", record)
    return calls


def test_an_image_each_and_the_latents_are_written(session: Session, photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "out"
    result = run(session, photos, output)
    assert files_in(output) == {"a.png", "b.png", "c.png", "latents.npz"}
    images = tuple(output / f"{name}.png" for name in "abc")
    latents = output / "latents.npz"
    assert result == FolderResult(names=("a", "b", "c"), images=images, failures=(), latents=latents)
    with np.load(output / "latents.npz", allow_pickle=False) as arrays:
        assert set(arrays.files) == {"names", "latents"}
        names, latents = arrays["names"].tolist(), arrays["latents"]
    assert names == ["a", "b", "c"]
    assert latents.dtype == np.float32
    assert latents.shape == (3, session.config.n_styles, session.config.style_dim)
    for index, name in enumerate(("a.png", "b.jpg", "c.png")):
        expected = expected_result(session, photos / name)
        np.testing.assert_allclose(latents[index], expected.latents[-1, 0], atol=1e-5)
        image = pixels(output / f"{Path(name).stem}.png")
        assert image.shape == (*session.config.image_shape, 3)
        assert np.abs(image - uint8_from_images(expected.images[-1, 0])).max() <= 1


def test_every_step_is_written(session: Session, photos: Path, tmp_path: Path) -> None:
    run(session, photos, tmp_path / "out", every_step=True)
    stems = {"a", "b", "c"}
    images = {f"{stem}.png" for stem in stems} | {f"step-{k}/{stem}.png" for stem in stems for k in (1, 2, 3)}
    assert files_in(tmp_path / "out") == images | {"latents.npz"}
    with np.load(tmp_path / "out" / "latents.npz") as arrays:
        assert arrays["latents"].shape == (3, 3, session.config.n_styles, session.config.style_dim)
        np.testing.assert_allclose(
            arrays["latents"][0], expected_result(session, photos / "a.png").latents[:, 0], atol=1e-5
        )
    for step in (1, 2, 3):
        expected = expected_result(session, photos / "a.png").images[step - 1, 0]
        image = pixels(tmp_path / "out" / f"step-{step}" / "a.png")
        assert np.abs(image - uint8_from_images(expected)).max() <= 1
    last, final = tmp_path / "out" / "step-3" / "a.png", tmp_path / "out" / "a.png"
    assert last.read_bytes() == final.read_bytes()


def test_official_layout_is_upstreams(session: Session, photos: Path, tmp_path: Path) -> None:
    result = run(session, photos, tmp_path / "out", official_layout=True)
    names = ("a.png", "b.jpg", "c.png")
    images = {f"inference_results/{step}/{name}" for step in (0, 1, 2) for name in names}
    assert files_in(tmp_path / "out") == images | {"latents.npy"}
    assert (result.names, result.latents) == (names, tmp_path / "out" / "latents.npy")
    latents = np.load(tmp_path / "out" / "latents.npy", allow_pickle=True).item()  # as upstream's scripts read it
    assert type(latents) is dict
    assert tuple(latents) == names
    for name in names:
        assert type(latents[name]) is list
        expected = expected_result(session, photos / name)
        for latent, other in zip(latents[name], expected.latents[:, 0], strict=True):
            assert (latent.shape, latent.dtype) == ((session.config.n_styles, session.config.style_dim), np.float32)
            np.testing.assert_allclose(latent, other, atol=1e-5)
    for step, image in enumerate(expected.images[:, 0]):
        saved = pixels(tmp_path / "out" / "inference_results" / str(step) / "c.png")
        assert np.abs(saved - uint8_from_images(image)).max() <= 1
    with Image.open(tmp_path / "out" / "inference_results" / "0" / "b.jpg") as jpeg:
        assert (jpeg.format, jpeg.size) == ("JPEG", session.config.image_shape[::-1])


@pytest.mark.parametrize("layout", [{}, {"every_step": True}, {"official_layout": True}])
def test_resized_images_have_the_encoders_size(
    session: Session, photos: Path, tmp_path: Path, layout: dict[str, bool]
) -> None:
    run(session, photos, tmp_path / "out", resized=True, **layout)
    images = [path for path in (tmp_path / "out").rglob("*") if path.suffix in (".png", ".jpg")]
    assert images
    assert {pixels(path).shape for path in images} == {(*session.config.input_shape, 3)}


def test_resized_images_are_pooled_before_they_become_bytes(session: Session, photos: Path, tmp_path: Path) -> None:
    result = run(session, photos, tmp_path / "out", steps=3, resized=True)
    assert result.images == tuple(tmp_path / "out" / f"{name}.png" for name in "abc")
    image = expected_result(session, photos / "a.png").images[-1]
    pooled = pool_images(image, session.config.input_shape)
    np.testing.assert_array_equal(pixels(tmp_path / "out" / "a.png"), uint8_from_images(pooled)[0])


@pytest.mark.parametrize("layout", [{}, {"every_step": True}, {"official_layout": True}])
def test_batches_change_no_result(
    session: Session,
    photos: Path,
    tmp_path: Path,
    asked: list[tuple[int, dict[str, Any]]],
    layout: dict[str, bool],
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    run(session, photos, one, batch_size=1, **layout)
    assert [count for count, _ in asked] == [1, 1, 1]
    asked.clear()
    result = run(session, photos, two, batch_size=2, **layout)
    assert [count for count, _ in asked] == [2, 1]
    assert files_in(one) == files_in(two)
    for name in files_in(one):
        if name.endswith(".png"):
            assert np.abs(pixels(one / name) - pixels(two / name)).max() <= 1
    assert result.latents is not None
    if result.latents.suffix == ".npz":
        found, expected = (np.load(folder / "latents.npz")["latents"] for folder in (two, one))
    else:
        found, expected = (
            np.array(list(np.load(folder / "latents.npy", allow_pickle=True).item().values())) for folder in (two, one)
        )
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("layout", "kept"), [({}, False), ({"every_step": True}, True), ({"official_layout": True}, True)]
)
def test_steps_are_kept_only_where_they_are_written(
    session: Session,
    photos: Path,
    tmp_path: Path,
    asked: list[tuple[int, dict[str, Any]]],
    layout: dict[str, bool],
    kept: bool,
) -> None:
    run(session, photos, tmp_path / "out", steps=4, batch_size=3, **layout)
    assert asked == [(3, {"steps": 4, "every_step": kept, "max_batch": 3})]


def test_a_second_run_replaces_the_first(session: Session, photos: Path, tmp_path: Path) -> None:
    run(session, photos, tmp_path / "out", steps=1)
    first = (tmp_path / "out" / "a.png").read_bytes()
    run(session, photos, tmp_path / "out", steps=2)
    assert (tmp_path / "out" / "a.png").read_bytes() != first
    assert files_in(tmp_path / "out") == {"a.png", "b.png", "c.png", "latents.npz"}


# Names


def test_same_names_in_two_folders_do_not_overwrite_each_other(session: Session, tmp_path: Path) -> None:
    for seed, folder in enumerate(("first", "second")):
        write_picture(tmp_path / "in" / folder / "x.png", seed)
    result = run(session, tmp_path / "in", tmp_path / "out")
    assert result.names == ("first_x", "second_x")
    assert files_in(tmp_path / "out") == {"first_x.png", "second_x.png", "latents.npz"}
    assert (pixels(tmp_path / "out" / "first_x.png") != pixels(tmp_path / "out" / "second_x.png")).any()
    run(session, tmp_path / "in", tmp_path / "official", official_layout=True, steps=1)
    images = {"inference_results/0/first_x.png", "inference_results/0/second_x.png"}
    assert files_in(tmp_path / "official") == images | {"latents.npy"}


UNUSUAL_NAMES = ["with space", "a\nb", "%s {0}", "ümläut", "写真", "-o", "quote'\"", "a.b.c", "🙂"]
if sys.platform == "linux":  # elsewhere names are text
    UNUSUAL_NAMES.append(os.fsdecode(b"\xff\xfe"))


def test_unusual_names_are_kept(session: Session, tmp_path: Path) -> None:
    for seed, name in enumerate(UNUSUAL_NAMES):
        write_picture(tmp_path / "in" / f"{name}.png", seed)
    result = run(session, tmp_path / "in", tmp_path / "out", steps=1)
    assert sorted(result.names) == sorted(UNUSUAL_NAMES)
    assert files_in(tmp_path / "out") == {f"{name}.png" for name in UNUSUAL_NAMES} | {"latents.npz"}
    with np.load(tmp_path / "out" / "latents.npz", allow_pickle=False) as arrays:
        assert arrays["names"].tolist() == list(result.names)
    official = run(session, tmp_path / "in", tmp_path / "official", steps=1, official_layout=True)
    assert sorted(official.names) == sorted(f"{name}.png" for name in UNUSUAL_NAMES)
    assert np.load(tmp_path / "official" / "latents.npy", allow_pickle=True).item().keys() == set(official.names)


def test_longest_names_are_kept(session: Session, tmp_path: Path) -> None:
    name = "x" * (255 - len(".png"))
    write_picture(tmp_path / "in" / f"{name}.png")
    assert run(session, tmp_path / "in", tmp_path / "out", steps=1).names == (name,)
    assert f"{name}.png" in files_in(tmp_path / "out")


def test_name_that_is_too_long_for_the_output_is_reported_and_the_others_go_on(
    session: Session, tmp_path: Path
) -> None:
    inputs = [write_picture(tmp_path / "x", 0).rename(tmp_path / ("x" * 254)), write_picture(tmp_path / "y.png", 1)]
    result = invert_files(session, find_images(inputs), tmp_path / "out", FolderOptions(steps=1))
    assert result.names == ("y",)
    (path, reason) = result.failures[0]
    assert path == inputs[0]
    assert reason.startswith(f"{inputs[0]}: ")
    assert "the name of the output would be too long; rename the input" in reason
    assert files_in(tmp_path / "out") == {"y.png", "latents.npz"}


def test_name_that_upstreams_layout_cannot_keep_is_reported_and_the_others_go_on(
    session: Session, tmp_path: Path
) -> None:
    inputs = [write_picture(tmp_path / "noextension", 0), write_picture(tmp_path / "y.png", 1)]
    options = FolderOptions(steps=2, official_layout=True, batch_size=2)
    result = invert_files(session, find_images(inputs), tmp_path / "out", options)
    assert result.names == ("y.png",)
    assert result.failures[0][0] == inputs[0]
    assert "cannot write images with the extension ''" in result.failures[0][1]
    assert files_in(tmp_path / "out") == {f"inference_results/{k}/y.png" for k in (0, 1)} | {"latents.npy"}
    assert invert_files(session, find_images(inputs), tmp_path / "plain", FolderOptions(steps=1)).failures == ()


def test_output_that_would_overwrite_an_input_is_refused(session: Session, photos: Path) -> None:
    before = {name: (photos / name).read_bytes() for name in files_in(photos)}
    with pytest.raises(ImageError, match=r"a\.png: the output would overwrite an input; choose another output folder"):
        run(session, photos, photos)
    assert {name: (photos / name).read_bytes() for name in files_in(photos)} == before


def test_output_that_would_overwrite_an_input_through_a_link_is_refused(
    session: Session, photos: Path, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(photos)
    with pytest.raises(ImageError, match="would overwrite an input"):
        run(session, photos, tmp_path / "link")
    (photos / "inference_results").mkdir()
    (photos / "inference_results" / "1").symlink_to(photos)
    with pytest.raises(ImageError, match="would overwrite an input"):
        invert_files(session, find_images([photos / "a.png"]), photos, FolderOptions(official_layout=True))


def test_folder_of_the_inputs_may_take_other_outputs(session: Session, photos: Path) -> None:
    run(session, photos / "b.jpg", photos)
    assert files_in(photos) == {"a.png", "b.jpg", "b.png", "c.png", "latents.npz"}


# Failures


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_bad_files_are_reported_and_the_others_go_on(
    session: Session, photos: Path, tmp_path: Path, batch_size: int
) -> None:
    bad = write_bad_files(photos)
    reported: list[tuple[Path, str]] = []
    finished: list[int] = []
    inputs = find_images([photos])
    result = invert_files(
        session,
        inputs,
        tmp_path / "out",
        FolderOptions(steps=1, batch_size=batch_size),
        progress=finished.append,
        report_failure=lambda path, reason: reported.append((path, reason)),
    )
    assert result.names == ("a", "b", "c")
    assert sorted(path for path, _ in result.failures) == sorted(bad)
    assert reported == list(result.failures)
    assert all(reason.startswith(f"{path}: ") for path, reason in reported)
    assert sum(finished) == len(inputs) == 7
    assert files_in(tmp_path / "out") == {"a.png", "b.png", "c.png", "latents.npz"}


def test_nothing_is_written_where_all_fail(session: Session, tmp_path: Path) -> None:
    write_bad_files(tmp_path / "in")
    result = run(session, tmp_path / "in", tmp_path / "out", batch_size=3)
    assert (result.names, result.latents, len(result.failures)) == ((), None, 4)
    assert files_in(tmp_path) == {f"in/{name}" for name in ("empty.png", "huge.png", "text.jpg", "truncated.png")}


def test_no_inputs_write_nothing(session: Session, tmp_path: Path) -> None:
    result = invert_files(session, [], tmp_path / "out", FolderOptions())
    assert result == FolderResult(names=(), images=(), failures=(), latents=None)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with names")
def test_pipe_is_refused_and_the_others_go_on(session: Session, photos: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    inputs = find_images([tmp_path / "pipe.png", photos / "a.png"])
    result = invert_files(session, inputs, tmp_path / "out", FolderOptions(steps=1, batch_size=2))
    assert result.names == ("a",)
    reason = f"{tmp_path / 'pipe.png'}: no regular file; save the image in one"
    assert result.failures == ((tmp_path / "pipe.png", reason),)


def test_first_frame_of_an_animation_is_taken(session: Session, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (40, 50), colour) for colour in ("white", "black")]
    frames[0].save(tmp_path / "both.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "first.gif")
    inputs = find_images([tmp_path / "both.gif", tmp_path / "first.gif"])
    invert_files(session, inputs, tmp_path / "out", FolderOptions(steps=1))
    np.testing.assert_array_equal(pixels(tmp_path / "out" / "both.png"), pixels(tmp_path / "out" / "first.png"))


def test_files_that_are_passed_over_are_those_of_folders_with_other_extensions(tmp_path: Path) -> None:
    for name in ("a.png", "b.txt", "c.txt", "s/d", "s/.e.txt", ".s/f.txt", "out/latents.npz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    paths = [tmp_path, tmp_path / "s", tmp_path / "c.txt"]
    inputs = find_images([tmp_path, tmp_path / "c.txt"], output=tmp_path / "out")
    skipped = find_skipped(paths, inputs, output=tmp_path / "out")
    assert sorted(skipped) == [tmp_path / "b.txt", tmp_path / "s" / "d"]
    assert find_skipped([tmp_path / "c.txt"], inputs, output=tmp_path / "out") == []


def test_file_that_vanishes_is_reported(session: Session, photos: Path, tmp_path: Path) -> None:
    inputs = find_images([photos])
    (photos / "b.jpg").unlink()
    result = invert_files(session, inputs, tmp_path / "out", FolderOptions(steps=1))
    assert result.names == ("a", "c")
    assert "No such file" in result.failures[0][1]


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_image_whose_result_is_not_finite_is_named_and_the_others_go_on(
    session: Session, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_size: int
) -> None:
    Image.new("RGB", (40, 50), "white").save(photos / "b.jpg")
    invert: Invert = session.invert

    def refuse_white(images: NDArray[np.uint8], **options: Any) -> InversionResult:
        white = (images == 255).all(axis=(1, 2, 3))
        if white.any():
            raise VerificationError(f"the latent of image {np.argmax(white)} is not finite after step 1")
        return invert(images, **options)

    monkeypatch.setattr(session, "invert", refuse_white)
    result = run(session, photos, tmp_path / "out", batch_size=batch_size)
    assert result.names == ("a", "c")
    assert result.failures == (
        (photos / "b.jpg", f"{photos / 'b.jpg'}: the latent of image 0 is not finite after step 1"),
    )
    assert files_in(tmp_path / "out") == {"a.png", "c.png", "latents.npz"}


def test_output_that_cannot_be_written_ends_the_run(session: Session, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        run(session, photos, tmp_path / "file")
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_interrupted_run_leaves_whole_files_only(
    session: Session, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    save = Image.Image.save

    def save_the_first_only(image: Image.Image, path: Path, **options: Any) -> None:
        save(image, path, **options)
        if files_in(tmp_path / "out") & {"a.png"}:
            path.write_bytes(path.read_bytes()[:10])
            raise error

    monkeypatch.setattr(Image.Image, "save", save_the_first_only)
    with pytest.raises(type(error)):
        run(session, photos, tmp_path / "out")
    assert files_in(tmp_path / "out") == {"a.png", "latents.npz"}
    assert pixels(tmp_path / "out" / "a.png").shape == (*session.config.image_shape, 3)


def test_interrupt_between_batches_leaves_whole_files_only(session: Session, photos: Path, tmp_path: Path) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    inputs: list[ImageInput] = find_images([photos])
    with pytest.raises(KeyboardInterrupt):
        invert_files(session, inputs, tmp_path / "out", FolderOptions(steps=1, batch_size=2), progress=interrupt)
    assert files_in(tmp_path / "out") == {"a.png", "b.png", "latents.npz"}
    with np.load(tmp_path / "out" / "latents.npz") as latents:
        assert latents["names"].tolist() == ["a", "b"]
