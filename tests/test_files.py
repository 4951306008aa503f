"""Files and directories appear complete or not at all."""

import errno
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from restyle_deploy.files import (
    hold_lock,
    locked_working_directory,
    place_directory,
    remove_abandoned_directories,
    replace_directory_when_complete,
    replace_when_complete,
)


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


def fill_disk(error: OSError) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError("1474560 requested and 102400 written"), "cannot be written, is the disk full"),
    ],
)
def test_full_disk_names_the_file_or_the_folder(tmp_path: Path, error: OSError, message: str) -> None:
    writers = {
        tmp_path / "a.txt": replace_when_complete(tmp_path / "a.txt"),
        tmp_path / "bundle": replace_directory_when_complete(tmp_path / "bundle"),
        tmp_path: locked_working_directory(tmp_path),
    }
    for path, writer in writers.items():
        with pytest.raises(OSError, match=message) as caught, writer:
            fill_disk(type(error)(*error.args))
        assert (caught.value.filename, caught.value.errno) == (str(path), errno.ENOSPC)
    assert names_in(tmp_path) == []


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "full", "other"), OSError(errno.EPIPE, "closed"), OSError("of our own")]
)
def test_errors_of_other_files_and_kinds_stay_as_they_are(tmp_path: Path, error: OSError) -> None:
    name = error.filename
    with pytest.raises(OSError, match=str(error.strerror or error)) as caught:  # noqa: SIM117
        with replace_when_complete(tmp_path / "a.txt"):
            fill_disk(error)
    assert caught.value is error
    assert error.filename == name


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


def directory_with(path: Path, content: str) -> Path:
    path.mkdir()
    (path / "a.txt").write_text(content)
    return path


@pytest.mark.parametrize("is_there", [False, True])
def test_directory_takes_its_place_for_the_block_and_after(tmp_path: Path, is_there: bool) -> None:
    new, target = directory_with(tmp_path / "new", "new"), tmp_path / "target"
    if is_there:
        directory_with(target, "old")
    with place_directory(new, target):
        assert (target / "a.txt").read_text() == "new"
    assert (target / "a.txt").read_text() == "new"
    assert names_in(tmp_path) == ["target"]


@pytest.mark.parametrize("is_there", [False, True])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_error_in_the_block_brings_the_old_directory_back(
    tmp_path: Path, is_there: bool, error: type[BaseException]
) -> None:
    new, target = directory_with(tmp_path / "new", "new"), tmp_path / "target"
    if is_there:
        directory_with(target, "old")
    with pytest.raises(error, match="no manifest"), place_directory(new, target):
        raise error("no manifest")
    assert (new / "a.txt").read_text() == "new"
    assert target.exists() is is_there
    if is_there:
        assert (target / "a.txt").read_text() == "old"
    assert names_in(tmp_path) == ["new", "target"][: 1 + is_there]


def test_new_directory_that_is_missing_leaves_the_old_one(tmp_path: Path) -> None:
    target = directory_with(tmp_path / "target", "old")
    with pytest.raises(FileNotFoundError), place_directory(tmp_path / "none", target):
        pass
    assert (target / "a.txt").read_text() == "old"
    assert names_in(tmp_path) == ["target"]


without_locks = pytest.mark.skipif(sys.platform == "win32", reason="there are no such locks")


@without_locks
def test_lock_lets_one_in_at_a_time(tmp_path: Path) -> None:
    inside, order = threading.Event(), []

    def wait_for_the_lock() -> None:
        inside.wait()
        with hold_lock(tmp_path):
            order.append("other")

    other = threading.Thread(target=wait_for_the_lock)
    other.start()
    with hold_lock(tmp_path):
        inside.set()
        other.join(0.2)
        assert other.is_alive()
        order.append("first")
    other.join(10)
    assert order == ["first", "other"]


def test_lock_of_no_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), hold_lock(tmp_path / "none"):
        pass


def test_working_directory_is_hidden_and_removed(tmp_path: Path) -> None:
    with locked_working_directory(tmp_path) as working:
        assert working.parent == tmp_path
        assert working.name.startswith(".")
        (working / "a.txt").write_text("half")
    with pytest.raises(RuntimeError, match="half"), locked_working_directory(tmp_path) as working:
        write_half(working / "a.txt")
    assert names_in(tmp_path) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from restyle_deploy.files import locked_working_directory
with locked_working_directory(Path(sys.argv[1])) as working:
    (working / "a.txt").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@without_locks
def test_directories_of_killed_processes_are_removed_and_no_others(tmp_path: Path) -> None:
    assert subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False).returncode < 0
    (abandoned,) = tmp_path.iterdir()
    directory_with(tmp_path / ".others", "kept")
    directory_with(tmp_path / "engine", "kept")
    (tmp_path / ".building-file").write_text("kept")
    with locked_working_directory(tmp_path) as working:
        remove_abandoned_directories(tmp_path)
        assert working.is_dir()
        assert not abandoned.exists()
    assert names_in(tmp_path) == [".building-file", ".others", "engine"]
