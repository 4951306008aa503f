"""Files and directories that appear under their final name only once they are complete; locks; the hash of a file."""

import errno
import hashlib
import os
import re
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

if sys.platform != "win32":
    import fcntl

# What writing says of a disk that is full, over its quota or broken, without the name of a file.
_DISK_ERRORS = frozenset({errno.ENOSPC, errno.EFBIG, errno.EIO, *([errno.EDQUOT] if hasattr(errno, "EDQUOT") else [])})
# What NumPy says where the system has not written all of an array; it leaves out why.
_CUT_SHORT = re.compile(r"\d+ requested and \d+ written")
_WORKING_PREFIX = ".building-"
_PART_PREFIX = ".part-"


@contextmanager
def replace_when_complete(path: Path) -> Iterator[Path]:
    """Yield a temporary name in the same folder; rename it to `path` on success, remove it after an error.

    The temporary name is hidden and has the suffix of `path`, so that writers which go by the suffix behave alike.
    Missing parent folders are created; a file that exists is replaced; a link is followed.

    Raises:
        OSError: the folder or the file cannot be written, or nothing was written under the temporary name; where the
            disk is full, with the name `path`.
    """
    target = path.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _hidden_sibling(target, target.suffix)
    try:
        with _named_disk_errors(path):
            yield temporary
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replace_directory_when_complete(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a new directory next to `path`; rename it to `path` on success, remove it with its content after an error.

    Args:
        path: the final name; missing parent folders are created; a link is followed.
        overwrite: replace what is there. It is moved aside first, and comes back if the new directory cannot take its
            place. The caller decides whether it may be lost.
    Raises:
        FileExistsError: `path` exists and `overwrite` is false; checked first and once more before the renaming.
        OSError: the directory cannot be written; where the disk is full, with the name `path`.
    """
    target = path.resolve()
    _check_replaceable(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _hidden_sibling(target)
    temporary.mkdir()
    try:
        with _named_disk_errors(path):
            yield temporary
        _check_replaceable(target, overwrite)
        with place_directory(temporary, target):
            pass
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def place_directory(new: Path, target: Path) -> Iterator[None]:
    """Put the directory `new` in the place of `target`; after an error in the block, what was there comes back.

    The old directory waits under a hidden name beside `target` until the block has ended. After an error `new` is where
    it was.

    Args:
        new: on the same file system as `target`.
        target: a directory, which is replaced, or nothing.
    Raises:
        OSError: a directory cannot be renamed.
    """
    old = _hidden_sibling(target)
    try:
        if target.exists():
            os.rename(target, old)
        os.rename(new, target)
        yield
    except BaseException:
        if target.exists() and not new.exists():
            os.rename(target, new)
        if old.exists():
            os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def hold_lock(directory: Path) -> Iterator[None]:
    """Wait until no other process or thread is in such a block for this directory.

    The system lets go of the lock when a process ends, however it does. Where it has no such locks (Windows), this does
    nothing.

    Raises:
        OSError: there is no such directory.
    """
    with _lock(directory, waits=True):
        yield


@contextmanager
def locked_working_directory(parent: Path) -> Iterator[Path]:
    """Yield a new hidden directory in `parent`, locked; it is removed in the end, whatever has become of it.

    `remove_abandoned_directories` takes it away when this process is killed. An `OSError` of the block that
    says that the disk is full has the name `parent`.
    """
    working = Path(tempfile.mkdtemp(dir=parent, prefix=_WORKING_PREFIX))
    try:
        with hold_lock(working), _named_disk_errors(parent):
            yield working
    finally:
        shutil.rmtree(working, ignore_errors=True)


def remove_abandoned_directories(parent: Path) -> None:
    """Remove the hidden directories in `parent` whose processes were killed: nobody holds their locks."""
    for path in parent.iterdir():
        if path.is_dir() and not path.is_symlink() and path.name.startswith((_WORKING_PREFIX, _PART_PREFIX)):
            with _lock(path, waits=False) as is_abandoned:
                if is_abandoned:
                    shutil.rmtree(path, ignore_errors=True)


def sha256_of_file(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file; it is read in blocks, never as a whole."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def _named_disk_errors(path: Path) -> Iterator[None]:
    """Add to an `OSError` of the block that names no file, and says that the disk is full or broken, this name."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno in _DISK_ERRORS:
            error.filename = str(path)
        if error.errno is None and _CUT_SHORT.match(str(error)):
            raise OSError(errno.ENOSPC, f"cannot be written, is the disk full? ({error})", str(path)) from error
        raise


def _hidden_sibling(target: Path, suffix: str = "") -> Path:
    return target.with_name(f"{_PART_PREFIX}{secrets.token_hex(8)}{suffix}")


def _check_replaceable(target: Path, overwrite: bool) -> None:
    if target.is_dir() and overwrite:
        return
    if target.exists():
        raise FileExistsError(errno.EEXIST, "exists already and is not replaced", str(target))


@contextmanager
def _lock(directory: Path, *, waits: bool) -> Iterator[bool]:
    """Yield whether the directory's lock is held; let go of it in the end."""
    if sys.platform == "win32":
        yield waits
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        is_held = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if waits else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            is_held = False
        yield is_held
    finally:
        os.close(descriptor)
