"""Files and directories appear complete or not at all."""

import os
import stat
import sys
from pathlib import Path

import pytest

from restyle_deploy.files import replace_directory_when_complete, replace_when_complete


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_half(path: Path, error: type[BaseException] = RuntimeError) -> None:
    path.write_text("ha")
    raise error("half written")


def test_file_appears_at_the_end_under_its_name(tmp_path: Path) -> None:
    target = tmp_path / "new" / "folder" / "report.json"
    with replace_when_complete(target) as temporary:
        assert temporary.parent == target.parent
        assert temporary.suffix == ".json"
        temporary.write_text("{}")
        assert not target.exists()
    assert target.read_text() == "{}"
    assert names_in(target.parent) == ["report.json"]


def test_file_is_replaced(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    with replace_when_complete(target) as temporary:
        temporary.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"


def test_error_leaves_the_old_file_and_no_temporary_one(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(RuntimeError, match="half"), replace_when_complete(target) as temporary:
        write_half(temporary)
    assert target.read_text() == "old"
    assert names_in(tmp_path) == ["a.txt"]


def test_interrupt_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt, match="half"), replace_when_complete(tmp_path / "a.txt") as temporary:
        write_half(temporary, KeyboardInterrupt)
    assert names_in(tmp_path) == []


def test_nothing_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), replace_when_complete(tmp_path / "a.txt"):
        pass
    assert names_in(tmp_path) == []


def test_directory_in_place_of_the_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(OSError, match=r"a\.txt"), replace_when_complete(tmp_path / "a.txt") as temporary:
        temporary.write_text("new")
    assert names_in(tmp_path) == ["a.txt"]


def test_longest_file_name_can_be_written(tmp_path: Path) -> None:
    target = tmp_path / ("n" * 251 + ".txt")
    with replace_when_complete(target) as temporary:
        temporary.write_text("new")
    assert target.read_text() == "new"


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions and links")
def test_permissions_and_links_are_those_of_a_plain_write(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    (tmp_path / "link").symlink_to("target")
    with replace_when_complete(tmp_path / "link") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "new"
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "target")}
    assert len(modes) == 1


def test_directory_appears_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "new" / "bundle"
    with replace_directory_when_complete(target) as temporary:
        (temporary / "manifest.json").write_text("{}")
        assert not target.exists()
    assert names_in(target) == ["manifest.json"]
    assert names_in(target.parent) == ["bundle"]


def test_directory_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="half"), replace_directory_when_complete(tmp_path / "bundle") as temporary:
        write_half(temporary / "manifest.json")
    assert names_in(tmp_path) == []


def test_existing_directory_is_kept_unless_told(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    target.mkdir()
    with pytest.raises(FileExistsError, match="exists already"), replace_directory_when_complete(target):
        pytest.fail("the check comes before the work")
    assert names_in(tmp_path) == ["bundle"]


def test_directory_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    with pytest.raises(FileExistsError, match="exists already"), replace_directory_when_complete(target):
        target.mkdir()
    assert names_in(tmp_path) == ["bundle"]


def test_existing_directory_is_replaced_when_told(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    target.mkdir()
    (target / "old").write_text("")
    with replace_directory_when_complete(target, overwrite=True) as temporary:
        (temporary / "new").write_text("")
        assert names_in(target) == ["old"]
    assert names_in(target) == ["new"]
    assert names_in(tmp_path) == ["bundle"]


def test_file_in_place_of_the_directory_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "bundle").write_text("mine")
    target = tmp_path / "bundle"
    with (
        pytest.raises(FileExistsError, match="exists already"),
        replace_directory_when_complete(target, overwrite=True),
    ):
        pytest.fail("the check comes before the work")
    assert target.read_text() == "mine"


def test_old_directory_comes_back_when_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "bundle"
    target.mkdir()
    (target / "old").write_text("")
    rename = os.rename
    calls: list[str] = []

    def rename_but_not_second(source: Path, destination: Path) -> None:
        calls.append(source.name)
        if len(calls) == 2:
            raise PermissionError("no")
        rename(source, destination)

    monkeypatch.setattr("restyle_deploy.files.os.rename", rename_but_not_second)
    with pytest.raises(PermissionError), replace_directory_when_complete(target, overwrite=True) as temporary:
        (temporary / "new").write_text("")
    assert names_in(target) == ["old"]
    assert names_in(tmp_path) == ["bundle"]
