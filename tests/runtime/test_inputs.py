"""Which files are taken as inputs, and how their outputs are named."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from restyle_deploy.errors import ImageError
from restyle_deploy.runtime.inputs import find_images


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


def test_folders_are_walked_sorted_and_by_extension(tmp_path: Path) -> None:
    touch(tmp_path, "b/2.PNG", "b/c/1.jpeg", "a.TIF", "notes.txt", "b/.hidden.png", ".cache/1.png", "z.webp")
    images = find_images([tmp_path])
    assert [str(image.path.relative_to(tmp_path)) for image in images] == ["a.TIF", "b/2.PNG", "b/c/1.jpeg", "z.webp"]
    assert [image.name for image in images] == ["a.TIF", "2.PNG", "1.jpeg", "z.webp"]
    assert [image.stem for image in images] == ["a", "2", "1", "z"]


def test_files_are_taken_as_they_are_in_the_order_given(tmp_path: Path) -> None:
    touch(tmp_path, "b.dat", "a.png")
    images = find_images([tmp_path / "b.dat", tmp_path / "a.png"])
    assert [image.name for image in images] == ["b.dat", "a.png"]


def test_same_file_is_taken_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "a/x.png")
    (tmp_path / "link.png").symlink_to("a/x.png")
    monkeypatch.chdir(tmp_path)
    images = find_images([Path("link.png"), Path("a"), Path("a/../a/x.png")])
    assert [(image.path, image.name) for image in images] == [(Path("link.png"), "link.png")]


@pytest.mark.parametrize(
    ("files", "names", "stems"),
    [
        (["a/x.jpg", "b/x.jpg"], ["a_x.jpg", "b_x.jpg"], ["a_x", "b_x"]),
        (["a/x.jpg", "b/X.JPG"], ["a_x.jpg", "b_X.JPG"], ["a_x", "b_X"]),
        (["a/s/x.jpg", "b/s/x.jpg"], ["a_s_x.jpg", "b_s_x.jpg"], ["a_s_x", "b_s_x"]),
        (["a/x.jpg", "b/x.jpg", "c/y.jpg"], ["a_x.jpg", "b_x.jpg", "y.jpg"], ["a_x", "b_x", "y"]),
        (["x.jpg", "x.png"], ["x.jpg", "x.png"], ["x_jpg", "x_png"]),
        (["x.jpg", "x.png", "x_jpg.bmp"], ["x.jpg", "x.png", "x_jpg.bmp"], ["x_jpg", "x_png", "x_jpg_bmp"]),
        (["a/x.jpg", "b/x.jpg", "c/a_x.jpg"], ["t_a_x.jpg", "b_x.jpg", "c_a_x.jpg"], ["t_a_x", "b_x", "c_a_x"]),
        (["a/b/x.jpg", "a_b/x.jpg"], ["x.jpg", "x_2.jpg"], ["x", "x_2"]),
        (["x.jpg", "X.jpg", "x_2.jpg"], ["x.jpg", "X_3.jpg", "x_2.jpg"], ["x", "X_3", "x_2"]),
    ],
)
def test_names_that_agree_are_told_apart(tmp_path: Path, files: list[str], names: list[str], stems: list[str]) -> None:
    touch(tmp_path / "t", *files)
    if len({path for path in (tmp_path / "t").rglob("*") if path.is_file()}) < len(files):
        pytest.skip("file names here do not depend on the case")
    images = find_images([tmp_path / "t" / file for file in files])
    assert [image.name for image in images] == names
    assert [image.stem for image in images] == stems


@given(st.lists(st.lists(st.sampled_from(["a", "B", "b", "a_b", "x.png", "X.jpg", "a_x.png"]), min_size=1, max_size=4)))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_names_and_stems_are_unique_whatever_the_case(tmp_path: Path, paths: list[list[str]]) -> None:
    files = [tmp_path.joinpath(*parts[:-1], f"f{parts[-1]}") for parts in paths]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"")
    images = find_images(files)
    assert len({image.name.casefold() for image in images}) == len(images) == len(set(files))
    assert len({image.stem.casefold() for image in images}) == len(images)


def test_missing_paths_and_folders_without_images_are_all_named(tmp_path: Path) -> None:
    touch(tmp_path, "empty/notes.txt")
    with pytest.raises(ImageError, match=r"gone.*no such file.*; .*empty.*no images"):
        find_images([tmp_path / "gone.png", tmp_path / "empty"])


def test_results_below_the_inputs_are_not_taken_for_inputs(tmp_path: Path) -> None:
    for name in ("a.png", "out/a.png", "out/step-1/a.png", "kept/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    found = find_images([tmp_path], output=tmp_path / "out")
    assert [image_input.path for image_input in found] == [tmp_path / "a.png", tmp_path / "kept" / "b.png"]
    assert len(find_images([tmp_path])) == 4
    assert len(find_images([tmp_path / "out"], output=tmp_path / "out")) == 2


def test_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.png").touch()
    scandir = os.scandir

    def refuse(path: str) -> Any:
        if Path(path).name == "closed":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ImageError, match="closed: this folder cannot be read: Permission denied"):
        find_images([tmp_path])
